// bag.cpp - the C interface of the weighted bag.
#include <cinttypes>

#include "call.h"

namespace sparse_ffn {
namespace {

sparse_ffn_bag take_table(Operands& o, const sparse_ffn_table& t, int32_t n_threads) {
  sparse_ffn_bag p{};
  p.values = o.take<void>("values", t.values, "NO");
  p.index = o.take<int64_t>("index", t.index, "TJ");
  p.weight = o.take<void>("weight", t.weight, "TJ");
  p.T = o['T'], p.J = o['J'], p.N = o['N'], p.O = o['O'];
  p.dtype = o.dtype(), p.n_threads = n_threads;
  o.count("slots", p.T, p.J);
  o.count("rows of values", p.N);
  o.below("index", p.index, p.T * p.J, p.N);
  return p;
}

}  // namespace
}  // namespace sparse_ffn

using namespace sparse_ffn;

extern "C" {

int sparse_ffn_bag_forward(const sparse_ffn_bag_forward_args* a, int32_t skip_zeros, int32_t n_threads) {
  Operands o;
  sparse_ffn_bag p = take_table(o, a->table, n_threads);
  p.skip_zeros = skip_zeros != 0;
  void* out = o.take<void>("out", a->out, "TO");
  return o.status() ? o.status() : done(PHASE("bag", kernels().bag_forward(p, out)));
}

int sparse_ffn_bag_backward(const sparse_ffn_bag_backward_args* a, int32_t n_threads) {
  Operands o;
  const sparse_ffn_bag p = take_table(o, a->table, n_threads);
  const void* dout = o.take<void>("dout", a->dout, "TO");
  void* dweight = o.maybe<void>("dweight", a->dweight, "TJ");
  void* dvalues = o.maybe<void>("dvalues", a->dvalues, "NO");
  if (o.status()) return o.status();
  return done(PHASE("dbag", kernels().bag_backward(p, dout, dweight, dvalues, -1)));
}

int sparse_ffn_bag_backward_sparse(const sparse_ffn_bag_backward_sparse_args* a, int32_t n_threads) {
  Operands o;
  const sparse_ffn_bag p = take_table(o, a->table, n_threads);
  const void* dout = o.take<void>("dout", a->dout, "TO");
  void* dweight = o.maybe<void>("dweight", a->dweight, "TJ");
  void* dvalue_rows = o.take<void>("dvalue_rows", a->dvalue_rows, "RO");
  if (o.status()) return o.status();
  const int status = done(PHASE("dbag", kernels().bag_backward(p, dout, dweight, dvalue_rows, o['R'])));
  if (status != SPARSE_FFN_BAD_ARGUMENT) return status;
  return refuse(status, "dvalue_rows must have as many rows as index names of values, got %" PRId64, o['R']);
}

}  // extern "C"
