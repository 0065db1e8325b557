// quantized_few.cpp - products with rows of codes for few slots of an expert, where reading the codes is the whole cost.
// Threads own output columns: the sums do not depend on their number.
#include "quantized.h"

#include "code_steps.h"
#include "threads.h"

SPARSE_FFN_BEGIN

constexpr int64_t kAhead = 8;  // rows that are fetched before their turn

// What a thread needs. Steps are counted in whole vectors.
struct Work {
  const float* x;       // widened rows, or null
  int64_t padded;       // of x
  const float* x_sums;  // [rows_x, steps], of each step of x: up, with zero points
  int64_t x_steps;
  float* acc;           // [rows_out, width]: the thread's columns
  int64_t width;
  bool whole;           // groups are whole steps
  int64_t steps;        // of a row
  float* scales;        // [kRows, steps] and a vector
  float* shifts;        // the same
  float* factors;       // [kSlots, kRows, steps]
  float* shifted;       // [rows_out, steps], what zero points add to each column of a step: down
  float* numbers;       // of one row, where groups are not whole steps
};

template <class F> static ALWAYS_INLINE void fetch_factors(const F* factors, int64_t groups) {
  for (int64_t p = 0; p < groups; p += 64 / static_cast<int64_t>(sizeof(F))) prefetch(factors + p);
}

// Each lane of v kTimes times, to as many vectors as begin before the end.
template <int kTimes> static ALWAYS_INLINE void spread(V v, float* to, const float* end) {
  if constexpr (kTimes == 1) {
    if (to < end) store(to, v);
  } else {
    V half[2] = {v, v};
    interleave(half);
    spread<kTimes / 2>(half[0], to, end);
    spread<kTimes / 2>(half[1], to + kTimes / 2 * VL, end);
  }
}

// See take_factors: groups of kTimes steps. The last vector of groups is one that ends with them, if there are so many.
template <class T, int kBits, int kTimes>
static ALWAYS_INLINE void take_short_groups(const T* scale, const uint8_t* zero, int64_t steps, float* scales,
                                            float* shifts) {
  const int64_t groups = ceil_div(steps, int64_t{kTimes}), padded = round_up(steps, VL);
  store(scales + padded - VL, V{});
  if (shifts) store(shifts + padded - VL, V{});
  for (int64_t next = 0; next < groups; next += VL) {
    const int64_t p = larger<int64_t>(0, lesser(next, groups - VL));
    const V s = load_upto(scale + p, groups - p);
    spread<kTimes>(s, scales + p * kTimes, scales + padded);
    if (shifts) spread<kTimes>(s * shifts_of<kBits>(zero + p, groups - p), shifts + p * kTimes, shifts + padded);
  }
}

// The scale and the shift of each step of one row, from those of its groups on, to whole vectors of steps: what is behind the
// last one meets zeros, and must be a number. May write a vector too much.
template <class T, int kBits>
static void take_factors(const T* scale, const uint8_t* zero, int64_t steps, int64_t in_group, float* scales,
                         float* shifts) {
  switch (in_group) {
    case 1: return take_short_groups<T, kBits, 1>(scale, zero, steps, scales, shifts);
    case 2: return take_short_groups<T, kBits, 2>(scale, zero, steps, scales, shifts);
    case 4: return take_short_groups<T, kBits, 4>(scale, zero, steps, scales, shifts);
  }
  const int64_t groups = ceil_div(steps, in_group);
  for (int64_t p = 0; p < groups; p++) {
    const V s = splat(to_float(scale[p]));
    const int64_t end = p + 1 < groups ? (p + 1) * in_group : round_up(steps, VL);
    for (int64_t i = p * in_group; i < end; i += VL) {
      store(scales + i, s);
      if (shifts) store(shifts + i, s * static_cast<float>(kMiddleZero<kBits> - zero_of<kBits>(zero[p])));
    }
  }
}

// Columns n0 .. n1-1, whole steps of each group, of rows g .. g+kRows-1 of expert e; the last one again from `last` on.
template <class T, int kBits>
static FewRows take_rows(const CodeRows<T>& rows, int64_t e, int64_t g, int64_t last, int64_t n0, int64_t n1,
                         const Work& w) {
  const int64_t size = rows.group(), steps = (n1 - n0) / kStep, p0 = n0 / size;
  const int64_t in_group = lesser(size, n1 - n0) / kStep, groups = ceil_div(steps, in_group);
  const bool shifted = rows.c.zero_point;
  FewRows taken{{}, w.scales, shifted ? w.shifts : nullptr, w.steps, in_group % kTogether == 0};
  for (int j = 0; j < kRows; j++) {
    const int64_t at = lesser(g + j, last - 1);
    const T* scale = rows.scales(e, at) + p0;
    const uint8_t* zero = rows.zero(e, at, p0);
    fetch_factors(scale + kAhead * rows.c.scale_strides.row, groups);
    if (shifted) fetch_factors(zero + kAhead * rows.c.zero_strides.row, groups);
    float* shifts = shifted ? w.shifts + j * w.steps : nullptr;
    take_factors<T, kBits>(scale, zero, steps, in_group, w.scales + j * w.steps, shifts);
    taken.row[j] = rows.row(e, at) + n0 * kBits / 8;
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
          const float* x_sums[kSlots];
          for (int64_t r = 0; r < count; r++) {
            x[r] = from + p.gather[s + r] * x_stride;
            x_sums[r] = w.x_sums + p.gather[s + r] * w.x_steps;
          }
          with_count(count, [&](auto c) {
            dot<M, kBits, decltype(c)::value>(x, x_sums, taken, ahead, columns / kStep, sums);
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
          for (int64_t r = 0; r < count; r++) {
            float* shifted = w.shifted + p.scatter[s + r] * w.steps;
            for (int j = 0; j < kRows; j++) {
              const float* scale = taken.scale + j * w.steps;
              float* factors = w.factors + (r * kRows + j) * w.steps;
              for (int64_t i = 0; i < steps; i += VL) store(factors + i, load(scale + i) * h[r][j]);
              if (!taken.shift) continue;
              const float* shift = taken.shift + j * w.steps;
              for (int64_t i = 0; i < steps; i += VL)
                store(shifted + i, fma(load(shift + i), splat(h[r][j]), load(shifted + i)));
            }
          }
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

// The sum of each whole step of x, zeros after them.
template <class T> static void sum_steps(const sparse_ffn_cvmm& p, int64_t steps, float* to) {
  const T* x = static_cast<const T*>(p.x);
  for (int64_t n = 0; n < p.rows_x; n++, x += p.x_stride)
    for (int64_t i = 0; i < steps; i++) {
      const int64_t m = i * kStep;
      *to++ = m < p.M ? sum(load(x + m) + load(x + m + VL)) : 0.f;
    }
}

// The thread's columns n0 .. n1-1 of all rows, in the order of the output, with what zero points add to them.
template <class T>
static void finish(const sparse_ffn_quantized& q, const Work& w, bool split, int64_t n0, int64_t n1, T* out) {
  for (int64_t r = 0; r < q.cvmm.rows_out; r++) {
    float* acc = w.acc + r * w.width;
    if (q.down && w.whole)
      for (int64_t i = 0; i * kStep < n1 - n0; i++) {
        float* at = acc + i * kStep;
        V pair[2] = {load(at), load(at + VL)};
        if (q.codes.zero_point) {
          const V shifted = broadcast(w.shifted + r * w.steps + i);
          pair[0] += shifted, pair[1] += shifted;
        }
        if (split) interleave(pair);
        store(at, pair[0]), store(at + VL, pair[1]);
      }
    for (int64_t j = 0; j < n1 - n0; j += VL)
      store_upto(out + r * q.cvmm.L + n0 + j, load(acc + j), n1 - n0 - j);
  }
}

template <class T, int kBits> bool quantized_few(const sparse_ffn_quantized& q, T* out) {
  const sparse_ffn_cvmm& p = q.cvmm;
  const int64_t size = q.codes.columns / q.codes.groups;
  const bool whole = size % kStep == 0, split = whole && kBits == 4;
  // Down, threads share out whole groups, or steps of the only one; up, rows.
  const int64_t unit = !q.down ? kRows : q.codes.groups > 1 ? size : kStep;
  const int64_t units = ceil_div(p.L, unit), padded = round_up(p.M, kStep);
  const int64_t x_steps = round_up(padded / kStep, VL);
  float* x = nullptr;
  float* x_sums = nullptr;
  if (!q.down) {
    const bool widened = !(whole && kPairs<T>), summed = whole && q.codes.zero_point;
    x = scratch_of<float>(kBufferHidden, p.rows_x * (widened * padded + summed * x_steps) + 1);
    if (!x) return false;
    if (widened) widen_rows<T>(p, padded, split, x);
    x_sums = x + widened * p.rows_x * padded;
    if (summed) sum_steps<T>(p, x_steps, x_sums);
  }
  int failed = 0;
#pragma omp parallel num_threads(team(units, p.n_threads))
  {
    const int64_t t = thread_index(), n = thread_count();
    const int64_t n0 = lesser(p.L, units * t / n * unit), n1 = lesser(p.L, units * (t + 1) / n * unit);
    Work w{};
    w.x = x, w.padded = padded, w.x_sums = x_sums, w.x_steps = x_steps, w.whole = whole;
    w.width = round_up(n1 - n0, kStep);
    w.steps = round_up(ceil_div(q.down ? n1 - n0 : q.codes.columns, kStep), VL);
    const int64_t sums = p.rows_out * w.width, shifted = q.down ? p.rows_out * w.steps : 0;
    w.acc = scratch_of<float>(kBufferAcc, sums + shifted + 1);
    w.shifted = w.acc + sums;
    w.scales = scratch_of<float>(kBufferA, kRows * (2 + kSlots) * w.steps + 2 * VL);
    w.shifts = w.scales + kRows * w.steps + VL;
    w.factors = w.shifts + kRows * w.steps + VL;
    w.numbers = scratch_of<float>(kBufferB, q.codes.columns + VL);
    if (!w.acc || !w.scales || !w.numbers) {
#pragma omp atomic write
      failed = 1;
    } else if (n0 < n1) {
      memset(w.acc, 0, static_cast<size_t>(sums + shifted) * 4);
      if (q.down) few_down<T, kBits>(q, w, n0, n1);
      else few_up<T, kBits>(q, w, n0, n1);
      finish(q, w, split, n0, n1, out);
    }
    limit_own_scratch();
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
