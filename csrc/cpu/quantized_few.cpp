// quantized_few.cpp - products with rows of codes for few slots of an expert, where reading the codes is the whole cost: they
// become numbers in registers, less their zero points, and the scale multiplies what a step of a group sums to. Threads own
// output columns: the sums do not depend on their number.
#include "quantized.h"

#include "threads.h"
#include "tile.h"

SPARSE_FFN_BEGIN

constexpr int kRows = 4;       // of codes at a time
constexpr int kSlots = 4;      // at a time
constexpr int64_t kAhead = 8;  // rows that are fetched before their turn

template <int n> struct Count { static constexpr int value = n; };

// kStep codes of a row and how they are multiplied: in fp32, by rows of x that are widened into the order of the codes.
template <class T, int kBits> struct Numbers {
  using X = float;
  V n[2];
  ALWAYS_INLINE Numbers(const uint8_t* codes, int zero) { Group<kBits>(zero).numbers(codes, n); }
  ALWAYS_INLINE V times(const float* x) const { return fma(load(x + VL), n[1], load(x) * n[0]); }
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
  ALWAYS_INLINE Numbers(const uint8_t* codes, int zero) : n(GroupOfPairs<kBits>(zero).numbers(codes)) {}
  ALWAYS_INLINE V times(const bf16* x) const {
    return V(_mm512_dpbf16_ps(_mm512_setzero_ps(), reinterpret_cast<__m512bh>(_mm512_loadu_si512(x)), n));
  }
};
#endif

// kRows rows of codes, and the scale and zero point of each step.
struct FewRows {
  const uint8_t* row[kRows];
  const float* scale[kRows];
  const int32_t* zero[kRows];
};

// Codes of the next kSteps steps of a row, for a later row.
template <int kBits, int kSteps> static ALWAYS_INLINE void fetch(const uint8_t* codes, int64_t ahead) {
  for (int b = 0; b < kSteps * kStepBytes<kBits>; b += 64) prefetch(codes + ahead + b);
}

// Up: kSteps steps from step i on of kCount slots and the rows, added to acc[slot][row].
template <class T, int kBits, int kCount, int kSteps>
static ALWAYS_INLINE void dot_steps(const typename Numbers<T, kBits>::X* const* x, const FewRows& rows, int64_t ahead,
                                    int64_t i, V (&acc)[kCount][kRows]) {
#pragma GCC unroll 4
  for (int j = 0; j < kRows; j++) {
    const uint8_t* codes = rows.row[j] + i * kStepBytes<kBits>;
    fetch<kBits, kSteps>(codes, ahead);
#pragma GCC unroll 4
    for (int s = 0; s < kSteps; s++) {
      const Numbers<T, kBits> numbers(codes + s * kStepBytes<kBits>, rows.zero[j][i + s]);
      const V scale = broadcast(rows.scale[j] + i + s);
#pragma GCC unroll 4
      for (int r = 0; r < kCount; r++) acc[r][j] = fma(scale, numbers.times(x[r] + (i + s) * kStep), acc[r][j]);
    }
  }
}

// sums[slot][row] over all steps. Not inlined, as add is not: all types share it, and compiling it takes long.
template <class T, int kBits, int kCount>
__attribute__((noinline)) static void dot(const typename Numbers<T, kBits>::X* const* x, const FewRows& rows,
                                          int64_t ahead, int64_t steps, float (*sums)[kRows]) {
  V acc[kCount][kRows] = {};
  int64_t i = 0;
  for (; i + 4 <= steps; i += 4) dot_steps<T, kBits, kCount, 4>(x, rows, ahead, i, acc);
  for (; i < steps; i++) dot_steps<T, kBits, kCount, 1>(x, rows, ahead, i, acc);
  for (int r = 0; r < kCount; r++)
    for (int j = 0; j < kRows; j++) sums[r][j] = sum(acc[r][j]);
}

// Down: kSteps steps from step i on of kCount slots' factors [slot][row][step] times the rows, added to the slots' rows of acc.
template <int kBits, int kCount, int kSteps>
static ALWAYS_INLINE void add_steps(const float* factors, const FewRows& rows, int64_t ahead, int64_t steps, int64_t i,
                                    float* const* acc) {
#pragma GCC unroll 4
  for (int j = 0; j < kRows; j++) fetch<kBits, kSteps>(rows.row[j] + i * kStepBytes<kBits>, ahead);
#pragma GCC unroll 4
  for (int s = 0; s < kSteps; s++) {
    V n[kRows][2];
#pragma GCC unroll 4
    for (int j = 0; j < kRows; j++)
      Group<kBits>(rows.zero[j][i + s]).numbers(rows.row[j] + (i + s) * kStepBytes<kBits>, n[j]);
#pragma GCC unroll 4
    for (int r = 0; r < kCount; r++) {
      float* to = acc[r] + (i + s) * kStep;
      V total[2] = {load(to), load(to + VL)};
#pragma GCC unroll 4
      for (int j = 0; j < kRows; j++) {
        const V factor = broadcast(factors + (r * kRows + j) * steps + i + s);
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
  for (; i + 4 <= steps; i += 4) add_steps<kBits, kCount, 4>(factors, rows, ahead, steps, i, acc);
  for (; i < steps; i++) add_steps<kBits, kCount, 1>(factors, rows, ahead, steps, i, acc);
}

template <class F> static ALWAYS_INLINE void with_count(int64_t count, const F& f) {
  switch (count) {
    case 1: f(Count<1>{}); break;
    case 2: f(Count<2>{}); break;
    case 3: f(Count<3>{}); break;
    default: f(Count<4>{});
  }
}

// What a thread needs.
struct Work {
  const float* x;  // widened rows, or null
  int64_t padded;  // of x
  float* acc;      // [rows_out, width]: the thread's columns
  int64_t width;
  bool whole;      // groups are whole steps
  float* scales;   // [kRows, steps]
  int32_t* zeros;  // [kRows, steps]
  float* factors;  // [kSlots, kRows, steps]
  float* numbers;  // of one row, where groups are not whole steps
};

template <class F> static ALWAYS_INLINE void fetch_factors(const F* factors, int64_t groups) {
  for (int64_t p = 0; p < groups; p += 64 / static_cast<int64_t>(sizeof(F))) prefetch(factors + p);
}
// Of each step, that of its group.
template <class From, class To, class F>
static void spread(const From* from, int64_t stride, int64_t steps, int64_t in_group, To* to, const F& as) {
  for (int64_t i = 0; i < steps; from += stride) {
    const To group = as(*from);
    for (const int64_t end = lesser(steps, i + in_group); i < end; i++) to[i] = group;
  }
}

// Columns n0 .. n1-1, whole steps of each group, of rows g .. g+kRows-1 of expert e; the last one again from `last` on.
template <class T, int kBits>
static FewRows take_rows(const CodeRows<T>& rows, int64_t e, int64_t g, int64_t last, int64_t n0, int64_t n1,
                         const Work& w) {
  const int64_t size = rows.group(), steps = (n1 - n0) / kStep, p0 = n0 / size;
  const int64_t in_group = lesser(size, n1 - n0) / kStep, groups = ceil_div(steps, in_group);
  FewRows taken;
  for (int j = 0; j < kRows; j++) {
    const int64_t at = lesser(g + j, last - 1);
    const T* scale = rows.scales(e, at) + p0;
    const uint8_t* zero = rows.zero(e, at, p0);
    float* scales = w.scales + j * steps;
    int32_t* zeros = w.zeros + j * steps;
    fetch_factors(scale + kAhead * rows.c.scale_strides.row, groups);
    if (rows.c.zero_point) fetch_factors(zero + kAhead * rows.c.zero_strides.row, groups);
    if (in_group == 1) {
      for (int64_t i = 0; i < steps; i += VL) store_upto(scales + i, load_upto(scale + i, steps - i), steps - i);
    } else {
      spread<T, float>(scale, 1, steps, in_group, scales, [](T s) { return to_float(s); });
    }
    if (in_group == 1 && rows.c.zero_point) {
      for (int64_t i = 0; i < steps; i++) zeros[i] = zero_of<kBits>(zero[i]);
    } else {
      spread<uint8_t, int32_t>(zero, rows.c.zero_point != nullptr, steps, in_group, zeros, zero_of<kBits>);
    }
    taken.row[j] = rows.row(e, at) + n0 * kBits / 8, taken.scale[j] = scales, taken.zero[j] = zeros;
  }
  return taken;
}

template <class T, int kBits>
static void few_up(const sparse_ffn_quantized& q, const Work& w, int64_t n0, int64_t n1) {
  using M = typename Multiplied<T>::Type;
  using X = typename Numbers<M, kBits>::X;
  const sparse_ffn_cvmm& p = q.cvmm;
  const CodeRows<T> rows{q.codes};
  const int64_t columns = q.codes.columns, ahead = kAhead * q.codes.qdata_strides.row;
  const int64_t x_stride = kPairs<T> ? p.x_stride : w.padded;
  const X* from = reinterpret_cast<const X*>(kPairs<T> ? p.x : static_cast<const void*>(w.x));
  for (int64_t e = 0; e < p.E; e++) {
    if (p.offsets[e] == p.offsets[e + 1]) continue;
    for (int64_t g = n0; g < n1; g += kRows) {
      const int n = static_cast<int>(lesser<int64_t>(kRows, n1 - g));
      FewRows taken{};
      if (w.whole) taken = take_rows<T, kBits>(rows, e, g, n1, 0, columns, w);
      for (int64_t s = p.offsets[e]; s < p.offsets[e + 1]; s += kSlots) {
        const int64_t count = lesser<int64_t>(kSlots, p.offsets[e + 1] - s);
        float sums[kSlots][kRows];
        if (w.whole) {
          const X* x[kSlots];
          for (int64_t r = 0; r < count; r++) x[r] = from + p.gather[s + r] * x_stride;
          with_count(count, [&](auto c) {
            dot<M, kBits, decltype(c)::value>(x, taken, ahead, columns / kStep, sums);
          });
        } else {
          for (int j = 0; j < n; j++) {
            rows.template numbers<kBits>(e, g + j, 0, columns, w.numbers);
            for (int64_t r = 0; r < count; r++) {
              V total = zero();
              for (int64_t m = 0; m < p.M; m += VL)
                total = fma(load_upto(w.numbers + m, p.M - m), load(w.x + p.gather[s + r] * w.padded + m), total);
              sums[r][j] = sum(total);
            }
          }
        }
        for (int64_t r = 0; r < count; r++) {
          float* to = w.acc + p.scatter[s + r] * w.width + (g - n0);
          const float factor = p.scale ? p.scale[s + r] : 1.f;
          for (int j = 0; j < n; j++) to[j] += factor * sums[r][j];
        }
      }
    }
  }
}

template <class T, int kBits>
static void few_down(const sparse_ffn_quantized& q, const Work& w, int64_t n0, int64_t n1) {
  const sparse_ffn_cvmm& p = q.cvmm;
  const CodeRows<T> rows{q.codes};
  const int64_t steps = (n1 - n0) / kStep, ahead = kAhead * q.codes.qdata_strides.row;
  for (int64_t e = 0; e < p.E; e++)
    for (int64_t g = 0; g < q.codes.rows && p.offsets[e] < p.offsets[e + 1]; g += kRows) {
      const int n = static_cast<int>(lesser<int64_t>(kRows, q.codes.rows - g));
      FewRows taken{};
      if (w.whole) taken = take_rows<T, kBits>(rows, e, g, q.codes.rows, n0, n1, w);
      for (int64_t s = p.offsets[e]; s < p.offsets[e + 1]; s += kSlots) {
        const int64_t count = lesser<int64_t>(kSlots, p.offsets[e + 1] - s);
        float h[kSlots][kRows] = {};
        float* acc[kSlots];
        for (int64_t r = 0; r < count; r++) {
          acc[r] = w.acc + p.scatter[s + r] * w.width;
          const float factor = p.scale ? p.scale[s + r] : 1.f;
          const T* from = static_cast<const T*>(p.x) + p.gather[s + r] * p.x_stride + g;
          for (int j = 0; j < n; j++) h[r][j] = factor * to_float(from[j]);
        }
        if (w.whole) {
          float* factors = w.factors;
          for (int64_t r = 0; r < count; r++)
            for (int j = 0; j < kRows; j++)
              for (int64_t i = 0; i < steps; i++) *factors++ = h[r][j] * taken.scale[j][i];
          with_count(count, [&](auto c) { add<kBits, decltype(c)::value>(w.factors, taken, ahead, steps, acc); });
        } else {
          for (int j = 0; j < n; j++) {
            rows.template numbers<kBits>(e, g + j, n0, n1, w.numbers);
            for (int64_t r = 0; r < count; r++)
              for (int64_t m = 0; m < n1 - n0; m += VL)
                store(acc[r] + m, fma(splat(h[r][j]), load_upto(w.numbers + m, n1 - n0 - m), load(acc[r] + m)));
          }
        }
      }
    }
}

// x in fp32, each row padded with zeros to whole steps. Split, the even columns of a step lie before its odd ones.
template <class T> static void widen_rows(const sparse_ffn_cvmm& p, int64_t padded, bool split, float* to) {
  const T* x = static_cast<const T*>(p.x);
  for (int64_t n = 0; n < p.rows_x; n++, x += p.x_stride)
    for (int64_t m = 0; m < padded; m += kStep, to += kStep)
      for (int i = 0; i < kStep; i++) {
        const int64_t column = m + (!split ? i : i < VL ? 2 * i : 2 * (i - VL) + 1);
        to[i] = column < p.M ? to_float(x[column]) : 0.f;
      }
}

template <class T, int kBits> bool quantized_few(const sparse_ffn_quantized& q, T* out) {
  const sparse_ffn_cvmm& p = q.cvmm;
  const int64_t size = q.codes.columns / q.codes.groups;
  const bool whole = size % kStep == 0;
  // Down, threads share out whole groups, or steps of the only one; up, rows.
  const int64_t unit = !q.down ? kRows : q.codes.groups > 1 ? size : kStep;
  const int64_t units = ceil_div(p.L, unit), padded = round_up(p.M, kStep);
  float* x = nullptr;
  if (!q.down && !(whole && kPairs<T>)) {
    x = scratch_of<float>(kBufferHidden, p.rows_x * padded + 1);
    if (!x) return false;
    widen_rows<T>(p, padded, whole && kBits == 4, x);
  }
  int failed = 0;
#pragma omp parallel num_threads(static_cast<int>(larger<int64_t>(1, lesser<int64_t>(p.n_threads, units))))
  {
    const int64_t t = thread_index(), n = thread_count();
    const int64_t n0 = lesser(p.L, units * t / n * unit), n1 = lesser(p.L, units * (t + 1) / n * unit);
    Work w{};
    w.x = x, w.padded = padded, w.width = round_up(n1 - n0, kStep);
    w.acc = scratch_of<float>(kBufferAcc, p.rows_out * w.width + 1);
    const int64_t most = ceil_div(q.codes.columns, kStep);
    w.whole = whole;
    w.scales = scratch_of<float>(kBufferA, kRows * (1 + kSlots) * most);
    w.factors = w.scales + kRows * most;
    w.zeros = scratch_of<int32_t>(kBufferIndex, kRows * most);
    w.numbers = scratch_of<float>(kBufferB, q.codes.columns + VL);
    if (!w.acc || !w.scales || !w.zeros || !w.numbers) {
#pragma omp atomic write
      failed = 1;
    } else if (n0 < n1) {
      memset(w.acc, 0, static_cast<size_t>(p.rows_out * w.width) * 4);
      if (q.down) few_down<T, kBits>(q, w, n0, n1);
      else few_up<T, kBits>(q, w, n0, n1);
      for (int64_t r = 0; r < p.rows_out; r++) {
        float* acc = w.acc + r * w.width;
        if (q.down && whole && kBits == 4)
          for (int64_t j = 0; j < n1 - n0; j += kStep) {
            V pair[2] = {load(acc + j), load(acc + j + VL)};
            interleave(pair);
            store(acc + j, pair[0]), store(acc + j + VL, pair[1]);
          }
        for (int64_t j = 0; j < n1 - n0; j += VL)
          store_upto(out + r * p.L + n0 + j, load(acc + j), n1 - n0 - j);
      }
    }
  }
  return !failed;
}

#define SPARSE_FFN_DEFINE(T)                                          \
  template bool quantized_few<T, 4>(const sparse_ffn_quantized&, T*); \
  template bool quantized_few<T, 8>(const sparse_ffn_quantized&, T*);
SPARSE_FFN_DEFINE(float)
SPARSE_FFN_DEFINE(bf16)
SPARSE_FFN_DEFINE(fp16)

SPARSE_FFN_END
