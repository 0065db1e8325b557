// quantized.cpp - the C interface of the product with quantised rows.
#include "slots.h"

using namespace sparse_ffn;

extern "C" int sparse_ffn_quantized_cvmm(const sparse_ffn_quantized_cvmm_args* a, int32_t down, int32_t n_threads) {
  Operands o;
  sparse_ffn_quantized p{};
  sparse_ffn_codes& c = p.codes;
  p.cvmm.x = o.take<void>("x", a->x, "NM", Strides::kRows);
  p.cvmm.x_stride = a->x.stride[0];
  const bool four = a->qdata.dtype == SPARSE_FFN_UINT8;
  c.bits = four ? 4 : 8;
  c.qdata = four ? static_cast<const void*>(o.take<Byte>("qdata", a->qdata, "EGB", Strides::kRows))
                 : o.take<int8_t>("qdata", a->qdata, "EGB", Strides::kRows);
  c.scale = o.take<void>("scale", a->scale, "EGP", Strides::kRows);
  c.zero_point = o.maybe<Byte>("zero_point", a->zero_point, "EGP", Strides::kRows);
  const auto strides = [](const sparse_ffn_tensor& t) { return sparse_ffn_row_strides{t.stride[0], t.stride[1]}; };
  c.qdata_strides = strides(a->qdata), c.scale_strides = strides(a->scale);
  if (c.zero_point) c.zero_strides = strides(a->zero_point);
  o.count("experts", o['E']);
  c.rows = o['G'], c.columns = four ? 2 * o['B'] : o['B'], c.groups = o['P'];
  o.require(c.groups > 0 || !c.columns, "scale must have a column for each group");
  const bool whole = c.groups > 0 ? c.columns % c.groups == 0 && (!four || c.columns / c.groups % 2 == 0) : !c.columns;
  o.require(whole, "scale must have a column for each of equally long groups of qdata's columns, whole bytes of them");
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
