// pack.h - copies operands into the order in which tile.h reads them, widening or pairing on the way.
#pragma once
#include "tile.h"

SPARSE_FFN_BEGIN

// Units of 32 bits that hold k elements of T.
template <class T> static ALWAYS_INLINE int64_t words(int64_t k) { return Paired<T>::value ? (k + 1) / 2 : k; }

// Also for fp32: GCC turns a memcpy of unknown length into `rep movs`, which cost 6% of the whole forward (measured).
template <class T> static ALWAYS_INLINE void widen(float* dst, const T* src, int64_t n) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) store(dst + i, load(src + i));
  if (i < n) store_n(dst + i, load_n(src + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

// One row of A (k elements) into row r of a row-packed panel. Blocks of kKBlock words lie kMr * kRowStride apart.
template <class T, bool kPair = Paired<T>::value>
static ALWAYS_INLINE void pack_row(float* panel, int r, const T* src, int64_t k) {
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
template <class T> static ALWAYS_INLINE int64_t row_panel_size(int64_t k) {
  return ceil_div(words<T>(k), kKBlock) * kMr * kRowStride;
}

#if defined(__AVX512BF16__)
// Two bf16 rows to 16 pairs (low half from a), each row scaled first when scale is not one.
static ALWAYS_INLINE __m512i pair_rows(__m256i a, __m256i b) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}
static ALWAYS_INLINE __m256i scaled(__m256i a, float s) { return narrow_bf16(widen_bf16(a) * s); }
#endif

// k rows of n <= width valid columns each, row(i) -> pointer, into dst[word][width]; the rest is zero. scale (may be
// null) multiplies row i by scale[i]. width is VL or kNr for a panel of B, or the row count of a column panel of A.
template <class T, class Row>
static void pack_columns(float* dst, Row row, int64_t k, int64_t n, int64_t width, const float* scale) {
#if defined(__AVX512BF16__)
  if constexpr (Paired<T>::value) {
    const __m256i none = _mm256_setzero_si256();
    for (int64_t i = 0; i < k; i += 2, dst += width) {
      const T* first_row = row(i);
      const T* second_row = i + 1 < k ? row(i + 1) : nullptr;
      for (int64_t j = 0; j < width; j += VL) {
        const __mmask16 m = j >= n ? 0 : first(static_cast<int>(lesser<int64_t>(VL, n - j)));
        __m256i a = _mm256_maskz_loadu_epi16(m, first_row + j);
        __m256i b = second_row ? _mm256_maskz_loadu_epi16(m, second_row + j) : none;
        if (scale) {
          a = scaled(a, scale[i]);
          if (second_row) b = scaled(b, scale[i + 1]);
        }
        const __mmask16 w = first(static_cast<int>(lesser<int64_t>(VL, width - j)));
        _mm512_mask_storeu_epi32(dst + j, w, pair_rows(a, b));
      }
    }
    return;
  }
#endif
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
  if constexpr (Paired<T>::value) {
    if (scale) full = 0;
#if defined(__AVX512BF16__)
    for (int64_t i = 0; i < k && full; i += 2) {
      const T* a = row(i);
      const T* b = i + 1 < k ? row(i + 1) : nullptr;
      float* to = dst + i / 2 * kNr;
      for (int64_t j = 0; j < full; j += kNr, to += k_words * kNr) {
        const __m512i first_row = _mm512_loadu_si512(a + j);
        const __m512i second_row = b ? _mm512_loadu_si512(b + j) : _mm512_setzero_si512();
        _mm512_storeu_si512(to, pair_columns<0>(first_row, second_row));
        _mm512_storeu_si512(to + VL, pair_columns<1>(first_row, second_row));
      }
    }
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
  if constexpr (Paired<T>::value) {
    if (k & 1) {  // rows are not whole words: rare, slow and simple
      for (int64_t u = 0; u < words<T>(k); u++)
        for (int64_t n = 0; n < width; n++) {
          uint16_t pair[2] = {0, 0};
          if (n < valid) memcpy(pair, w + n * stride + 2 * u, 2 * u + 1 < k ? 4 : 2);
          memcpy(dst + u * width + n, pair, 4);
        }
      return;
    }
  }
  const int64_t k_words = words<T>(k);
  V block[VL];
  for (int64_t n = 0; n < width; n += VL)
    for (int64_t u = 0; u < k_words; u += VL) {
      const int64_t left = k_words - u;
#pragma GCC unroll 16
      for (int i = 0; i < VL; i++) {
        if (n + i >= valid) block[i] = zero();
        else if constexpr (Paired<T>::value)
          block[i] = load_upto(reinterpret_cast<const float*>(w + (n + i) * stride) + u, left);
        else block[i] = load_upto(w + (n + i) * stride + u, left);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < VL; i++)
        if (i < left) store(dst + (u + i) * width + n, block[i]);
    }
}

SPARSE_FFN_END
