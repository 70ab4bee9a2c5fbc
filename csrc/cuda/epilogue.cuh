// What follows the products: y = activation(acc + bias + residual), staged through shared memory so that every access to
// global memory is 16 bytes a lane and whole sectors a warp. Sums in float32, one rounding.
#pragma once

#include "conv2d_params.h"
#include "element.cuh"
#include "ptx.cuh"
#include "store_quad.cuh"
#include "unroll.cuh"

namespace resnet_fused {

// Rows of a strip that are stored: pixels first, first + 1, ... of y, `count` of them.
struct StripRows {
  int first, count;
};

// A warp's accumulators leave in strips of 16 rows by WARP_N channels; a strip's rows are neighbouring pixels of y. A
// lane always has the same VECTOR channels, of rows lane / LANES_PER_ROW + k ROWS_PER_ACCESS.
template <class T, int WARP_N>
class Epilogue {
  using Vector = Vector16<T>;
  static constexpr int VECTOR = Vector::COUNT, LANES_PER_ROW = WARP_N / VECTOR;
  static constexpr int ROWS_PER_ACCESS = 32 / LANES_PER_ROW, ACCESSES = 16 / ROWS_PER_ACCESS;
  static constexpr int COLUMNS = WARP_N / 8, STRIP_ROW_BYTES = WARP_N * 4;

 public:
  static constexpr int STRIP_BYTES = 16 * STRIP_ROW_BYTES;

  // strip: address of STRIP_BYTES of shared memory of this warp's own.
  __device__ Epilogue(const Conv2dParams& p, int first_channel, int lane, uint32_t strip)
      : p_(p),
        first_channel_(first_channel),
        channel_(first_channel + lane % LANES_PER_ROW * VECTOR),
        lane_(lane),
        strip_(strip) {}

  // Brings the residual's lines of ROWS rows to L2 while the products are computed.
  template <int ROWS>
  __device__ __forceinline__ void prefetch_residual(int first_row) const {
    if (p_.residual == nullptr || p_.partial != nullptr || !p_.vectorised) return;
    constexpr int LINE_BYTES = 128, LINES_PER_ROW = (WARP_N * int(sizeof(T)) + LINE_BYTES - 1) / LINE_BYTES;
#pragma unroll
    for (int i = 0; i < ROWS * LINES_PER_ROW / 32; ++i) {
      const int line = i * 32 + lane_, row = first_row + line / LINES_PER_ROW;
      const int channel = first_channel_ + line % LINES_PER_ROW * (LINE_BYTES / int(sizeof(T)));
      if (row < p_.out_pixels && channel < p_.out_channels)
        ptx::prefetch_l2(static_cast<const T*>(p_.residual) + int64_t(row) * p_.out_channels + channel);
    }
  }

  // Reads the bias; once, before the first strip.
  __device__ __forceinline__ void begin() {
    if (p_.partial != nullptr) return;
    if (p_.vectorised) {
#pragma unroll
      for (int k = 0; k < VECTOR; k += 4) {
        const uint4 f = ptx::load_global_16(p_.bias + channel_ + k, channel_ < p_.out_channels);
        bias_[k] = __uint_as_float(f.x), bias_[k + 1] = __uint_as_float(f.y);
        bias_[k + 2] = __uint_as_float(f.z), bias_[k + 3] = __uint_as_float(f.w);
      }
    } else {
#pragma unroll
      for (int k = 0; k < VECTOR; ++k)
        if (channel_ + k < p_.out_channels) bias_[k] = p_.bias[channel_ + k];
    }
  }

  // Stores strips; rows_of(i) gives the pixel of y that is the first row of strip i, and how many of its rows there are.
  template <int STRIPS, class RowsOf>
  __device__ __forceinline__ void store(const float (&acc)[STRIPS][COLUMNS][4], RowsOf&& rows_of) const {
#pragma unroll
    for (int i = 0; i < STRIPS; ++i) {
      write_strip(acc[i]);
      __syncwarp();
      if (p_.partial != nullptr) {
        store_partial(rows_of(i));
      } else if (p_.activation > Activation::relu) {
        store_activated(rows_of(i));
      } else if (p_.vectorised) {
        store_vectors(rows_of(i));
      } else {
        store_elements(rows_of(i));
      }
      __syncwarp();
    }
  }

 private:
  // Byte offset of a float of the strip, swizzled: the 32-byte units that hold 8 channels by row, and the halves of a
  // unit by every fourth unit. Fragments are written, and both 4 and 8 channels a lane read, without a bank conflict.
  __device__ static int strip_offset(int row, int column) {
    const int unit = row * COLUMNS + column / 8;
    return (unit ^ (row & 3)) * 32 + ((column / 4 ^ unit >> 2) & 1) * 16 + column % 4 * 4;
  }

  __device__ __forceinline__ void write_strip(const float (&acc)[COLUMNS][4]) const {
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      const uint32_t pair = strip_ + strip_offset(lane_ / 4, j * 8 + lane_ % 4 * 2);
      ptx::store_shared_8<0>(pair, acc[j][0], acc[j][1]);
      ptx::store_shared_8<8 * STRIP_ROW_BYTES>(pair, acc[j][2], acc[j][3]);  // row + 8 has the same swizzle
    }
  }

  // The lane's VECTOR channels of row lane / LANES_PER_ROW + ROW.
  template <int ROW>
  __device__ __forceinline__ void read_strip(float (&v)[VECTOR]) const {
    constexpr int PERIOD = 4;  // rows until the swizzle repeats
    unroll<VECTOR / 4>([&](auto quad) {
      const int offset = strip_offset(lane_ / LANES_PER_ROW + ROW % PERIOD, lane_ % LANES_PER_ROW * VECTOR + quad * 4);
      const float4 f = ptx::load_shared_16<ROW / PERIOD * PERIOD * STRIP_ROW_BYTES>(strip_ + offset);
      v[quad * 4] = f.x, v[quad * 4 + 1] = f.y, v[quad * 4 + 2] = f.z, v[quad * 4 + 3] = f.w;
    });
  }

  __device__ __forceinline__ void store_vectors(StripRows rows) const {
    const int row = lane_ / LANES_PER_ROW;
    if (channel_ >= p_.out_channels) rows.count = 0;
    const int64_t offset = (int64_t(rows.first + row) * p_.out_channels + channel_) * int(sizeof(T));
    const int64_t step = ROWS_PER_ACCESS * int(sizeof(T)) * int64_t(p_.out_channels);
    const bool add = p_.residual != nullptr;
    const char* residual_ptr = static_cast<const char*>(p_.residual) + offset;
    uint4 residual[ACCESSES];
    if (add) {
#pragma unroll
      for (int k = 0; k < ACCESSES; ++k)
        residual[k] = ptx::load_global_16(residual_ptr + k * step, row + k * ROWS_PER_ACCESS < rows.count);
    }
    char* y_ptr = static_cast<char*>(p_.y) + offset;
    unroll<ACCESSES>([&](auto k) {
      float v[VECTOR];
      read_strip<k * ROWS_PER_ACCESS>(v);
#pragma unroll
      for (int e = 0; e < VECTOR; ++e) v[e] += bias_[e];
      if (add) {
        float r[VECTOR];
        Vector::unpack(residual[k], r);
        overflow<T>(v);
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) v[e] += r[e];
      }
      uint4 y = Vector::pack(v);
      if (p_.activation == Activation::relu) y = Vector::relu(y);
      ptx::store_global_16(y_ptr + k * step, y, row + k * ROWS_PER_ACCESS < rows.count);
    });
  }

  // out_channels that make no whole 16 bytes.
  __device__ __forceinline__ void store_elements(StripRows rows) const {
    unroll<ACCESSES>([&](auto k) {
      float v[VECTOR];
      read_strip<k * ROWS_PER_ACCESS>(v);
      const int row = lane_ / LANES_PER_ROW + k * ROWS_PER_ACCESS;
      const int64_t offset = int64_t(rows.first + row) * p_.out_channels + channel_;
#pragma unroll
      for (int e = 0; e < VECTOR; ++e) {
        if (row >= rows.count || channel_ + e >= p_.out_channels) continue;
        float sum[1] = {v[e] + bias_[e]};
        if (p_.residual != nullptr) {
          overflow<T>(sum);
          sum[0] += to_float(static_cast<const T*>(p_.residual)[offset + e]);
        }
        static_cast<T*>(p_.y)[offset + e] = from_float<T>(p_.activation == Activation::relu ? relu(sum[0]) : sum[0]);
      }
    });
  }

  // Any function but ReLU, four channels a lane. A loop, since the code of a function is long.
  __device__ __forceinline__ void store_activated(StripRows rows) const {
    constexpr int LANES = WARP_N / 4;
    const int column = lane_ % LANES * 4, channel = first_channel_ + column;
#pragma unroll 1
    for (int row = lane_ / LANES; row < 16; row += 32 / LANES) {
      if (row >= rows.count || channel >= p_.out_channels) continue;
      const float4 f = ptx::load_shared_16<0>(strip_ + strip_offset(row, column));
      float v[4] = {f.x, f.y, f.z, f.w};
      store_quad<T>(p_, v, int64_t(rows.first + row) * p_.out_channels + channel, channel);
    }
  }

  // The sums of one part of a split k, four channels a lane.
  __device__ __forceinline__ void store_partial(StripRows rows) const {
    constexpr int LANES = WARP_N / 4, ROWS = 32 / LANES;
    const int channel = first_channel_ + lane_ % LANES * 4;
    float* part = p_.partial + blockIdx.z * (int64_t(p_.out_pixels) * p_.partial_stride);
#pragma unroll
    for (int k = 0; k < 16; k += ROWS) {
      const int row = lane_ / LANES + k;
      const float4 f = ptx::load_shared_16<0>(strip_ + strip_offset(row, lane_ % LANES * 4));
      const uint4 sums = {__float_as_uint(f.x), __float_as_uint(f.y), __float_as_uint(f.z), __float_as_uint(f.w)};
      ptx::store_global_16(part + int64_t(rows.first + row) * p_.partial_stride + channel, sums,
                           row < rows.count && channel < p_.partial_stride);
    }
  }

  const Conv2dParams& p_;
  const int first_channel_, channel_, lane_;
  const uint32_t strip_;
  float bias_[VECTOR] = {};
};

}  // namespace resnet_fused
