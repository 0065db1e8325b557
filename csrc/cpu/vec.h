// vec.h - one float vector V of VL lanes per instruction set, and how it is loaded from and stored to each storage
// type. Arithmetic and comparisons use the compiler's vector operators (GCC and Clang), so code above is written once.
#pragma once
#include "types.h"
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

SPARSE_FFN_BEGIN

#if defined(__AVX512F__) || defined(SPARSE_FFN_AMX_EMULATED)
constexpr int VL = 16;
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif
typedef float V __attribute__((vector_size(VL * 4), may_alias));
typedef int32_t VI __attribute__((vector_size(VL * 4), may_alias));
// pairs of bf16 are loaded as the words of a vector: a row may begin at any of them
typedef float VUnaligned __attribute__((vector_size(VL * 4), aligned(2), may_alias));

static ALWAYS_INLINE V zero() { return V{}; }
static ALWAYS_INLINE V splat(float f) { return V{} + f; }
#if defined(__aarch64__)  // a vector of less alignment as an argument is an internal error of GCC 14 there
static ALWAYS_INLINE V load(const float* p) { V v; memcpy(&v, p, sizeof v); return v; }
#else
static ALWAYS_INLINE V load(const float* p) { return *reinterpret_cast<const VUnaligned*>(p); }
#endif
static ALWAYS_INLINE void store(float* p, V v) { *reinterpret_cast<VUnaligned*>(p) = v; }
static ALWAYS_INLINE void stream(float* p, V v) {  // p aligned to a vector; drain_streams() before others may read
#if defined(__AVX512F__)
  _mm512_stream_ps(p, __m512(v));
#elif defined(__AVX2__)
  _mm256_stream_ps(p, __m256(v));
#else
  store(p, v);
#endif
}
static ALWAYS_INLINE void drain_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
static ALWAYS_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

#if defined(__AVX512F__)
static ALWAYS_INLINE V broadcast(const float* p) {  // as an integer, so that GCC loads once and not once per use
  int32_t word;
  memcpy(&word, p, 4);
  return V(_mm512_castsi512_ps(_mm512_set1_epi32(word)));
}
static ALWAYS_INLINE V fma(V a, V b, V c) { return V(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c))); }
static ALWAYS_INLINE float sum(V v) { return _mm512_reduce_add_ps(__m512(v)); }
static ALWAYS_INLINE float largest(V v) { return _mm512_reduce_max_ps(__m512(v)); }  // of numbers: no NaN

static ALWAYS_INLINE V widen_bf16(__m256i h) {
  return V(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)));
}
static ALWAYS_INLINE __m256i narrow_bf16(V v) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(__m512(v)));
#else
  const __m512i u = _mm512_castps_si512(__m512(v));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(__m512(v), __m512(v), _CMP_UNORD_Q);
  r = _mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(r);
#endif
}
// Columns 16 kHalf .. 16 kHalf + 15 of two bf16 rows of 32, as pairs with the first row's element in the low half.
template <int kHalf> static ALWAYS_INLINE __m512i pair_columns(__m512i first_row, __m512i second_row) {
  const __m512i step = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i column = _mm512_add_epi32(step, _mm512_set1_epi32(16 * kHalf));
  const __m512i lanes = _mm512_or_si512(column, _mm512_slli_epi32(_mm512_add_epi32(column, _mm512_set1_epi32(32)), 16));
  return _mm512_permutex2var_epi16(first_row, lanes, second_row);
}
static ALWAYS_INLINE V load(const bf16* p) {
  return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static ALWAYS_INLINE V load(const fp16* p) {
  return V(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
static ALWAYS_INLINE void store(bf16* p, V v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v));
}
static ALWAYS_INLINE __m256i narrow_fp16(V v) { return _mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT); }
static ALWAYS_INLINE void store(fp16* p, V v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_fp16(v));
}
// The first n < VL lanes; the others read as zero and are not written.
static ALWAYS_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
static ALWAYS_INLINE V load_n(const float* p, int n) { return V(_mm512_maskz_loadu_ps(first(n), p)); }
static ALWAYS_INLINE V load_n(const bf16* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
static ALWAYS_INLINE V load_n(const fp16* p, int n) {
  return V(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)));
}
static ALWAYS_INLINE void store_n(float* p, V v, int n) { _mm512_mask_storeu_ps(p, first(n), __m512(v)); }
static ALWAYS_INLINE void store_n(bf16* p, V v, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(v)); }
static ALWAYS_INLINE void store_n(fp16* p, V v, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow_fp16(v)); }

#else  // all others: partial vectors go through a small buffer, out of line: inlined they were half of the build

#if defined(__AVX2__)
static ALWAYS_INLINE V broadcast(const float* p) { return V(_mm256_broadcast_ss(p)); }
static ALWAYS_INLINE V fma(V a, V b, V c) { return V(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c))); }
static ALWAYS_INLINE V load(const bf16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return V(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)));
}
static ALWAYS_INLINE V load(const fp16* p) {
  return V(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
static ALWAYS_INLINE void store(bf16* p, V v) {
  const __m256i u = _mm256_castps_si256(__m256(v));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256 nan = _mm256_cmp_ps(__m256(v), __m256(v), _CMP_UNORD_Q);
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(nan));
  r = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(r));
}
static ALWAYS_INLINE void store(fp16* p, V v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
static ALWAYS_INLINE V broadcast(const float* p) { return V(vld1q_dup_f32(p)); }
static ALWAYS_INLINE V fma(V a, V b, V c) { return V(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b))); }
static ALWAYS_INLINE V load(const bf16* p) {
  return reinterpret_cast<V>(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
}
static ALWAYS_INLINE V load(const fp16* p) {
  return V(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)))));
}
static ALWAYS_INLINE void store(bf16* p, V v) {
  const uint32x4_t u = vreinterpretq_u32_f32(float32x4_t(v));
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t r = vshrq_n_u32(vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
  const uint32x4_t number = vceqq_f32(float32x4_t(v), float32x4_t(v));
  vst1_u16(reinterpret_cast<uint16_t*>(p), vmovn_u32(vbslq_u32(number, r, vdupq_n_u32(0x7fc0))));
}
static ALWAYS_INLINE void store(fp16* p, V v) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(float32x4_t(v))));
}
#else
static ALWAYS_INLINE V broadcast(const float* p) { return splat(*p); }
static ALWAYS_INLINE V fma(V a, V b, V c) { return a * b + c; }
template <class T> static ALWAYS_INLINE V load(const T* p) {
  V v = {};
  for (int i = 0; i < VL; i++) v[i] = to_float(p[i]);
  return v;
}
template <class T> static ALWAYS_INLINE void store(T* p, V v) {
  for (int i = 0; i < VL; i++) from_float(v[i], p + i);
}
#endif
static ALWAYS_INLINE float sum(V v) {
  float s = 0;
  for (int i = 0; i < VL; i++) s += v[i];
  return s;
}
static ALWAYS_INLINE float largest(V v) {
  float best = v[0];
  for (int i = 1; i < VL; i++) best = v[i] > best ? v[i] : best;
  return best;
}
template <class T> static __attribute__((noinline)) V load_n(const T* p, int n) {
  alignas(64) float buffer[VL] = {};
  for (int i = 0; i < n; i++) buffer[i] = to_float(p[i]);
  return load(buffer);
}
template <class T> static __attribute__((noinline)) void store_n(T* p, V v, int n) {
  alignas(64) float buffer[VL];
  store(buffer, v);
  for (int i = 0; i < n; i++) from_float(buffer[i], p + i);
}
#endif

#if defined(__AVX512F__)
static ALWAYS_INLINE V widen(const bf16*, __m256i h) { return widen_bf16(h); }
static ALWAYS_INLINE V widen(const fp16*, __m256i h) { return V(_mm512_cvtph_ps(h)); }
static ALWAYS_INLINE __m256i narrow(const bf16*, V v) { return narrow_bf16(v); }
static ALWAYS_INLINE __m256i narrow(const fp16*, V v) { return narrow_fp16(v); }
#endif
template <class T> static ALWAYS_INLINE void stream(T* p, V low, V high) {  // 2 VL numbers, like stream(float*, V)
#if defined(__AVX512F__)
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(narrow(p, low)), narrow(p, high), 1);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), both);
#else
  store(p, low);
  store(p + VL, high);
#endif
}

// One bit per lane of a comparison's result.
static ALWAYS_INLINE uint32_t lanes_of(VI mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(__m512i(mask));
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(__m256(mask)));
#elif defined(__aarch64__)
  const uint32x4_t bit = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(reinterpret_cast<uint32x4_t>(mask), bit));
#else
  uint32_t lanes = 0;
  for (int i = 0; i < VL; i++) lanes |= static_cast<uint32_t>(mask[i] & 1) << i;
  return lanes;
#endif
}

static ALWAYS_INLINE VI load(const int32_t* p) { VI v; memcpy(&v, p, sizeof v); return v; }
// The marked lanes, in order, to p; up to VL elements are written.
static ALWAYS_INLINE void compress(int32_t* p, VI v, uint32_t lanes) {
#if defined(__AVX512F__)  // in a register: compressing to memory is slow on AMD
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(static_cast<__mmask16>(lanes), __m512i(v)));
#else
  for (; lanes; lanes &= lanes - 1) *p++ = v[__builtin_ctz(lanes)];
#endif
}
// The four vectors' sums, into out[0] .. out[3] or added to them.
static ALWAYS_INLINE void sum4(V a, V b, V c, V d, float* out, bool add) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const auto half = [](V v) {
    return _mm256_add_ps(_mm512_castps512_ps256(__m512(v)), _mm512_extractf32x8_ps(__m512(v), 1));
  };
#else
  const auto half = [](V v) { return __m256(v); };
#endif
  const __m256 ab = _mm256_hadd_ps(half(a), half(b)), cd = _mm256_hadd_ps(half(c), half(d));
  const __m256 all = _mm256_hadd_ps(ab, cd);
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  _mm_storeu_ps(out, add ? _mm_add_ps(_mm_loadu_ps(out), sums) : sums);
#else
  const float sums[4] = {sum(a), sum(b), sum(c), sum(d)};
  for (int i = 0; i < 4; i++) out[i] = (add ? out[i] : 0.f) + sums[i];
#endif
}

template <class T> static ALWAYS_INLINE V load_upto(const T* p, int64_t n) {
  return n >= VL ? load(p) : load_n(p, static_cast<int>(n));
}
template <class T> static ALWAYS_INLINE void store_upto(T* p, V v, int64_t n) {
  if (n >= VL) store(p, v); else store_n(p, v, static_cast<int>(n));
}

SPARSE_FFN_END
