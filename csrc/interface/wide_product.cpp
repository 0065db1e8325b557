// wide_product.cpp - the C interface of the wide product and of its norm.
#include <algorithm>
#include <numeric>

#include "call.h"

namespace sparse_ffn {
namespace {

void require_norm(Operands& o, int32_t norm) {
  o.require(norm >= SPARSE_FFN_NORM_NONE && norm <= SPARSE_FFN_NORM_RMS, "norm %d is unknown", norm);
}

}  // namespace
}  // namespace sparse_ffn

using namespace sparse_ffn;

extern "C" {

int sparse_ffn_wide_product_forward(const sparse_ffn_wide_product_args* a, int32_t norm, int32_t n_threads) {
  Operands o;
  sparse_ffn_wide_product p{};
  p.x = o.take<void>("x", a->x, "BMK", Strides::kRows);
  p.w = o.take<void>("w", a->w, "BNK");
  float* out = o.take<float>("out", a->out, "BMN");
  float* scale = o.maybe<float>("scale", a->scale, "BMP");
  require_norm(o, norm);
  o.require((norm != SPARSE_FFN_NORM_NONE) == (scale != nullptr), "scale must be there with a norm, and only then");
  o.require(!scale || (o['P'] > 0 && o['N'] % o['P'] == 0), "w must have the same number of rows for each piece");
  p.B = o['B'], p.M = o['M'], p.N = o['N'], p.K = o['K'];
  o.count("rows of x", p.B, p.M);
  if (o.status() || p.B * p.M * p.N == 0) return o.status();
  const int64_t stride_b = p.B > 1 ? a->x.stride[0] : 0, stride_m = p.M > 1 ? a->x.stride[1] : 0;
  p.x_step = std::max<int64_t>(1, std::gcd(stride_b, stride_m));
  p.x_steps_b = stride_b / p.x_step, p.x_steps_m = stride_m / p.x_step;
  o.count("steps between the first and the last row of x", (p.B - 1) * p.x_steps_b + (p.M - 1) * p.x_steps_m);
  if (o.status()) return o.status();
  p.norm_width = scale ? p.N / o['P'] : 0;
  p.dtype = o.dtype(), p.norm = norm, p.n_threads = n_threads;
  return done(PHASE(norm ? "query" : "scores", kernels().wide_product(p, out, scale)));
}

int sparse_ffn_normalised_backward(const sparse_ffn_normalised_args* a, int32_t norm, int32_t n_threads) {
  Operands o;
  const float* dout = o.take<float>("dout", a->dout, "MPW", Strides::kRows);
  const float* out = o.take<float>("out", a->out, "MPW");
  const float* scale = o.take<float>("scale", a->scale, "MP");
  void* dproduct = o.take<void>("dproduct", a->dproduct, "MPW");
  require_norm(o, norm);
  o.require(norm != SPARSE_FFN_NORM_NONE, "there is no norm");
  const sparse_ffn_normalised p{o['M'], o['P'], o['W'], a->dout.stride[0], a->dout.stride[1], o.dtype(), norm, n_threads};
  if (o.status() || p.M * p.pieces * p.width == 0) return o.status();
  return done(PHASE("dnorm", kernels().normalised_backward(p, dout, out, scale, dproduct)));
}

}  // extern "C"
