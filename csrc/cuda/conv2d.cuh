// Implicit-GEMM convolution with a fused epilogue: y = relu(conv2d(x, w) + shift + residual), channels_last.
// Rows of the product are output pixels, columns output channels; k runs over filter rows, runs and their elements.
// Source: NVIDIA CUTLASS documentation, "Implicit GEMM convolution" (the method; no code of it is used).
#pragma once

#include "conv2d_params.h"
#include "epilogue.cuh"
#include "ptx.cuh"
#include "unroll.cuh"

namespace resnet_fused {

// A block computes BLOCK_M x BLOCK_N outputs with warps of WARP_M x WARP_N, BLOCK_K elements of k a step, kStages in flight.
// kGather: x is loaded by element, for runs that make no whole 16 bytes.
template <class T_, bool GATHER, int BLOCK_M_, int BLOCK_N_, int BLOCK_K_, int WARP_M_, int WARP_N_, int STAGES_>
struct Conv2dTile {
  using T = T_;
  static constexpr bool kGather = GATHER;
  static constexpr int BLOCK_M = BLOCK_M_, BLOCK_N = BLOCK_N_, BLOCK_K = BLOCK_K_, WARP_M = WARP_M_, WARP_N = WARP_N_;
  static constexpr int kStages = STAGES_;
  static constexpr int kWarpsM = BLOCK_M / WARP_M, kWarpsN = BLOCK_N / WARP_N;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kRowBytes = BLOCK_K * sizeof(T);        // of a tile row in shared memory: 64 or 128
  static constexpr int kChunks = kRowBytes / 16;               // 16-byte chunks a row
  static constexpr int kMmaSteps = kRowBytes / 32;             // one mma takes 32 bytes of k
  static constexpr int kRowsPerPass = kThreads / kChunks;      // rows the block copies at once
  static constexpr int kPassesA = BLOCK_M / kRowsPerPass, kPassesB = BLOCK_N / kRowsPerPass;
  static constexpr int kBytesA = BLOCK_M * kRowBytes, kStageBytes = (BLOCK_M + BLOCK_N) * kRowBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kRowBytes == 64 || kRowBytes == 128, "the swizzle covers rows of 64 and 128 bytes");
  static_assert(kPassesA * kRowsPerPass == BLOCK_M && kPassesB * kRowsPerPass == BLOCK_N, "whole passes");
  static_assert(kWarpsM * kWarpsN * 16 * WARP_N * 4 <= kSharedBytes, "the epilogue's strips reuse the pipeline's memory");

  // Byte offset of a chunk of a tile row: XOR-swizzled, so that the eight rows an ldmatrix reads and the eight chunks a
  // quarter-warp writes fall into different banks.
  __device__ static uint32_t offset(int row, int chunk) {
    const int key = kRowBytes == 64 ? (row >> 1) & 3 : row & 7;
    return row * kRowBytes + ((chunk ^ key) << 4);
  }
};

// Copies the tiles of one step after the other from global to shared memory. A thread copies the same chunk of every
// kRowsPerPass-th row; pointers advance by deltas.
template <class Tile>
class TileLoader {
  using T = typename Tile::T;
  static constexpr uint32_t kFirstRun = 1u << 16, kNever = 1u << 31;  // kNever is set in every mask of invalid positions

 public:
  __device__ TileLoader(const Conv2dParams& p, int tile_m, int tile_n, int first_step, int step_count)
      : p_(p), row_delta_(p.row_delta), run_delta_(p.run_delta), weight_delta_(p.weight_delta), steps_per_run_(p.steps_per_run),
        runs_(p.runs) {
    const int chunk = threadIdx.x % Tile::kChunks, row = threadIdx.x / Tile::kChunks;
    shared_ = Tile::offset(row, chunk);
    steps_left_ = step_count;
    const int run = first_step / p.steps_per_run, filter_row = run / p.runs;
    step_in_run_ = first_step - run * p.steps_per_run;
    run_ = run - filter_row * p.runs;
    row_bit_ = 1u << filter_row, run_bit_ = kFirstRun << run_;
    const int chunks_in_last = (p.run_length - (p.steps_per_run - 1) * Tile::BLOCK_K) * int(sizeof(T)) / 16;
    tail_bit_ = chunk >= chunks_in_last ? kNever : 0;
    update_position();

    const int64_t in_run = step_in_run_ * Tile::kRowBytes + chunk * 16;
    const int64_t filter_offset = filter_row * p.dilation_h * p.row_stride + int64_t(run_) * p.dilation_w * p.pixel_stride;
#pragma unroll
    for (int i = 0; i < Tile::kPassesA; ++i) {
      const uint32_t m = tile_m * Tile::BLOCK_M + row + i * Tile::kRowsPerPass;
      const uint32_t n = p.image.quotient(m), pixel = m - n * p.image.divisor;
      const uint32_t out_h = p.row.quotient(pixel), out_w = pixel - out_h * p.row.divisor;
      const int h = int(out_h) * p.stride_h - p.pad_h, w = int(out_w) * p.stride_w - p.pad_w;
      x_[i] = static_cast<const char*>(p.x) + n * p.image_stride + h * p.row_stride + int64_t(w) * p.pixel_stride +
              filter_offset + in_run;
      invalid_[i] = m < p.out_pixels ? kNever : ~0u;
      if constexpr (Tile::kGather) first_w_[i] = w;
      for (int r = 0; r < p.filter_rows; ++r)
        if (uint32_t(h + r * p.dilation_h) >= uint32_t(p.height)) invalid_[i] |= 1u << r;
      for (int s = 0; s < p.runs && !Tile::kGather; ++s)
        if (uint32_t(w + s * p.dilation_w) >= uint32_t(p.width)) invalid_[i] |= kFirstRun << s;
    }
    const int channel = tile_n * Tile::BLOCK_N + row;
    weight_ = static_cast<const char*>(p.weight) + channel * p.weight_stride +
              int64_t(run) * (p.run_length * int(sizeof(T))) + in_run;
    weight_pass_ = Tile::kRowsPerPass * p.weight_stride;
    invalid_channels_ = kNever;
#pragma unroll
    for (int i = 0; i < Tile::kPassesB; ++i)
      if (channel + i * Tile::kRowsPerPass >= p.out_channels) invalid_channels_ |= 1u << i;
  }

  // Issues the copies of the next step into the stage at `stage` (an address in shared memory) and moves on.
  __device__ __forceinline__ void load(uint32_t stage) {
    constexpr int kPassBytes = Tile::kRowsPerPass * Tile::kRowBytes;
    const uint32_t destination = stage + shared_;
    const bool run_ends = step_in_run_ + 1 == steps_per_run_, row_ends = run_ + 1 == runs_;
    const int64_t delta = run_ends ? row_ends ? row_delta_ : run_delta_ : int64_t{Tile::kRowBytes};
    unroll<Tile::kPassesA>([&](auto i) {
      const bool valid = (invalid_[i] & position_) == 0;
      if constexpr (Tile::kGather) {
        ptx::store_shared_16<i * kPassBytes>(destination, gather(i, valid));
      } else {
        ptx::cp_async_16<i * kPassBytes>(destination, x_[i], valid);
      }
      x_[i] += delta;
    });
    const uint32_t invalid_channels = invalid_channels_ | uint32_t(int32_t(position_) >> 31);
    const char* weight = weight_;
    unroll<Tile::kPassesB>([&](auto i) {
      ptx::cp_async_16<Tile::kBytesA + i * kPassBytes>(destination, weight, (invalid_channels & (1u << i)) == 0);
      weight += weight_pass_;
    });
    ptx::cp_async_commit();
    weight_ += run_ends ? weight_delta_ : Tile::kRowBytes;
    advance(run_ends, row_ends);
  }

 private:
  __device__ __forceinline__ void advance(bool run_ends, bool row_ends) {
    --steps_left_;
    step_in_run_ = run_ends ? 0 : step_in_run_ + 1;
    row_ends = run_ends && row_ends;
    run_ = row_ends ? 0 : run_ + run_ends;
    row_bit_ <<= row_ends;
    run_bit_ = kFirstRun << run_;
    update_position();
  }

  // 16 bytes of the run by element; zeros where the run leaves the image, and behind its end.
  __device__ __forceinline__ uint4 gather(int i, bool valid) const {
    constexpr int kVector = 16 / sizeof(T);
    const int w = first_w_[i] + run_ * p_.dilation_w;
    const int low = min(max(-w, 0), p_.run_pixels) * p_.channels;
    const int high = valid ? min(max(p_.width - w, 0), p_.run_pixels) * p_.channels : 0;
    const int first = step_in_run_ * Tile::BLOCK_K + threadIdx.x % Tile::kChunks * kVector;
    T v[kVector];
#pragma unroll
    for (int e = 0; e < kVector; ++e)
      v[e] = first + e >= low && first + e < high ? reinterpret_cast<const T*>(x_[i])[e] : T(0.0f);
    return Vector16<T>::from_elements(v);
  }

  // The bits that must be clear in a row's mask for its chunk of this step to exist.
  __device__ __forceinline__ void update_position() {
    position_ = row_bit_ | (Tile::kGather ? 0 : run_bit_) | (step_in_run_ + 1 == steps_per_run_ ? tail_bit_ : 0) | (steps_left_ > 0 ? 0 : kNever);
  }

  const Conv2dParams& p_;
  const int64_t row_delta_, run_delta_;  // these five are read in every step
  const int32_t weight_delta_, steps_per_run_, runs_;
  const char* x_[Tile::kPassesA];
  uint32_t invalid_[Tile::kPassesA];  // bit r: filter row r misses the image; bit 16 + s: run s does
  int first_w_[Tile::kGather ? Tile::kPassesA : 1];  // column of x where the window of the row's pixel begins
  const char* weight_;
  int64_t weight_pass_;
  uint32_t invalid_channels_;
  uint32_t shared_, position_, row_bit_, run_bit_, tail_bit_;
  int steps_left_, step_in_run_, run_;
};

// The operands of one mma step of a warp, read from the swizzled tiles.
template <class Tile>
class FragmentReader {
 public:
  static constexpr int kM = Tile::WARP_M / 16, kN = Tile::WARP_N / 8;
  struct Fragments {
    uint32_t a[kM][4];
    uint32_t b[kN / 2][4];  // two columns of mma tiles a load
  };

  __device__ FragmentReader(int warp_m, int warp_n, int lane) {
    a_ = Tile::offset(warp_m * Tile::WARP_M + lane % 16, lane / 16);
    b_ = Tile::kBytesA + Tile::offset(warp_n * Tile::WARP_N + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }

  __device__ __forceinline__ void read(Fragments& f, uint32_t stage, int step) const {
    const uint32_t a = (stage + a_) ^ (step * 32), b = (stage + b_) ^ (step * 32);
    unroll<kM>([&](auto i) { ptx::ldmatrix_x4<i * 16 * Tile::kRowBytes>(f.a[i], a); });
    unroll<kN / 2>([&](auto i) { ptx::ldmatrix_x4<i * 16 * Tile::kRowBytes>(f.b[i], b); });
  }

 private:
  uint32_t a_, b_;
};

template <class Tile>
__device__ __forceinline__ void multiply(float (&acc)[Tile::WARP_M / 16][Tile::WARP_N / 8][4],
                                         typename FragmentReader<Tile>::Fragments& f) {
  using T = typename Tile::T;
  if constexpr (sizeof(T) == 4) {  // the weights were rounded when they were packed
#pragma unroll
    for (auto& a : f.a)
#pragma unroll
      for (auto& bits : a) bits = ptx::round_to_tf32(bits);
  }
#pragma unroll
  for (int i = 0; i < Tile::WARP_M / 16; ++i)
#pragma unroll
    for (int step = 0; step < Tile::WARP_N / 8; ++step) {
      const int j = i % 2 ? Tile::WARP_N / 8 - 1 - step : step;  // there and back, so that b stays in the register cache
      ptx::mma_16x8<T>(acc[i][j], f.a[i], f.b[j / 2][j % 2 * 2], f.b[j / 2][j % 2 * 2 + 1]);
    }
}

template <class Tile>
__device__ __forceinline__ void conv2d_fwd(const Conv2dParams& p, unsigned char* shared) {
  const int tile_m = blockIdx.x >> p.group_shift;
  const int tile_n = (blockIdx.y << p.group_shift) + (blockIdx.x & ((1 << p.group_shift) - 1));
  if (tile_n >= p.tiles_n) return;
  const int first_step = blockIdx.z * p.steps_per_split;
  const int steps = min(p.steps_per_split, p.steps - first_step);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp % Tile::kWarpsM, warp_n = warp / Tile::kWarpsM;
  const uint32_t pipeline = ptx::shared_address(shared);

  TileLoader<Tile> loader(p, tile_m, tile_n, first_step, steps);
#pragma unroll
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) loader.load(pipeline + stage * Tile::kStageBytes);

  Epilogue<Tile> epilogue(p, tile_m * Tile::BLOCK_M + warp_m * Tile::WARP_M, tile_n * Tile::BLOCK_N + warp_n * Tile::WARP_N, lane);
  epilogue.prefetch_residual();

  float acc[Tile::WARP_M / 16][Tile::WARP_N / 8][4] = {};
  FragmentReader<Tile> reader(warp_m, warp_n, lane);
  typename FragmentReader<Tile>::Fragments fragments[2];
  ptx::cp_async_wait<Tile::kStages - 2>();
  __syncthreads();
  reader.read(fragments[0], pipeline, 0);

  uint32_t read_stage = 0, write_stage = (Tile::kStages - 1) * Tile::kStageBytes;
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int k = 0; k < Tile::kMmaSteps; ++k) {
      if (k + 1 < Tile::kMmaSteps) {
        reader.read(fragments[(k + 1) % 2], pipeline + read_stage, k + 1);
      } else {  // the next step's tile: landed for this thread after the wait, for all after the barrier
        ptx::cp_async_wait<Tile::kStages - 2>();
        __syncthreads();
        read_stage = read_stage == (Tile::kStages - 1) * Tile::kStageBytes ? 0 : read_stage + Tile::kStageBytes;
        reader.read(fragments[(k + 1) % 2], pipeline + read_stage, 0);
      }
      if (k == 0) {  // into the stage that every warp left before the last barrier
        loader.load(pipeline + write_stage);
        write_stage = write_stage == (Tile::kStages - 1) * Tile::kStageBytes ? 0 : write_stage + Tile::kStageBytes;
      }
      multiply<Tile>(acc, fragments[k % 2]);
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  epilogue.store(acc, pipeline + warp * 16 * Tile::WARP_N * int(sizeof(float)));
}

}  // namespace resnet_fused
