// Rows of x in shared memory for the stem's kernel: groups of GROUP_ROWS rows, those of one channel after the other's.
#pragma once

#include "ptx.cuh"
#include "stem_params.h"
#include "stem_tiles.h"

namespace resnet_fused {

// Group g has rows 4 g - 3 to 4 g of x. Row r of the pool's result reads groups r, r + 1 and the first row of r + 2, while the
// next group comes. Rows outside of the image, and what lies left and right of it, are zeros. Interleaved rows come as they
// are, and are brought into the order of planar ones in shared memory.
template <StemInput INPUT>
class StemRows {
  using Tile = StemPoolTile;
  static constexpr bool PLANAR = INPUT == StemInput::planar;
  static constexpr int GROUPS = STEM_GROUPS<INPUT>;
  static constexpr int INTERLEAVED_BYTES = Tile::INPUT_CHANNELS * 2;  // of a pixel

 public:
  // address: of shared memory, as stem_plan.cpp counts it. begin, end: the strip's rows of the pool's result.
  __device__ __forceinline__ StemRows(const StemParams& p, uint32_t address, int begin, int end)
      : p_(p),
        address_(address),
        staged_(address + GROUPS * Tile::GROUP_LINES * p.row_pitch),
        first_(max(begin == 0 ? 0 : 4 * begin - 5, 0)),
        last_(4 * end + 2) {}

  // Brings the groups that the strip begins with, from that of the row before `begin` on.
  __device__ __forceinline__ void start(int begin) const {
    for (int i = threadIdx.x * 16; i < GROUPS * Tile::GROUP_LINES * p_.row_pitch; i += Tile::THREADS * 16)
      ptx::store_shared_16<0>(address_ + i, uint4{});
    __syncthreads();
    if constexpr (PLANAR) {
      for (int group = max(begin - 1, 0); group < begin + 3; ++group) copy(group);
    } else {
      for (int group = max(begin - 1, 0); group < begin + 2; ++group) {
        copy(group);
        ptx::cp_async_wait<0>();
        __syncthreads();
        separate(group);
        __syncthreads();
      }
      copy(begin + 2);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
  }

  // Before row `row` of the pool's result: its last group is there, and the next one's copy begins. All threads come here.
  __device__ __forceinline__ void advance(int row) const {
    ptx::cp_async_wait<0>();
    __syncthreads();
    if constexpr (!PLANAR) {
      separate(row + 2);
      __syncthreads();
    }
    copy(row + 3);
  }

  // Address of a group's first row of the first channel.
  __device__ __forceinline__ uint32_t group(int group) const {
    return address_ + group % GROUPS * Tile::GROUP_LINES * p_.row_pitch;
  }

 private:
  __device__ __forceinline__ void copy(int group) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, above = Tile::GROUP_ROWS * group - 3;
    const char* x = static_cast<const char*>(p_.x) + blockIdx.x * p_.image_stride;
    if (above < last_) {
      constexpr int LINES = PLANAR ? Tile::GROUP_LINES : Tile::GROUP_ROWS;
      const int chunks = p_.width * (PLANAR ? 2 : INTERLEAVED_BYTES) / 16;
      for (int line = warp; line < LINES; line += Tile::WARPS) {
        const int row = above + line % Tile::GROUP_ROWS;
        const char* from = x + line / Tile::GROUP_ROWS * p_.channel_stride + row * p_.row_stride;
        const uint32_t to = PLANAR ? this->group(group) + line * p_.row_pitch + Tile::LEFT_BYTES : staged_ + line * chunks * 16;
        for (int chunk = lane; chunk < chunks; chunk += 32)
          ptx::cp_async_16<0>(to + chunk * 16, from + chunk * 16, row >= first_ && row < min(last_, p_.height));
      }
    }
    ptx::cp_async_commit();
  }

  // From the pixels of a group's rows, two of which are three words, to a row of each channel.
  __device__ __forceinline__ void separate(int group) const {
    if (Tile::GROUP_ROWS * group - 3 >= last_) return;
    const int pairs = p_.width / 2, plane = Tile::GROUP_ROWS * p_.row_pitch;
    for (int line = threadIdx.x / 32; line < Tile::GROUP_ROWS; line += Tile::WARPS) {
      const uint32_t from = staged_ + line * pairs * 2 * INTERLEAVED_BYTES;
      const uint32_t to = this->group(group) + line * p_.row_pitch + Tile::LEFT_BYTES;
      for (int pair = threadIdx.x % 32; pair < pairs; pair += 32) {
        const uint32_t source = from + pair * 2 * INTERLEAVED_BYTES;
        const uint32_t a = ptx::load_shared_4<0>(source), b = ptx::load_shared_4<4>(source), c = ptx::load_shared_4<8>(source);
        ptx::store_shared_4<0>(to + pair * 4, __byte_perm(a, b, 0x7610));
        ptx::store_shared_4<0>(to + plane + pair * 4, __byte_perm(a, c, 0x5432));
        ptx::store_shared_4<0>(to + 2 * plane + pair * 4, __byte_perm(b, c, 0x7610));
      }
    }
  }

  const StemParams& p_;
  const uint32_t address_, staged_;
  const int first_, last_;  // rows that the strip reads: first, ..., last - 1, of which x may have fewer
};

}  // namespace resnet_fused
