// quantized.h - the product with rows of codes for few slots of an expert.
#pragma once
#include "codes.h"

SPARSE_FFN_BEGIN

// Writes all of out; false when out of memory.
template <class T, int kBits> bool quantized_few(const sparse_ffn_quantized&, T* out);

#define SPARSE_FFN_DECLARE(T)                                                \
  extern template bool quantized_few<T, 4>(const sparse_ffn_quantized&, T*); \
  extern template bool quantized_few<T, 8>(const sparse_ffn_quantized&, T*);
SPARSE_FFN_DECLARE(float)
SPARSE_FFN_DECLARE(bf16)
SPARSE_FFN_DECLARE(fp16)
#undef SPARSE_FFN_DECLARE

SPARSE_FFN_END
