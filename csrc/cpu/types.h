// types.h - storage types and small helpers. Everything lives in a namespace named after the instruction set, so code
// that was compiled with wider instructions can never be linked into the path for an older CPU (one-definition rule).
// For the same reason no std:: template is used in files that are compiled once per instruction set.
#pragma once
#include <cstdint>
#include <cstring>

#include "../include/sparse_ffn.h"
#include "scratch.h"

#ifndef SPARSE_FFN_ISA_NAME
#define SPARSE_FFN_ISA_NAME generic
#endif
#define SPARSE_FFN_BEGIN namespace sparse_ffn { namespace SPARSE_FFN_ISA_NAME {
#define SPARSE_FFN_END } }
#define ALWAYS_INLINE inline __attribute__((always_inline))

SPARSE_FFN_BEGIN

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
#if defined(SPARSE_FFN_AMX)
struct tiled_fp16 : fp16 {};  // where the tiles multiply fp16 too
bool tiles_multiply_fp16();   // whether they do here
#define SPARSE_FFN_WITH_TILED(X) X(tiled_fp16)
#else
#define SPARSE_FFN_WITH_TILED(X)
#endif

// f of an example of the storage type that a dtype stands for.
template <class F> static ALWAYS_INLINE int with_dtype(int32_t dtype, const F& f) {
  switch (dtype) {
    case SPARSE_FFN_FP32: return f(float{});
    case SPARSE_FFN_BF16: return f(bf16{});
    case SPARSE_FFN_FP16: return f(fp16{});
  }
  __builtin_trap();  // csrc/interface has refused all others
}

// The same for what multiplies packed operands.
template <class F> static ALWAYS_INLINE int with_packed_dtype(int32_t dtype, const F& f) {
#if defined(SPARSE_FFN_AMX)
  if (dtype == SPARSE_FFN_FP16 && tiles_multiply_fp16()) return f(tiled_fp16{});
#endif
  return with_dtype(dtype, f);
}

template <class A> static ALWAYS_INLINE A lesser(A a, A b) { return b < a ? b : a; }
template <class A> static ALWAYS_INLINE A larger(A a, A b) { return a < b ? b : a; }
static ALWAYS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static ALWAYS_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

static ALWAYS_INLINE uint32_t bits_of(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
static ALWAYS_INLINE float float_of(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }

static ALWAYS_INLINE float to_float(float v) { return v; }
static ALWAYS_INLINE float to_float(bf16 v) { return float_of(static_cast<uint32_t>(v.bits) << 16); }
static inline float to_float(fp16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16, magnitude = v.bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // infinity, NaN
  if (magnitude >= 0x0400) return float_of(sign | ((magnitude << 13) + (112u << 23)));
  const float tiny = static_cast<float>(magnitude) * 5.9604644775390625e-8f;                // subnormal: 2^-24 steps
  return sign ? -tiny : tiny;
}

// Round to nearest, ties to even; NaN stays NaN.
static ALWAYS_INLINE void from_float(float v, float* out) { *out = v; }
static ALWAYS_INLINE void from_float(float v, bf16* out) {
  const uint32_t u = bits_of(v);
  out->bits = v != v ? static_cast<uint16_t>(0x7fc0 | (u >> 16 & 0x8000))
                     : static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static inline void from_float(float v, fp16* out) {
  const uint32_t u = bits_of(v), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  uint32_t r;
  if (magnitude > 0x7f800000) r = 0x7e00;
  else if (magnitude >= 0x477ff000) r = 0x7c00;                                             // rounds to infinity
  else if (magnitude >= 0x38800000) r = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  else r = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;  // subnormal: adding 0.5 rounds to multiples of 2^-24
  out->bits = static_cast<uint16_t>(sign | r);
}

SPARSE_FFN_END
