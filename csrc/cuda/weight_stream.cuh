// The weights of a whole block in shared memory, chunk by chunk in the order in which they are used.
#pragma once

#include "block_params.h"
#include "block_tiles.h"
#include "ptx.cuh"
#include "unroll.cuh"

namespace resnet_fused {

// All CHUNKS of the weights, again at each step down the image; before the first step, FIRST of them once more. Where there
// are as many STAGES as chunks, all are brought once and stay.
template <int CHUNKS, int FIRST, int STAGES, int THREADS>
class WeightStream {
  static constexpr bool RESIDENT = STAGES == CHUNKS;
  static constexpr int AHEAD = STAGES - 1;
  static constexpr uint32_t LAST = (STAGES - 1) * CHUNK_BYTES;
  static_assert(RESIDENT || AHEAD <= CHUNKS);

 public:
  // stages: address of STAGES chunks of shared memory.
  __device__ __forceinline__ WeightStream(const BlockParams& p, uint32_t stages) : p_(p), stages_(stages) {
    if constexpr (RESIDENT) {
      copy<CHUNKS * CHUNK_BYTES>(0, 0);
    } else {
      unroll<AHEAD>([&](auto chunk) { copy<CHUNK_BYTES>(chunk * CHUNK_BYTES, chunk < FIRST ? chunk : chunk - FIRST); });
    }
  }

  // Once, before the first chunk is taken.
  __device__ __forceinline__ void begin() const {
    if constexpr (RESIDENT) {
      ptx::cp_async_wait<0>();
      __syncthreads();
    }
  }

  // Address of a chunk, which must be the one after the last that was taken; it stays there until the next is taken. All
  // threads come here. Unless the weights are resident, it is a barrier of the block. `before`: whether it is one of those
  // before the first step.
  __device__ __forceinline__ uint32_t take(int chunk, bool before = false) {
    if constexpr (RESIDENT) return stages_ + chunk * CHUNK_BYTES;
    ptx::cp_async_wait<AHEAD - 1>();
    __syncthreads();
    const int end = before ? FIRST : CHUNKS, next = chunk + AHEAD;
    // Into the stage before this chunk's, which every warp left before the barrier.
    copy<CHUNK_BYTES>(read_ == 0 ? LAST : read_ - CHUNK_BYTES, next < end ? next : next - end);
    const uint32_t read = read_;
    read_ = read == LAST ? 0 : read + CHUNK_BYTES;
    return stages_ + read;
  }

  // Once, after the last chunk.
  __device__ __forceinline__ void end() const { ptx::cp_async_wait<0>(); }

 private:
  // Copies from a chunk on, as a group of its own.
  template <int BYTES>
  __device__ __forceinline__ void copy(uint32_t stage, int chunk) const {
    constexpr int PASS = THREADS * 16;
    const char* from = static_cast<const char*>(p_.weight) + chunk * CHUNK_BYTES + threadIdx.x * 16;
    const uint32_t to = stages_ + stage + threadIdx.x * 16;
    unroll<(BYTES + PASS - 1) / PASS>([&](auto i) {
      if ((i + 1) * PASS <= BYTES || threadIdx.x * 16 < BYTES - i * PASS) ptx::cp_async_16<i * PASS>(to, from + i * PASS, true);
    });
    ptx::cp_async_commit();
  }

  const BlockParams& p_;
  uint32_t stages_, read_ = 0;
};

}  // namespace resnet_fused
