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

// Code less zero, for all codes and zero points of 4 bits, in the dtype of N.
template <class N, int kCodes> struct Differences {
  alignas(64) N of[16][kCodes] = {};
  constexpr Differences() {
    for (int zero = 0; zero < 16; zero++)
      for (int code = 0; code < kCodes; code++) set(code % 16 - zero, &of[zero][code]);
  }
  static constexpr void set(int n, float* out) { *out = static_cast<float>(n); }
  static constexpr void set(int n, uint16_t* out) {  // the bits of bf16, which has integers of 8 bits
    const int size = n < 0 ? -n : n;
    int exponent = 0;
    while (size >> exponent > 1) exponent++;
    const int bits = (127 + exponent) << 7 | (size << (7 - exponent) & 127);
    *out = static_cast<uint16_t>(size ? bits | (n < 0 ? 0x8000 : 0) : 0);
  }
};

// The zero point of a stored one: 4 bits as they are, and of 8 bits less 128, as the codes are stored.
template <int kBits> static constexpr int zero_of(uint8_t stored) { return kBits == 4 ? stored & 15 : stored - 128; }
constexpr uint8_t kMiddle[2] = {8, 128};  // what 4 and 8 bits without zero points have in their place
template <int kBits> constexpr int kMiddleZero = zero_of<kBits>(kMiddle[kBits == 8]);

// The middle less the zero points of n groups, or of VL.
template <int kBits> static ALWAYS_INLINE V shifts_of(const uint8_t* stored, int64_t n) {
  if (n >= VL) {
    const VI zero = load_codes(stored);
    return __builtin_convertvector(kBits == 4 ? 8 - (zero & 15) : 128 - zero, V);
  }
  float shifts[VL] = {};
  for (int64_t p = 0; p < n; p++) shifts[p] = static_cast<float>(kMiddleZero<kBits> - zero_of<kBits>(stored[p]));
  return load(shifts);
}

// Codes less the zero point of their group, kStep of them from an even column on: two vectors, of consecutive columns after
// order(). That of 4 bits makes them of the even and of the odd columns. Small integers: the scale multiplies what they sum to.
constexpr int kStep = 2 * VL;
template <int kBits> constexpr int kStepBytes = kStep * kBits / 8;
template <int kBits> struct Group;

template <> struct Group<8> {
  VI zero;
  ALWAYS_INLINE Group() {}
  explicit ALWAYS_INLINE Group(int z) : zero(VI{} + z) {}
  ALWAYS_INLINE void numbers(const uint8_t* codes, V (&n)[2]) const {
    const int8_t* p = reinterpret_cast<const int8_t*>(codes);
    n[0] = __builtin_convertvector(load_codes(p) - zero, V);
    n[1] = __builtin_convertvector(load_codes(p + VL) - zero, V);
  }
};

template <> struct Group<4> {
#if defined(__AVX512F__)
  static constexpr Differences<float, 16> kTable{};
  __m512 table;
  ALWAYS_INLINE Group() {}
  explicit ALWAYS_INLINE Group(int z) : table(_mm512_load_ps(kTable.of[z])) {}
  ALWAYS_INLINE void numbers(const uint8_t* codes, V (&n)[2]) const {
    const __m512i bytes = __m512i(load_codes(codes));
    n[0] = V(_mm512_permutexvar_ps(bytes, table));  // looks at four bits of an index
    n[1] = V(_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table));
  }
#else
  VI zero;
  ALWAYS_INLINE Group() {}
  explicit ALWAYS_INLINE Group(int z) : zero(VI{} + z) {}
  ALWAYS_INLINE void numbers(const uint8_t* codes, V (&n)[2]) const {
    const VI bytes = load_codes(codes);
    n[0] = __builtin_convertvector((bytes & 15) - zero, V);
    n[1] = __builtin_convertvector((bytes >> 4) - zero, V);
  }
#endif
};

#if defined(__AVX512BF16__)
// The same as bf16, which is exact, of consecutive columns.
template <int kBits> struct GroupOfPairs;

template <> struct GroupOfPairs<8> {
  Group<8> group;
  explicit ALWAYS_INLINE GroupOfPairs(int z) : group(z) {}
  ALWAYS_INLINE __m512bh numbers(const uint8_t* codes) const {
    V n[2];
    group.numbers(codes, n);
    return _mm512_cvtne2ps_pbh(__m512(n[1]), __m512(n[0]));
  }
};

template <> struct GroupOfPairs<4> {
  static constexpr Differences<uint16_t, 32> kTable{};  // twice: five bits of an index are looked at
  __m512i table;
  explicit ALWAYS_INLINE GroupOfPairs(int z) : table(_mm512_load_si512(kTable.of[z])) {}
  ALWAYS_INLINE __m512bh numbers(const uint8_t* codes) const {
    const __m512i bytes = __m512i(load_codes(codes));
    const __m512i halves = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
    return reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(halves, table));
  }
};
#endif

// Vectors of even and of odd columns to vectors of consecutive ones.
static ALWAYS_INLINE void interleave(V (&n)[2]) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const __m512 even = __m512(n[0]), odd = __m512(n[1]);
  n[0] = V(_mm512_permutex2var_ps(even, low, odd));
  n[1] = V(_mm512_permutex2var_ps(even, high, odd));
#elif defined(__AVX2__)
  const __m256 even = __m256(n[0]), odd = __m256(n[1]);
  const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);  // in each half
  n[0] = V(_mm256_permute2f128_ps(low, high, 0x20));
  n[1] = V(_mm256_permute2f128_ps(low, high, 0x31));
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
  const uint8_t* row(int64_t e, int64_t g) const {
    return static_cast<const uint8_t*>(c.qdata) + e * c.qdata_strides.expert + g * c.qdata_strides.row;
  }
  const T* scales(int64_t e, int64_t g) const {
    return static_cast<const T*>(c.scale) + e * c.scale_strides.expert + g * c.scale_strides.row;
  }
  // Of group p; without zero points all have one.
  const uint8_t* zero(int64_t e, int64_t g, int64_t p) const {
    if (!c.zero_point) return kMiddle + (c.bits == 8);
    return static_cast<const uint8_t*>(c.zero_point) + e * c.zero_strides.expert + g * c.zero_strides.row + p;
  }
  // Columns first .. last-1 of a row.
  template <int kBits, class Out>
  void numbers(int64_t e, int64_t g, int64_t first, int64_t last, Out* to) const {
    const uint8_t* from = row(e, g);
    const T* scale = scales(e, g);
    const int64_t size = group();
    for (int64_t p = first / size; p * size < last; p++) {
      const int64_t end = lesser(last, (p + 1) * size);
      int64_t column = larger(first, p * size);
      const float s = to_float(scale[p]);
      const int z = zero_of<kBits>(*zero(e, g, p));
      const Group<kBits> group(z);
      if (!(column & (kBits == 4)))
        for (; column + kStep <= end; column += kStep) {
          V n[2];
          group.numbers(from + column * kBits / 8, n);
          order<kBits>(n);
          store(to + column - first, n[0] * s), store(to + column - first + VL, n[1] * s);
        }
      for (; column < end; column++)
        from_float((code_at(from, column, kBits) - static_cast<float>(z)) * s, to + column - first);
    }
  }
};

SPARSE_FFN_END
