// How much memory is worth keeping, from how much was in use lately.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

namespace resnet_fused::cpu {

// Use comes in cycles, from nothing in use to nothing in use: a model's call or a part of one. What only one of the last CYCLES
// cycles needed isn't worth keeping, be it one large image among small ones; what two of them needed will be wanted again.
class RecentNeed {
 public:
  // To be called with the bytes in use after each change of them.
  void in_use(int64_t bytes, bool taken) {
    most_ = std::max(most_, bytes);
    takes_ += taken ? 1 : 0;
    // Where somebody holds a result all the time, some number of takes, that of several calls, is a cycle.
    if (bytes == 0 || takes_ == LONGEST) end_cycle(bytes);
  }

  // What the cycle that is going on has needed so far, or two earlier ones did.
  int64_t bytes() const { return std::max(most_, twice_); }

  void forget(int64_t in_use) { *this = RecentNeed{}, most_ = in_use; }

 private:
  static constexpr size_t CYCLES = 256;
  static constexpr int64_t LONGEST = 1024;

  void end_cycle(int64_t bytes) {
    cycles_[next_++ % CYCLES] = most_;
    int64_t first = 0;
    twice_ = 0;
    for (const int64_t most : cycles_) {
      twice_ = std::max(twice_, std::min(first, most));
      first = std::max(first, most);
    }
    most_ = bytes;
    takes_ = 0;
  }

  std::array<int64_t, CYCLES> cycles_{};  // the most in use in each
  size_t next_ = 0;
  int64_t most_ = 0, takes_ = 0;  // of this cycle
  int64_t twice_ = 0;
};

}  // namespace resnet_fused::cpu
