// Brings the operands of an implicit-GEMM convolution to shared memory, step by step along k.
#pragma once

#include "conv2d_params.h"
#include "element.cuh"
#include "ptx.cuh"
#include "unroll.cuh"

namespace resnet_fused {

// How a tile's operands come to shared memory: cp.async in a pipeline of stages (sm_80 on), or through registers
// (sm_75).
enum class Copy { async, through_registers };

// A block computes BLOCK_M x BLOCK_N outputs with warps of WARP_M x WARP_N, BLOCK_K elements of k a step, STAGES in
// flight. GATHER: x is loaded by element, for runs that make no whole 16 bytes.
template <ElementType ELEMENT_, bool GATHER_, Copy COPY_, int BLOCK_M_, int BLOCK_N_, int BLOCK_K_, int WARP_M_, int WARP_N_,
          int STAGES_>
struct Conv2dTile {
  using T = typename ElementOf<ELEMENT_>::T;
  static constexpr ElementType ELEMENT = ELEMENT_;
  static constexpr bool GATHER = GATHER_;
  static constexpr Copy COPY = COPY_;
  static constexpr int BLOCK_M = BLOCK_M_, BLOCK_N = BLOCK_N_, BLOCK_K = BLOCK_K_, WARP_M = WARP_M_, WARP_N = WARP_N_;
  static constexpr int STAGES = STAGES_;
  static constexpr int WARPS_M = BLOCK_M / WARP_M, WARPS_N = BLOCK_N / WARP_N;
  static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int ROW_BYTES = BLOCK_K * sizeof(T);   // of a tile row in shared memory: 64 or 128
  static constexpr int CHUNKS = ROW_BYTES / 16;           // 16-byte chunks a row
  static constexpr int MMA_STEPS = ROW_BYTES / 32;        // one mma takes 32 bytes of k
  static constexpr int ROWS_PER_PASS = THREADS / CHUNKS;  // rows the block copies at once
  static constexpr int PASSES_A = BLOCK_M / ROWS_PER_PASS, PASSES_B = BLOCK_N / ROWS_PER_PASS;
  static constexpr int BYTES_A = BLOCK_M * ROW_BYTES, STAGE_BYTES = (BLOCK_M + BLOCK_N) * ROW_BYTES;
  static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES;
  static_assert(ROW_BYTES == 64 || ROW_BYTES == 128, "the swizzle covers rows of 64 and 128 bytes");
  static_assert(PASSES_A * ROWS_PER_PASS == BLOCK_M && PASSES_B * ROWS_PER_PASS == BLOCK_N, "whole passes");
  static_assert(WARPS_M * WARPS_N * 16 * WARP_N * 4 <= SHARED_BYTES, "the epilogue's strips reuse the pipeline's memory");

  // Byte offset of a chunk of a tile row: XOR-swizzled, so that the eight rows an ldmatrix reads and the eight chunks a
  // quarter-warp writes fall into different banks.
  __device__ static uint32_t offset(int row, int chunk) {
    const int key = ROW_BYTES == 64 ? (row >> 1) & 3 : row & 7;
    return row * ROW_BYTES + ((chunk ^ key) << 4);
  }
};

// Copies the tiles of one step after the other from global to shared memory. A thread copies the same chunk of every
// ROWS_PER_PASS-th row; pointers advance by deltas.
template <class Tile>
class TileLoader {
  using T = typename Tile::T;
  static constexpr int PASS_BYTES = Tile::ROWS_PER_PASS * Tile::ROW_BYTES;
  static constexpr uint32_t FIRST_RUN = 1u << 16,
                            NEVER = 1u << 31;  // NEVER is set in every mask of invalid positions

 public:
  __device__ TileLoader(const Conv2dParams& p, int tile_m, int tile_n, int first_step, int step_count)
      : p_(p),
        row_delta_(p.row_delta),
        run_delta_(p.run_delta),
        weight_delta_(p.weight_delta),
        steps_per_run_(p.steps_per_run),
        runs_(p.runs) {
    const int chunk = threadIdx.x % Tile::CHUNKS, row = threadIdx.x / Tile::CHUNKS;
    shared_ = Tile::offset(row, chunk);
    steps_left_ = step_count;
    const int run = first_step / p.steps_per_run, filter_row = run / p.runs;
    step_in_run_ = first_step - run * p.steps_per_run;
    run_ = run - filter_row * p.runs;
    row_bit_ = 1u << filter_row, run_bit_ = FIRST_RUN << run_;
    const int chunks_in_last = (p.run_length - (p.steps_per_run - 1) * Tile::BLOCK_K) * int(sizeof(T)) / 16;
    tail_bit_ = chunk >= chunks_in_last ? NEVER : 0;
    update_position();

    const int64_t in_run = step_in_run_ * Tile::ROW_BYTES + chunk * 16;
    const int64_t filter_offset = filter_row * p.dilation_h * p.row_stride + int64_t(run_) * p.dilation_w * p.pixel_stride;
#pragma unroll
    for (int i = 0; i < Tile::PASSES_A; ++i) {
      const uint32_t m = tile_m * Tile::BLOCK_M + row + i * Tile::ROWS_PER_PASS;
      const uint32_t n = p.image.quotient(m), pixel = m - n * p.image.divisor;
      const uint32_t out_h = p.row.quotient(pixel), out_w = pixel - out_h * p.row.divisor;
      const int h = int(out_h) * p.stride_h - p.pad_h, w = int(out_w) * p.stride_w - p.pad_w;
      x_[i] = static_cast<const char*>(p.x) - (Tile::GATHER ? RUN_LEAD * int(sizeof(T)) : 0) + n * p.image_stride +
              h * p.row_stride + int64_t(w) * p.pixel_stride + filter_offset + in_run;
      invalid_[i] = m < p.out_pixels ? NEVER : ~0u;
      if constexpr (Tile::GATHER) first_w_[i] = w;
      for (int r = 0; r < p.filter_rows; ++r)
        if (uint32_t(h + r * p.dilation_h) >= uint32_t(p.height)) invalid_[i] |= 1u << r;
      for (int s = 0; s < p.runs && !Tile::GATHER; ++s)
        if (uint32_t(w + s * p.dilation_w) >= uint32_t(p.width)) invalid_[i] |= FIRST_RUN << s;
    }
    const int channel = tile_n * Tile::BLOCK_N + row;
    weight_ = static_cast<const char*>(p.weight) + channel * p.weight_stride + int64_t(run) * (p.run_length * int(sizeof(T))) +
              in_run;
    weight_pass_ = Tile::ROWS_PER_PASS * p.weight_stride;
    invalid_channels_ = NEVER;
#pragma unroll
    for (int i = 0; i < Tile::PASSES_B; ++i)
      if (channel + i * Tile::ROWS_PER_PASS >= p.out_channels) invalid_channels_ |= 1u << i;
  }

  // cp.async: issues the copies of the next step into the stage at `stage` (an address in shared memory) and moves on.
  __device__ __forceinline__ void load(uint32_t stage) {
    const uint32_t destination = stage + shared_;
    next(
        [&](auto i, bool valid) {
          if constexpr (Tile::GATHER) {
            ptx::store_shared_16<i * PASS_BYTES>(destination, gather(i, valid));
          } else {
            ptx::cp_async_16<i * PASS_BYTES>(destination, x_[i], valid);
          }
        },
        [&](auto i, const char* weight, bool valid) {
          ptx::cp_async_16<Tile::BYTES_A + i * PASS_BYTES>(destination, weight, valid);
        });
    ptx::cp_async_commit();
  }

  // Through registers: fetch loads the next step's chunks and moves on, put writes them into a stage.
  __device__ __forceinline__ void fetch() {
    next(
        [&](auto i, bool valid) {
          if constexpr (Tile::GATHER) {
            fetched_[i] = gather(i, valid);
          } else {
            fetched_[i] = ptx::load_global_16(x_[i], valid);
          }
        },
        [&](auto i, const char* weight, bool valid) { fetched_[Tile::PASSES_A + i] = ptx::load_global_16(weight, valid); });
  }
  __device__ __forceinline__ void put(uint32_t stage) const {
    unroll<Tile::PASSES_A>([&](auto i) { ptx::store_shared_16<i * PASS_BYTES>(stage + shared_, fetched_[i]); });
    unroll<Tile::PASSES_B>(
        [&](auto i) { ptx::store_shared_16<Tile::BYTES_A + i * PASS_BYTES>(stage + shared_, fetched_[Tile::PASSES_A + i]); });
  }

 private:
  // Calls copy_x(pass, valid) and copy_weight(pass, address, valid) for the chunks of this step, and moves on to the
  // next.
  template <class CopyX, class CopyWeight>
  __device__ __forceinline__ void next(CopyX&& copy_x, CopyWeight&& copy_weight) {
    const bool run_ends = step_in_run_ + 1 == steps_per_run_, row_ends = run_ + 1 == runs_;
    const int64_t delta = run_ends ? row_ends ? row_delta_ : run_delta_ : int64_t{Tile::ROW_BYTES};
    unroll<Tile::PASSES_A>([&](auto i) {
      copy_x(i, (invalid_[i] & position_) == 0);
      x_[i] += delta;
    });
    const uint32_t invalid_channels = invalid_channels_ | uint32_t(int32_t(position_) >> 31);
    const char* weight = weight_;
    unroll<Tile::PASSES_B>([&](auto i) {
      copy_weight(i, weight, (invalid_channels & (1u << i)) == 0);
      weight += weight_pass_;
    });
    weight_ += run_ends ? weight_delta_ : Tile::ROW_BYTES;
    advance(run_ends, row_ends);
  }

  __device__ __forceinline__ void advance(bool run_ends, bool row_ends) {
    --steps_left_;
    step_in_run_ = run_ends ? 0 : step_in_run_ + 1;
    row_ends = run_ends && row_ends;
    run_ = row_ends ? 0 : run_ + run_ends;
    row_bit_ <<= row_ends;
    run_bit_ = FIRST_RUN << run_;
    update_position();
  }

  // 16 bytes of the run by element; zeros where the run leaves the image, and after its end.
  __device__ __forceinline__ uint4 gather(int i, bool valid) const {
    constexpr int VECTOR = 16 / sizeof(T);
    const int w = first_w_[i] + run_ * p_.dilation_w;
    const int low = RUN_LEAD + min(max(-w, 0), p_.run_pixels) * p_.channels;
    const int high = valid ? RUN_LEAD + min(max(p_.width - w, 0), p_.run_pixels) * p_.channels : 0;
    const int first = step_in_run_ * Tile::BLOCK_K + threadIdx.x % Tile::CHUNKS * VECTOR;
    T v[VECTOR];
#pragma unroll
    for (int e = 0; e < VECTOR; ++e)
      v[e] = first + e >= low && first + e < high ? reinterpret_cast<const T*>(x_[i])[e] : from_float<T>(0.0f);
    return Vector16<T>::from_elements(v);
  }

  // The bits that must be clear in a row's mask for its chunk of this step to exist.
  __device__ __forceinline__ void update_position() {
    position_ = row_bit_ | (Tile::GATHER ? 0 : run_bit_) | (step_in_run_ + 1 == steps_per_run_ ? tail_bit_ : 0) |
                (steps_left_ > 0 ? 0 : NEVER);
  }

  const Conv2dParams& p_;
  const int64_t row_delta_, run_delta_;  // these five are read in every step
  const int32_t weight_delta_, steps_per_run_, runs_;
  const char* x_[Tile::PASSES_A];
  uint32_t invalid_[Tile::PASSES_A];                // bit r: filter row r misses the image; bit 16 + s: run s does
  int first_w_[Tile::GATHER ? Tile::PASSES_A : 1];  // column of x where the window of the row's pixel begins
  const char* weight_;
  int64_t weight_pass_;
  uint32_t invalid_channels_;
  uint32_t shared_, position_, row_bit_, run_bit_, tail_bit_;
  int steps_left_, step_in_run_, run_;
  uint4 fetched_[Tile::COPY == Copy::through_registers ? Tile::PASSES_A + Tile::PASSES_B : 1];
};

}  // namespace resnet_fused
