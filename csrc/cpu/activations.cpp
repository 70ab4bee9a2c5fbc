#include "activations.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <vector>

#include "recent_need.h"
#include "runtime.h"
#include "../stable_abi.h"

// Of PyTorch 2.11's stable ABI; null where an older PyTorch runs the library.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* tensor, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* deleter_context);

namespace resnet_fused::cpu {

namespace {

// Smaller results come from PyTorch's allocator, whose free lists keep them.
constexpr int64_t SMALLEST = int64_t{1} << 20;
// Sizes of blocks are multiples of this, and not of a huge page: half of a ResNet's activations would be a quarter longer.
constexpr int64_t STEP = int64_t{64} << 10;
// A kept block serves a request of at least this fraction of its size, so that one small result doesn't hold a large block.
constexpr int64_t LARGEST_WASTE = 4;

using Block = ActivationBlock;

class Pool {
 public:
  Block* take(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t best = free_.size();
    for (size_t i = 0; i < free_.size(); ++i) {
      const int64_t size = free_[i]->size;
      // Of blocks of one size the one given back last, some of which is still in the caches.
      if (size >= bytes && size / LARGEST_WASTE <= bytes && (best == free_.size() || size <= free_[best]->size)) best = i;
    }
    Block* block = nullptr;
    if (best < free_.size()) {
      block = free_[best];
      free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(best));
      kept_ -= block->size;
    } else {
      const int64_t size = (bytes + STEP - 1) / STEP * STEP;
      block = new Block{allocate_huge_pages(size), size};
    }
    used_ += block->size;
    need_.in_use(used_, true);
    trim(limit());
    return block;
  }

  void give_back(Block* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ -= block->size;
    kept_ += block->size;
    free_.push_back(block);
    need_.in_use(used_, false);
    trim(limit());
  }

  int64_t release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t bytes = kept_;
    trim(0);
    need_.forget(used_);
    return bytes;
  }

  int64_t kept() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return kept_;
  }

 private:
  // Together with what is in use, the pool holds an eighth more than was lately in use at once: a network's layers differ in
  // size, and the largest are wanted again at the next call. From the third or fourth call on nothing is allocated.
  int64_t limit() const { return need_.bytes() + need_.bytes() / 8 - used_; }

  // Frees the longest kept blocks until at most `limit` bytes are kept.
  void trim(int64_t limit) {
    while (kept_ > limit && !free_.empty()) {
      Block* block = free_.front();
      free_.erase(free_.begin());
      kept_ -= block->size;
      std::free(block->memory);
      delete block;
    }
  }

  std::mutex mutex_;
  std::vector<Block*> free_;
  int64_t used_ = 0, kept_ = 0;
  RecentNeed need_;
};

// Never destroyed: a tensor may outlive every static object of this library.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

using Sizes = std::array<int64_t, 4>;

// From the pool, uninitialised, on the device of `like`; null where the tensor is small, or PyTorch can't make tensors of
// foreign memory.
std::optional<torch::stable::Tensor> from_pool(const torch::stable::Tensor& like, int32_t dtype, size_t element_size,
                                               const Sizes& size, const Sizes& stride) {
  const int64_t bytes = size[0] * size[1] * size[2] * size[3] * static_cast<int64_t>(element_size);
  if (bytes < SMALLEST || torch_from_blob == nullptr) return std::nullopt;
  int32_t device_type = 0, layout = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(like.get(), &layout));
  Block* block = pool().take(bytes);
  AtenTensorHandle tensor = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(
      block->memory, 4, size.data(), stride.data(), 0, dtype, device_type, -1, &tensor, layout, nullptr, 0,
      [](void*, void* context) { pool().give_back(static_cast<Block*>(context)); }, block));
  return torch::stable::Tensor(tensor);
}

int32_t dtype_of(const torch::stable::Tensor& like) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return dtype;
}

}  // namespace

torch::stable::Tensor new_activations(const torch::stable::Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  const Sizes size{n, c, h, w};
  auto pooled = from_pool(like, dtype_of(like), like.element_size(), size, {c * h * w, 1, w * c, c});
  if (pooled.has_value()) return *pooled;
  return torch::stable::empty({size.data(), size.size()}, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

torch::stable::Tensor new_activations(const torch::stable::Tensor& like) {
  const Sizes size{like.size(0), like.size(1), like.size(2), like.size(3)};
  const Sizes stride{like.stride(0), like.stride(1), like.stride(2), like.stride(3)};
  auto pooled = from_pool(like, dtype_of(like), like.element_size(), size, stride);
  return pooled.has_value() ? *pooled : torch::stable::empty_like(like);
}

torch::stable::Tensor new_weight_gradient(const torch::stable::Tensor& like, int64_t o, int64_t k, int64_t i) {
  const Sizes size{o, k, k, i};
  auto pooled = from_pool(like, aoti_torch_dtype_float32(), sizeof(float), size, {k * k * i, k * i, i, 1});
  if (pooled.has_value()) return *pooled;
  return torch::stable::empty({size.data(), size.size()}, torch::headeronly::ScalarType::Float, std::nullopt, like.device());
}

void GiveBack::operator()(ActivationBlock* block) const { pool().give_back(block); }

ActivationMemory take_activation_memory(int64_t bytes) { return ActivationMemory(pool().take(bytes)); }

int64_t release_activations() { return pool().release(); }

int64_t kept_activations() { return pool().kept(); }

}  // namespace resnet_fused::cpu
