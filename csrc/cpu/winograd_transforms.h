// The transforms of Winograd's minimal filtering F(m x m, 3 x 3): Y = A^T [(G g G^T) * (B^T d B)] A.
//
// Built by Toom-Cook from interpolation points 0, +-a(, +-b), infinity (Lavin and Gray 2015, section 4; Blahut 2010). The
// factors 1/N_i = 1/prod(p_i - p_j) of Lagrange's formula are put into the output transform A^T rather than into G, so that a
// weight transform is a bare evaluation at the points, cheap enough to be done at every call.
// For F(4) the points are 0, +-sqrt(1/2), +-sqrt(2), infinity: symmetric in magnitude about 1, they keep the entries of the
// matrices close together and halve the rounding error of the usual 0, +-1, +-2 (see docs/cpu-kernels.md).
// Each function transforms one line of vectors; a tile is transformed by its columns, then its rows.
//
// Members common to all: M, the output tile; A, the input tile; PAD, how far above and left of its first output it begins;
// STRIDE of the convolution; PHASES, the images that an image of stride 2 splits into (even and odd rows and columns); TAPS of a
// phase's kernel in a line, and which row and column of the whole kernel each is (-1: none); watched(), whether uneven.h is to
// see a result of input(). GROUPS, those of the channels that have taps of their own, and has_tap(), where in a window a phase and
// a group have one: uneven.h asks.
#pragma once

#include "simd.h"

namespace resnet_fused::cpu::RF_ISA {

// Phases that contribute to a point: `count` of them, from `first` on.
struct PhaseRun {
  int64_t first, count;
};

// Of an algorithm for stride 1: the image itself.
struct OnePhase {
  static constexpr int STRIDE = 1;
  static constexpr int PHASES = 1;
  static RF_INLINE PhaseRun run(int) { return {0, 1}; }
  static constexpr int TAPS = 3;
  static constexpr int kernel_row(int, int tap) { return tap; }
  static constexpr int kernel_column(int, int tap) { return tap; }
  static constexpr int GROUPS = 1;
  static constexpr bool has_tap(int, int, int, int) { return true; }
  static RF_INLINE int64_t first_row(int64_t top, int64_t pad, int) { return top - pad; }
  static RF_INLINE int64_t first_column(int64_t left, int64_t pad, int) { return left - pad; }
};

struct F2 : OnePhase {
  static constexpr int M = 2;
  static constexpr int A = 4;
  static constexpr int PAD = 1;

  // y = B^T x
  static RF_INLINE void input(const vec (&x)[A], vec (&y)[A]) {
    y[0] = sub(x[2], x[0]);
    y[1] = add(x[2], x[1]);
    y[2] = sub(x[2], x[1]);
    y[3] = sub(x[3], x[1]);
  }
  // Equal values cancel in y0 and y3, but not in y1 and y2.
  static constexpr bool watched(int) { return true; }
  // y = G x: the values of x0 + x1 p + x2 p^2 at the points
  static RF_INLINE void weight(const vec (&x)[3], vec (&y)[A]) {
    const vec even = add(x[0], x[2]);
    y[0] = x[0];
    y[1] = add(even, x[1]);
    y[2] = sub(even, x[1]);
    y[3] = x[2];
  }
  // y = A^T x, with 1/N = (-1, 1/2, 1/2, 1)
  static RF_INLINE void output(const vec (&x)[A], vec (&y)[M]) {
    const vec half = splat(0.5f);
    y[0] = fma(half, add(x[1], x[2]), sub(zero(), x[0]));
    y[1] = fma(half, sub(x[1], x[2]), x[3]);
  }
};

struct F4 : OnePhase {
  static constexpr int M = 4;
  static constexpr int A = 6;
  static constexpr int PAD = 1;
  static constexpr double P = 0.70710678118654752440;  // sqrt(1/2)
  static constexpr double Q = 1.41421356237309504880;  // sqrt(2)
  static constexpr double P2 = 0.5, Q2 = 2.0;
  // 1/N for 0, +-P, +-Q
  static constexpr double N0 = 1 / (P2 * Q2), NP = 1 / (2 * P2 * (P2 - Q2)), NQ = 1 / (2 * Q2 * (Q2 - P2));

  static RF_INLINE vec constant(double c) { return splat(static_cast<float>(c)); }

  static RF_INLINE void input(const vec (&x)[A], vec (&y)[A]) {
    // (P Q)^2 = 1, so that neither x0 nor x1 is scaled.
    y[0] = fnma(constant(P2 + Q2), x[2], add(x[0], x[4]));
    y[5] = fnma(constant(P2 + Q2), x[3], add(x[1], x[5]));
    const vec even_p = fnma(constant(Q2), x[2], x[4]), odd_p = fnma(constant(Q2), x[1], x[3]);
    y[1] = fma(constant(P), odd_p, even_p);
    y[2] = fnma(constant(P), odd_p, even_p);
    const vec even_q = fnma(constant(P2), x[2], x[4]), odd_q = fnma(constant(P2), x[1], x[3]);
    y[3] = fma(constant(Q), odd_q, even_q);
    y[4] = fnma(constant(Q), odd_q, even_q);
  }
  // y0 and y5 have all of x, and don't vanish for values of one magnitude but where two with opposite signs lie four rows
  // apart and small ones between them. Each of those lies in the tile above or below, too, beside other values.
  static constexpr bool watched(int i) { return i == 0 || i == A - 1; }
  static RF_INLINE void weight(const vec (&x)[3], vec (&y)[A]) {
    const vec even_p = fma(constant(P2), x[2], x[0]), even_q = fma(constant(Q2), x[2], x[0]);
    y[0] = x[0];
    y[1] = fma(constant(P), x[1], even_p);
    y[2] = fnma(constant(P), x[1], even_p);
    y[3] = fma(constant(Q), x[1], even_q);
    y[4] = fnma(constant(Q), x[1], even_q);
    y[5] = x[2];
  }
  static RF_INLINE void output(const vec (&x)[A], vec (&y)[M]) {
    const vec sum_p = add(x[1], x[2]), difference_p = sub(x[1], x[2]);
    const vec sum_q = add(x[3], x[4]), difference_q = sub(x[3], x[4]);
    y[0] = fma(constant(NP), sum_p, fma(constant(NQ), sum_q, x[0]));  // N0 = 1
    y[1] = fma(constant(P * NP), difference_p, mul(constant(Q * NQ), difference_q));
    y[2] = fma(constant(P2 * NP), sum_p, mul(constant(Q2 * NQ), sum_q));
    y[3] = fma(constant(P * P2 * NP), difference_p, fma(constant(Q * Q2 * NQ), difference_q, x[5]));
  }
};

// F(3 x 3, 4 x 4) at the same points, so with the same input transform: for the stem, see stem.h. Its weights are transformed
// where they are packed, in resnet_fused/backends/cpu.py.
struct Stem34 : OnePhase {
  static constexpr int M = 3;
  static constexpr int A = 6;
  static constexpr int PAD = 2;
  // Of the eight rows and columns that a window of four of each phase has, 7 x 7 taps lack the first, which is even.
  static constexpr int GROUPS = 4;
  static constexpr bool has_tap(int, int group, int row, int column) {
    return (row > 0 || group / 2 == 1) && (column > 0 || group % 2 == 1);
  }

  static RF_INLINE void input(const vec (&x)[A], vec (&y)[A]) { F4::input(x, y); }
  static constexpr bool watched(int i) { return F4::watched(i); }
  static RF_INLINE void output(const vec (&x)[A], vec (&y)[M]) {
    constexpr double P = F4::P, P2 = F4::P2, Q = F4::Q, Q2 = F4::Q2, NP = F4::NP, NQ = F4::NQ;
    const vec sum_p = add(x[1], x[2]), difference_p = sub(x[1], x[2]);
    const vec sum_q = add(x[3], x[4]), difference_q = sub(x[3], x[4]);
    y[0] = fma(F4::constant(NP), sum_p, fma(F4::constant(NQ), sum_q, x[0]));
    y[1] = fma(F4::constant(P * NP), difference_p, mul(F4::constant(Q * NQ), difference_q));
    y[2] = fma(F4::constant(P2 * NP), sum_p, fma(F4::constant(Q2 * NQ), sum_q, x[5]));
  }
};

// 3 x 3 of stride 2: F(5 x 5, 2 x 2) at the same points, on the four phases of the image stacked as channels. With
// r = 2 o + k - 1, kernel rows 0 and 2 read the odd rows 2 (o - 1) + 1 and 2 o + 1: two taps, at offsets -1 and 0; kernel row 1
// reads the even row 2 o: one tap, at offset 0. Likewise for columns. Where a phase has no tap at offset -1, its polynomial is
// 0 at the point 0, and its products there are left out: 121 products a channel for 25 results, where the direct sum has 225.
// The phases are ordered so that those which contribute to a point lie side by side.
struct Stride2 {
  static constexpr int M = 5;
  static constexpr int A = 6;
  static constexpr int PAD = 1;
  static constexpr int STRIDE = 2;
  static constexpr int PHASES = 4;

  static constexpr int TAPS = 2;
  static constexpr bool odd_row(int phase) { return phase < 2; }                    // odd odd even even
  static constexpr bool odd_column(int phase) { return phase == 1 || phase == 2; }  // even odd odd even
  // The taps are 0 and 2 in the odd phase, none and 1 in the even one.
  static constexpr int kernel_row(int phase, int tap) { return odd_row(phase) ? 2 * tap : tap == 0 ? -1 : 1; }
  static constexpr int kernel_column(int phase, int tap) { return odd_column(phase) ? 2 * tap : tap == 0 ? -1 : 1; }
  static constexpr int GROUPS = 1;
  static constexpr bool has_tap(int phase, int, int row, int column) {
    return kernel_row(phase, row) >= 0 && kernel_column(phase, column) >= 0;
  }
  static RF_INLINE PhaseRun run(int point) {
    if (point == 0) return {1, 1};
    if (point < A) return {0, 2};
    return point % A == 0 ? PhaseRun{1, 2} : PhaseRun{0, 4};
  }
  static RF_INLINE int64_t first_row(int64_t top, int64_t pad, int phase) { return 2 * (top - pad) + odd_row(phase); }
  static RF_INLINE int64_t first_column(int64_t left, int64_t pad, int phase) { return 2 * (left - pad) + odd_column(phase); }

  static RF_INLINE void input(const vec (&x)[A], vec (&y)[A]) { F4::input(x, y); }
  static constexpr bool watched(int i) { return F4::watched(i); }
  static RF_INLINE void weight(const vec (&x)[2], vec (&y)[A]) {
    y[0] = x[0];
    y[1] = fma(F4::constant(F4::P), x[1], x[0]);
    y[2] = fnma(F4::constant(F4::P), x[1], x[0]);
    y[3] = fma(F4::constant(F4::Q), x[1], x[0]);
    y[4] = fnma(F4::constant(F4::Q), x[1], x[0]);
    y[5] = x[1];
  }
  static RF_INLINE void output(const vec (&x)[A], vec (&y)[M]) {
    constexpr double P = F4::P, P2 = F4::P2, Q = F4::Q, Q2 = F4::Q2, NP = F4::NP, NQ = F4::NQ;
    const vec sum_p = add(x[1], x[2]), difference_p = sub(x[1], x[2]);
    const vec sum_q = add(x[3], x[4]), difference_q = sub(x[3], x[4]);
    y[0] = fma(F4::constant(NP), sum_p, fma(F4::constant(NQ), sum_q, x[0]));
    y[1] = fma(F4::constant(P * NP), difference_p, mul(F4::constant(Q * NQ), difference_q));
    y[2] = fma(F4::constant(P2 * NP), sum_p, mul(F4::constant(Q2 * NQ), sum_q));
    y[3] = fma(F4::constant(P * P2 * NP), difference_p, mul(F4::constant(Q * Q2 * NQ), difference_q));
    y[4] = fma(F4::constant(P2 * P2 * NP), sum_p, fma(F4::constant(Q2 * Q2 * NQ), sum_q, x[5]));
  }
};

}  // namespace resnet_fused::cpu::RF_ISA
