#include "runtime.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

#include "isa.h"

#if RF_X86_64
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace resnet_fused::cpu {

namespace {

constexpr int64_t HUGE_PAGE = int64_t{2} << 20;
constexpr int64_t CACHE_LINE = 64;

int64_t ceil_div(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }
int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// A stack of chunks. A request that doesn't fit opens a new chunk, since the older ones may be in use; once the stack is
// empty, several chunks become one as large as the stack ever was, so that the steady state is a single chunk.
struct Arena {
  struct Chunk {
    char* memory;
    int64_t size;
    int64_t before;  // bytes of the stack below this chunk
  };
  std::vector<Chunk> chunks;
  size_t current = 0;
  int64_t used = 0;  // of the current chunk
  int64_t highest = 0;

  ~Arena() { release(); }

  void release() {
    for (Chunk& chunk : chunks) std::free(chunk.memory);
    chunks.clear();
    current = 0;
    used = 0;
  }

  void open(int64_t bytes) {
    const int64_t size = round_up(bytes, HUGE_PAGE);
    chunks.push_back({static_cast<char*>(allocate_huge_pages(size)), size, 0});
    current = chunks.size() - 1;
    used = 0;
  }

  void* take(int64_t bytes) {
    bytes = round_up(std::max<int64_t>(bytes, 1), CACHE_LINE);
    if (current == 0 && used == 0 && chunks.size() > 1) {
      release();
      open(std::max(highest, bytes));
    }
    if (chunks.empty()) open(bytes);
    while (used + bytes > chunks[current].size) {
      const int64_t below = chunks[current].before + used;
      if (current + 1 < chunks.size()) {
        ++current;
        used = 0;
      } else {
        open(bytes);
      }
      chunks[current].before = below;
    }
    char* p = chunks[current].memory + used;
    used += bytes;
    highest = std::max(highest, chunks[current].before + used);
    return p;
  }
};

thread_local Arena arena;

// What begin_shares() asked for, on the thread that asked.
struct Shares {
  bool wanted = false;
  int64_t first = 0;
  std::vector<int64_t> found;
};
thread_local Shares shares;

}  // namespace

int64_t thread_count() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

Cut cut(int64_t blocks, int64_t most_blocks, int64_t panels, int64_t multiply_adds) {
  // About 20 microseconds of a core; handing out less takes longer than what it evens out.
  constexpr int64_t SMALLEST_UNIT = int64_t{1} << 20;
  const int64_t threads = thread_count();
  // Four units a thread even out what one loses to another process.
  const int64_t wanted = threads * std::clamp<int64_t>(multiply_adds / (threads * SMALLEST_UNIT), 1, 4);
  int64_t groups = std::min(panels, ceil_div(wanted, blocks));
  while (panels % groups != 0) ++groups;
  blocks = std::max(blocks, std::min(most_blocks, ceil_div(threads, groups)));
  const int64_t rounds = ceil_div(blocks * groups, threads);
  if (100 * blocks * groups < 95 * rounds * threads) {  // in the last round many threads would have nothing to do
    blocks = std::max(blocks, std::min(most_blocks, round_up(blocks, threads / std::gcd(threads, groups))));
  }
  return {blocks, groups};
}

// A run of neighbouring units, on a cache line of its own.
struct alignas(CACHE_LINE) Units::Run {
  std::atomic<int64_t> next;
  int64_t end;

  // The next unit of the run if it has more than `spared` left; -1 otherwise.
  int64_t take(int64_t spared) {
    if (next.load(std::memory_order_relaxed) + spared >= end) return -1;
    const int64_t unit = next.fetch_add(1, std::memory_order_relaxed);
    return unit < end ? unit : -1;
  }
};

bool Units::take() {
  current_ = following_;
  for (int64_t i = 0; current_ < 0 && i < threads_; ++i) current_ = runs_[(thread_ + i) % threads_].take(0);
  following_ = current_ < 0 ? -1 : runs_[thread_].take(threads_ > 1 ? 1 : 0);
  return current_ >= 0;
}

void run_workers(int64_t units, void (*worker)(void*, Units&), void* context) {
  const int64_t threads = std::max<int64_t>(std::min(thread_count(), units), 1);
  std::vector<Units::Run> runs(static_cast<size_t>(threads));
  for (int64_t i = 0; i < threads; ++i) {
    Units::Run& run = runs[static_cast<size_t>(i)];
    run.next.store(units * i / threads, std::memory_order_relaxed);
    run.end = units * (i + 1) / threads;
  }
  if (shares.wanted) {
    std::vector<int64_t>& found = shares.found;
    found.insert(found.end(), {units, threads});
    const size_t begin = found.size();
    found.resize(begin + runs.size());
    for (int64_t i = 0; i < threads; ++i) {
      const size_t share = static_cast<size_t>((shares.first + i) % threads);
      Units own(&runs[share], 1, 0);
      const auto start = std::chrono::steady_clock::now();
      worker(context, own);
      found[begin + share] = std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
    }
    return;
  }
  const auto work = [&](int64_t thread, int64_t) {
    Units own(runs.data(), threads, thread);
    worker(context, own);
  };
  threads == 1 ? work(0, 1) : torch::stable::parallel_for(0, threads, 1, work);
}

void begin_shares(int64_t first) { shares = {true, first, {}}; }

std::vector<int64_t> end_shares() { return std::exchange(shares, {}).found; }

Scratch::Scratch() : chunk_(arena.current), used_(arena.used) {}

Scratch::~Scratch() {
  arena.current = chunk_;
  arena.used = used_;
}

void* Scratch::take_bytes(int64_t bytes) { return arena.take(bytes); }

void* allocate_huge_pages(int64_t bytes) {
  void* memory = std::aligned_alloc(static_cast<size_t>(HUGE_PAGE), static_cast<size_t>(bytes));
  if (memory == nullptr) throw std::bad_alloc();
  advise_huge_pages(memory, bytes);
  return memory;
}

void advise_huge_pages(void* p, int64_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + 4095) & ~uintptr_t{4095};
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes)) & ~uintptr_t{4095};
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)p;
  (void)bytes;
#endif
}

namespace {

Isa best_isa() {
#if RF_X86_64
  __builtin_cpu_init();  // this runs as a static initialiser, perhaps before the compiler's own
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::scalar;
}

std::atomic<Isa> chosen_isa{best_isa()};

}  // namespace

Isa detected_isa() { return chosen_isa.load(std::memory_order_relaxed); }

Isa limit_isa(Isa highest) {
  chosen_isa.store(std::min(best_isa(), highest), std::memory_order_relaxed);
  return detected_isa();
}

bool has_avx512_bf16() {
#if RF_X86_64
  return detected_isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool has_float16() {
#if RF_X86_64
  // By CPUID: not every compiler knows "f16c" in __builtin_cpu_supports. AVX2, which is looked for before, is the system's part.
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned F16C = 1u << 29;  // CPUID leaf 1, ECX
  return detected_isa() == Isa::scalar || (__get_cpuid(1, &a, &b, &c, &d) != 0 && (c & F16C) != 0);
#else
  return true;
#endif
}

bool has_amx_bf16() {
#if RF_X86_64
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned AMX_BF16 = 1u << 22;  // CPUID leaf 7, EDX
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & AMX_BF16) != 0;
#else
  return false;
#endif
}

}  // namespace resnet_fused::cpu
