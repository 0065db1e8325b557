// gemm_rows.h - for each expert: its rows (gathered) times its weights, finished rows handed to a callback in fp32.
// Threads own rows. Used where the result stays in expert order: the up-projection, and the gradient of the hidden units.
// Large experts are multiplied in blocks of columns: the packed weights are read again for each panel of rows, and packed
// whole they would lie in no cache.
#pragma once
#include "line_queue.h"
#include "split.h"
#include "threads.h"

SPARSE_FFN_BEGIN

// Experts with fewer rows than this read their weights where they lie: packing would cost more than it saves. On tiles it
// saves more; where it does is an estimate.
template <class T> constexpr int64_t kPackMinRows = kOnTiles<T> && kMr > 7 ? 8 : kMr + 1;

constexpr int64_t kTilePanels = 4;  // panels of A that read the packed weights together: on tiles that is the bottleneck
template <class T> constexpr int64_t kPanels = kOnTiles<T> ? kTilePanels : 1;

constexpr int64_t kPackedBytes = int64_t{4} << 20;  // of an expert's packed weights, in each thread

template <class T> struct RowGemm {
  const T* a;             // row of sorted position s: a + gather[s] * a_stride (gather null: s itself), K long
  int64_t a_stride;
  const int32_t* gather;
  int64_t K;
  const T* w[2];          // one or two (GLU) weight tensors [E, N, K], the second may be null
  int64_t w_stride_expert, w_stride_row;
  // Or, with w null: writes rows n0 .. n0+rows-1 of W[e] to `to`, as [rows, K]. They are then always packed.
  void (*fill)(const void* source, int64_t e, int64_t n0, int64_t rows, T* to);
  const void* source;
  int64_t N;
  const int32_t* offsets;
  int64_t E;
  int n_threads;
  bool whole_rows;        // finished rows have all N columns

  const T* row(int64_t s) const { return a + (gather ? gather[s] : s) * a_stride; }
  int64_t matrices() const { return w[1] ? 2 : 1; }
  int64_t block() const {  // columns at a time
    const int64_t that_fit = kPackedBytes / (4 * matrices() * larger<int64_t>(1, words<T>(K))) / kNr * kNr;
    return whole_rows ? N : lesser(N, larger<int64_t>(kNr, that_fit));
  }
};

// Columns n0 .. n0+n-1 of the products of sorted position s with one or two weight tensors.
struct FinishedRow {
  int64_t e, s, n0, n;
  const float* c[2];
};

// R rows of A dot `keys` (1..4) rows of W, both where they lie: for experts with fewer than kPackMinRows rows, and for a
// few tokens (experts_decode.cpp). The rows of W are consecutive, or kListed: the next ones of a list, of which four more
// are fetched. c[r * c_stride + row of W].
template <class T, int R, bool kListed>
static void dot_rows(const T* const* a, const T* w, int64_t w_stride, const int32_t* list, int64_t k, int keys, float* c,
                     int64_t c_stride) {
  const T *row[4], *ahead[4];
  for (int j = 0; j < 4; j++) {
    const int64_t last = lesser(j, keys - 1);
    row[j] = w + (kListed ? list[last] : last) * w_stride;
    ahead[j] = kListed ? w + list[j + 4] * w_stride : row[j] + 4 * w_stride;
  }
  V acc[R][4] = {};
  int64_t i = 0;
#if defined(__AVX512BF16__)
  if constexpr (kDirectProduct<T> == Product::kPaired) {
    for (; i < k; i += 2 * VL) {  // past the end both operands read as zero
      const __mmask32 lanes = k - i >= 2 * VL ? ~__mmask32{0} : (__mmask32{1} << (k - i)) - 1;
      const auto pairs = [&](const T* p) { return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(lanes, p + i)); };
      __m512bh wv[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        wv[j] = pairs(row[j]);
        prefetch(ahead[j] + i);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const __m512bh av = pairs(a[r]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) acc[r][j] = V(_mm512_dpbf16_ps(__m512(acc[r][j]), av, wv[j]));
      }
    }
  }
#endif
  for (; i + VL <= k; i += VL) {
    V wv[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      wv[j] = load(row[j] + i);
      prefetch(ahead[j] + i);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const V av = load(a[r] + i);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) acc[r][j] = fma(av, wv[j], acc[r][j]);
    }
  }
  if (i < k) {
    const int n = static_cast<int>(k - i);
    for (int r = 0; r < R; r++)
      for (int j = 0; j < 4; j++) acc[r][j] = fma(load_n(a[r] + i, n), load_n(row[j] + i, n), acc[r][j]);
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < keys; j++) c[r * c_stride + (kListed ? list[j] : j)] = sum(acc[r][j]);
}

// All `rows` (<= kMr) rows of A against the next four rows of W, of which `left` are left.
template <class T, bool kListed>
static void dot_four(const T* const* a, int rows, const T* w, int64_t w_stride, const int32_t* list, int64_t k,
                     int64_t left, float* c, int64_t c_stride) {
  const int keys = static_cast<int>(lesser<int64_t>(4, left));
  int r = 0;
  for (; r + 4 <= rows; r += 4) dot_rows<T, 4, kListed>(a + r, w, w_stride, list, k, keys, c + r * c_stride, c_stride);
  switch (rows - r) {
    case 3: dot_rows<T, 3, kListed>(a + r, w, w_stride, list, k, keys, c + r * c_stride, c_stride); break;
    case 2: dot_rows<T, 2, kListed>(a + r, w, w_stride, list, k, keys, c + r * c_stride, c_stride); break;
    case 1: dot_rows<T, 1, kListed>(a + r, w, w_stride, list, k, keys, c + r * c_stride, c_stride); break;
  }
}

// All `rows` (<= kMr) rows of A against rows g0 .. g1-1 of W.
template <class T>
static void dot_panel(const T* const* a, int rows, const T* w, int64_t w_stride, int64_t k, int64_t g0, int64_t g1,
                      float* c, int64_t c_stride) {
  for (int64_t g = g0; g < g1; g += 4)
    dot_four<T, false>(a, rows, w + g * w_stride, w_stride, nullptr, k, g1 - g, c + g, c_stride);
}

// All `rows` (<= kMr) rows of A against `count` rows of W by a list, which kListAhead more entries follow.
template <class T>
static void dot_listed(const T* const* a, int rows, const T* w, int64_t w_stride, const int32_t* list, int64_t count,
                       int64_t k, float* c, int64_t c_stride) {
  for (int64_t i = 0; i < count; i += 4) dot_four<T, true>(a, rows, w, w_stride, list + i, k, count - i, c, c_stride);
}

// Packed rows of A, one panel or on tiles up to kPanels, against a block of packed columns of an expert.
template <class T>
static void multiply_panels(const RowGemm<T>& g, int64_t rows, int64_t padded, const float* pa, const float* pb, float* c,
                            int64_t c_stride, LineQueue* next) {
  const int64_t k_words = words<T>(g.K);
  if (!k_words) memset(c, 0, static_cast<size_t>(rows * c_stride) * 4);
  for (int64_t k0 = 0; k0 < k_words; k0 += kKBlock)  // outermost: this block of A stays in L1 for all columns
    for (int64_t m = 0; m < g.matrices(); m++)
      for (int64_t n = 0; n < padded; n += kNr) {
        const int64_t width = lesser<int64_t>(kNr, padded - n), k = lesser(kKBlock, k_words - k0);
        for (int64_t r = 0; r < rows; r += kPanelRows<T>) {
          const int mr = static_cast<int>(lesser<int64_t>(kPanelRows<T>, rows - r));
          const TileFn f = find_tile(k0 ? Finish::kAdd : Finish::kStore, kPanelLayout<T>, kPackedProduct<T>, mr, width);
          f(mr, k, pa + r / kPanelRows<T> * panel_size<T>(g.K) + panel_word<T>(k0), 0,
            pb + (m * padded + n) * k_words + k0 * width,
            TileOut{c + r * c_stride + m * padded + n, c_stride, nullptr, nullptr, 0}, next->take(k));
        }
      }
}

// What comes after rows .. s-1 of a block: the next rows of A, and part i of `count` of the weights of the block from n0 on
// or, behind the last one, of the next used expert's first block.
template <class T>
static void queue_next(const RowGemm<T>& g, int64_t e, int64_t n0, int64_t s, int64_t i, int64_t count, LineQueue* next) {
  next->clear();
  if (kOnTiles<T>) return;  // they gain nothing from it
  const int64_t last = lesser<int64_t>(s + kMr, g.offsets[g.E]);
  for (; s < last; s++) next->add(g.row(s), g.K * static_cast<int64_t>(sizeof(T)));
  if (n0 >= g.N) {
    n0 = 0;
    e++;
    while (e < g.E && g.offsets[e + 1] == g.offsets[e]) e++;
  }
  if (e < g.E && !g.fill)
    for (int64_t m = 0; m < g.matrices(); m++) {
      const int64_t columns = lesser(g.block(), g.N - n0);
      for (int64_t n = n0 + columns * i / count; n < n0 + columns * (i + 1) / count; n++)
        next->add(g.w[m] + e * g.w_stride_expert + n * g.w_stride_row, g.K * static_cast<int64_t>(sizeof(T)));
    }
  next->seal();
}

// The next `width` rows from j on of matrix m of expert e, packed; made: room for them as they are filled.
template <class T>
static void pack_rows(const RowGemm<T>& g, int64_t e, int64_t m, int64_t j, int64_t width, T* made, float* to) {
  const T* w = made;
  int64_t stride = g.K;
  if (g.fill) g.fill(g.source, e, j, lesser(width, g.N - j), made);
  else w = g.w[m] + e * g.w_stride_expert + j * g.w_stride_row, stride = g.w_stride_row;
  pack_transposed(to, w, stride, g.K, g.N - j, width);
}

// finish(row) gets each row of each block, those of one row in the order of their columns. False when out of memory.
template <class T, class Finisher> static bool run_row_gemm(const RowGemm<T>& g, const Finisher& finish) {
  const int64_t k_words = words<T>(g.K), block = g.block(), most = g.matrices() * round_up(block, VL);
  const int64_t panels = count_panels<T>(g.offsets, g.E);
  int failed = 0;
#pragma omp parallel num_threads(team(panels, g.n_threads))
  {
    const TilesInUse<T> tiles;
    float* pa = scratch_of<float>(kBufferA, kPanels<T> * panel_size<T>(g.K));
    float* pb = scratch_of<float>(kBufferB, most * k_words);
    float* c = scratch_of<float>(kBufferC, kPanels<T> * kPanelRows<T> * most);
    T* made = g.fill ? scratch_of<T>(kBufferAcc, kNr * g.K + 1) : nullptr;
    LineQueue next;
    const bool queue = next.reserve((kMr + g.matrices() * block) * ceil_div(g.K * static_cast<int64_t>(sizeof(T)), 64));
    if (!pa || !pb || !c || !queue || (g.fill && !made)) {
#pragma omp atomic write
      failed = 1;
    } else {
      share_panels<T>(g.offsets, g.E, panels, thread_index(), thread_count(), [&](int64_t e, int64_t lo, int64_t hi,
                                                                                  int64_t count) {
        const int64_t rows = g.offsets[e + 1] - g.offsets[e];
        const bool packed = rows >= kPackMinRows<T> || g.fill;
        int64_t n0 = 0;
        do {  // once where there are no columns, whose sums are zero
          const int64_t n = lesser(block, g.N - n0), padded = round_up(n, VL), c_stride = g.matrices() * padded;
          if (packed)
            for (int64_t m = 0; m < g.matrices(); m++)
              for (int64_t j = 0; j < padded; j += kNr)
                pack_rows(g, e, m, n0 + j, lesser<int64_t>(kNr, padded - j), made, pb + (m * padded + j) * k_words);
          for (int64_t i = lo; i < hi; i += kPanels<T>) {
            const int64_t s0 = g.offsets[e] + panel_start<T>(rows, i, count);
            const int64_t s1 = g.offsets[e] + panel_start<T>(rows, lesser(hi, i + kPanels<T>), count);
            const int mr = static_cast<int>(s1 - s0);
            if (packed) {
              for (int r = 0; r < mr; r++)
                pack_panel_row(pa + r / kPanelRows<T> * panel_size<T>(g.K), r % kPanelRows<T>, g.row(s0 + r), g.K);
              queue_next(g, e, n0 + n, s1, i, count, &next);
              multiply_panels(g, mr, padded, pa, pb, c, c_stride, &next);
            } else {
              const T* a[kMr];
              for (int r = 0; r < mr; r++) a[r] = g.row(s0 + r);
              for (int64_t m = 0; m < g.matrices(); m++)
                dot_panel(a, mr, g.w[m] + e * g.w_stride_expert + n0 * g.w_stride_row, g.w_stride_row, g.K, int64_t{0}, n,
                          c + m * padded, c_stride);
            }
            for (int r = 0; r < mr; r++)
              finish(FinishedRow{e, s0 + r, n0, n, {c + r * c_stride, c + r * c_stride + padded}});
          }
        } while ((n0 += block) < g.N);
      });
    }
  }
  return !failed;
}

SPARSE_FFN_END
