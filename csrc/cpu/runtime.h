// Threads and scratch memory, shared by all kernels and independent of the instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace resnet_fused::cpu {

// The threads that torch.set_num_threads grants a parallel region.
int64_t thread_count();

// The units of work that a thread takes, one by one, in a parallel region: first those of a run of its own, so that from layer
// to layer a thread works on the same part of an image and finds it in its own cache, then what others haven't begun, so that
// a thread that loses its core to another process delays no more than the two units in its hands.
class Units {
 public:
  struct Run;

  Units(Run* runs, int64_t threads, int64_t thread) : runs_(runs), threads_(threads), thread_(thread) {}

  // Takes the next unit; false when there is none.
  bool take();
  int64_t current() const { return current_; }
  // The unit after this one, claimed in advance so that its memory can be prefetched; -1 where it isn't known.
  int64_t following() const { return following_; }

 private:
  Run* const runs_;
  const int64_t threads_, thread_;
  int64_t current_ = -1, following_ = -1;
};

// How a convolution is cut into units of work: blocks of rows of pixels, times groups of panels.
struct Cut {
  int64_t blocks, groups;
};

// The cut for the threads at hand. `blocks` are needed for their size, there may be `most_blocks`; all groups have as many panels.
Cut cut(int64_t blocks, int64_t most_blocks, int64_t panels, int64_t multiply_adds);

// Runs worker(context, units) on each of PyTorch's threads, as many as there are units for.
void run_workers(int64_t units, void (*worker)(void* context, Units& units), void* context);

// From begin_shares() to end_shares() the calling thread runs every region alone: one thread's run of units after the other, as
// they would be divided among all threads. What comes back tells of each region its units, its threads, and the nanoseconds
// that each thread's share took, in this order: how work divides among more threads than the machine has cores. The shares are
// run from number `first` on, since what comes first finds the caches cold.
void begin_shares(int64_t first);
std::vector<int64_t> end_shares();

// Runs worker(Units&) on each thread: for work that keeps something of its own from one unit to the next.
template <class Worker>
void parallel_workers(int64_t units, Worker&& worker) {
  using Callable = std::remove_reference_t<Worker>;
  run_workers(
      units, [](void* context, Units& own) { (*static_cast<Callable*>(context))(own); },
      const_cast<void*>(static_cast<const void*>(&worker)));
}

// Runs unit(u, following) for every u in [0, units).
template <class Unit>
void parallel_units(int64_t units, Unit&& unit) {
  parallel_workers(units, [&](Units& own) {
    while (own.take()) unit(own.current(), own.following());
  });
}

// Scratch memory of the calling thread: a stack in one block that grows and stays with the thread. A Scratch object gives
// back what it took when it goes out of scope; objects of one thread must end in the reverse order of their beginning.
class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // `count` elements on a cache line of their own, uninitialised.
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(count * static_cast<int64_t>(sizeof(T))));
  }

 private:
  void* take_bytes(int64_t bytes);
  size_t chunk_;  // where the thread's stack stood when this object began
  int64_t used_;
};

// Memory that begins at a huge page and consists of huge pages; std::free gives it back. Throws std::bad_alloc.
void* allocate_huge_pages(int64_t bytes);

// Asks the system for huge pages in [p, p + bytes): one page fault and one TLB entry per 2 MiB.
void advise_huge_pages(void* p, int64_t bytes);

}  // namespace resnet_fused::cpu
