// cvmm.cpp - grouped matrix product with gather, scatter and reduction weight, and its gradients; all of it is the three
// products of gemm_*.h with the roles of x and out exchanged.
#include "gemm_outer.h"
#include "gemm_scatter.h"
#include "ops.h"
#include "slot_rows.h"

SPARSE_FFN_BEGIN

template <class T> static ScatterGemm<T> product(const sparse_ffn_cvmm& p) {
  ScatterGemm<T> g{};
  g.w[0] = static_cast<const T*>(p.w);
  g.w_stride_expert = p.w_stride_e;
  g.offsets = p.offsets;
  g.E = p.E;
  g.scale = p.scale;
  g.n_threads = p.n_threads;
  return g;
}

// For few rows, weights that lie as [E, L, M]: rows times rows, without packing.
template <class T> static bool forward_rows(const sparse_ffn_cvmm& p, T* out) {
  RowGemm<T> g{};
  g.a = static_cast<const T*>(p.x);
  g.a_stride = p.x_stride;
  g.gather = p.gather;
  g.K = p.M;
  g.w[0] = static_cast<const T*>(p.w);
  g.w_stride_expert = p.w_stride_e;
  g.w_stride_row = p.w_stride_l;
  g.N = p.L;
  g.offsets = p.offsets;
  g.E = p.E;
  g.n_threads = p.n_threads;
  return run_slot_rows(p, g, out);
}

template <class T> static int forward(const sparse_ffn_cvmm& p, T* out) {
  if (p.w_stride_m == 1 && p.w_stride_l != 1 && p.S < p.E * kPackMinRows<T> && one_slot_each(p))
    return forward_rows(p, out) ? SPARSE_FFN_OK : SPARSE_FFN_NO_MEMORY;
  ScatterGemm<T> g = product<T>(p);
  g.a = static_cast<const T*>(p.x);
  g.a_stride = p.x_stride;
  g.gather = p.gather;
  g.K = p.M;
  g.w_stride_k = p.w_stride_m;
  g.w_stride_n = p.w_stride_l;
  g.N = p.L;
  g.scatter = p.scatter;
  g.out = out;
  g.out_stride = p.L;
  g.rows_out = p.rows_out;
  return run_scatter_gemm(g) ? SPARSE_FFN_OK : SPARSE_FFN_NO_MEMORY;
}

template <class T> static float dot(const float* a, const T* b, int64_t n) {
  V total = zero();
  for (int64_t i = 0; i < n; i += VL) total = fma(load_upto(a + i, n - i), load_upto(b + i, n - i), total);
  return sum(total);
}

// dscale[s] = (x[gather] W) . dout[scatter]; the weights are read along whichever side is contiguous.
template <class T> static bool scale_gradient(const sparse_ffn_cvmm& p, const T* dout, int64_t dout_stride, float* dscale) {
  const T* x = static_cast<const T*>(p.x);
  const bool along_l = p.w_stride_l == 1;
  RowGemm<T> g{};
  g.a = along_l ? dout : x;
  g.a_stride = along_l ? dout_stride : p.x_stride;
  g.gather = along_l ? p.scatter : p.gather;
  g.K = along_l ? p.L : p.M;
  g.w[0] = static_cast<const T*>(p.w);
  g.w_stride_expert = p.w_stride_e;
  g.w_stride_row = along_l ? p.w_stride_m : p.w_stride_l;
  g.N = along_l ? p.M : p.L;
  g.offsets = p.offsets;
  g.E = p.E;
  g.n_threads = p.n_threads;
  return run_row_gemm(g, [&](const FinishedRow& r) {
    const T* other = along_l ? x + p.gather[r.s] * p.x_stride : dout + p.scatter[r.s] * dout_stride;
    dscale[r.s] = dot(r.c[0], other + r.n0, r.n) + (r.n0 ? dscale[r.s] : 0.f);
  });
}

template <class T>
static int backward(const sparse_ffn_cvmm& p, const T* dout, int64_t dout_stride, T* dx, T* dw, float* dscale) {
  if (dx) {
    ScatterGemm<T> g = product<T>(p);
    g.a = dout;
    g.a_stride = dout_stride;
    g.gather = p.scatter;
    g.K = p.L;
    g.w_stride_k = p.w_stride_l;
    g.w_stride_n = p.w_stride_m;
    g.N = p.M;
    g.scatter = p.gather;
    g.out = dx;
    g.out_stride = p.M;
    g.rows_out = p.rows_x;
    if (!run_scatter_gemm(g)) return SPARSE_FFN_NO_MEMORY;
  }
  if (dw) {
    OuterGemm<T> g{};
    g.a = static_cast<const T*>(p.x);
    g.a_stride = p.x_stride;
    g.gather_a = p.gather;
    g.M = p.M;
    g.b = dout;
    g.b_stride = dout_stride;
    g.gather_b = p.scatter;
    g.N = p.L;
    g.scale = p.scale;
    g.offsets = p.offsets;
    g.E = p.E;
    g.out[0] = dw;
    g.n_threads = p.n_threads;
    if (!run_outer_gemm(g)) return SPARSE_FFN_NO_MEMORY;
  }
  if (dscale && !scale_gradient(p, dout, dout_stride, dscale)) return SPARSE_FFN_NO_MEMORY;
  return SPARSE_FFN_OK;
}

int cvmm_forward(const sparse_ffn_cvmm& p, void* out) {
  return with_packed_dtype(p.dtype, [&](auto example) { return forward(p, static_cast<decltype(example)*>(out)); });
}
int cvmm_backward(const sparse_ffn_cvmm& p, const void* dout, int64_t dout_stride, void* dx, void* dw, float* dscale) {
  const auto run = [&](auto example) {
    using T = decltype(example);
    return backward<T>(p, static_cast<const T*>(dout), dout_stride, static_cast<T*>(dx), static_cast<T*>(dw), dscale);
  };
  return with_packed_dtype(p.dtype, run);
}

SPARSE_FFN_END
