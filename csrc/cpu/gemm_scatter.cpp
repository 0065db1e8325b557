// gemm_scatter.cpp - see gemm_scatter.h.
#include "gemm_scatter.h"

#include "split.h"

SPARSE_FFN_BEGIN

constexpr int64_t kRowBlock = 32 * kMr;          // rows of an expert copied (if they must be) at a time: whole panels

// First position in [lo, hi) whose output row is >= row.
static inline int64_t first_at_least(const int32_t* scatter, int64_t lo, int64_t hi, int64_t row) {
  while (lo < hi) {
    const int64_t mid = lo + (hi - lo) / 2;
    if (scatter[mid] < row) lo = mid + 1; else hi = mid;
  }
  return lo;
}

// Whether the output rows of each expert ascend, no two alike: then a range of them is a range of sorted positions, and what
// an expert adds to a row does not depend on where ranges are cut. Two rows of a panel that are added to the same output row
// take turns in each block of k, those of different panels follow each other.
static bool rows_ascend(const int32_t* offsets, int64_t E, const int32_t* scatter) {
  for (int64_t e = 0; e < E; e++)
    for (int64_t s = offsets[e] + 1; s < offsets[e + 1]; s++)
      if (scatter[s] <= scatter[s - 1]) return false;
  return true;
}

// `columns` columns from n0 of expert e, all K of all weight tensors, into panels of B; made first, where they are not in
// memory, in `made`.
template <class T>
static void pack_block(const ScatterGemm<T>& g, int64_t e, int64_t n0, int64_t columns, int64_t padded, float* pb,
                       T* made) {
  const int64_t k_words = words<T>(g.K);
  if (g.fill) {
    g.fill(g.source, e, n0, columns, made);
    ScatterGemm<T> block{};
    block.K = g.K;
    block.w[0] = made;
    block.w_stride_k = g.w_stride_n == 1 ? columns : 1;
    block.w_stride_n = g.w_stride_n == 1 ? 1 : g.K;
    pack_block<T>(block, 0, 0, columns, padded, pb, nullptr);
    return;
  }
  for (int64_t m = 0; m < g.matrices(); m++, pb += padded * k_words) {
    const T* w = g.w[m] + e * g.w_stride_expert + n0 * g.w_stride_n;
    if (g.w_stride_n == 1) {
      pack_group<T>(pb, [=](int64_t k) { return w + k * g.w_stride_k; }, g.K, columns, padded, nullptr);
      continue;
    }
    for (int64_t j = 0; j < padded; j += kNr)
      pack_transposed(pb + j * k_words, w + j * g.w_stride_n, g.w_stride_n, g.K, columns - j,
                      lesser<int64_t>(kNr, padded - j));
  }
}

// Rows of A as words: word k0, which begins a block, of the rows for weight tensor m is at a + m * matrix + k0 * word.
struct Panel {
  const float* a;
  int64_t stride, matrix, word;
  Layout layout;
};

// Sorted rows s0 .. s0+rows-1, from where they lie or else from a copy.
template <class T> struct UnitRows {
  const ScatterGemm<T>& g;
  int64_t s0, rows;
  float* copy;

  // Rows before this one are read where they lie: fp32 in expert order. Tiles read rows of bf16 in steps of 32 elements, 16
  // rows at a time.
  int64_t first_copied() const {
    if (g.gather) return 0;
    if constexpr (kOnTiles<T>)
      return g.K % (2 * kTileSide) || g.a_stride % 2 ? 0 : rows % kTileSide ? rows / kTilesMr * kTilesMr : rows;
    return sizeof(T) == 4 ? rows : 0;
  }
  // In a copy rows of all weight tensors follow each other, on tiles panels do.
  void fill() const {
    for (int64_t r = first_copied(); r < rows; r++)
      for (int64_t m = 0; m < g.matrices(); m++) {
        const T* src = g.row(s0 + r) + m * g.K;
        if constexpr (kOnTiles<T>)
          pack_panel_row(copy + (r / kTilesMr * g.matrices() + m) * panel_size<T>(g.K), r % kTilesMr, src, g.K);
        else
          copy_row(copy + (r * g.matrices() + m) * words<T>(g.K), src);
      }
  }
  Panel panel(int64_t r) const {
    const int64_t k_words = words<T>(g.K), all_words = g.matrices() * k_words;
    if (r < first_copied()) {
      const float* a = reinterpret_cast<const float*>(g.row(s0 + r));
      return {a, g.a_stride * static_cast<int64_t>(sizeof(T)) / 4, k_words, 1, Layout::kRows};
    }
    if (kOnTiles<T>) return {copy + r * all_words, 0, panel_size<T>(g.K), panel_word<T>(1), Layout::kTiles};
    return {copy + r * all_words, all_words, k_words, 1, Layout::kRows};
  }

 private:
  void copy_row(float* dst, const T* src) const {
    if constexpr (kPackedProduct<T> == Product::kPaired) {
      if (g.K & 1) dst[words<T>(g.K) - 1] = 0;
      if (g.K) memcpy(dst, src, static_cast<size_t>(g.K) * sizeof(T));
    } else {
      widen(dst, src, g.K);
    }
  }
};

// Rows first .. last-1 of one expert against its packed columns. Columns outermost: a panel of B, the larger operand of a
// tile, stays in L1 for all rows.
template <class T>
static void scatter_packed(const ScatterGemm<T>& g, int64_t first, int64_t last, int64_t padded, float* copy,
                           const float* pb, TileOut out, LineQueue* next) {
  const int64_t k_words = words<T>(g.K);
  float* c = out.c;
  for (int64_t s0 = first; s0 < last; s0 += kRowBlock) {
    const int64_t rows = lesser(kRowBlock, last - s0), count = ceil_div(rows, kPanelRows<T>);
    const UnitRows<T> units{g, s0, rows, copy};
    units.fill();
    for (int64_t j = 0; j < padded; j += kNr) {
      const int64_t width = lesser<int64_t>(kNr, padded - j);
      out.c = c + j;
      for (int64_t i = 0; i < count; i++) {
        const int64_t r0 = panel_start<T>(rows, i, count);
        const int mr = static_cast<int>(panel_start<T>(rows, i + 1, count) - r0);
        const Panel a = units.panel(r0);
        const TileFn f = find_tile(Finish::kScatter, a.layout, kPackedProduct<T>, mr, width);
        int32_t identity[kPanelRows<T>];
        for (int r = 0; !g.scatter && r < mr; r++) identity[r] = static_cast<int32_t>(s0 + r0 + r);
        out.rows = g.scatter ? g.scatter + s0 + r0 : identity;
        out.scale = g.scale ? g.scale + s0 + r0 : nullptr;
        for (int64_t m = 0; m < g.matrices(); m++)
          for (int64_t k0 = 0; k0 < k_words; k0 += kKBlock) {
            const int64_t k = lesser(kKBlock, k_words - k0);
            f(mr, k, a.a + m * a.matrix + k0 * a.word, a.stride, pb + (m * padded + j) * k_words + k0 * width, out,
              next->take(k));
          }
      }
    }
  }
}

// Columns from j on in tiles NV vectors wide; returns the first column not done.
template <class T, int NV>
static int64_t direct_tiles(int64_t j, int mr, int64_t k, int64_t columns, const float* pa, const T* w,
                            int64_t w_stride, const int32_t* rows, TileOut out) {
  const DirectFn<T> f = find_direct<T>(mr, NV);
  if (!f) return j;
  float* c = out.c;
  for (; j + NV * VL <= columns; j += NV * VL) {
    out.c = c + j;
    f(k, pa, w + j, w_stride, rows, out);
  }
  return j;
}

// 0, 1, 2, ...
template <int64_t kCount> struct FirstRows {
  int32_t row[kCount];
  constexpr FirstRows() : row{} {
    for (int64_t i = 0; i < kCount; i++) row[i] = static_cast<int32_t>(i);
  }
};

// The same with B read where it lies. Wide tiles for few rows: more of the weights in flight. A is packed by rows.
template <class T>
void scatter_direct(int mr, int64_t k, int64_t columns, const float* pa, const T* w, int64_t w_stride,
                    const int32_t* rows, float* tail, const TileOut& out) {
  constexpr Product kProduct = kDirectProduct<T>;
  constexpr int64_t kBlock = kDirectBlock<T>;
  static constexpr FirstRows<kBlock + kListAhead> first{};
  if (!rows) rows = first.row;
  for (int64_t k0 = 0; k0 < k; k0 += kBlock, pa += kMr * kRowStride, w += kBlock * w_stride) {
    const int64_t n = lesser(kBlock, k - k0);
    int64_t j = direct_tiles<T, 8>(0, mr, n, columns, pa, w, w_stride, rows, out);
    j = direct_tiles<T, 4>(j, mr, n, columns, pa, w, w_stride, rows, out);
    j = direct_tiles<T, 2>(j, mr, n, columns, pa, w, w_stride, rows, out);
    j = direct_tiles<T, 1>(j, mr, n, columns, pa, w, w_stride, rows, out);
    if (j < columns) {  // fewer than VL columns left: a padded copy of them
      pack_columns<T, kProduct>(tail, [&](int64_t i) { return w + rows[i] * w_stride + j; }, n, columns - j, VL, nullptr);
      TileOut last = out;
      last.c = out.c + j;
      find_tile(Finish::kScatter, Layout::kPacked, kProduct, mr, VL)(mr, words<T, kProduct>(n), pa, 0, tail, last, kNoLines);
    }
  }
}

// The weights of the next used expert for the same columns, and the rows of A that follow.
template <class T>
static void queue_next(const ScatterGemm<T>& g, int64_t e, int64_t n0, int64_t columns, int64_t rows, LineQueue* next) {
  next->clear();
  e++;
  while (e < g.E && g.offsets[e + 1] == g.offsets[e]) e++;
  if (e < g.E) {
    if (g.w_stride_n == 1 && g.w[0])
      for (int64_t m = 0; m < g.matrices(); m++)
        for (int64_t k = 0; k < g.K; k++)
          next->add(g.w[m] + e * g.w_stride_expert + k * g.w_stride_k + n0, columns * static_cast<int64_t>(sizeof(T)));
    if (kOnTiles<T>) return next->seal();  // rows: they lie in order
    const int64_t first = g.offsets[e], last = lesser<int64_t>(first + rows, g.offsets[e + 1]);
    for (int64_t s = first; s < last; s++) next->add(g.row(s), g.matrices() * g.K * static_cast<int64_t>(sizeof(T)));
  }
  next->seal();
}

// One block: output rows t0 .. t1-1, columns n0 .. n1-1. acc is [t1 - t0, padded].
template <class T>
static void scatter_block(const ScatterGemm<T>& g, int64_t t0, int64_t t1, int64_t n0, int64_t n1, float* pa, float* pb,
                          T* made, float* acc, LineQueue* next) {
  const int64_t columns = n1 - n0, padded = round_up(columns, VL);
  memset(acc, 0, static_cast<size_t>((t1 - t0) * padded) * 4);
  const bool whole = t0 == 0 && t1 == g.rows_out;
  if (g.extra_a) {
    ScatterGemm<T> extra{};
    extra.a = g.extra_a;
    extra.a_stride = extra.K = g.extra_K;
    extra.w[0] = g.extra_w;
    extra.w_stride_k = g.N;
    extra.w_stride_n = 1;
    pack_block<T>(extra, 0, n0, columns, padded, pb, nullptr);
    next->clear();
    next->seal();
    scatter_packed(extra, t0, t1, padded, pa, pb, TileOut{acc, padded, nullptr, nullptr, static_cast<int32_t>(t0)}, next);
  }
  for (int64_t e = 0; e < g.E; e++) {
    const int64_t rows_all = g.offsets[e + 1] - g.offsets[e];
    if (!rows_all) continue;
    int64_t first = g.offsets[e], last = g.offsets[e + 1];
    if (!whole) {
      first = first_at_least(g.scatter, first, last, t0);
      last = first_at_least(g.scatter, first, last, t1);
    }
    const int64_t rows = last - first, count = ceil_div(rows, kMr);
    if (!rows) continue;
    // Decided by the expert's total, not by this block's share: the same sums whatever the blocking.
    const bool packed = rows_all >= kPackMinRows<T> || g.w_stride_n != 1 || g.fill;
    if (packed) {
      pack_block(g, e, n0, columns, padded, pb, made);
      queue_next(g, e, n0, columns, lesser(rows, kRowBlock), next);
    }
    TileOut out{acc, padded, nullptr, nullptr, static_cast<int32_t>(t0)};
    if (packed) {
      scatter_packed(g, first, last, padded, pa, pb, out, next);
      continue;
    }
    for (int64_t i = 0; i < count; i++) {
      const int64_t s0 = first + rows * i / count;
      const int mr = static_cast<int>(first + rows * (i + 1) / count - s0);
      out.rows = g.scatter + s0;
      out.scale = g.scale ? g.scale + s0 : nullptr;
      for (int64_t m = 0; m < g.matrices(); m++) {
        for (int r = 0; r < mr; r++) pack_row<T, kDirectProduct<T>>(pa, r, g.row(s0 + r) + m * g.K, g.K);
        scatter_direct(mr, g.K, columns, pa, g.w[m] + e * g.w_stride_expert + n0, g.w_stride_k, nullptr, pb, out);
      }
    }
  }
  for (int64_t t = t0; t < t1; t++) {
    T* dst = g.out + t * g.out_stride + n0;
    const float* src = acc + (t - t0) * padded;
    for (int64_t j = 0; j < columns; j += VL) store_upto(dst + j, load(src + j), columns - j);
  }
}

template <class T> bool run_scatter_gemm(const ScatterGemm<T>& g) {
  if (!g.rows_out || !g.N) return true;
  const int64_t threads = larger(1, g.n_threads);
  const bool chunked = rows_ascend(g.offsets, g.E, g.scatter);
  const ScatterSplit split = split_scatter(g.rows_out, g.N, g.offsets[g.E], g.E, chunked, threads);
  const int64_t most_columns = split.most_columns(), most_rows = split.most_rows();
  int failed = 0;
#pragma omp parallel num_threads(team(split.pieces(), g.n_threads))
  {
    const int64_t row_words = larger(g.matrices() * words<T>(g.K), words<T>(g.extra_K));
    const TilesInUse<T> tiles;
    float* pa = scratch_of<float>(kBufferA, larger(kRowBlock * row_words, ceil_div(g.K, kKBlock) * kMr * kRowStride));
    float* pb = scratch_of<float>(kBufferB, larger(most_columns * row_words, kKBlock * VL));
    float* acc = scratch_of<float>(kBufferAcc, most_rows * most_columns);
    T* made = g.fill ? scratch_of<T>(kBufferC, most_columns * g.K + 1) : nullptr;
    LineQueue next;
    const int64_t size = sizeof(T), weight_lines = g.K * (most_columns * size / 64 + 1);
    const int64_t row_lines = kRowBlock * (g.K * size / 64 + 1);
    const bool ready = next.reserve(g.matrices() * (weight_lines + row_lines)) && pa && pb && acc && (made || !g.fill);
    if (!ready) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t u = 0; u < split.pieces(); u++) {
      if (!ready) continue;
      scatter_block(g, split.first_row(u), split.last_row(u), split.first_column(u), split.last_column(u), pa, pb, made,
                    acc, &next);
    }
    limit_own_scratch();
  }
  return !failed;
}

#define SPARSE_FFN_DEFINE(T)                                                                                \
  template bool run_scatter_gemm(const ScatterGemm<T>&);                                                    \
  template void scatter_direct(int, int64_t, int64_t, const float*, const T*, int64_t, const int32_t*, float*,            \
                               const TileOut&);
SPARSE_FFN_DEFINE(float)
SPARSE_FFN_DEFINE(bf16)
SPARSE_FFN_DEFINE(fp16)
SPARSE_FFN_WITH_TILED(SPARSE_FFN_DEFINE)

SPARSE_FFN_END
