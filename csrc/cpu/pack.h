// pack.h - copies operands into the order in which tile.h reads them, widening or pairing on the way.
#pragma once
#include "tile.h"

SPARSE_FFN_BEGIN

// Units of 32 bits that hold k elements of T in an operand for this product.
template <class T, Product kProduct = kPackedProduct<T>> static ALWAYS_INLINE int64_t words(int64_t k) {
  if constexpr (on_tiles(kProduct)) return round_up(ceil_div(k, 2), kTileSide);
  return kProduct == Product::kPaired ? ceil_div(k, 2) : k;
}

// Also for fp32: GCC turns a memcpy of unknown length into `rep movs`, which cost 6% of the whole forward (measured).
template <class T> static ALWAYS_INLINE void widen(float* dst, const T* src, int64_t n) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) store(dst + i, load(src + i));
  if (i < n) store_n(dst + i, load_n(src + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

// VL pairs of neighbours in a row of which n elements are left; past the end they are zero.
template <class T> static ALWAYS_INLINE V load_pairs(const T* p, int64_t n) {
  if (n >= 2 * VL) return load(reinterpret_cast<const float*>(p));
#if defined(__AVX512F__)
  const __mmask32 lanes = n > 0 ? (__mmask32{1} << n) - 1 : 0;
  return V(_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(lanes, p)));
#else
  alignas(64) uint16_t elements[2 * VL] = {};
  if (n > 0) memcpy(elements, p, static_cast<size_t>(n) * sizeof(T));
  return load(reinterpret_cast<const float*>(elements));
#endif
}

// VL columns, of which n are left, of two rows as pairs, a's in the low halves. The rest and a null row are zero. Each row
// is scaled first when scale is not null.
template <class T> static ALWAYS_INLINE V pair_rows(const T* a, const T* b, int64_t n, const float* scale) {
#if defined(__AVX512F__)
  const __mmask16 lanes = n >= VL ? 0xffff : n > 0 ? first(static_cast<int>(n)) : 0;
  __m256i low = _mm256_maskz_loadu_epi16(a ? lanes : 0, a), high = _mm256_maskz_loadu_epi16(b ? lanes : 0, b);
  if (scale) {
    if (a) low = narrow(a, widen(a, low) * scale[0]);
    if (b) high = narrow(b, widen(b, high) * scale[1]);
  }
  return V(_mm512_castsi512_ps(
      _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16))));
#else
  alignas(64) uint16_t pairs[2 * VL] = {};
  for (int i = 0; i < 2; i++)
    if (const T* row = i ? b : a)
      for (int64_t j = 0; j < lesser<int64_t>(n, VL); j++) {
        T v = row[j];
        if (scale) from_float(to_float(v) * scale[i], &v);
        pairs[2 * j + i] = v.bits;
      }
  return load(reinterpret_cast<const float*>(pairs));
#endif
}

// One row of A (k elements) into row r of a panel packed by rows. Blocks of kKBlock words lie kMr * kRowStride apart.
template <class T, Product kProduct>
static ALWAYS_INLINE void pack_row(float* panel, int r, const T* src, int64_t k) {
  constexpr bool kPair = kProduct == Product::kPaired;
  constexpr int64_t kStep = kPair ? 2 * kKBlock : kKBlock;
  for (int64_t k0 = 0; k0 < k; k0 += kStep) {
    float* dst = panel + (k0 / kStep * kMr + r) * kRowStride;
    const int64_t n = lesser(kStep, k - k0);
    if constexpr (kPair) {
      memcpy(dst, src + k0, static_cast<size_t>(n) * sizeof(T));
      if (n & 1) memset(reinterpret_cast<T*>(dst) + n, 0, sizeof(T));
    } else {
      widen(dst, src + k0, n);
    }
  }
}
template <class T, Product kProduct> static ALWAYS_INLINE int64_t row_panel_size(int64_t k) {
  return ceil_div(words<T, kProduct>(k), kKBlock) * kMr * kRowStride;
}

// The same for packed operands, whatever multiplies them: a panel of kPanelRows rows, its size, and where word k0, which
// begins a block, lies in it.
template <class T> static ALWAYS_INLINE void pack_panel_row(float* panel, int r, const T* src, int64_t k) {
  if constexpr (kOnTiles<T>) {
    float* dst = panel + r / kTileSide * kTileWords + r % kTileSide * kTileSide;
    for (; k > 0; k -= 2 * kTileSide, src += 2 * kTileSide, dst += kTilesMr * kTileSide) store(dst, load_pairs(src, k));
  } else {
    pack_row<T, kPackedProduct<T>>(panel, r, src, k);
  }
}
template <class T> static ALWAYS_INLINE int64_t panel_size(int64_t k) {
  return kOnTiles<T> ? words<T>(k) * kTilesMr : row_panel_size<T, kPackedProduct<T>>(k);
}
template <class T> static ALWAYS_INLINE int64_t panel_word(int64_t k0) {
  return kOnTiles<T> ? k0 * kTilesMr : k0 / kKBlock * kMr * kRowStride;
}
template <class T> constexpr Layout kPanelLayout = kOnTiles<T> ? Layout::kTiles : Layout::kPacked;

// Rows are divided among `count` panels: equally, or in whole tiles. First row of panel i.
template <class T> static ALWAYS_INLINE int64_t panel_start(int64_t rows, int64_t i, int64_t count) {
  return kOnTiles<T> ? lesser(rows, i * kTilesMr) : rows * i / count;
}

// k rows of n <= width valid columns each, row(i) -> pointer, into dst[word][width]; the rest is zero. scale (may be
// null) multiplies row i by scale[i]. width is VL or kNr for a panel of B, or the row count of a column panel of A.
template <class T, Product kProduct = kPackedProduct<T>, class Row>
static void pack_columns(float* dst, Row row, int64_t k, int64_t n, int64_t width, const float* scale) {
  if constexpr (kProduct != Product::kPlain) {
    for (int64_t u = 0; u < words<T, kProduct>(k); u++, dst += width) {
      const T* a = 2 * u < k ? row(2 * u) : nullptr;
      const T* b = 2 * u + 1 < k ? row(2 * u + 1) : nullptr;
      for (int64_t j = 0; j < width; j += VL)
        store_upto(dst + j, pair_rows(a ? a + j : a, b ? b + j : b, n - j, scale ? scale + 2 * u : scale), width - j);
    }
    return;
  }
  for (int64_t i = 0; i < k; i++, dst += width) {
    const T* src = row(i);
    const V s = scale ? splat(scale[i]) : splat(1.f);
    for (int64_t j = 0; j < width; j += VL) {
      const int64_t valid = n - j;
      V v = valid >= VL ? load(src + j) : valid > 0 ? load_n(src + j, static_cast<int>(valid)) : zero();
      if (scale) v = v * s;
      store_upto(dst + j, v, width - j);
    }
  }
}

// k rows of `padded` columns (n valid) into consecutive panels kNr wide, the last one VL wide if that suffices. Like
// pack_columns for each panel, but each row is visited once and full panels take a loop without tails.
template <class T, class Row>
static void pack_group(float* dst, Row row, int64_t k, int64_t n, int64_t padded, const float* scale) {
  const int64_t k_words = words<T>(k);
  int64_t full = lesser(n, padded) / kNr * kNr;
  if constexpr (kPackedProduct<T> != Product::kPlain) {
#if defined(__AVX512F__)
    if (scale) full = 0;
    for (int64_t u = 0; u < k_words && full; u++) {
      const T* a = 2 * u < k ? row(2 * u) : nullptr;
      const T* b = 2 * u + 1 < k ? row(2 * u + 1) : nullptr;
      float* to = dst + u * kNr;
      for (int64_t j = 0; j < full; j += kNr, to += k_words * kNr) {
        const __m512i first_row = a ? _mm512_loadu_si512(a + j) : _mm512_setzero_si512();
        const __m512i second_row = b ? _mm512_loadu_si512(b + j) : _mm512_setzero_si512();
        _mm512_storeu_si512(to, pair_columns<0>(first_row, second_row));
        _mm512_storeu_si512(to + VL, pair_columns<1>(first_row, second_row));
      }
    }
#else
    full = 0;
#endif
  } else {
    for (int64_t i = 0; i < k && full; i++) {
      const T* src = row(i);
      float* to = dst + i * kNr;
      const V s = scale ? splat(scale[i]) : splat(1.f);
      for (int64_t j = 0; j < full; j += kNr, to += k_words * kNr) {
        store(to, load(src + j) * s);
        store(to + VL, load(src + j + VL) * s);
      }
    }
  }
  for (int64_t j = full; j < padded; j += kNr)
    pack_columns<T>(dst + j * k_words, [&](int64_t i) { return row(i) + j; }, k, n - j, lesser<int64_t>(kNr, padded - j),
                    scale);
}

// VL vectors to their transpose.
static ALWAYS_INLINE void transpose(V (&r)[VL]) {
#if defined(__AVX512F__)
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(__m512(r[i]), __m512(r[i + 1]));
    t[i + 1] = _mm512_unpackhi_ps(__m512(r[i]), __m512(r[i + 1]));
  }
  __m512 q[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    q[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    q[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    q[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    q[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
  }
#pragma GCC unroll 2
  for (int g = 0; g < 16; g += 8)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      t[g + i] = _mm512_shuffle_f32x4(q[g + i], q[g + i + 4], 0x88);
      t[g + i + 4] = _mm512_shuffle_f32x4(q[g + i], q[g + i + 4], 0xdd);
    }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {  // t[i] holds columns i and i + 8 of both halves
    r[i] = V(_mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
    r[i + 8] = V(_mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
  }
#elif defined(__AVX2__)
  __m256 t[8], q[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(__m256(r[i]), __m256(r[i + 1]));
    t[i + 1] = _mm256_unpackhi_ps(__m256(r[i]), __m256(r[i + 1]));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    q[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    q[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    q[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    q[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = V(_mm256_permute2f128_ps(q[i], q[i + 4], 0x20));
    r[i + 4] = V(_mm256_permute2f128_ps(q[i], q[i + 4], 0x31));
  }
#else
  for (int i = 0; i < VL; i++)
    for (int j = 0; j < i; j++) {
      const float t = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = t;
    }
#endif
}

// dst[word k][width] = w[n * stride + k]: a panel of B out of rows along k; columns n >= valid are zero.
template <class T>
static void pack_transposed(float* dst, const T* w, int64_t stride, int64_t k, int64_t valid, int64_t width) {
  const int64_t k_words = words<T>(k);
  V block[VL];
  for (int64_t n = 0; n < width; n += VL)
    for (int64_t u = 0; u < k_words; u += VL) {
      const int64_t left = k_words - u;
#pragma GCC unroll 16
      for (int i = 0; i < VL; i++) {
        if (n + i >= valid) block[i] = zero();
        else if constexpr (kPackedProduct<T> != Product::kPlain)
          block[i] = load_pairs(w + (n + i) * stride + 2 * u, k - 2 * u);
        else block[i] = load_upto(w + (n + i) * stride + u, left);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < VL; i++)
        if (i < left) store(dst + (u + i) * width + n, block[i]);
    }
}

#if defined(SPARSE_FFN_AMX)
// n <= kTilesMr columns of k rows, as pack_columns takes them, into a panel of A in tiles.
template <class Row> static void pack_tiles(float* panel, Row row, int64_t k, int64_t n, const float* scale) {
  V block[kTileSide];
  for (int64_t j = 0; j < n; j += kTileSide, panel += kTileWords)
    for (int64_t u = 0; u < words<bf16>(k); u += kTileSide) {
#pragma GCC unroll 16
      for (int i = 0; i < kTileSide; i++) {
        const int64_t s = 2 * (u + i);
        block[i] = pair_rows(s < k ? row(s) + j : nullptr, s + 1 < k ? row(s + 1) + j : nullptr, n - j,
                             scale ? scale + s : nullptr);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kTileSide; i++) store(panel + u * kTilesMr + i * kTileSide, block[i]);
    }
}
#endif

SPARSE_FFN_END
