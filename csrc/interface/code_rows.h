// code_rows.h - rows of codes across the C interface, checked. Not compiled per instruction set.
#pragma once
#include "call.h"

namespace sparse_ffn {

// The letters of rows: experts E, units G, bytes of a row, groups of a row. The names are of qdata, scale and zero_point.
struct CodeLetters {
  const char *qdata, *scale;
  const char* names[3];
};

// Once the tensor is taken that the dtype of the scales is of.
inline sparse_ffn_codes take_codes(Operands& o, const sparse_ffn_code_rows& rows, const CodeLetters& letters) {
  sparse_ffn_codes c{};
  const bool four = rows.qdata.dtype == SPARSE_FFN_UINT8;
  c.bits = four ? 4 : 8;
  c.qdata = four ? static_cast<const void*>(o.take<Byte>(letters.names[0], rows.qdata, letters.qdata, Strides::kRows))
                 : o.take<int8_t>(letters.names[0], rows.qdata, letters.qdata, Strides::kRows);
  c.scale = o.take<void>(letters.names[1], rows.scale, letters.scale, Strides::kRows);
  c.zero_point = o.maybe<Byte>(letters.names[2], rows.zero_point, letters.scale, Strides::kRows);
  const auto strides = [](const sparse_ffn_tensor& t) { return sparse_ffn_row_strides{t.stride[0], t.stride[1]}; };
  c.qdata_strides = strides(rows.qdata), c.scale_strides = strides(rows.scale);
  if (c.zero_point) c.zero_strides = strides(rows.zero_point);
  o.count("experts", o['E']);
  const int64_t bytes = o[letters.qdata[2]];
  c.rows = o['G'], c.columns = four ? 2 * bytes : bytes, c.groups = o[letters.scale[2]];
  o.require(c.groups > 0 || !c.columns, "%s must have a column for each group", letters.names[1]);
  const bool whole = c.groups > 0 ? c.columns % c.groups == 0 && (!four || c.columns / c.groups % 2 == 0) : !c.columns;
  o.require(whole, "%s must have a column for each of equally long groups of qdata's columns, whole bytes of them",
            letters.names[1]);
  return c;
}

}  // namespace sparse_ffn
