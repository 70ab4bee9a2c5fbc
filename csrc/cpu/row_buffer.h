// A window on the rows of an image in the making, for layers that are computed strip by strip.
#pragma once

#include "winograd_stages.h"

namespace resnet_fused::cpu::RF_ISA {

// The rows of a layer's result that the following 3 x 3 layer may still need. They lie in memory in order, from row `begin`.
template <class T>
class RowBuffer {
 public:
  RowBuffer(Scratch& scratch, int64_t capacity, int64_t height, int64_t width, int64_t channels)
      : data_(scratch.take<T>(capacity * width * channels)), height_(height), width_(width), channels_(channels) {}

  // Forgets everything; the first row to come is `row`.
  void restart(int64_t row) { begin_ = end_ = row; }

  // Drops the rows before `row` and moves the others to the front.
  void keep_from(int64_t row) {
    if (row <= begin_) return;
    const int64_t size = width_ * channels_;
    if (row < end_) {
      __builtin_memmove(data_, data_ + (row - begin_) * size, static_cast<size_t>((end_ - row) * size) * sizeof(T));
    }
    begin_ = row;
    if (end_ < row) end_ = row;
  }

  void grow_to(int64_t row) { end_ = row; }
  int64_t end() const { return end_; }
  T* row(int64_t h) const { return data_ + (h - begin_) * width_ * channels_; }
  template <class Element>
  Strip<Element> strip() const {
    return {data_, begin_, height_, width_, channels_};
  }

 private:
  T* data_;
  int64_t begin_ = 0, end_ = 0;
  int64_t height_, width_, channels_;
};

}  // namespace resnet_fused::cpu::RF_ISA
