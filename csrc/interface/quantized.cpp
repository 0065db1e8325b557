// quantized.cpp - the C interface of the product with quantised rows.
#include "code_rows.h"
#include "slots.h"

using namespace sparse_ffn;

extern "C" int sparse_ffn_quantized_cvmm(const sparse_ffn_quantized_cvmm_args* a, int32_t down, int32_t n_threads) {
  Operands o;
  sparse_ffn_quantized p{};
  p.cvmm.x = o.take<void>("x", a->x, "NM", Strides::kRows);
  p.cvmm.x_stride = a->x.stride[0];
  const sparse_ffn_codes& c = p.codes = take_codes(o, a->rows, {"EGB", "EGP", {"qdata", "scale", "zero_point"}});
  p.down = down != 0;
  o.require(o['M'] == (p.down ? c.rows : c.columns), "x must have %d columns, got %d",
            static_cast<int>(p.down ? c.rows : c.columns), static_cast<int>(o['M']));
  o.let('L', p.down ? c.columns : c.rows);
  const Slots slots = take_slots(o, a->slots);
  p.cvmm.dtype = o.dtype(), p.cvmm.n_threads = n_threads;
  void* out = o.take<void>("out", a->out, "RL");
  check_slots(o, p.cvmm, slots);
  if (o.status()) return o.status();
  if (!p.cvmm.E) {
    zero(out, p.cvmm.rows_out * p.cvmm.L, p.cvmm.dtype);
    return SPARSE_FFN_OK;
  }
  return sort_slots(p.cvmm, slots) ? done(kernels().quantized_cvmm(p, out)) : done(SPARSE_FFN_NO_MEMORY);
}
