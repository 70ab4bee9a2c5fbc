// Watches over the memory of a model's parameters. Kernels keep packed copies of them. A write through a tensor counts up its
// version, but one through `.data`, by numpy or by another process leaves no trace except in the memory itself. So a watch looks
// there at each call of a model: at a few words of every tensor, which a write to all of it changes, and at one part of all
// memory after the other, by checksum, which finds a single element in the end. resnet_fused/backends/watch.py is the caller.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "../checks.h"
#include "registry.h"
#include "../stable_abi.h"

namespace resnet_fused::cpu {
namespace {

using torch::stable::Tensor;

// Memory whose checksum a call compares, in 2 to 4 microseconds, most of it for getting it into the caches.
constexpr int64_t PART = int64_t{48} << 10;
// Parts are put together from pieces of at most this size, since tensors differ in size.
constexpr int64_t PIECE = int64_t{8} << 10;

constexpr int64_t WORD = sizeof(uint64_t);
// Words looked at in every call: all of a tensor of up to SMALL bytes, else two, or in tensors that lie in many pages, four. Each
// page costs some 50 ns where neither it nor its entry in the page table is in the caches, as after a model's run.
constexpr int64_t SMALL = 16 * WORD, LARGE = int64_t{16} << 10;
constexpr int64_t FEW = 2, MANY = 4;
constexpr int64_t SEARCH = 64;  // words in which one that isn't zero is looked for

uint64_t load(const char* p) {
  uint64_t word;
  std::memcpy(&word, p, sizeof(word));
  return word;
}

// ---- Where a tensor's memory is -----------------------------------------------------------------------------------------

struct Dimension {
  int64_t size, stride;  // in bytes
};

// Runs of adjacent bytes, as many as the dimensions say, by ascending stride. An expanded dimension is the same memory again and
// left out.
struct Extent {
  int64_t run;
  std::vector<Dimension> dimensions;

  explicit Extent(const Tensor& t) : run(static_cast<int64_t>(t.element_size())) {
    std::vector<Dimension> all;
    for (int64_t d = 0; d < t.dim(); ++d) {
      if (t.size(d) != 1 && t.stride(d) != 0) all.push_back({t.size(d), t.stride(d) * run});
    }
    std::sort(all.begin(), all.end(), [](const Dimension& a, const Dimension& b) { return a.stride < b.stride; });
    for (const Dimension& d : all) {
      if (dimensions.empty() && d.stride == run) {
        run *= d.size;
      } else if (!dimensions.empty() && d.stride == dimensions.back().stride * dimensions.back().size) {
        dimensions.back().size *= d.size;
      } else {
        dimensions.push_back(d);
      }
    }
  }

  int64_t runs() const {
    int64_t count = 1;
    for (const Dimension& d : dimensions) count *= d.size;
    return count;
  }

  int64_t offset_of_run(int64_t index) const {
    int64_t offset = 0;
    for (const Dimension& d : dimensions) {
      offset += index % d.size * d.stride;
      index /= d.size;
    }
    return offset;
  }

  // From the first byte to the one after the last.
  int64_t bytes() const { return offset_of_run(runs() - 1) + run; }
};

// Whether the tensor's memory can be read, and is all within what its storage owns.
bool readable(const Tensor& t, const void* data) {
  int32_t layout = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
  if (!t.is_cpu() || layout != aoti_torch_layout_strided() || data == nullptr || t.numel() == 0) return false;
  int64_t storage = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &storage));
  return t.storage_offset() * static_cast<int64_t>(t.element_size()) + Extent(t).bytes() <= storage;
}

// ---- Checksums ----------------------------------------------------------------------------------------------------------

// Rotations and sums in 32 lanes, as fast as memory comes without any instruction set in particular. Each step is a bijection, so
// a change of one lane's word is never missed. (A multiplication in place of the rotation would lose an even number of signs.)
class Checksum {
 public:
  static constexpr int64_t BLOCK = 128;

  void add(const char* p, int64_t bytes) {
    constexpr int64_t AHEAD = 1024;  // the processor itself looks ahead in one page only
    for (; bytes >= BLOCK; p += BLOCK, bytes -= BLOCK) {
      __builtin_prefetch(p + AHEAD);
      __builtin_prefetch(p + AHEAD + BLOCK / 2);
      add_block(p);
    }
    if (bytes > 0) {
      char rest[BLOCK] = {};
      std::memcpy(rest, p, static_cast<size_t>(bytes));
      add_block(rest);
    }
  }

  uint64_t value() const {
    uint64_t sum = 0;
    for (const Lanes& lanes : lanes_) {
      for (int i = 0; i < 4; ++i) {
        sum = (sum ^ lanes[i]) * 0x9e3779b97f4a7c15u;
        sum ^= sum >> 32;
      }
    }
    return sum;
  }

 private:
  using Lanes = uint32_t __attribute__((vector_size(16)));

  void add_block(const char* p) {
    for (size_t i = 0; i < 8; ++i) {
      Lanes words;
      std::memcpy(&words, p + 16 * i, sizeof(words));
      lanes_[i] = ((lanes_[i] << 13) | (lanes_[i] >> 19)) + words;
    }
  }

  Lanes lanes_[8] = {};
};

// ---- A watch ------------------------------------------------------------------------------------------------------------

// `rows` times `bytes` of memory.
struct Piece {
  const char* data;
  int64_t bytes, rows, stride;

  // Of the checksum, in bytes: a row of few bytes takes as long as a block.
  int64_t cost() const { return rows * std::max(bytes, Checksum::BLOCK); }
};

struct Part {
  size_t begin, end;  // pieces
  uint64_t checksum;
};

class Watch {
 public:
  explicit Watch(std::vector<Tensor> tensors) : tensors_(std::move(tensors)) {
    for (const Tensor& t : tensors_) {
      const void* data = t.const_data_ptr();
      handles_.push_back(t.get());
      data_.push_back(data);
      if (!readable(t, data)) continue;
      const Extent extent(t);
      add_samples(static_cast<const char*>(data), extent);
      add_pieces(static_cast<const char*>(data), extent);
    }
    divide();
  }

  bool unchanged() {
    if (changed_.load(std::memory_order_relaxed)) return false;
    const bool same = same_data() && same_samples() && same_part();
    // For good, since only one call in many comes by the changed part.
    if (!same) changed_.store(true, std::memory_order_relaxed);
    return same;
  }

  int64_t parts() const { return static_cast<int64_t>(parts_.size()); }

 private:
  void add_samples(const char* data, const Extent& extent) {
    const int64_t bytes = extent.runs() * extent.run;
    if (extent.run < WORD) {
      const int64_t count = bytes <= SMALL ? extent.runs() : std::min(bytes < LARGE ? FEW : MANY, extent.runs());
      for (int64_t i = 0; i < count; ++i) {
        const char* p = data + extent.offset_of_run((2 * i + 1) * extent.runs() / (2 * count));
        for (int64_t byte = 0; byte < extent.run; ++byte) {
          byte_places_.push_back(p + byte);
          bytes_.push_back(p[byte]);
        }
      }
      return;
    }
    const int64_t words = (extent.run + WORD - 1) / WORD;  // of a run; the last may overlap the one before
    const auto place = [&](int64_t index) {
      return data + extent.offset_of_run(index / words) + std::min(index % words * WORD, extent.run - WORD);
    };
    const int64_t all = extent.runs() * words;
    const int64_t count = bytes <= SMALL ? all : bytes < LARGE ? FEW : MANY;
    for (int64_t i = 0; i < count; ++i) {
      int64_t index = (2 * i + 1) * all / (2 * count);
      // Better a word that isn't zero: a multiplication leaves zeros as they are, and pruned weights are mostly zeros.
      for (int64_t other = index; other < std::min(index + SEARCH, all); ++other) {
        if (load(place(other)) == 0) continue;
        index = other;
        break;
      }
      places_.push_back(place(index));
      words_.push_back(load(place(index)));
    }
  }

  void add_pieces(const char* data, const Extent& extent) {
    // Rows of a piece: along the dimension of the smallest stride.
    const Dimension inner = extent.dimensions.empty() ? Dimension{1, 0} : extent.dimensions.front();
    for (int64_t run = 0; run < extent.runs(); run += inner.size) {
      const char* begin = data + extent.offset_of_run(run);
      for (int64_t column = 0; column < extent.run; column += PIECE) {
        const int64_t bytes = std::min(PIECE, extent.run - column);
        const int64_t most = PIECE / std::max(bytes, Checksum::BLOCK);
        for (int64_t row = 0; row < inner.size; row += most) {
          pieces_.push_back({begin + column + row * inner.stride, bytes, std::min(most, inner.size - row), inner.stride});
        }
      }
    }
  }

  void divide() {
    int64_t cost = 0;
    for (size_t i = 0; i < pieces_.size(); ++i) {
      cost += pieces_[i].cost();
      if (parts_.empty() || cost > PART) {
        parts_.push_back({i, i, 0});
        cost = pieces_[i].cost();
      }
      parts_.back().end = i + 1;
    }
    for (Part& part : parts_) part.checksum = checksum(part);
  }

  uint64_t checksum(const Part& part) const {
    Checksum sum;
    for (size_t i = part.begin; i < part.end; ++i) {
      const Piece& piece = pieces_[i];
      for (int64_t row = 0; row < piece.rows; ++row) sum.add(piece.data + row * piece.stride, piece.bytes);
    }
    return sum.value();
  }

  // Where `.data` was set to another tensor the memory known here may be gone: this comes before anything is read.
  bool same_data() const {
    for (size_t i = 0; i < handles_.size(); ++i) {
      const void* data = nullptr;
      STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handles_[i], &data));
      if (data != data_[i]) return false;
    }
    return true;
  }

  bool same_samples() const {
    uint64_t different = 0;
    for (size_t i = 0; i < places_.size(); ++i) different |= load(places_[i]) ^ words_[i];
    for (size_t i = 0; i < byte_places_.size(); ++i) different |= static_cast<uint64_t>(*byte_places_[i] ^ bytes_[i]);
    return different == 0;
  }

  bool same_part() {
    if (parts_.empty()) return true;
    const Part& part = parts_[next_.fetch_add(1, std::memory_order_relaxed) % parts_.size()];
    return checksum(part) == part.checksum;
  }

  const std::vector<Tensor> tensors_;  // keeps the handles
  std::vector<AtenTensorHandle> handles_;
  std::vector<const void*> data_;
  std::vector<const char*> places_;  // of the samples
  std::vector<uint64_t> words_;
  std::vector<const char*> byte_places_;  // of samples in runs shorter than a word
  std::vector<char> bytes_;
  std::vector<Piece> pieces_;
  std::vector<Part> parts_;
  std::atomic<uint64_t> next_{0};
  std::atomic<bool> changed_{false};
};

// ---- The watches that exist ---------------------------------------------------------------------------------------------

// Never destroyed: a model may outlive every static object of this library.
Registry<Watch>& watches() {
  static Registry<Watch>* const instance = new Registry<Watch>("watch");
  return *instance;
}

// ---- Operators ----------------------------------------------------------------------------------------------------------

int64_t new_watch(std::vector<Tensor> tensors) { return watches().add(std::make_shared<Watch>(std::move(tensors))); }
bool watch_unchanged(int64_t watch) { return watches().get(watch)->unchanged(); }
// Calls of watch_unchanged in which all memory is looked at once.
int64_t watch_parts(int64_t watch) { return watches().get(watch)->parts(); }
void delete_watch(int64_t watch) { watches().remove(watch); }

}  // namespace
}  // namespace resnet_fused::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def("new_watch(Tensor[] tensors) -> int");
  m.def("watch_unchanged(int watch) -> bool");
  m.def("watch_parts(int watch) -> int");
  m.def("delete_watch(int watch) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CompositeExplicitAutograd, m) {
  using namespace resnet_fused::cpu;
  m.impl("new_watch", TORCH_BOX(&new_watch));
  m.impl("watch_unchanged", TORCH_BOX(&watch_unchanged));
  m.impl("watch_parts", TORCH_BOX(&watch_parts));
  m.impl("delete_watch", TORCH_BOX(&delete_watch));
}
