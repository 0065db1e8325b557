// tile.cpp - the micro-kernels declared in tile.h.
#include "tile.h"

SPARSE_FFN_BEGIN

static const char no_line[64] = {};
#define LINES_8 no_line, no_line, no_line, no_line, no_line, no_line, no_line, no_line
#define LINES_64 LINES_8, LINES_8, LINES_8, LINES_8, LINES_8, LINES_8, LINES_8, LINES_8
#define LINES_512 LINES_64, LINES_64, LINES_64, LINES_64, LINES_64, LINES_64, LINES_64, LINES_64
const void* const kNoLines[kKBlock * 2] = {LINES_512, LINES_512};

template <bool kPaired> static ALWAYS_INLINE V dot_step(V a, V b, V c) {
#if defined(__AVX512BF16__)
  if constexpr (kPaired)
    return V(_mm512_dpbf16_ps(__m512(c), reinterpret_cast<__m512bh>(b), reinterpret_cast<__m512bh>(a)));
#endif
  return fma(a, b, c);
}

template <Finish kFinish, int NV> static ALWAYS_INLINE void finish_row(const V (&acc)[NV], int r, const TileOut& out) {
  if constexpr (kFinish == Finish::kScatter) {
    float* c = out.c + (out.rows[r] - out.first_row) * out.stride;
    const V scale = out.scale ? splat(out.scale[r]) : splat(1.f);
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) store(c + v * VL, fma(scale, acc[v], load(c + v * VL)));
  } else {
    float* c = out.c + r * out.stride;
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) {
      if constexpr (kFinish == Finish::kStream) stream(c + v * VL, acc[v]);
      else store(c + v * VL, kFinish == Finish::kAdd ? acc[v] + load(c + v * VL) : acc[v]);
    }
  }
}
template <Finish kFinish, int MR, int NV>
static ALWAYS_INLINE void finish_tile(const V (&acc)[MR][NV], const TileOut& out) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; r++) finish_row<kFinish>(acc[r], r, out);
}

template <Finish kFinish, Layout kLayout, bool kPaired, int MR, int NV>
static void tile(int, int64_t k_words, const float* a, int64_t a_stride, const float* b, const TileOut& out, Lines lines) {
  if constexpr (kFinish == Finish::kScatter) {  // the rows of out are far apart: fetch them while multiplying
    for (int r = 0; r < MR; r++) {
      const float* c = out.c + (out.rows[r] - out.first_row) * out.stride;
      for (int v = 0; v < NV; v++) prefetch(c + v * VL);
    }
  }
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) acc[r][v] = zero();
  // kRows: every third row has a pointer, the two after it are reached by a scaled index; 12 pointers would not fit.
  const float* row[4] = {a, a + 3 * a_stride, a + 6 * a_stride, a + 9 * a_stride};
  for (int64_t k = 0; k < k_words; k++) {
    V bv[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) bv[v] = load(b + v * VL);
    __builtin_prefetch(lines[k], 0, 2);
    if constexpr (kLayout == Layout::kRows) __builtin_prefetch(a + MR * a_stride + k * MR, 0, 3);
#pragma GCC unroll 16
    for (int r = 0; r < MR; r++) {
      const V av = broadcast(kLayout == Layout::kPacked ? a + r * kRowStride
                             : kLayout == Layout::kRows ? row[r / 3] + r % 3 * a_stride
                                                        : a + r);
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) acc[r][v] = dot_step<kPaired>(av, bv[v], acc[r][v]);
    }
    b += NV * VL;
    if constexpr (kLayout == Layout::kRows)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) row[i]++;
    else
      a += kLayout == Layout::kPacked ? 1 : a_stride;
  }
  finish_tile<kFinish, MR, NV>(acc, out);
}

#if defined(SPARSE_FFN_AMX)
// M x N tiles of C, numbered 0 to 3, in two's of A (4, 5) and B (6, 7).
template <bool kFp16, Finish kFinish, Layout kLayout, int M, int N>
static void matrix_tile(int mr, int64_t k_words, const float* a, int64_t a_stride, const float* b, const TileOut& out,
                        Lines lines) {
  constexpr bool kPacked = kLayout == Layout::kTiles;
  const int64_t row = 4 * (kPacked ? kTileSide : a_stride);  // bytes
  const int64_t second = kPacked ? kTileWords : kTileSide * a_stride, step = kPacked ? 2 * kTileWords : kTileSide;
  if constexpr (kFinish == Finish::kScatter) {
    for (int r = 0; r < mr; r++) {
      const float* c = out.c + (out.rows[r] - out.first_row) * out.stride;
      for (int v = 0; v < N; v++) prefetch(c + v * VL);
    }
    if (lines != kNoLines)  // all at once: one in each step would hold up the loads of tiles
      for (int64_t k = 0; k < k_words; k++) __builtin_prefetch(lines[k], 0, 2);
  }
  tile_zero<0>();
  if (N > 1) tile_zero<1>();
  if (M > 1) tile_zero<2>();
  if (M > 1 && N > 1) tile_zero<3>();
  for (int64_t k = 0; k < k_words; k += kTileSide, a += step, b += kTileSide * N * VL) {
    tile_load<6>(b, N * kTileBytes);
    tile_load<4>(a, row);
    tile_dot<kFp16, 0, 4, 6>();
    if constexpr (N > 1) {
      tile_load<7>(b + VL, N * kTileBytes);
      tile_dot<kFp16, 1, 4, 7>();
    }
    if constexpr (M > 1) {
      tile_load<5>(a + second, row);
      tile_dot<kFp16, 2, 5, 6>();
    }
    if constexpr (M > 1 && N > 1) tile_dot<kFp16, 3, 5, 7>();
  }
  alignas(64) float c[M * kTileSide][N * VL];
  tile_store<0>(c[0], N * kTileBytes);
  if constexpr (N > 1) tile_store<1>(c[0] + VL, N * kTileBytes);
  if constexpr (M > 1) tile_store<2>(c[kTileSide], N * kTileBytes);
  if constexpr (M > 1 && N > 1) tile_store<3>(c[kTileSide] + VL, N * kTileBytes);
  for (int r = 0; r < mr; r++) {
    V acc[N];
    for (int v = 0; v < N; v++) acc[v] = load(c[r] + v * VL);
    finish_row<kFinish>(acc, r, out);
  }
}

template <bool kFp16, Finish kFinish, Layout kLayout> static TileFn matrix_tile_for(int mr, int64_t columns) {
  if (columns > VL)
    return mr > kTileSide ? matrix_tile<kFp16, kFinish, kLayout, 2, 2> : matrix_tile<kFp16, kFinish, kLayout, 1, 2>;
  return mr > kTileSide ? matrix_tile<kFp16, kFinish, kLayout, 2, 1> : matrix_tile<kFp16, kFinish, kLayout, 1, 1>;
}
template <bool kFp16> static TileFn find_matrix_tile(Finish finish, Layout layout, int mr, int64_t columns) {
  if (finish == Finish::kScatter)
    return layout == Layout::kRows ? matrix_tile_for<kFp16, Finish::kScatter, Layout::kRows>(mr, columns)
                                   : matrix_tile_for<kFp16, Finish::kScatter, Layout::kTiles>(mr, columns);
  return finish == Finish::kAdd ? matrix_tile_for<kFp16, Finish::kAdd, Layout::kTiles>(mr, columns)
                                : matrix_tile_for<kFp16, Finish::kStore, Layout::kTiles>(mr, columns);
}
#endif

// One word of k of NV vectors of B: a row, or two rows paired (the second is zero past the end).
template <class T, int NV>
static ALWAYS_INLINE void load_words(const T* b, const T* next, bool second, V (&bv)[NV]) {
#if defined(__AVX512BF16__)
  if constexpr (kDirectProduct<T> == Product::kPaired) {
    if constexpr (NV == 1) {
      const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
      const __m256i high = second ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(next)) : _mm256_setzero_si256();
      bv[0] = V(_mm512_castsi512_ps(
          _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16))));
    } else {
#pragma GCC unroll 4
      for (int v = 0; v < NV; v += 2) {
        const __m512i low = _mm512_loadu_si512(b + v * VL);
        const __m512i high = second ? _mm512_loadu_si512(next + v * VL) : _mm512_setzero_si512();
        bv[v] = V(_mm512_castsi512_ps(pair_columns<0>(low, high)));
        bv[v + 1] = V(_mm512_castsi512_ps(pair_columns<1>(low, high)));
      }
    }
    return;
  }
#endif
  (void)next;
  (void)second;
#pragma GCC unroll 8
  for (int v = 0; v < NV; v++) bv[v] = load(b + v * VL);
}

template <class T, int MR, int NV>
static void tile_direct(int64_t k, const float* a, const T* b, int64_t b_stride, const int32_t* rows,
                        const TileOut& out) {
  constexpr bool kPaired = kDirectProduct<T> == Product::kPaired;
  constexpr int kRows = kPaired ? 2 : 1;  // of B in a word
  constexpr int kAhead = kListAhead - 2;  // rows of B fetched ahead: weights come from memory here
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) acc[r][v] = zero();
  for (int64_t i = 0; i < k; i += kRows) {
    V bv[NV];
    load_words<T, NV>(b + rows[i] * b_stride, b + rows[i + 1] * b_stride, i + 1 < k, bv);
    for (int row = 0; row < kRows; row++)
      for (int64_t line = 0; line < NV * VL * static_cast<int64_t>(sizeof(T)); line += 64)
        prefetch(reinterpret_cast<const char*>(b + rows[i + kAhead + row] * b_stride) + line);
#pragma GCC unroll 16
    for (int r = 0; r < MR; r++) {
      const V av = broadcast(a + r * kRowStride);
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) acc[r][v] = dot_step<kPaired>(av, bv[v], acc[r][v]);
    }
    a++;
  }
  finish_tile<Finish::kScatter, MR, NV>(acc, out);
}

#define SPARSE_FFN_TILE_ROWS(CASE) \
  CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)

template <Finish kFinish, Layout kLayout, bool kPaired, int NV> static TileFn tile_for(int mr) {
  switch (mr) {
#define CASE(n) case n: if constexpr (n <= kMr) return tile<kFinish, kLayout, kPaired, n, NV>; break;
    SPARSE_FFN_TILE_ROWS(CASE)
#undef CASE
  }
  return nullptr;
}

template <Finish kFinish, Layout kLayout> static TileFn tile_for(Product product, int mr, int64_t columns) {
  if constexpr (kPackedProduct<bf16> == Product::kPaired)
    if (product == Product::kPaired)
      return columns > VL ? tile_for<kFinish, kLayout, true, 2>(mr) : tile_for<kFinish, kLayout, true, 1>(mr);
  (void)product;
  return columns > VL ? tile_for<kFinish, kLayout, false, 2>(mr) : tile_for<kFinish, kLayout, false, 1>(mr);
}

TileFn find_tile(Finish finish, Layout layout, Product product, int mr, int64_t columns) {
  // Those of the combinations that are in use.
#if defined(SPARSE_FFN_AMX)
  if (product == Product::kTiles) return find_matrix_tile<false>(finish, layout, mr, columns);
  if (product == Product::kTilesFp16) return find_matrix_tile<true>(finish, layout, mr, columns);
#endif
  if (finish == Finish::kScatter)
    return layout == Layout::kRows ? tile_for<Finish::kScatter, Layout::kRows>(product, mr, columns)
                                   : tile_for<Finish::kScatter, Layout::kPacked>(product, mr, columns);
  if (finish == Finish::kStream) return tile_for<Finish::kStream, Layout::kColumns>(product, mr, columns);
  if (layout == Layout::kColumns)
    return finish == Finish::kAdd ? tile_for<Finish::kAdd, Layout::kColumns>(product, mr, columns)
                                  : tile_for<Finish::kStore, Layout::kColumns>(product, mr, columns);
  return finish == Finish::kAdd ? tile_for<Finish::kAdd, Layout::kPacked>(product, mr, columns)
                                : tile_for<Finish::kStore, Layout::kPacked>(product, mr, columns);
}

template <class T, int NV> static DirectFn<T> direct_for(int mr) {
  switch (mr) {
#define CASE(n) case n: if constexpr (n <= kMr && n * NV <= 2 * kMr) return tile_direct<T, n, NV>; break;
    SPARSE_FFN_TILE_ROWS(CASE)
#undef CASE
  }
  return nullptr;
}
template <class T> DirectFn<T> find_direct(int mr, int nv) {
  return nv == 8 ? direct_for<T, 8>(mr) : nv == 4 ? direct_for<T, 4>(mr) : nv == 2 ? direct_for<T, 2>(mr) : direct_for<T, 1>(mr);
}
template DirectFn<float> find_direct<float>(int, int);
template DirectFn<bf16> find_direct<bf16>(int, int);
template DirectFn<fp16> find_direct<fp16>(int, int);
#if defined(SPARSE_FFN_AMX)
template DirectFn<tiled_fp16> find_direct<tiled_fp16>(int, int);
#endif

SPARSE_FFN_END
