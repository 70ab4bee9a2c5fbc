// A whole bottleneck of stride 1: y = relu(conv3(relu(conv2(relu(conv1(x))))) + x), or + projection(x), channels_last. Results
// inside of it are rounded as the layers' would be, and never leave the multiprocessor.
//
// A block of threads goes down a strip of an image, `rows` rows a step. conv1's rows go to a ring in shared memory, where two rows
// of the step before wait as the halo of conv2's window, so that they are computed once. conv2's accumulators are conv3's
// fragments. x comes from memory as fragments, as does the residual, from L2 the second time.
#pragma once

#include "block_math.cuh"
#include "weight_stream.cuh"

namespace resnet_fused {

template <class T, class Tile>
class Bottleneck {
  static constexpr int COLUMNS = Tile::WIDTH / 8, K = Tile::WIDTH / 16;  // of a layer inside: columns and steps of mma
  static constexpr int STEP_BYTES = COLUMNS / 2 * FRAGMENT_BYTES, STEPS_PER_CHUNK = CHUNK_BYTES / STEP_BYTES;
  static constexpr int IN_BYTES = Tile::IN * 2, OUT_BYTES = Tile::OUT * 2;

 public:
  __device__ __forceinline__ Bottleneck(const BlockParams& p, uint32_t shared)
      : p_(p),
        lane_(threadIdx.x % 32),
        pixel_(warp_pixel() + lane_ / 4),
        pixels_of_step_(p.rows * p.width),
        weights_(p, shared),
        ring_(p, shared + Tile::STAGES * CHUNK_BYTES) {}

  __device__ __forceinline__ void run() {
    const int first_step = blockIdx.y * p_.steps_per_strip;
    int first = first_step * pixels_of_step_;  // pixel of the image with which the step's rows begin
    int slot = 0;                              // of conv1's row before them
    weights_.begin();
    bool before = true;  // the first step: there are only the two rows of conv1 to compute with which it begins
    for (int left = min(p_.steps_per_strip, p_.steps - first_step); left > 0;) {
      conv1(first, slot, before);
      if (before) {
        before = false;
        continue;
      }
      prefetch(first + p_.width + pixels_of_step_);
      PixelFragments a[K];
      conv2(a, slot);
      conv3(a, first);
      first += pixels_of_step_;
      slot = ring_.after(slot, p_.rows);
      --left;
    }
    weights_.end();
  }

 private:
  // conv1 of the step's rows, which for it are a row ahead, to the ring; zeros for rows above or below the image. slot: the
  // ring's row before the step's. `before` the first step: only the two rows with which that begins.
  __device__ __forceinline__ void conv1(int first, int slot, bool before) {
    first += before ? -p_.width : p_.width;
    const int count = before ? 2 * p_.width : pixels_of_step_;
    bool valid[4];
    validate(valid, first, count);
    const char* x = static_cast<const char*>(p_.x) + offset(first) * IN_BYTES + lane_ % 4 * 16;
    float acc[2][COLUMNS][4];
    start(acc, p_.bias, lane_);
    uint32_t b = 0;
#pragma unroll 1
    for (int k = 0; k < Tile::IN / 16; k += 2) {
      LoadedPixels loaded;
      loaded.load(x, IN_BYTES, valid);
      x += 64;
      if (k % STEPS_PER_CHUNK == 0) b = weights_.take(k / STEPS_PER_CHUNK, before);
      PixelFragments a[2];
      loaded.to(a);
      unroll<2>([&](auto step) { multiply<T, step * STEP_BYTES>(acc, a[step], b, lane_); });
      b += 2 * STEP_BYTES;
    }
    if constexpr (Tile::RESIDENT) __syncthreads();  // conv2 is through with the rows that these replace
    slot = before ? slot : ring_.after(slot, 2);
    unroll<4>([&](auto r) {
      if (pixel_ + 8 * r >= count) return;
      const uint32_t to = ring_.address(slot, pixel_ + 8 * r) + lane_ % 4 * 4;
      unroll<COLUMNS>([&](auto j) {
        const uint32_t word = relu_pair<T>(acc[r / 2][j][r % 2 * 2], acc[r / 2][j][r % 2 * 2 + 1]);
        ptx::store_shared_4<j * 16>(to, valid[r] ? word : 0);
      });
    });
    if constexpr (Tile::RESIDENT) __syncthreads();  // elsewhere the next chunk's barrier serves
  }

  // conv2 of the step's rows, as fragments; slot: of the ring's row before them.
  __device__ __forceinline__ void conv2(PixelFragments (&result)[K], int slot) {
    float acc[2][COLUMNS][4];
    start(acc, p_.bias + Tile::WIDTH, lane_);
    int pixels[2];  // whose fragments the lane reads; in the last warp, those that are no more lie in another's
#pragma unroll
    for (int i = 0; i < 2; ++i)
      pixels[i] = min(warp_pixel() + i * 16 + lane_ % 16, pixels_of_step_ - 1);
    uint32_t b = 0;
    int chunk = Tile::CHUNKS_1;
#pragma unroll 1
    for (int row = 0; row < 3; ++row) {
      uint32_t from[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        from[i] = ring_.address(ring_.after(slot, row), pixels[i]) + lane_ / 16 * 16 - RING_PIXEL_BYTES<Tile::WIDTH>;
      unroll<3 * K>([&](auto k) {  // of one column after the other
        if constexpr (k % STEPS_PER_CHUNK == 0) b = weights_.take(chunk++);
        PixelFragments a;
        unroll<2>([&](auto i) { ptx::ldmatrix_x4<k / K * RING_PIXEL_BYTES<Tile::WIDTH> + k % K * 32>(a[i], from[i]); });
        multiply<T, k % STEPS_PER_CHUNK * STEP_BYTES>(acc, a, b, lane_);
      });
    }
    to_fragments<T>(acc, result);
  }

  // conv3 of the step's rows, from pixel `first` of the image on, with what follows it, to memory.
  __device__ __forceinline__ void conv3(const PixelFragments (&a)[K], int first) {
    constexpr int GROUP_BYTES = 64 * (Tile::WIDTH + (Tile::PROJECTED ? Tile::IN : 0)), GROUPS = CHUNK_BYTES / GROUP_BYTES;
    constexpr int PROJECTION = Tile::PROJECTED ? Tile::IN / 16 : 0;  // steps of mma
    bool valid[4];
    validate(valid, first, pixels_of_step_);
    const char* x = static_cast<const char*>(p_.x) + offset(first) * IN_BYTES + lane_ % 4 * 16;
    char* y = static_cast<char*>(p_.y) + offset(first) * OUT_BYTES + lane_ % 4 * 16;
    const float* bias = p_.bias + 2 * Tile::WIDTH;
    PixelFragments of_x[PROJECTION / 2 + 1][2];
    unroll<PROJECTION / 2>([&](auto k) {
      LoadedPixels loaded;
      loaded.load(x + k * 64, IN_BYTES, valid);
      loaded.to(of_x[k]);
    });
#pragma unroll 1
    for (int chunk = 0; chunk < Tile::CHUNKS_3; ++chunk) {
      const uint32_t b = weights_.take(Tile::CHUNKS_1 + Tile::CHUNKS_2 + chunk);
      unroll<GROUPS>([&](auto group) {  // of 32 channels
        constexpr int OFFSET = group * GROUP_BYTES;
        float acc[2][4][4];
        LoadedPixels residual;
        if constexpr (!Tile::PROJECTED) residual.load(x, IN_BYTES, valid);
        x += 64;
        if constexpr (Tile::PROJECTED) {
          start(acc, bias + Tile::OUT, lane_);
          unroll<PROJECTION>([&](auto k) { multiply<T, OFFSET + k * 2 * FRAGMENT_BYTES>(acc, of_x[k / 2][k % 2], b, lane_); });
#pragma unroll
          for (int r = 0; r < 4; ++r) residual.v[r] = eight_of<T>(acc, r);
        }
        start(acc, bias, lane_);
        unroll<K>([&](auto k) { multiply<T, OFFSET + (PROJECTION + k) * 2 * FRAGMENT_BYTES>(acc, a[k], b, lane_); });
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const uint4 sums = Vector16<T>::add(eight_of<T>(acc, r), residual.v[r]);
          ptx::store_global_16(y + r * 8 * OUT_BYTES, Vector16<T>::relu(sums), valid[r]);
        }
        bias += 32, y += 64;
      });
    }
  }

  // The lane's first pixel of all images' pixels, with `first` of the image the step's first.
  __device__ __forceinline__ int64_t offset(int first) const { return int64_t(blockIdx.x) * p_.pixels + first + pixel_; }

  // The warp's first pixel, of a step's.
  __device__ __forceinline__ static int warp_pixel() { return int(threadIdx.x) / 32 * Tile::WARP_PIXELS; }

  // Which of the lane's pixels are among the first `count` from pixel `first` of the image on, and in it.
  __device__ __forceinline__ void validate(bool (&valid)[4], int first, int count) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int pixel = pixel_ + 8 * r;
      valid[r] = pixel < count && uint32_t(first + pixel) < uint32_t(p_.pixels);
    }
  }

  // Brings x's pixels of conv1's next step to L2.
  __device__ __forceinline__ void prefetch(int first) const {
    constexpr int LINE_BYTES = 128, LINES = IN_BYTES / LINE_BYTES;  // of a pixel
    const int count = min(pixels_of_step_, p_.pixels - first) * LINES;
    const char* x = static_cast<const char*>(p_.x) + (int64_t(blockIdx.x) * p_.pixels + first) * IN_BYTES;
#pragma unroll 1
    for (int line = threadIdx.x; line < count; line += Tile::THREADS) ptx::prefetch_l2(x + line * LINE_BYTES);
  }

  const BlockParams& p_;
  const int lane_;
  const int pixel_;  // the lane's first, of a step's
  const int pixels_of_step_;
  WeightStream<Tile::CHUNKS, Tile::CHUNKS_1, Tile::STAGES, Tile::THREADS> weights_;
  RowRing<Tile::WIDTH, Tile::THREADS> ring_;
};

}  // namespace resnet_fused
