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

// That hold a bit for each unit.
int64_t words(int64_t n_units) { return (n_units + 31) / 32; }

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

int sparse_ffn_topk_hidden_forward(const sparse_ffn_topk_hidden_forward_args* a, int32_t activation, int32_t k,
                                   int32_t n_threads) {
  Operands o;
  o.let('K', k);
  sparse_ffn_topk_hidden p{};
  p.up = o.take<void>("up", a->up, "TF");
  p.glu_gate = o.maybe<void>("glu_gate", a->glu_gate, "TF");
  p.dropout_mask = o.maybe<void>("dropout_mask", a->dropout_mask, "TF");
  p.norm = o.maybe<float>("norm", a->norm, "F");
  o.let('W', words(o['F']));
  sparse_ffn_topk_hidden_out out{};
  out.index = o.maybe<int64_t>("index", a->index, "TK");
  out.kept = o.maybe<void>("kept", a->kept, "TK");
  out.hidden = o.maybe<void>("hidden", a->hidden, "TF");
  out.selected = o.maybe<int32_t>("saved.selected", a->saved.selected, "TW");
  out.up = o.maybe<void>("saved.up", a->saved.up, "TK");
  out.glu_gate = o.maybe<void>("saved.glu_gate", a->saved.glu_gate, "TK");
  p.activation = take_activation(o, activation);
  o.require(k >= 0 && k <= o['F'], "k must be from 0 to the number of units, got %d", k);
  o.require(!out.glu_gate || p.glu_gate, "glu_gate is missing");
  o.count("units", o['F']);
  p.T = o['T'], p.F = o['F'], p.K = k, p.dtype = o.dtype(), p.n_threads = n_threads;
  return o.status() || !p.T ? o.status() : done(PHASE("select", kernels().topk_hidden_forward(p, out)));
}

int sparse_ffn_topk_hidden_backward(const sparse_ffn_topk_hidden_backward_args* a, int32_t activation, int32_t n_threads) {
  Operands o;
  sparse_ffn_topk_kept p{};
  const void* dhidden = o.take<void>("dhidden", a->dhidden, "TF");
  o.let('W', words(o['F']));
  p.selected = o.take<int32_t>("saved.selected", a->saved.selected, "TW");
  p.up = o.take<void>("saved.up", a->saved.up, "TK");
  p.glu_gate = o.maybe<void>("saved.glu_gate", a->saved.glu_gate, "TK");
  p.dropout_mask = o.maybe<void>("dropout_mask", a->dropout_mask, "TF");
  void* hidden = o.take<void>("hidden", a->hidden, "TF");
  void* dup = o.take<void>("dup", a->dup, "TF");
  void* dglu_gate = p.glu_gate ? o.take<void>("dglu_gate", a->dglu_gate, "TF") : nullptr;
  p.activation = take_activation(o, activation);
  o.require(o['K'] <= o['F'], "k must be at most the number of units");
  o.count("units", o['F']);
  p.T = o['T'], p.F = o['F'], p.K = o['K'], p.dtype = o.dtype(), p.n_threads = n_threads;
  if (o.status() || !p.T) return o.status();
  return done(PHASE("dselect", kernels().topk_hidden_backward(p, dhidden, hidden, dup, dglu_gate)));
}

int sparse_ffn_topk_index(const sparse_ffn_topk_index_args* a, int32_t n_units, int32_t n_threads) {
  Operands o;
  o.require(n_units >= 0, "n_units must not be negative, got %d", n_units);
  o.let('W', words(n_units));
  const int32_t* selected = o.take<int32_t>("selected", a->selected, "TW");
  int64_t* index = o.take<int64_t>("index", a->index, "TK");
  return o.status() ? o.status() : done(kernels().topk_index(selected, o['T'], n_units, o['K'], n_threads, index));
}

}  // extern "C"
