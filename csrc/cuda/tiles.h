// tiles.h - which block computes what: all of the scheduling, as functions of plain integers that run on the host too.
// Nothing here needs a table in device memory, or a count that only the device knows.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define SPARSE_FFN_BOTH __host__ __device__ inline
#else
#define SPARSE_FFN_BOTH inline
#endif

namespace sparse_ffn_cuda {

constexpr int kThreads = 128;
constexpr int kRows = 64;       // a block's tile of a product: rows,
constexpr int kColumns = 128;   // columns
constexpr int64_t kPiece = 64;  // members of a segment that are summed apart where the segment is long

template <class A> SPARSE_FFN_BOTH A lesser(A a, A b) { return b < a ? b : a; }
template <class A> SPARSE_FFN_BOTH A larger(A a, A b) { return a < b ? b : a; }
SPARSE_FFN_BOTH int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
SPARSE_FFN_BOTH int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Last i in [0, n) with first(i) <= x; first ascends and first(0) <= x.
template <class First> SPARSE_FFN_BOTH int64_t last_at_or_before(int64_t n, int64_t x, First first) {
  int64_t low = 0, high = n;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (first(middle) <= x) low = middle;
    else high = middle;
  }
  return low;
}

// ---- Rows grouped by expert ----
// Expert e's tiles are numbered from offsets[e] / kRows + e. A segment needs at most one tile more than the multiples
// of kRows that it passes, so that no two experts share a number, and S / kRows + E numbers are enough whatever the
// counts are; some numbers stand for no tile.
struct Range {
  int64_t expert, begin, end;  // begin >= end: nothing to do
};
SPARSE_FFN_BOTH int64_t row_tiles(int64_t S, int64_t E) { return S / kRows + E; }
struct FirstTile {
  const int32_t* offsets;
  SPARSE_FFN_BOTH int64_t operator()(int64_t e) const { return offsets[e] / kRows + e; }
};
SPARSE_FFN_BOTH Range row_tile(int64_t tile, const int32_t* offsets, int64_t E) {
  const FirstTile first{offsets};
  const int64_t e = last_at_or_before(E, tile, first);
  const int64_t begin = offsets[e] + (tile - first(e)) * kRows;
  return {e, begin, lesser<int64_t>(begin + kRows, offsets[e + 1])};
}

// ---- Sums over an expert's rows, split so that a few experts still fill the device ----
SPARSE_FFN_BOTH int64_t matrix_tiles(int64_t M, int64_t L) { return ceil_div(M, kRows) * ceil_div(L, kColumns); }
SPARSE_FFN_BOTH int64_t split_parts(int64_t S, int64_t E, int64_t M, int64_t L) {
  const int64_t blocks = larger<int64_t>(E * matrix_tiles(M, L), 1), enough = 512, shortest = 256;
  const int64_t wanted = lesser<int64_t>(ceil_div(enough, blocks), 32);
  return larger<int64_t>(lesser(wanted, S / (shortest * larger<int64_t>(E, 1))), 1);
}
SPARSE_FFN_BOTH Range split_range(int64_t e, int64_t part, int64_t parts, int64_t depth, const int32_t* offsets) {
  const int64_t begin = offsets[e], end = offsets[e + 1], length = round_up(ceil_div(end - begin, parts), depth);
  return {e, lesser(begin + part * length, end), lesser(begin + (part + 1) * length, end)};
}

// ---- Sums over segments of a sorted list ----
// Members that fill a whole block of kPiece positions inside one segment are summed by a pass of their own, which
// splits long segments over the device; a segment's sum takes them in the order of the list, with what is left at both
// ends.
struct Begin {
  const int32_t* offsets;
  SPARSE_FFN_BOTH int64_t operator()(int64_t i) const { return offsets[i]; }
};
SPARSE_FFN_BOTH bool piece_inside(int64_t piece, const int32_t* offsets, int64_t segments) {
  const int64_t begin = piece * kPiece;
  if (begin >= offsets[segments]) return false;
  return begin + kPiece <= offsets[last_at_or_before(segments, begin, Begin{offsets}) + 1];
}
SPARSE_FFN_BOTH bool takes_piece(int64_t position, int64_t end) {
  return position % kPiece == 0 && position + kPiece <= end;
}

}  // namespace sparse_ffn_cuda
