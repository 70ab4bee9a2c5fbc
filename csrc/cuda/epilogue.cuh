// What follows the products: y = relu(acc + shift + residual), staged through shared memory so that every access to global
// memory is 16 bytes a lane and whole sectors a warp. Sums in float32, one rounding.
#pragma once

#include "conv2d_params.h"
#include "element.cuh"
#include "ptx.cuh"
#include "unroll.cuh"

namespace resnet_fused {

// A warp's WARP_M x WARP_N accumulators leave in strips of 16 rows. A lane always has the same kVector channels, of rows
// lane / kLanesPerRow + k kRowsPerAccess.
template <class Tile>
class Epilogue {
  using T = typename Tile::T;
  using Vector = Vector16<T>;
  static constexpr int kVector = Vector::kCount, kLanesPerRow = Tile::WARP_N / kVector;
  static constexpr int kRowsPerAccess = 32 / kLanesPerRow, kAccesses = 16 / kRowsPerAccess;
  static constexpr int kStrips = Tile::WARP_M / 16, kColumns = Tile::WARP_N / 8;
  static constexpr int kStripRowBytes = Tile::WARP_N * 4;

 public:
  static constexpr int kStripBytes = 16 * kStripRowBytes;

  // first_row, first_channel: of the warp's part of the product.
  __device__ Epilogue(const Conv2dParams& p, int first_row, int first_channel, int lane) : p_(p), lane_(lane) {
    row_ = first_row + lane / kLanesPerRow;
    channel_ = first_channel + lane % kLanesPerRow * kVector;
  }

  // Brings the residual's lines to L2 while the products are computed.
  __device__ __forceinline__ void prefetch_residual() const {
    if (p_.residual == nullptr || !p_.vectorised) return;
    constexpr int kLineBytes = 128, kLinesPerRow = (Tile::WARP_N * int(sizeof(T)) + kLineBytes - 1) / kLineBytes;
    const int first_row = row_ - lane_ / kLanesPerRow, first_channel = channel_ - lane_ % kLanesPerRow * kVector;
#pragma unroll
    for (int i = 0; i < Tile::WARP_M * kLinesPerRow / 32; ++i) {
      const int line = i * 32 + lane_, row = first_row + line / kLinesPerRow;
      const int channel = first_channel + line % kLinesPerRow * (kLineBytes / int(sizeof(T)));
      if (row < p_.out_pixels && channel < p_.out_channels)
        ptx::prefetch_l2(static_cast<const T*>(p_.residual) + int64_t(row) * p_.out_channels + channel);
    }
  }

  // strip: address of kStripBytes of shared memory of this warp's own.
  __device__ __forceinline__ void store(const float (&acc)[kStrips][kColumns][4], uint32_t strip) const {
    float shift[kVector] = {};
    if (p_.partial == nullptr) load_shift(shift);
#pragma unroll
    for (int i = 0; i < kStrips; ++i) {
      write_strip(acc[i], strip);
      __syncwarp();
      if (p_.partial != nullptr) {
        store_partial(strip, i * 16);
      } else if (p_.vectorised) {
        store_vectors(shift, strip, row_ + i * 16);
      } else {
        store_elements(shift, strip, row_ + i * 16);
      }
      __syncwarp();
    }
  }

 private:
  // Byte offset of a float of the strip, swizzled: the 32-byte units that hold 8 channels by row, and the halves of a unit
  // by every fourth unit. Fragments are written, and both 4 and 8 channels a lane read, without a bank conflict.
  __device__ static int strip_offset(int row, int column) {
    const int unit = row * kColumns + column / 8;
    return (unit ^ (row & 3)) * 32 + ((column / 4 ^ unit >> 2) & 1) * 16 + column % 4 * 4;
  }

  __device__ __forceinline__ void write_strip(const float (&acc)[kColumns][4], uint32_t strip) const {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const uint32_t pair = strip + strip_offset(lane_ / 4, j * 8 + lane_ % 4 * 2);
      ptx::store_shared_8<0>(pair, acc[j][0], acc[j][1]);
      ptx::store_shared_8<8 * kStripRowBytes>(pair, acc[j][2], acc[j][3]);  // row + 8 has the same swizzle
    }
  }

  // The lane's kVector channels of row lane / kLanesPerRow + kRow.
  template <int kRow>
  __device__ __forceinline__ void read_strip(float (&v)[kVector], uint32_t strip) const {
    constexpr int kPeriod = 4;  // rows until the swizzle repeats
    unroll<kVector / 4>([&](auto quad) {
      const int offset = strip_offset(lane_ / kLanesPerRow + kRow % kPeriod, lane_ % kLanesPerRow * kVector + quad * 4);
      const float4 f = ptx::load_shared_16<kRow / kPeriod * kPeriod * kStripRowBytes>(strip + offset);
      v[quad * 4] = f.x, v[quad * 4 + 1] = f.y, v[quad * 4 + 2] = f.z, v[quad * 4 + 3] = f.w;
    });
  }

  __device__ __forceinline__ void load_shift(float (&shift)[kVector]) const {
    if (p_.vectorised) {
#pragma unroll
      for (int k = 0; k < kVector; k += 4) {
        const uint4 f = ptx::load_global_16(p_.shift + channel_ + k, channel_ < p_.out_channels);
        shift[k] = __uint_as_float(f.x), shift[k + 1] = __uint_as_float(f.y);
        shift[k + 2] = __uint_as_float(f.z), shift[k + 3] = __uint_as_float(f.w);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kVector; ++k)
        if (channel_ + k < p_.out_channels) shift[k] = p_.shift[channel_ + k];
    }
  }

  __device__ __forceinline__ void store_vectors(const float (&shift)[kVector], uint32_t strip, int row) const {
    const int rows = channel_ < p_.out_channels ? p_.out_pixels - row : 0;  // of those behind `row` that exist
    const int64_t offset = (int64_t(row) * p_.out_channels + channel_) * int(sizeof(T));
    const int64_t step = kRowsPerAccess * int(sizeof(T)) * int64_t(p_.out_channels);
    const bool add = p_.residual != nullptr;
    const char* residual_ptr = static_cast<const char*>(p_.residual) + offset;
    uint4 residual[kAccesses];
    if (add) {
#pragma unroll
      for (int k = 0; k < kAccesses; ++k)
        residual[k] = ptx::load_global_16(residual_ptr + k * step, k * kRowsPerAccess < rows);
    }
    char* y_ptr = static_cast<char*>(p_.y) + offset;
    unroll<kAccesses>([&](auto k) {
      float v[kVector];
      read_strip<k * kRowsPerAccess>(v, strip);
#pragma unroll
      for (int e = 0; e < kVector; ++e) v[e] += shift[e];
      if (add) {
        float r[kVector];
        Vector::unpack(residual[k], r);
#pragma unroll
        for (int e = 0; e < kVector; ++e) v[e] += r[e];
      }
      uint4 y = Vector::pack(v);
      if (p_.relu) y = Vector::relu(y);
      ptx::store_global_16(y_ptr + k * step, y, k * kRowsPerAccess < rows);
    });
  }

  // out_channels that make no whole 16 bytes.
  __device__ __forceinline__ void store_elements(const float (&shift)[kVector], uint32_t strip, int row) const {
    unroll<kAccesses>([&](auto k) {
      float v[kVector];
      read_strip<k * kRowsPerAccess>(v, strip);
      const int m = row + k * kRowsPerAccess;
      const int64_t offset = int64_t(m) * p_.out_channels + channel_;
#pragma unroll 1
      for (int e = 0; e < kVector; ++e) {
        if (m >= p_.out_pixels || channel_ + e >= p_.out_channels) continue;
        float sum = v[e] + shift[e];
        if (p_.residual != nullptr) sum += static_cast<float>(static_cast<const T*>(p_.residual)[offset + e]);
        static_cast<T*>(p_.y)[offset + e] = static_cast<T>(p_.relu ? relu(sum) : sum);
      }
    });
  }

  // The sums of one part of a split k, four channels a lane.
  __device__ __forceinline__ void store_partial(uint32_t strip, int strip_row) const {
    constexpr int kLanes = Tile::WARP_N / 4, kRows = 32 / kLanes;
    const int channel = channel_ - lane_ % kLanesPerRow * kVector + lane_ % kLanes * 4;
    const int row = row_ - lane_ / kLanesPerRow + lane_ / kLanes + strip_row;
    float* part = p_.partial + blockIdx.z * (int64_t(p_.out_pixels) * p_.partial_stride);
#pragma unroll
    for (int k = 0; k < 16; k += kRows) {
      const float4 f = ptx::load_shared_16<0>(strip + strip_offset(lane_ / kLanes + k, lane_ % kLanes * 4));
      const uint4 sums = {__float_as_uint(f.x), __float_as_uint(f.y), __float_as_uint(f.z), __float_as_uint(f.w)};
      ptx::store_global_16(part + int64_t(row + k) * p_.partial_stride + channel, sums,
                           row + k < p_.out_pixels && channel < p_.partial_stride);
    }
  }

  const Conv2dParams& p_;
  int lane_, row_, channel_;
};

}  // namespace resnet_fused
