// Output channels of a grouped convolution in vectors, and its weights packed for them:
//
//   [vector][kernel row][input channel of a group][kernel column][LANES], float32
//
// Groups that fit a vector are put into it whole, as many as fit; of wider ones the vectors follow each other through the
// groups, so that one may hold the end of a group and the beginning of the next.
#pragma once

#include "simd.h"

namespace resnet_fused::cpu::RF_ISA {

// How a pixel becomes the vector that weights multiply; see grouped.h.
enum class GroupKind : uint8_t { own_channel, spread_groups, one_group, two_groups };

// One vector of output channels.
struct GroupVector {
  int64_t first_output, outputs;
  int64_t first_input, inputs;  // those of its groups
  int64_t first_group;          // outputs that belong to its first group
  int64_t weights;              // where its weights begin
  GroupKind kind;
  bool whole;  // has no lane to spare
};

struct GroupLanes {
  int64_t in, out;   // channels of a group
  int64_t total;     // output channels
  int64_t together;  // groups in a vector; 1: one, or part of one
  int64_t step;      // output channels in a vector
  int64_t blocks;    // vectors

  GroupLanes(int64_t groups, int64_t in_channels, int64_t out_channels)
      : in(in_channels / groups),
        out(out_channels / groups),
        total(out_channels),
        together(std::max<int64_t>(1, LANES / std::max(in, out))),
        step(std::min<int64_t>(LANES, together * out)),
        blocks((total + step - 1) / step) {}

  bool depthwise() const { return in == 1 && out == 1; }
  int64_t outputs(int64_t block) const { return std::min(step, total - block * step); }

  const GroupVector* vectors(GroupVector* list, int64_t taps) const {
    for (int64_t block = 0; block < blocks; ++block) {
      GroupVector& v = list[block];
      v.first_output = block * step;
      v.outputs = outputs(block);
      v.first_input = v.first_output / out * in;
      v.first_group = out - v.first_output % out;
      v.inputs = (v.outputs - v.first_group + 2 * out - 1) / out * in;
      v.weights = block * taps * in * LANES;
      v.kind = depthwise()                  ? GroupKind::own_channel
               : together > 1               ? GroupKind::spread_groups
               : v.first_group >= v.outputs ? GroupKind::one_group
                                            : GroupKind::two_groups;
      v.whole = v.outputs == LANES && (together == 1 || v.inputs == LANES);
    }
    return list;
  }

  // Of any vector: one that begins within a group may end in the next.
  int64_t most_inputs() const { return std::max<int64_t>(together, 2) * in; }

  // For each input channel k of a group, the lane of the input vector that each lane of the results multiplies.
  const int32_t* spread(int32_t* order) const {
    for (int64_t k = 0; k < in; ++k) {
      for (int64_t lane = 0; lane < LANES; ++lane) {
        order[k * LANES + lane] = static_cast<int32_t>(lane < step ? lane / out * in + k : 0);
      }
    }
    return order;
  }
};

inline int64_t grouped_size(int64_t groups, int64_t in_channels, int64_t out_channels, int64_t taps) {
  const GroupLanes lanes(groups, in_channels, out_channels);
  return lanes.blocks * taps * lanes.in * LANES;
}

template <class From>
void pack_grouped_as(const PackParams& p, int64_t groups, int64_t kernel) {
  const GroupLanes lanes(groups, p.in_channels * groups, p.out_channels);
  const From* weights = static_cast<const From*>(p.weights);
  parallel_units(lanes.blocks, [&](int64_t block, int64_t) {
    float* out = static_cast<float*>(p.packed) + block * p.taps * lanes.in * LANES;
    const int64_t outputs = lanes.outputs(block);
    for (int64_t kh = 0; kh < p.taps / kernel; ++kh) {
      for (int64_t k = 0; k < lanes.in; ++k) {
        for (int64_t kw = 0; kw < kernel; ++kw, out += LANES) {
          for (int64_t lane = 0; lane < LANES; ++lane) {
            const int64_t filter = block * lanes.step + lane;
            out[lane] = lane < outputs ? widen(weights[(filter * p.taps + kh * kernel + kw) * lanes.in + k]) : 0.0f;
          }
        }
      }
    }
  });
}

// `kernel`: columns of the filter. p.in_channels are those of a group.
inline void pack_grouped(const PackParams& p, int64_t groups, int64_t kernel) {
  with_element(p.source, [&](auto from) { pack_grouped_as<decltype(from)>(p, groups, kernel); });
}

}  // namespace resnet_fused::cpu::RF_ISA
