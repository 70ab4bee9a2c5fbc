// Implicit-GEMM convolution with a fused epilogue: y = relu(conv2d(x, w) + bias + residual), channels_last.
// Rows of the product are output pixels, columns output channels; k runs over filter rows, runs and their elements.
// Source: NVIDIA CUTLASS documentation, "Implicit GEMM convolution" (the method; no code of it is used).
#pragma once

#include <type_traits>

#include "conv2d_loader.cuh"
#include "conv2d_math.cuh"
#include "conv2d_params.h"
#include "epilogue.cuh"
#include "ptx.cuh"

namespace resnet_fused {

template <class Tile>
using Math = std::conditional_t<Tile::ELEMENT == ElementType::float32, FmaMath<Tile>, TensorMath<Tile>>;

// acc += the product over `steps` steps, STAGES - 1 of them ahead in flight. Fragments are read one mma step ahead.
template <class Tile>
__device__ __forceinline__ void accumulate_async(Accumulators<Tile>& acc, TileLoader<Tile>& loader, const Math<Tile>& math,
                                                 uint32_t pipeline, int steps) {
  constexpr uint32_t LAST = (Tile::STAGES - 1) * Tile::STAGE_BYTES;
  typename Math<Tile>::Fragments fragments[2];
  ptx::cp_async_wait<Tile::STAGES - 2>();
  __syncthreads();
  math.read(fragments[0], pipeline, 0);
  uint32_t read_stage = 0, write_stage = LAST;
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int k = 0; k < Math<Tile>::STEPS; ++k) {
      if (k + 1 < Math<Tile>::STEPS) {
        math.read(fragments[(k + 1) % 2], pipeline + read_stage, k + 1);
      } else {  // the next step's tiles: landed for this thread after the wait, for all after the barrier
        ptx::cp_async_wait<Tile::STAGES - 2>();
        __syncthreads();
        read_stage = read_stage == LAST ? 0 : read_stage + Tile::STAGE_BYTES;
        math.read(fragments[(k + 1) % 2], pipeline + read_stage, 0);
      }
      if (k == 0) {  // into the stage that every warp left before the last barrier
        loader.load(pipeline + write_stage);
        write_stage = write_stage == LAST ? 0 : write_stage + Tile::STAGE_BYTES;
      }
      Math<Tile>::multiply(acc, fragments[k % 2]);
    }
  }
  ptx::cp_async_wait<0>();
}

// The same with two stages and the next step's chunks in registers.
template <class Tile>
__device__ __forceinline__ void accumulate_through_registers(Accumulators<Tile>& acc, TileLoader<Tile>& loader,
                                                             const Math<Tile>& math, uint32_t pipeline, int steps) {
  typename Math<Tile>::Fragments fragments;
  uint32_t stage = 0;
  loader.fetch();
  loader.put(pipeline);
  for (int step = 0; step < steps; ++step) {
    __syncthreads();
    loader.fetch();  // zeros after the last step
#pragma unroll
    for (int k = 0; k < Math<Tile>::STEPS; ++k) {
      math.read(fragments, pipeline + stage, k);
      Math<Tile>::multiply(acc, fragments);
    }
    stage ^= Tile::STAGE_BYTES;
    loader.put(pipeline + stage);
  }
}

template <class Tile>
__device__ __forceinline__ void conv2d_fwd(const Conv2dParams& p, unsigned char* shared) {
  using TileEpilogue = Epilogue<typename Tile::T, Tile::WARP_N>;
  static_assert(Tile::THREADS / 32 * TileEpilogue::STRIP_BYTES <= Tile::SHARED_BYTES, "the strips reuse the pipeline's memory");
  const int tile_m = blockIdx.x >> p.group_shift;
  const int tile_n = (blockIdx.y << p.group_shift) + (blockIdx.x & ((1 << p.group_shift) - 1));
  if (tile_n >= p.tiles_n) return;
  const int first_step = blockIdx.z * p.steps_per_split;
  const int steps = min(p.steps_per_split, p.steps - first_step);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp % Tile::WARPS_M, warp_n = warp / Tile::WARPS_M;
  const int first_row = tile_m * Tile::BLOCK_M + warp_m * Tile::WARP_M;
  const uint32_t pipeline = ptx::shared_address(shared);

  TileLoader<Tile> loader(p, tile_m, tile_n, first_step, steps);
  if constexpr (Tile::COPY == Copy::async) {
#pragma unroll
    for (int stage = 0; stage < Tile::STAGES - 1; ++stage) loader.load(pipeline + stage * Tile::STAGE_BYTES);
  }
  TileEpilogue epilogue(p, tile_n * Tile::BLOCK_N + warp_n * Tile::WARP_N, lane, pipeline + warp * TileEpilogue::STRIP_BYTES);
  epilogue.template prefetch_residual<Tile::WARP_M>(first_row);

  Accumulators<Tile> acc = {};
  const Math<Tile> math(warp_m, warp_n, lane);
  if constexpr (Tile::COPY == Copy::async) {
    accumulate_async<Tile>(acc, loader, math, pipeline, steps);
  } else {
    accumulate_through_registers<Tile>(acc, loader, math, pipeline, steps);
  }
  __syncthreads();
  epilogue.begin();
  epilogue.store(acc, [&](int i) { return StripRows{first_row + i * 16, p.out_pixels - first_row - i * 16}; });
}

}  // namespace resnet_fused
