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
  // Whether the residual is loaded while the columns before its own are multiplied: where that was measured. On other
  // architectures the registers don't suffice.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  static constexpr bool AHEAD = !Tile::PROJECTED && !Tile::RESIDENT;
#else
  static constexpr bool AHEAD = false;
#endif

 public:
  __device__ __forceinline__ Bottleneck(const BlockParams& p, uint32_t shared)
      : p_(p), pixels_of_step_(p.rows * p.width), weights_(p, shared), ring_(p, shared + Tile::STAGES * CHUNK_BYTES) {}

  __device__ __forceinline__ void run() {
    const int begin = blockIdx.y * p_.steps_per_strip, end = min(begin + p_.steps_per_strip, p_.steps);
    int slot = 0;  // the ring's row of conv1's before the step's
    weights_.begin();
    for (int step = begin - 1; step < end; ++step) {
      const bool before = step < begin;  // there are only the two rows of conv1 to compute with which the first step begins
      const int first = (before ? begin : step) * pixels_of_step_;  // pixel of the image
      conv1(first, slot, before);
      if (before) continue;
      PixelFragments a[K];
      conv2(a, slot);
      // Not before: what is to come would take the place in L2 of what conv3 adds.
      prefetch(first + p_.width + pixels_of_step_);
      conv3(a, first);
      slot = ring_.after(slot, p_.rows);
    }
    weights_.end();
  }

 private:
  // conv1 of the step's rows, which for it are a row ahead, to the ring; zeros for rows above or below the image. slot: the
  // ring's row before the step's. `before` the first step: only the two rows with which that begins.
  __device__ __forceinline__ void conv1(int first, int slot, bool before) {
    first += before ? -p_.width : p_.width;
    const int count = before ? 2 * p_.width : pixels_of_step_;
    const int thread = ptx::thread_index(), lane = thread % 32, own = own_pixel(thread);
    bool valid[4];
    validate(valid, own, first, count);
    const char* x = static_cast<const char*>(p_.x) + in_batch(first + own) * IN_BYTES + lane % 4 * 16;
    float acc[2][COLUMNS][4];
    start(acc, p_.bias, lane);
    uint32_t b = 0;
#pragma unroll(AHEAD ? 2 : 1)  // takes fewer registers with AHEAD, and more without
    for (int k = 0; k < Tile::IN / 16; k += 2) {
      PixelWords<4> loaded;
      loaded.load(x, IN_BYTES, valid);
      x += 64;
      if (k % STEPS_PER_CHUNK == 0) b = weights_.take(k / STEPS_PER_CHUNK, before) + lane * 16;
      PixelFragments a[2];
      to_fragments(loaded, a);
      unroll<2>([&](auto step) { multiply<T, step * STEP_BYTES>(acc, a[step], b); });
      b += 2 * STEP_BYTES;
    }
    if constexpr (Tile::RESIDENT) __syncthreads();  // conv2 is through with the rows that these replace
    slot = before ? slot : ring_.after(slot, 2);
    const PixelWords<COLUMNS> result = rounded<T>(acc);
    unroll<4>([&](auto r) {
      const int again = ptx::thread_index(), pixel = own_pixel(again) + 8 * r;
      if (pixel >= count) return;
      const uint32_t to = ring_.address(slot, pixel) + again % 4 * 4;
      unroll<COLUMNS>([&](auto j) { ptx::store_shared_4<j * 16>(to, valid[r] ? ptx::relu_word<T>(result.words[r][j]) : 0); });
    });
    if constexpr (Tile::RESIDENT) __syncthreads();  // elsewhere the next chunk's barrier serves
  }

  // conv2 of the step's rows, as fragments; slot: of the ring's row before them.
  __device__ __forceinline__ void conv2(PixelFragments (&result)[K], int slot) {
    const int thread = ptx::thread_index(), lane = thread % 32;
    float acc[2][COLUMNS][4];
    start(acc, p_.bias + Tile::WIDTH, lane);
    int pixels[2];  // whose fragments the lane reads; in the last warp, those that are no more lie in another's
#pragma unroll
    for (int i = 0; i < 2; ++i) pixels[i] = min(warp_pixel(thread) + i * 16 + lane % 16, pixels_of_step_ - 1);
    uint32_t b = 0;
    int chunk = Tile::CHUNKS_1;
#pragma unroll 1
    for (int row = 0; row < 3; ++row) {
      uint32_t from[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        from[i] = ring_.address(ring_.after(slot, row), pixels[i]) + lane / 16 * 16 - RING_PIXEL_BYTES<Tile::WIDTH>;
#pragma unroll 1
      for (int column = 0; column < 3; ++column) {
        unroll<K>([&](auto k) {
          if constexpr (k % STEPS_PER_CHUNK == 0) b = weights_.take(chunk++) + lane * 16;
          PixelFragments a;
          unroll<2>([&](auto i) { ptx::ldmatrix_x4<k * 32>(a[i], from[i]); });
          multiply<T, k % STEPS_PER_CHUNK * STEP_BYTES>(acc, a, b);
        });
#pragma unroll
        for (int i = 0; i < 2; ++i) from[i] += RING_PIXEL_BYTES<Tile::WIDTH>;
      }
    }
    relu_fragments<T>(acc, result);
  }

  // conv3 of the step's rows, from pixel `first` of the image on, with what follows it, to memory.
  __device__ __forceinline__ void conv3(const PixelFragments (&a)[K], int first) {
    constexpr int PROJECTION = Tile::PROJECTED ? Tile::IN / 16 : 0;  // steps of mma
    constexpr int GROUP_BYTES = Tile::COLUMNS_3 / 2 * (PROJECTION + K) * FRAGMENT_BYTES, GROUPS = CHUNK_BYTES / GROUP_BYTES;
    constexpr int NEIGHBOURS = 2 * Tile::COLUMNS_3;  // channels of a group that a lane has, of 4 lanes' each
    const int thread = ptx::thread_index(), lane = thread % 32, own = own_pixel(thread);
    bool valid[4];
    validate(valid, own, first, pixels_of_step_);
    const char* x = static_cast<const char*>(p_.x) + in_batch(first + own) * IN_BYTES + lane % 4 * 16;
    char* y = static_cast<char*>(p_.y) + in_batch(first + own) * OUT_BYTES + lane % 4 * NEIGHBOURS * 2;
    const float* bias = p_.bias + 2 * Tile::WIDTH;
    PixelFragments of_x[PROJECTION / 2 + 1][2];
    unroll<PROJECTION / 2>([&](auto k) {
      PixelWords<4> loaded;
      loaded.load(x + k * 64, IN_BYTES, valid);
      to_fragments(loaded, of_x[k]);
    });
    PixelWords<Tile::COLUMNS_3> residual[AHEAD ? 2 : 1];
    if constexpr (AHEAD) residual[0].template load<true>(x, IN_BYTES, valid);
#pragma unroll 1
    for (int chunk = 0; chunk < Tile::CHUNKS_3; ++chunk) {
      const uint32_t b = weights_.take(Tile::CHUNKS_1 + Tile::CHUNKS_2 + chunk) + lane * 16;
      unroll<GROUPS>([&](auto group) {
        constexpr int OFFSET = group * GROUP_BYTES, K_BYTES = Tile::COLUMNS_3 / 2 * FRAGMENT_BYTES;
        static_assert(GROUPS % 2 == 0);
        PixelWords<Tile::COLUMNS_3>& added = residual[AHEAD ? group % 2 : 0];
        float acc[2][Tile::COLUMNS_3][4];
        if constexpr (Tile::PROJECTED) {
          start(acc, bias + Tile::OUT, lane);
          unroll<PROJECTION>([&](auto k) { multiply<T, OFFSET + k * K_BYTES>(acc, of_x[k / 2][k % 2], b); });
          added = rounded<T>(acc);
        } else if constexpr (AHEAD) {
          x += 8 * NEIGHBOURS;
          if (group + 1 < GROUPS || chunk + 1 < Tile::CHUNKS_3)
            residual[(group + 1) % 2].template load<true>(x, IN_BYTES, valid);
        } else {
          added.template load<true>(x, IN_BYTES, valid);
          x += 8 * NEIGHBOURS;
        }
        start(acc, bias, lane);
        unroll<K>([&](auto k) { multiply<T, OFFSET + (PROJECTION + k) * K_BYTES>(acc, a[k], b); });
        add_relu<T>(rounded<T>(acc), added).store(y, OUT_BYTES, valid);
        bias += 4 * NEIGHBOURS, y += 8 * NEIGHBOURS;
      });
    }
  }

  // Of a step's pixels, a thread's warp's first and its own first.
  __device__ __forceinline__ static int warp_pixel(int thread) { return thread / 32 * Tile::WARP_PIXELS; }
  __device__ __forceinline__ static int own_pixel(int thread) { return warp_pixel(thread) + thread % 32 / 4; }

  // A pixel of all images, with `first` of the image the step's first.
  __device__ __forceinline__ int64_t in_batch(int first) const { return int64_t(blockIdx.x) * p_.pixels + first; }

  // Which of a lane's pixels, from `own` of the step's on, are among the first `count` and in the image.
  __device__ __forceinline__ void validate(bool (&valid)[4], int own, int first, int count) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) valid[r] = own + 8 * r < count && uint32_t(first + own + 8 * r) < uint32_t(p_.pixels);
  }

  // Brings x's pixels of conv1's next step to L2.
  __device__ __forceinline__ void prefetch(int first) const {
    constexpr int LINE_BYTES = 128, LINES = IN_BYTES / LINE_BYTES;  // of a pixel
    const int count = min(pixels_of_step_, p_.pixels - first) * LINES;
    const char* x = static_cast<const char*>(p_.x) + in_batch(first) * IN_BYTES;
#pragma unroll 1
    for (int line = threadIdx.x; line < count; line += Tile::THREADS) ptx::prefetch_l2(x + line * LINE_BYTES);
  }

  const BlockParams& p_;
  const int pixels_of_step_;
  WeightStream<Tile::CHUNKS, Tile::CHUNKS_1, Tile::STAGES, Tile::THREADS> weights_;
  RowRing<Tile::WIDTH, Tile::THREADS> ring_;
};

}  // namespace resnet_fused
