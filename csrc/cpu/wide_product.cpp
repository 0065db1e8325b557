// wide_product.cpp - products of low-precision matrices whose results stay in fp32, normalised in pieces where asked for:
// the queries and the scores that selections compare.
#include "gemm_rows.h"
#include "ops.h"

SPARSE_FFN_BEGIN

constexpr float kEpsilon = 1e-5f;

// Sum of f over [n], vectors first; f takes and returns a V or a float.
template <class F> static ALWAYS_INLINE float sum_of(int64_t n, const F& f) {
  V total = zero();
  int64_t i = 0;
  for (; i + VL <= n; i += VL) total = total + f(i, V{});
  float result = sum(total);
  for (; i < n; i++) result += f(i, 0.f);
  return result;
}
static ALWAYS_INLINE V at(const float* p, V) { return load(p); }
static ALWAYS_INLINE float at(const float* p, float) { return *p; }

// y = (z - mean) * scale, or y = z * scale for the root mean square; returns the scale.
static float normalise(const float* z, int64_t n, int32_t norm, float* y) {
  const float inverse_n = 1.f / static_cast<float>(n);
  float mean = 0;
  if (norm == SPARSE_FFN_NORM_LAYER) mean = sum_of(n, [&](int64_t i, auto k) { return at(z + i, k); }) * inverse_n;
  const float variance = sum_of(n, [&](int64_t i, auto k) {
    const auto d = at(z + i, k) - mean;
    return d * d;
  }) * inverse_n;
  const float scale = 1.f / __builtin_sqrtf(variance + kEpsilon);
  int64_t i = 0;
  for (; i + VL <= n; i += VL) store(y + i, (load(z + i) - mean) * scale);
  for (; i < n; i++) y[i] = (z[i] - mean) * scale;
  return scale;
}

// dz = scale * (dy - mean(dy) - y * mean(dy * y)); the root mean square has no mean(dy).
template <class T>
static void normalise_backward(const float* dy, const float* y, float scale, int64_t n, int32_t norm, T* dz) {
  const float inverse_n = 1.f / static_cast<float>(n);
  float mean = 0;
  if (norm == SPARSE_FFN_NORM_LAYER) mean = sum_of(n, [&](int64_t i, auto k) { return at(dy + i, k); }) * inverse_n;
  const float along = sum_of(n, [&](int64_t i, auto k) { return at(dy + i, k) * at(y + i, k); }) * inverse_n;
  for (int64_t i = 0; i < n; i += VL)
    store_upto(dz + i, (load_upto(dy + i, n - i) - mean - load_upto(y + i, n - i) * along) * scale, n - i);
}

template <class T>
static bool product(const sparse_ffn_wide_product& p, int32_t* offsets, int32_t* place, float* out, float* scale) {
  for (int64_t b = 0; b <= p.B; b++) offsets[b] = static_cast<int32_t>(b * p.M);
  for (int64_t b = 0; b < p.B; b++)
    for (int64_t m = 0; m < p.M; m++) place[b * p.M + m] = static_cast<int32_t>(b * p.x_steps_b + m * p.x_steps_m);
  RowGemm<T> g{};
  g.a = static_cast<const T*>(p.x);
  g.a_stride = p.x_step;
  g.gather = place;
  g.K = p.K;
  g.w[0] = static_cast<const T*>(p.w);
  g.w_stride_expert = p.N * p.K;
  g.w_stride_row = p.K;
  g.N = p.N;
  g.offsets = offsets;
  g.E = p.B;
  g.n_threads = p.n_threads;
  if (p.norm == SPARSE_FFN_NORM_NONE)
    return run_row_gemm(g, [&](const FinishedRow& r) { widen(out + r.s * p.N + r.n0, r.c[0], r.n); });
  const int64_t pieces = p.N / p.norm_width, width = p.norm_width;
  g.whole_rows = true;
  return run_row_gemm(g, [&](const FinishedRow& r) {
    for (int64_t i = 0; i < pieces; i++)
      scale[r.s * pieces + i] = normalise(r.c[0] + i * width, width, p.norm, out + r.s * p.N + i * width);
  });
}

int wide_product(const sparse_ffn_wide_product& p, float* out, float* scale) {
  int32_t* offsets = scratch_of<int32_t>(kBufferOffsets, p.B + 1);
  int32_t* place = scratch_of<int32_t>(kBufferOrder, p.B * p.M + 1);
  if (!offsets || !place) return SPARSE_FFN_NO_MEMORY;
  return with_packed_dtype(p.dtype, [&](auto example) {
    return product<decltype(example)>(p, offsets, place, out, scale) ? SPARSE_FFN_OK : SPARSE_FFN_NO_MEMORY;
  });
}

int normalised_backward(const sparse_ffn_normalised& p, const float* dout, const float* out, const float* scale,
                        void* dproduct) {
  return with_dtype(p.dtype, [&](auto example) {
    auto* dz = static_cast<decltype(example)*>(dproduct);
#pragma omp parallel for num_threads(larger(1, p.n_threads)) schedule(static)
    for (int64_t r = 0; r < p.M * p.pieces; r++)
      normalise_backward(dout + r / p.pieces * p.stride_m + r % p.pieces * p.stride_piece, out + r * p.width, scale[r],
                         p.width, p.norm, dz + r * p.width);
    return SPARSE_FFN_OK;
  });
}

SPARSE_FFN_END
