// codes.h - rows of codes as numbers: number = scale * (code - zero), exactly as the contract rounds it.
#pragma once
#include "problem.h"
#include "vec.h"

SPARSE_FFN_BEGIN

// VL codes as integers.
static ALWAYS_INLINE VI load_codes(const uint8_t* p) {
#if defined(__AVX512F__)
  return VI(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return VI(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  VI v;
  for (int i = 0; i < VL; i++) v[i] = p[i];
  return v;
#endif
}
static ALWAYS_INLINE VI load_codes(const int8_t* p) {
#if defined(__AVX512F__)
  return VI(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return VI(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  VI v;
  for (int i = 0; i < VL; i++) v[i] = p[i];
  return v;
#endif
}

// Scale and zero of a group, and what they make of kStep codes from an even column on: two vectors, of consecutive columns
// after order(). That of 4 bits makes them of the even and of the odd columns.
constexpr int kStep = 2 * VL;
template <int kBits> struct Group;

template <> struct Group<8> {
  V scale, zero;
  ALWAYS_INLINE Group() {}
  ALWAYS_INLINE Group(const float* s, const float* z) : scale(broadcast(s)), zero(broadcast(z)) {}
  ALWAYS_INLINE void numbers(const void* row, int64_t column, V (&n)[2]) const {
    const int8_t* p = static_cast<const int8_t*>(row) + column;
    n[0] = (__builtin_convertvector(load_codes(p), V) - zero) * scale;
    n[1] = (__builtin_convertvector(load_codes(p + VL), V) - zero) * scale;
  }
};

template <> struct Group<4> {
#if defined(__AVX512F__)
  __m512 table;
  ALWAYS_INLINE Group() {}
  ALWAYS_INLINE Group(const float* s, const float* z) {
    const __m512 codes = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    table = _mm512_mul_ps(_mm512_sub_ps(codes, _mm512_set1_ps(*z)), _mm512_set1_ps(*s));
  }
  ALWAYS_INLINE void numbers(const void* row, int64_t column, V (&n)[2]) const {
    const __m512i bytes = __m512i(load_codes(static_cast<const uint8_t*>(row) + column / 2));
    n[0] = V(_mm512_permutexvar_ps(bytes, table));  // looks at four bits of an index
    n[1] = V(_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table));
  }
#else
  V scale, zero;
  ALWAYS_INLINE Group() {}
  ALWAYS_INLINE Group(const float* s, const float* z) : scale(broadcast(s)), zero(broadcast(z)) {}
  ALWAYS_INLINE void numbers(const void* row, int64_t column, V (&n)[2]) const {
    const VI bytes = load_codes(static_cast<const uint8_t*>(row) + column / 2);
    n[0] = (__builtin_convertvector(bytes & 15, V) - zero) * scale;
    n[1] = (__builtin_convertvector(bytes >> 4, V) - zero) * scale;
  }
#endif
};

// Vectors of even and of odd columns to vectors of consecutive ones.
static ALWAYS_INLINE void interleave(V (&n)[2]) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const __m512 even = __m512(n[0]), odd = __m512(n[1]);
  n[0] = V(_mm512_permutex2var_ps(even, low, odd));
  n[1] = V(_mm512_permutex2var_ps(even, high, odd));
#else
  float pairs[2 * VL];
  for (int i = 0; i < VL; i++) pairs[2 * i] = n[0][i], pairs[2 * i + 1] = n[1][i];
  n[0] = load(pairs), n[1] = load(pairs + VL);
#endif
}
template <int kBits> static ALWAYS_INLINE void order(V (&n)[2]) {
  if constexpr (kBits == 4) interleave(n);
}

static ALWAYS_INLINE float code_at(const void* row, int64_t column, int bits) {
  if (bits == 8) return static_cast<const int8_t*>(row)[column];
  const uint8_t byte = static_cast<const uint8_t*>(row)[column / 2];
  return static_cast<float>(column % 2 ? byte >> 4 : byte & 15);
}

// The rows of a call: T is the dtype of the scales, and of x.
template <class T> struct CodeRows {
  const sparse_ffn_codes& c;

  int64_t group() const { return c.columns / c.groups; }
  const void* row(int64_t e, int64_t g) const {
    return static_cast<const uint8_t*>(c.qdata) + e * c.qdata_strides.expert + g * c.qdata_strides.row;
  }
  // Scales and zeros of groups p0 .. p1-1 of a row, widened.
  void factors(int64_t e, int64_t g, int64_t p0, int64_t p1, float* scale, float* zero) const {
    const T* s = static_cast<const T*>(c.scale) + e * c.scale_strides.expert + g * c.scale_strides.row;
    const uint8_t* z = static_cast<const uint8_t*>(c.zero_point) + e * c.zero_strides.expert + g * c.zero_strides.row;
    int64_t p = p0;
    for (; p + VL <= p1; p += VL) store(scale + p - p0, load(s + p));
    for (; p < p1; p++) scale[p - p0] = to_float(s[p]);
    const float offset = c.bits == 8 ? 128 : 0, absent = c.bits == 8 ? 0 : 8;
    for (p = p0; p < p1; p++) zero[p - p0] = c.zero_point ? static_cast<float>(z[p]) - offset : absent;
  }
  // Columns first .. last-1 of a row, whose groups' factors are given from the group of `first` on.
  template <int kBits, class Out>
  void numbers(const void* from, int64_t first, int64_t last, const float* scale, const float* zero, Out* to) const {
    const int64_t size = group();
    for (int64_t p = first / size; p * size < last; p++, scale++, zero++) {
      const int64_t end = lesser(last, (p + 1) * size);
      int64_t column = larger(first, p * size);
      const Group<kBits> numbers_of(scale, zero);
      if (!(column & (kBits == 4)))
        for (; column + kStep <= end; column += kStep) {
          V n[2];
          numbers_of.numbers(from, column, n);
          order<kBits>(n);
          store(to + column - first, n[0]), store(to + column - first + VL, n[1]);
        }
      for (; column < end; column++) from_float((code_at(from, column, kBits) - *zero) * *scale, to + column - first);
    }
  }
};

SPARSE_FFN_END
