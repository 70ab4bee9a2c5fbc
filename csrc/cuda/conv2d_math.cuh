// What a warp does with a tile in shared memory: acc += a b, by tensor cores or by float32 multiply-adds. Either way a
// lane holds the accumulators of mma's layout (PTX ISA 9.7.15.5, m16n8k16): rows lane / 4 and lane / 4 + 8, columns 2
// (lane % 4) + {0, 1}.
#pragma once

#include "element.cuh"
#include "ptx.cuh"
#include "unroll.cuh"

namespace resnet_fused {

template <class Tile>
using Accumulators = float[Tile::WARP_M / 16][Tile::WARP_N / 8][4];

// Tensor cores: one mma step takes 32 bytes of k of each operand, read by ldmatrix.
template <class Tile>
class TensorMath {
  using T = typename Tile::T;
  static constexpr int M = Tile::WARP_M / 16, N = Tile::WARP_N / 8;

 public:
  static constexpr int STEPS = Tile::ROW_BYTES / 32;
  struct Fragments {
    uint32_t a[M][4];
    uint32_t b[N / 2][4];  // two columns of mma tiles a load
  };

  __device__ TensorMath(int warp_m, int warp_n, int lane) {
    a_ = Tile::offset(warp_m * Tile::WARP_M + lane % 16, lane / 16);
    b_ = Tile::BYTES_A + Tile::offset(warp_n * Tile::WARP_N + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }

  // stage: address of a step's tiles.
  __device__ __forceinline__ void read(Fragments& f, uint32_t stage, int step) const {
    const uint32_t a = (stage + a_) ^ (step * 32), b = (stage + b_) ^ (step * 32);
    unroll<M>([&](auto i) { ptx::ldmatrix_x4<i * 16 * Tile::ROW_BYTES>(f.a[i], a); });
    unroll<N / 2>([&](auto i) { ptx::ldmatrix_x4<i * 16 * Tile::ROW_BYTES>(f.b[i], b); });
  }

  __device__ __forceinline__ static void multiply(Accumulators<Tile>& acc, Fragments& f) {
    if constexpr (Tile::ELEMENT == ElementType::tf32) {  // the weights were rounded when they were packed
#pragma unroll
      for (auto& a : f.a)
#pragma unroll
        for (auto& bits : a) bits = ptx::round_to_tf32(bits);
    }
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
      for (int step = 0; step < N; ++step) {
        const int j = i % 2 ? N - 1 - step : step;  // there and back, so that b stays in the register cache
        ptx::mma_16x8<T>(acc[i][j], f.a[i], f.b[j / 2][j % 2 * 2], f.b[j / 2][j % 2 * 2 + 1]);
      }
  }

 private:
  uint32_t a_, b_;
};

// Float32 multiply-adds, in the order of k: one step takes 16 bytes of k.
template <class Tile>
class FmaMath {
  static constexpr int M = Tile::WARP_M / 8, N = Tile::WARP_N / 8;

 public:
  static constexpr int STEPS = Tile::ROW_BYTES / 16;
  struct Fragments {
    float4 a[M];     // rows lane / 4 + 8 i
    float4 b[N][2];  // columns 8 j + 2 (lane % 4) + {0, 1}
  };

  __device__ FmaMath(int warp_m, int warp_n, int lane) {
    a_ = Tile::offset(warp_m * Tile::WARP_M + lane / 4, 0);
    b_[0] = Tile::BYTES_A + Tile::offset(warp_n * Tile::WARP_N + lane % 4 * 2, 0);
    b_[1] = Tile::BYTES_A + Tile::offset(warp_n * Tile::WARP_N + lane % 4 * 2 + 1, 0);
  }

  __device__ __forceinline__ void read(Fragments& f, uint32_t stage, int step) const {
    const uint32_t a = (stage + a_) ^ (step * 16);
    unroll<M>([&](auto i) { f.a[i] = ptx::load_shared_16<i * 8 * Tile::ROW_BYTES>(a); });
    unroll<N>([&](auto j) {
      f.b[j][0] = ptx::load_shared_16<j * 8 * Tile::ROW_BYTES>((stage + b_[0]) ^ (step * 16));
      f.b[j][1] = ptx::load_shared_16<j * 8 * Tile::ROW_BYTES>((stage + b_[1]) ^ (step * 16));
    });
  }

  __device__ __forceinline__ static void multiply(Accumulators<Tile>& acc, const Fragments& f) {
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
      for (int j = 0; j < N; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& sum = acc[i / 2][j][i % 2 * 2 + c];
          const float4 a = f.a[i], b = f.b[j][c];
          sum = __fmaf_rn(a.w, b.w, __fmaf_rn(a.z, b.z, __fmaf_rn(a.y, b.y, __fmaf_rn(a.x, b.x, sum))));
        }
  }

 private:
  uint32_t a_, b_[2];
};

}  // namespace resnet_fused
