// vec_math.h - vector exp and the activations with their derivatives.
#pragma once
#include "vec.h"

SPARSE_FFN_BEGIN

// exp(x) to about 1 ulp: x = n ln2 + r with |r| <= ln2/2, a degree-6 polynomial for e^r, the exponent bits for 2^n.
// 0 below -87.7 and infinite above 88.4, where these bits are those of 0 and of infinity; NaN for NaN.
static ALWAYS_INLINE V vexp(V x) {
  const V low = splat(-88.f), high = splat(89.f);
  const V clamped = x < low ? low : (x > high ? high : x);
  const V shifter = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const V t = fma(clamped, splat(1.44269504f), shifter);
  const V n = t - shifter;
  V r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440e-4f), r);
  V p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + 1.f);
  const VI scale = ((reinterpret_cast<VI>(t) - reinterpret_cast<VI>(shifter)) + 127) << 23;
  return p * reinterpret_cast<V>(scale);
}

// Each activation: value(z), and both(z, g, &a, &dz) with a = value and dz = g times the derivative. saves_value: the
// backward needs only the activation itself, so that is what the forward stores. gives_zeros: of all z <= 0, so that a
// few tokens need not read those units' rows (experts_decode.cpp).
//
// Of the smooth ones all factors of z are 0 or 1 to the last bit beyond +-kFar. Arguments from there are taken at it,
// where a formula would meet an overflow or infinity times zero: at -infinity they are 0, at +infinity their slope is 1.
constexpr float kFar = 100.f;
static ALWAYS_INLINE V above(V z) { return z < splat(-kFar) ? splat(-kFar) : z; }
static ALWAYS_INLINE V near(V z) { return z > splat(kFar) ? splat(kFar) : above(z); }

struct Relu {
  static constexpr bool saves_value = true, gives_zeros = true;
  static ALWAYS_INLINE V value(V z) { return z < zero() ? zero() : z; }
  static ALWAYS_INLINE void both(V z, V g, V& a, V& dz) { a = value(z); dz = z <= zero() ? zero() : g; }
};
struct Identity {
  static constexpr bool saves_value = true, gives_zeros = false;
  static ALWAYS_INLINE V value(V z) { return z; }
  static ALWAYS_INLINE void both(V z, V g, V& a, V& dz) { a = z; dz = g; }
};
struct Square {
  static constexpr bool saves_value = false, gives_zeros = false;
  static ALWAYS_INLINE V value(V z) { return z * z; }
  static ALWAYS_INLINE void both(V z, V g, V& a, V& dz) {
    a = z * z;
    const V once = g * z;
    dz = once + once;
  }
};
struct SquaredRelu {
  static constexpr bool saves_value = false, gives_zeros = true;
  static ALWAYS_INLINE V value(V z) { const V r = Relu::value(z); return r * r; }
  static ALWAYS_INLINE void both(V z, V g, V& a, V& dz) {
    a = value(z);
    const V once = g * z;
    dz = z <= zero() ? zero() : once + once;
  }
};
struct Silu {
  static constexpr bool saves_value = false, gives_zeros = false;
  static ALWAYS_INLINE V value(V z) { z = above(z); return z / (1.f + vexp(-z)); }
  static ALWAYS_INLINE void both(V z, V g, V& a, V& dz) {
    const V x = near(z), s = 1.f / (1.f + vexp(-x));
    a = above(z) * s;
    dz = g * fma(x * s, 1.f - s, s);
  }
};
struct Gelu {  // z Phi(z), Phi from erfc by Abramowitz and Stegun 7.1.26 (absolute error below 1.5e-7)
  static constexpr bool saves_value = false, gives_zeros = false;
  static ALWAYS_INLINE V phi_and_density(V z, V& density) {
    const V x = z * 0.70710678f, ax = x < zero() ? -x : x;
    const V t = 1.f / fma(ax, splat(0.3275911f), splat(1.f));
    V p = splat(1.061405429f);
    p = fma(p, t, splat(-1.453152027f));
    p = fma(p, t, splat(1.421413741f));
    p = fma(p, t, splat(-0.284496736f));
    p = fma(p, t, splat(0.254829592f));
    const V gauss = vexp(-ax * ax);
    density = gauss * 0.39894228f;
    const V half_erfc = 0.5f * p * t * gauss;
    return z < zero() ? half_erfc : 1.f - half_erfc;
  }
  static ALWAYS_INLINE V value(V z) { V density; return above(z) * phi_and_density(z, density); }
  static ALWAYS_INLINE void both(V z, V g, V& a, V& dz) {
    V density;
    const V x = near(z), phi = phi_and_density(x, density);
    a = above(z) * phi;
    dz = g * fma(x, density, phi);
  }
};
struct GeluTanh {  // 0.5 z (1 + tanh(w)) = z sigmoid(2w)
  static constexpr bool saves_value = false, gives_zeros = false;
  static ALWAYS_INLINE V factor(V z) {  // sigmoid(2w)
    const V w = z * 0.79788456f * fma(z * z, splat(0.044715f), splat(1.f));
    return 1.f / (1.f + vexp(-2.f * w));
  }
  static ALWAYS_INLINE V value(V z) { return above(z) * factor(z); }
  static ALWAYS_INLINE void both(V z, V g, V& a, V& dz) {
    const V x = near(z), s = factor(x);
    a = above(z) * s;
    const V dw = 2.f * 0.79788456f * fma(x * x, splat(3.f * 0.044715f), splat(1.f));
    dz = g * fma(x * s * (1.f - s), dw, s);
  }
};

// f of an example of the struct above that an activation stands for. No default: a case that is missing does not compile.
template <class F> static ALWAYS_INLINE auto with_activation(sparse_ffn_activation activation, const F& f) {
  switch (activation) {
    case SPARSE_FFN_RELU: return f(Relu{});
    case SPARSE_FFN_GELU: return f(Gelu{});
    case SPARSE_FFN_GELU_TANH: return f(GeluTanh{});
    case SPARSE_FFN_SILU: return f(Silu{});
    case SPARSE_FFN_IDENTITY: return f(Identity{});
    case SPARSE_FFN_SQUARED_RELU: return f(SquaredRelu{});
    case SPARSE_FFN_SQUARE: return f(Square{});
  }
  __builtin_trap();  // csrc/interface has refused all others
}

SPARSE_FFN_END
