// tiles.h - which block computes which rows, as functions of plain integers that run on the host too. Nothing here
// needs a table in device memory, or a count that only the device knows.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define SPARSE_FFN_BOTH __host__ __device__ inline
#else
#define SPARSE_FFN_BOTH inline
#endif

namespace sparse_ffn_cuda {

constexpr int kThreads = 128;
constexpr int kRows = 64;      // a block's tile of a product: rows,
constexpr int kColumns = 128;  // columns

template <class A> SPARSE_FFN_BOTH A lesser(A a, A b) { return b < a ? b : a; }
SPARSE_FFN_BOTH int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Range {
  int64_t expert, begin, end;  // begin >= end: nothing to do
};

// Expert e's tiles of rows are numbered from offsets[e] / kRows + e. A segment needs at most one tile more than the
// multiples of kRows that it passes, so that no two experts share a number, and S / kRows + E numbers are enough
// whatever the counts are; some numbers stand for no tile.
SPARSE_FFN_BOTH int64_t row_tiles(int64_t S, int64_t E) { return S / kRows + E; }
SPARSE_FFN_BOTH Range row_tile(int64_t tile, const int32_t* offsets, int64_t E) {
  int64_t e = 0;
  for (int64_t end = E; end - e > 1;) {  // the last expert whose first tile is not behind this one
    const int64_t middle = e + (end - e) / 2;
    if (offsets[middle] / kRows + middle <= tile) e = middle;
    else end = middle;
  }
  const int64_t begin = offsets[e] + (tile - offsets[e] / kRows - e) * kRows;
  return {e, begin, lesser<int64_t>(begin + kRows, offsets[e + 1])};
}

}  // namespace sparse_ffn_cuda
