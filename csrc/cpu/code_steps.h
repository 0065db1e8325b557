// code_steps.h - a few rows of codes by a few slots, step by step: codes less the middle of their range become numbers in
// registers, and the scale multiplies what a step sums to. What zero points add is the same for all columns of a group:
// their distance from the middle times the scale, `shift`, by the sum of the step's x, or to each of its columns.
#pragma once
#include "codes.h"
#include "tile.h"

SPARSE_FFN_BEGIN

constexpr int kRows = 4;      // of codes at a time
constexpr int kSlots = 4;     // at a time
constexpr int kTogether = 4;  // steps

template <int n> struct Count { static constexpr int value = n; };

// kStep codes of a row and how they are multiplied: in fp32, by rows of x that are widened into the order of the codes.
template <class T, int kBits> struct Numbers {
  using X = float;
  V n[2];
  explicit ALWAYS_INLINE Numbers(const uint8_t* codes) { Group<kBits>(kMiddleZero<kBits>).numbers(codes, n); }
  ALWAYS_INLINE V times(const float* x, V onto) const { return fma(load(x + VL), n[1], fma(load(x), n[0], onto)); }
};
template <class T> constexpr bool kPairs = kDirectProduct<T> == Product::kPaired;
// What rows of T are multiplied as: one code for all that are widened.
template <class T, bool = kPairs<T>> struct Multiplied { using Type = float; };
template <class T> struct Multiplied<T, true> { using Type = T; };
#if defined(__AVX512BF16__) && !defined(SPARSE_FFN_AMX)
// In pairs of bf16, by rows of x as they are.
template <int kBits> struct Numbers<bf16, kBits> {
  using X = bf16;
  __m512bh n;
  explicit ALWAYS_INLINE Numbers(const uint8_t* codes) : n(GroupOfPairs<kBits>(kMiddleZero<kBits>).numbers(codes)) {}
  ALWAYS_INLINE V times(const bf16* x, V onto) const {
    return V(_mm512_dpbf16_ps(__m512(onto), reinterpret_cast<__m512bh>(_mm512_loadu_si512(x)), n));
  }
};
#endif

// kRows rows of codes, and of each step of them the scale and the shift, [kRows, stride]; whole vectors of steps.
struct FewRows {
  const uint8_t* row[kRows];
  const float* scale;
  const float* shift;  // null without zero points
  int64_t stride;
  bool shared;  // whether the kTogether steps from a multiple of it on are of one group
};

// Codes of the next kSteps steps of a row, for a later row.
template <int kBits, int kSteps> static ALWAYS_INLINE void fetch(const uint8_t* codes, int64_t ahead) {
  for (int b = 0; b < kSteps * kStepBytes<kBits>; b += 64) prefetch(codes + ahead + b);
}

// Up: kSteps steps from step i on of kCount slots and the rows, added to acc[slot][row]; shared, all have one scale.
template <class T, int kBits, int kCount, int kSteps, bool kShared>
static ALWAYS_INLINE void dot_steps(const typename Numbers<T, kBits>::X* const* x, const FewRows& rows, int64_t ahead,
                                    int64_t i, V (&acc)[kCount][kRows]) {
#pragma GCC unroll 4
  for (int j = 0; j < kRows; j++) {
    const uint8_t* codes = rows.row[j] + i * kStepBytes<kBits>;
    fetch<kBits, kSteps>(codes, ahead);
    V total[kCount] = {};
#pragma GCC unroll 4
    for (int s = 0; s < kSteps; s++) {
      const Numbers<T, kBits> numbers(codes + s * kStepBytes<kBits>);
#pragma GCC unroll 4
      for (int r = 0; r < kCount; r++) total[r] = numbers.times(x[r] + (i + s) * kStep, total[r]);
      if (kShared && s + 1 < kSteps) continue;
      const V scale = broadcast(rows.scale + j * rows.stride + i + s);
#pragma GCC unroll 4
      for (int r = 0; r < kCount; r++) acc[r][j] = fma(scale, total[r], acc[r][j]), total[r] = zero();
    }
  }
}

// sums[slot][row] over all steps, of which x_sums are the slots' sums of x, zero to whole vectors of steps. Not inlined, as
// add is not: all types share it, and compiling it takes long.
template <class T, int kBits, int kCount>
__attribute__((noinline)) static void dot(const typename Numbers<T, kBits>::X* const* x, const float* const* x_sums,
                                          const FewRows& rows, int64_t ahead, int64_t steps, float (*sums)[kRows]) {
  V acc[kCount][kRows] = {};
  if (rows.shift)
    for (int64_t i = 0; i < steps; i += VL)
      for (int r = 0; r < kCount; r++)
        for (int j = 0; j < kRows; j++)
          acc[r][j] = fma(load(rows.shift + j * rows.stride + i), load(x_sums[r] + i), acc[r][j]);
  int64_t i = 0;
  if (rows.shared)
    for (; i + kTogether <= steps; i += kTogether) dot_steps<T, kBits, kCount, kTogether, true>(x, rows, ahead, i, acc);
  for (; i + kTogether <= steps; i += kTogether) dot_steps<T, kBits, kCount, kTogether, false>(x, rows, ahead, i, acc);
  for (; i < steps; i++) dot_steps<T, kBits, kCount, 1, false>(x, rows, ahead, i, acc);
  for (int r = 0; r < kCount; r++)
    for (int j = 0; j < kRows; j++) sums[r][j] = sum(acc[r][j]);
}

// Down: kSteps steps from step i on of kCount slots' factors [slot][row][stride] times the rows, added to the slots' rows of
// acc.
template <int kBits, int kCount, int kSteps>
static ALWAYS_INLINE void add_steps(const float* factors, const FewRows& rows, int64_t ahead, int64_t i,
                                    float* const* acc) {
#pragma GCC unroll 4
  for (int j = 0; j < kRows; j++) fetch<kBits, kSteps>(rows.row[j] + i * kStepBytes<kBits>, ahead);
#pragma GCC unroll 4
  for (int s = 0; s < kSteps; s++) {
    V n[kRows][2];
#pragma GCC unroll 4
    for (int j = 0; j < kRows; j++)
      Group<kBits>(kMiddleZero<kBits>).numbers(rows.row[j] + (i + s) * kStepBytes<kBits>, n[j]);
#pragma GCC unroll 4
    for (int r = 0; r < kCount; r++) {
      float* to = acc[r] + (i + s) * kStep;
      V total[2] = {load(to), load(to + VL)};
#pragma GCC unroll 4
      for (int j = 0; j < kRows; j++) {
        const V factor = broadcast(factors + (r * kRows + j) * rows.stride + i + s);
        total[0] = fma(factor, n[j][0], total[0]), total[1] = fma(factor, n[j][1], total[1]);
      }
      store(to, total[0]), store(to + VL, total[1]);
    }
  }
}

template <int kBits, int kCount>
__attribute__((noinline)) static void add(const float* factors, const FewRows& rows, int64_t ahead, int64_t steps,
                                          float* const* acc) {
  int64_t i = 0;
  for (; i + kTogether <= steps; i += kTogether) add_steps<kBits, kCount, kTogether>(factors, rows, ahead, i, acc);
  for (; i < steps; i++) add_steps<kBits, kCount, 1>(factors, rows, ahead, i, acc);
}

template <class F> static ALWAYS_INLINE void with_count(int64_t count, const F& f) {
  switch (count) {
    case 1: f(Count<1>{}); break;
    case 2: f(Count<2>{}); break;
    case 3: f(Count<3>{}); break;
    default: f(Count<4>{});
  }
}

SPARSE_FFN_END
