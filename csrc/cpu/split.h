// split.h - how the products share their work out to threads. No result depends on it. benchmarks/threads.cpp weighs the
// shares (`python -m benchmarks.threads`).
#pragma once
#include "pack.h"

SPARSE_FFN_BEGIN

// Products by rows (gemm_rows.h). A thread owns consecutive panels of the experts, each as many.
template <class T> static int64_t count_panels(const int32_t* offsets, int64_t E) {
  int64_t panels = 0;
  for (int64_t e = 0; e < E; e++) panels += ceil_div(offsets[e + 1] - offsets[e], kPanelRows<T>);
  return panels;
}
// f(expert, first, last, count): of the expert's `count` panels thread t of n owns first .. last-1.
template <class T, class F>
static void share_panels(const int32_t* offsets, int64_t E, int64_t panels, int64_t t, int64_t n, const F& f) {
  const int64_t first = panels * t / n, last = panels * (t + 1) / n;
  int64_t before = 0;
  for (int64_t e = 0; e < E && before < last; e++) {
    const int64_t count = ceil_div(offsets[e + 1] - offsets[e], kPanelRows<T>);
    const int64_t lo = larger<int64_t>(0, first - before), hi = lesser(count, last - before);
    before += count;
    if (lo < hi) f(e, lo, hi, count);
  }
}

// A few tokens (experts_decode.cpp). Thread t of n owns hidden units of all experts from the first on, in fours, then columns
// of the output.
static ALWAYS_INLINE int64_t first_unit(int64_t units, int64_t t, int64_t n) {
  return lesser(units, ceil_div(units, 4) * t / n * 4);
}
static ALWAYS_INLINE int64_t first_column(int64_t columns, int64_t t, int64_t n) {
  return lesser(columns, ceil_div(columns, VL) * t / n * VL);
}

// Products summed by token (gemm_scatter.h). Piece u is a chunk of the output's rows and a block of its columns; threads
// take the next one when they are done.
struct ScatterSplit {
  int64_t rows, columns, vectors, chunks, blocks;
  int64_t pieces() const { return chunks * blocks; }
  int64_t first_row(int64_t u) const { return rows * (u / blocks) / chunks; }
  int64_t last_row(int64_t u) const { return rows * (u / blocks + 1) / chunks; }
  int64_t first_column(int64_t u) const { return vectors * (u % blocks) / blocks * VL; }
  int64_t last_column(int64_t u) const { return lesser(columns, vectors * (u % blocks + 1) / blocks * VL); }
  int64_t most_rows() const { return ceil_div(rows, chunks); }
  int64_t most_columns() const { return ceil_div(vectors, blocks) * VL; }
};

constexpr int64_t kAccBytes = int64_t{1} << 20;  // of the compact output block: half of a 2 MB L2
constexpr int64_t kPackingRows = 16;  // of a product take as long as packing their weights, about

// A block of c columns reads every row of A once, a chunk of tokens packs every weight once: with r rows per expert and
// chunk the overhead goes as 1/c + 1/r, and c * tokens is what fits in L2.
static inline ScatterSplit split_scatter(int64_t rows, int64_t columns, int64_t slots, int64_t E, bool chunked,
                                         int64_t threads) {
  ScatterSplit s{rows, columns, ceil_div(columns, VL), 1, 1};
  const auto that_fit = [&](int64_t n) {
    return lesser(s.vectors, larger<int64_t>(2, kAccBytes / (4 * VL * ceil_div(rows, n))));
  };
  if (chunked)
    while (that_fit(s.chunks) < s.vectors && that_fit(s.chunks) * VL < slots / larger<int64_t>(1, E) / s.chunks)
      s.chunks *= 2;
  s.blocks = ceil_div(s.vectors, that_fit(s.chunks));
  if (s.chunks % threads) s.blocks = lesser(s.vectors, round_up(s.blocks, threads));  // an equal share for each thread
  if (!chunked || threads == 1) return s;
  if (s.pieces() < threads) s.chunks = lesser(rows, ceil_div(threads, s.blocks));
  // What the slowest thread does, in rows times vectors.
  const auto slowest = [&](int64_t n, int64_t blocks) {
    return ceil_div(n * blocks, threads) * ceil_div(s.vectors, blocks) * (ceil_div(slots, n) + kPackingRows * E);
  };
  int64_t best = slowest(s.chunks, s.blocks);
  if (best * threads * 10 <= s.chunks * s.vectors * (ceil_div(slots, s.chunks) + kPackingRows * E) * 11) return s;
  for (int64_t n = 1; n <= lesser(rows, threads); n++)
    for (int64_t blocks = ceil_div(s.vectors, that_fit(n)); blocks <= lesser(s.vectors, threads); blocks++)
      if (slowest(n, blocks) < best) best = slowest(n, blocks), s.chunks = n, s.blocks = blocks;
  return s;
}

// Outer products (gemm_outer.h). A piece is a block of columns of one expert's gradient; threads take the next one when they
// are done. An expert with many rows is cut finer: whoever takes its last piece would end long after the others.
struct OuterSplit {
  int64_t columns, vectors, E;
  int32_t* first;  // [E + 1]: the first piece of each expert

  int64_t pieces() const { return first[E]; }
  int64_t expert(int64_t u) const {
    int64_t lo = 0, hi = E - 1;
    while (lo < hi) {
      const int64_t mid = (lo + hi) / 2;
      if (first[mid + 1] <= u) lo = mid + 1; else hi = mid;
    }
    return lo;
  }
  int64_t first_column(int64_t u, int64_t e) const { return boundary(u - first[e], e); }
  int64_t last_column(int64_t u, int64_t e) const { return lesser(columns, boundary(u - first[e] + 1, e)); }

 private:
  int64_t boundary(int64_t block, int64_t e) const { return vectors * block / (first[e + 1] - first[e]) * VL; }
};

constexpr int64_t kOuterColumns = 256;  // of a piece
// most_columns: of any piece. first: room for E + 1.
static inline OuterSplit split_outer(int64_t columns, const int32_t* offsets, int64_t E, int64_t threads,
                                     int32_t* first, int64_t* most_columns) {
  const int64_t vectors = ceil_div(columns, VL), all_rows = larger(1, offsets[E]);
  const int64_t wanted = threads > 1 ? 4 * threads : 1;
  int64_t blocks = ceil_div(columns, kOuterColumns);
  if (E * blocks < wanted) blocks = lesser(vectors, ceil_div(wanted, E));  // few experts
  *most_columns = ceil_div(vectors, blocks) * VL;
  first[0] = 0;
  for (int64_t e = 0; e < E; e++) {
    const int64_t rows = offsets[e + 1] - offsets[e];
    first[e + 1] = first[e] + static_cast<int32_t>(lesser(vectors, larger(blocks, rows * wanted / all_rows)));
  }
  return {columns, vectors, E, first};
}

SPARSE_FFN_END
