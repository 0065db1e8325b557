// quantized.cpp - products with rows of codes: for experts with many slots their numbers are made once and packed as any
// weights are; for few slots, where reading the codes is the whole cost, they are made in registers. Threads own output
// columns: the sums do not depend on their number.
#include "threads.h"

#include "codes.h"
#include "gemm_scatter.h"
#include "ops.h"

SPARSE_FFN_BEGIN

constexpr int kRows = 4;   // of codes at a time
constexpr int kSlots = 4;  // at a time
// Up to so many slots of an expert on average their numbers are made in registers, once for each kSlots of them.
constexpr int64_t kFewSlots = 8;

template <int n> struct Count { static constexpr int value = n; };

// Whether the slots of each expert ascend in their rows of the output.
static bool scatter_ascends(const sparse_ffn_cvmm& p) {
  for (int64_t e = 0; e < p.E; e++)
    for (int64_t s = p.offsets[e] + 1; s < p.offsets[e + 1]; s++)
      if (p.scatter[s] <= p.scatter[s - 1]) return false;
  return true;
}

// ---- many slots

template <class T> struct Source {
  CodeRows<T> rows;
  bool down;
};

// Columns n0 .. n0+columns-1 of W[e]: of all rows down, [G, columns], and up that many whole rows, [columns, C].
template <class T, int kBits>
static void fill(const void* source, int64_t e, int64_t n0, int64_t columns, T* to) {
  const Source<T>& s = *static_cast<const Source<T>*>(source);
  const CodeRows<T>& rows = s.rows;
  const int64_t first = s.down ? n0 : 0, last = s.down ? n0 + columns : rows.c.columns, size = rows.group();
  const int64_t begin = s.down ? 0 : n0, end = s.down ? rows.c.rows : n0 + columns;
  const int64_t p0 = first / size, p1 = ceil_div(last, size);
  constexpr int64_t kGroups = 64;  // at a time
  float scale[kGroups], zero[kGroups];
  for (int64_t g = begin; g < end; g++, to += last - first)
    for (int64_t p = p0; p < p1; p += kGroups) {
      const int64_t until = lesser(p1, p + kGroups), from = larger(first, p * size);
      rows.factors(e, g, p, until, scale, zero);
      rows.template numbers<kBits>(rows.row(e, g), from, lesser(last, until * size), scale, zero, to + from - first);
    }
}

template <class T, int kBits> static bool packed(const sparse_ffn_quantized& q, T* out) {
  const sparse_ffn_cvmm& p = q.cvmm;
  const Source<T> source{{q.codes}, q.down};
  ScatterGemm<T> g{};
  g.a = static_cast<const T*>(p.x);
  g.a_stride = p.x_stride;
  g.gather = p.gather;
  g.K = p.M;
  g.fill = fill<T, kBits>;
  g.source = &source;
  g.w_stride_k = q.down ? p.L : 1;
  g.w_stride_n = q.down ? 1 : larger<int64_t>(2, p.M);
  g.N = p.L;
  g.offsets = p.offsets;
  g.E = p.E;
  g.scatter = p.scatter;
  g.scatter_ascends = scatter_ascends(p);
  g.scale = p.scale;
  g.out = out;
  g.out_stride = p.L;
  g.rows_out = p.rows_out;
  g.n_threads = p.n_threads;
  return run_scatter_gemm(g);
}

// ---- few slots

// x in fp32, each row padded with zeros to whole steps. Split, the even columns of a step lie before its odd ones.
template <class T> static void widen_rows(const sparse_ffn_cvmm& p, int64_t padded, bool split, float* to) {
  const T* x = static_cast<const T*>(p.x);
  for (int64_t n = 0; n < p.rows_x; n++, x += p.x_stride, to += padded)
    for (int64_t m = 0; m < padded; m++) {
      const int64_t in_step = m % (2 * VL), from = in_step < VL ? 2 * in_step : 2 * (in_step - VL) + 1;
      const int64_t column = split ? m - in_step + from : m;
      to[m] = column < p.M ? to_float(x[column]) : 0.f;
    }
}

// Up: `count` slots dot `rows` (up to kRows) rows of codes. sums[slot][row].
template <int kBits, int kCount>
static ALWAYS_INLINE void dot(const float* const* x, const void* const* row, int64_t row_bytes, const float* const* scale,
                              const float* const* zero, int64_t groups, int64_t size, float (*sums)[kRows]) {
  constexpr int kChains = kCount == 1 ? 2 : 1;
  V acc[kCount][kRows][kChains] = {};
  int64_t column = 0;
  for (int64_t p = 0; p < groups; p++) {
    Group<kBits> group[kRows];
#pragma GCC unroll 4
    for (int j = 0; j < kRows; j++) group[j] = Group<kBits>(scale[j] + p, zero[j] + p);
    for (const int64_t end = column + size; column < end; column += kStep) {
#pragma GCC unroll 4
      for (int j = 0; j < kRows; j++) {
        V n[2];
        group[j].numbers(row[j], column, n);
        prefetch(static_cast<const uint8_t*>(row[j]) + column * kBits / 8 + kRows * row_bytes);  // of the next rows
#pragma GCC unroll 4
        for (int r = 0; r < kCount; r++)
#pragma GCC unroll 2
          for (int i = 0; i < 2; i++)
            acc[r][j][i % kChains] = fma(load(x[r] + column + i * VL), n[i], acc[r][j][i % kChains]);
      }
    }
  }
  for (int r = 0; r < kCount; r++)
    for (int j = 0; j < kRows; j++)
      sums[r][j] = sum(kChains == 2 ? acc[r][j][0] + acc[r][j][kChains - 1] : acc[r][j][0]);
}

// Down: `count` slots' h times kRows rows of codes, added to their rows of acc; columns are counted from a group's first.
template <int kBits, int kCount>
static ALWAYS_INLINE void add(const float (*h)[kRows], const void* const* row, int64_t first, const float* const* scale,
                              const float* const* zero, int64_t groups, int64_t size, float* const* acc) {
  V factor[kCount][kRows];
  for (int r = 0; r < kCount; r++)
    for (int j = 0; j < kRows; j++) factor[r][j] = splat(h[r][j]);
  int64_t column = 0;
  for (int64_t p = 0; p < groups; p++) {
    Group<kBits> group[kRows];
#pragma GCC unroll 4
    for (int j = 0; j < kRows; j++) group[j] = Group<kBits>(scale[j] + p, zero[j] + p);
    for (const int64_t end = column + size; column < end; column += kStep) {
      V n[kRows][2];
#pragma GCC unroll 4
      for (int j = 0; j < kRows; j++) group[j].numbers(row[j], first + column, n[j]);
#pragma GCC unroll 4
      for (int r = 0; r < kCount; r++)
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
          float* to = acc[r] + column + i * VL;
          V total = load(to);
#pragma GCC unroll 4
          for (int j = 0; j < kRows; j++) total = fma(factor[r][j], n[j][i], total);
          store(to, total);
        }
    }
  }
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
  float *x;        // widened rows
  int64_t padded;  // of x
  float* acc;      // [rows_out, width]: the thread's columns
  int64_t width;
  float* scale[kRows];
  float* zero[kRows];
  float* numbers;  // of one row, where its groups are not whole steps
};

template <class T, int kBits>
static void few_up(const sparse_ffn_quantized& q, const Work& w, int64_t n0, int64_t n1, bool steps) {
  const sparse_ffn_cvmm& p = q.cvmm;
  const CodeRows<T> rows{q.codes};
  const int64_t groups = q.codes.groups, size = rows.group();
  for (int64_t e = 0; e < p.E; e++) {
    if (p.offsets[e] == p.offsets[e + 1]) continue;
    for (int64_t g = n0; g < n1; g += kRows) {
      const int n = static_cast<int>(lesser<int64_t>(kRows, n1 - g));
      const void* row[kRows];
      for (int j = 0; j < kRows; j++) row[j] = rows.row(e, lesser<int64_t>(g + j, n1 - 1));
      for (int j = 0; j < kRows; j++) rows.factors(e, lesser<int64_t>(g + j, n1 - 1), 0, groups, w.scale[j], w.zero[j]);
      for (int64_t s = p.offsets[e]; s < p.offsets[e + 1]; s += kSlots) {
        const int64_t count = lesser<int64_t>(kSlots, p.offsets[e + 1] - s);
        const float* x[kSlots];
        for (int64_t r = 0; r < count; r++) x[r] = w.x + p.gather[s + r] * w.padded;
        float sums[kSlots][kRows];
        if (steps) {
          with_count(count, [&](auto c) {
            dot<kBits, decltype(c)::value>(x, row, q.codes.qdata_strides.row, w.scale, w.zero, groups, size, sums);
          });
        } else {
          for (int j = 0; j < n; j++) {
            rows.template numbers<kBits>(row[j], 0, q.codes.columns, w.scale[j], w.zero[j], w.numbers);
            for (int64_t r = 0; r < count; r++) {
              V total = zero();
              for (int64_t m = 0; m < p.M; m += VL)
                total = fma(load_upto(w.numbers + m, p.M - m), load(x[r] + m), total);
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
static void few_down(const sparse_ffn_quantized& q, const Work& w, int64_t n0, int64_t n1, bool steps) {
  const sparse_ffn_cvmm& p = q.cvmm;
  const CodeRows<T> rows{q.codes};
  const int64_t size = rows.group(), p0 = n0 / size, p1 = ceil_div(n1, size), part = lesser(size, n1 - n0);
  for (int64_t e = 0; e < p.E; e++)
    for (int64_t g = 0; g < q.codes.rows && p.offsets[e] < p.offsets[e + 1]; g += kRows) {
      const int n = static_cast<int>(lesser<int64_t>(kRows, q.codes.rows - g));
      const void* row[kRows];
      for (int j = 0; j < kRows; j++) row[j] = rows.row(e, lesser<int64_t>(g + j, q.codes.rows - 1));
      for (int j = 0; j < kRows; j++) {
        rows.factors(e, lesser<int64_t>(g + j, q.codes.rows - 1), p0, p1, w.scale[j], w.zero[j]);
        const int64_t bytes = (n1 - n0) * kBits / 8;
        for (int64_t b = 0; b < bytes && g + kRows < q.codes.rows; b += 64)  // the rows after these
          prefetch(static_cast<const uint8_t*>(row[j]) + n0 * kBits / 8 + kRows * q.codes.qdata_strides.row + b);
      }
      for (int64_t s = p.offsets[e]; s < p.offsets[e + 1]; s += kSlots) {
        const int64_t count = lesser<int64_t>(kSlots, p.offsets[e + 1] - s);
        float h[kSlots][kRows] = {};
        float* acc[kSlots];
        for (int64_t r = 0; r < count; r++) {
          acc[r] = w.acc + p.scatter[s + r] * w.width;
          const float factor = p.scale ? p.scale[s + r] : 1.f;
          for (int j = 0; j < n; j++) h[r][j] = factor * w.x[p.gather[s + r] * w.padded + g + j];
        }
        if (steps) {
          with_count(count, [&](auto c) {
            add<kBits, decltype(c)::value>(h, row, n0, w.scale, w.zero, p1 - p0, part, acc);
          });
        } else {
          for (int j = 0; j < n; j++) {
            rows.template numbers<kBits>(row[j], n0, n1, w.scale[j], w.zero[j], w.numbers);
            for (int64_t r = 0; r < count; r++)
              for (int64_t m = 0; m < n1 - n0; m += VL)
                store(acc[r] + m, fma(splat(h[r][j]), load_upto(w.numbers + m, n1 - n0 - m), load(acc[r] + m)));
          }
        }
      }
    }
}

template <class T, int kBits> static bool few(const sparse_ffn_quantized& q, T* out) {
  const sparse_ffn_cvmm& p = q.cvmm;
  const int64_t size = q.codes.columns / q.codes.groups;
  const bool steps = size % kStep == 0;
  // Down, threads share out whole groups, or steps of the only one; up, rows.
  const int64_t unit = !q.down ? kRows : q.codes.groups > 1 ? size : kStep;
  const int64_t units = ceil_div(p.L, unit), padded = round_up(p.M, 2 * VL);
  float* x = scratch_of<float>(kBufferHidden, p.rows_x * padded + 1);
  if (!x) return false;
  widen_rows<T>(p, padded, steps && kBits == 4 && !q.down, x);
  int failed = 0;
#pragma omp parallel num_threads(static_cast<int>(larger<int64_t>(1, lesser<int64_t>(p.n_threads, units))))
  {
    const int64_t t = thread_index(), n = thread_count();
    const int64_t n0 = lesser(p.L, units * t / n * unit), n1 = lesser(p.L, units * (t + 1) / n * unit);
    Work w{};
    w.x = x, w.padded = padded, w.width = round_up(n1 - n0, 2 * VL);
    w.acc = scratch_of<float>(kBufferAcc, p.rows_out * w.width + 1);
    float* factors = scratch_of<float>(kBufferA, 2 * kRows * q.codes.groups);
    w.numbers = scratch_of<float>(kBufferB, q.codes.columns + VL);
    if (!w.acc || !factors || !w.numbers) {
#pragma omp atomic write
      failed = 1;
    } else if (n0 < n1) {
      for (int j = 0; j < kRows; j++) {
        w.scale[j] = factors + 2 * j * q.codes.groups;
        w.zero[j] = w.scale[j] + q.codes.groups;
      }
      memset(w.acc, 0, static_cast<size_t>(p.rows_out * w.width) * 4);
      if (q.down) few_down<T, kBits>(q, w, n0, n1, steps);
      else few_up<T, kBits>(q, w, n0, n1, steps);
      for (int64_t r = 0; r < p.rows_out; r++) {
        float* acc = w.acc + r * w.width;
        if (q.down && steps && kBits == 4)
          for (int64_t j = 0; j < n1 - n0; j += 2 * VL) {
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

template <class T, int kBits> static int product(const sparse_ffn_quantized& q, T* out) {
  const sparse_ffn_cvmm& p = q.cvmm;
  if (!p.M || !q.codes.columns || !q.codes.rows) {
    memset(out, 0, static_cast<size_t>(p.rows_out * p.L) * sizeof(T));
    return SPARSE_FFN_OK;
  }
  int64_t touched = 0;
  for (int64_t e = 0; e < p.E; e++) touched += p.offsets[e] < p.offsets[e + 1];
  const bool done = p.offsets[p.E] <= kFewSlots * touched ? few<T, kBits>(q, out) : packed<T, kBits>(q, out);
  return done ? SPARSE_FFN_OK : SPARSE_FFN_NO_MEMORY;
}

int quantized_cvmm(const sparse_ffn_quantized& q, void* out) {
  return with_packed_dtype(q.cvmm.dtype, [&](auto example) {
    using T = decltype(example);
    return q.codes.bits == 4 ? product<T, 4>(q, static_cast<T*>(out)) : product<T, 8>(q, static_cast<T*>(out));
  });
}

SPARSE_FFN_END
