// selection.cpp - the C interface of the selections.
#include "call.h"

namespace sparse_ffn {
namespace {

sparse_ffn_product_keys take_product_keys(Operands& o, const sparse_ffn_tensor& scores, int32_t n_threads) {
  const int64_t n = o['N'], k = o['K'];
  if (n > 0x7fff && !o.status())  // pairs of positions are kept in 32 bits
    o.require(false, "one call takes at most 32767 sub-keys, got %lld", static_cast<long long>(n));
  o.require(k <= n * n, "k must be at most n^2");
  return {o['T'], o['H'], n, k, scores.stride[0], scores.stride[1], scores.stride[2], n_threads};
}

}  // namespace
}  // namespace sparse_ffn

using namespace sparse_ffn;

extern "C" {

int sparse_ffn_product_key_topk(const sparse_ffn_product_key_topk_args* a, int32_t n_threads) {
  Operands o;
  o.let('S', 2);
  const float* scores = o.take<float>("scores", a->scores, "THSN", Strides::kRows);
  int64_t* index = o.take<int64_t>("index", a->index, "THK");
  float* sums = o.maybe<float>("sums", a->sums, "THK");
  const sparse_ffn_product_keys p = take_product_keys(o, a->scores, n_threads);
  if (o.status() || p.T * p.H * p.k == 0) return o.status();
  return done(PHASE("select", kernels().product_key_topk(p, scores, index, sums)));
}

int sparse_ffn_product_key_topk_backward(const sparse_ffn_product_key_topk_backward_args* a, int32_t n_threads) {
  Operands o;
  o.let('S', 2);
  const float* dsums = o.take<float>("dsums", a->dsums, "THK");
  const int64_t* index = o.take<int64_t>("index", a->index, "THK");
  float* dscores = o.take<float>("dscores", a->dscores, "THSN", Strides::kPermuted);
  o.require(o['N'] < 2 || a->dscores.stride[3] == 1, "dscores must be contiguous in its last dimension");
  const sparse_ffn_product_keys p = take_product_keys(o, a->dscores, n_threads);
  o.below("index", index, p.T * p.H * p.k, p.n * p.n);
  if (o.status() || p.T * p.H * p.n == 0) return o.status();
  return done(PHASE("dselect", kernels().product_key_topk_backward(p, dsums, index, dscores)));
}

int sparse_ffn_topk(const sparse_ffn_topk_args* a, int32_t n_threads) {
  Operands o;
  const float* scores = o.take<float>("scores", a->scores, "RN", Strides::kRows);
  int64_t* index = o.take<int64_t>("index", a->index, "RK");
  float* values = o.maybe<float>("values", a->values, "RK");
  o.require(o['K'] <= o['N'], "k must be at most the length of a row");
  o.count("scores in a row", o['N']);
  if (o.status() || !o['K']) return o.status();
  return done(kernels().topk(scores, o['R'], o['N'], a->scores.stride[0], o['K'], n_threads, index, values));
}

int sparse_ffn_topk_activation(const sparse_ffn_topk_activation_args* a, int32_t activation, int32_t n_threads) {
  Operands o;
  const void* u = o.take<void>("u", a->u, "TF", Strides::kRows);
  const float* norm = o.maybe<float>("norm", a->norm, "F");
  int64_t* index = o.take<int64_t>("index", a->index, "TK");
  void* kept = o.take<void>("kept", a->kept, "TK");
  const sparse_ffn_activation known = take_activation(o, activation);
  o.require(o['K'] <= o['F'], "k must be at most the number of units");
  o.count("units", o['F']);
  if (o.status() || !o['K']) return o.status();
  return done(kernels().topk_activation(u, o['T'], o['F'], a->u.stride[0], o.dtype(), known, norm, o['K'], n_threads,
                                        index, kept));
}

}  // extern "C"
