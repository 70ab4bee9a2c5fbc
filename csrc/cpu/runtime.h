// Threads and scratch memory, shared by all kernels and independent of the instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace resnet_fused::cpu {

// The threads that torch.set_num_threads grants a parallel region.
int64_t thread_count();

// Runs unit(context, u, following) for every u in [0, units) on PyTorch's threads. Units are handed out one by one, so that
// a thread which loses its core to another process delays no more than the two units in its hands (one, among the last). `following` is the
// thread's next unit, where it is known in advance so that its memory can be prefetched (>= units: none).
void run_units(int64_t units, void (*unit)(void* context, int64_t u, int64_t following), void* context);

template <class Unit>
void parallel_units(int64_t units, Unit&& unit) {
  using Callable = std::remove_reference_t<Unit>;
  run_units(
      units, [](void* context, int64_t u, int64_t following) { (*static_cast<Callable*>(context))(u, following); },
      const_cast<void*>(static_cast<const void*>(&unit)));
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

// Asks the system for huge pages behind [p, p + bytes): one page fault and one TLB entry per 2 MiB.
void advise_huge_pages(void* p, int64_t bytes);

}  // namespace resnet_fused::cpu
