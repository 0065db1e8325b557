// kernel_table.h - what one instruction set offers; csrc/interface checks the arguments and calls.
#pragma once
#include <cstdint>

#include "problem.h"

namespace sparse_ffn {

struct KernelTable {
  const char* name;
  int (*experts_forward)(const sparse_ffn_experts&, void* out, void* saved_z, void* saved_zg);
  int (*experts_decode)(const sparse_ffn_experts&, void* out);
  int (*experts_backward)(const sparse_ffn_experts&, const void* dout, int64_t dout_stride, const void* saved_z,
                          const void* saved_zg, void* dx, void* dkeys, void* dgate_keys, void* dvalues,
                          void* dkey_bias, float* dgate);
  int (*route_tokens)(const sparse_ffn_experts&, const sparse_ffn_router&, int64_t* index, float* gate,
                      float* softmax_sums);
  int (*moe_backward)(const sparse_ffn_experts&, const sparse_ffn_router&, const void* dout, int64_t dout_stride,
                      const void* saved_z, const void* saved_zg, const int64_t* index, const float* dgate,
                      const float* dsums, void* dx, void* drouter, void* dkeys, void* dgate_keys, void* dvalues,
                      void* dkey_bias);
  int (*cvmm_forward)(const sparse_ffn_cvmm&, void* out);
  int (*cvmm_backward)(const sparse_ffn_cvmm&, const void* dout, int64_t dout_stride, void* dx, void* dw,
                       float* dscale);
  int (*bag_forward)(const sparse_ffn_bag&, void* out);
  int (*bag_backward)(const sparse_ffn_bag&, const void* dout, void* dweight, void* dvalues, int64_t* rows,
                      int64_t* n_rows);
  int (*wide_product)(const sparse_ffn_wide_product&, float* out, float* scale);
  int (*normalised_backward)(const sparse_ffn_normalised&, const float* dout, const float* out, const float* scale,
                             void* dproduct);
  int (*product_key_topk)(const sparse_ffn_product_keys&, const float* scores, int64_t* index, float* sums);
  int (*product_key_topk_backward)(const sparse_ffn_product_keys&, const float* dsums, const int64_t* index,
                                  float* dscores);
  int (*topk)(const float* scores, int64_t R, int64_t n, int64_t stride, int64_t k, int32_t n_threads, int64_t* index,
              float* values);
  int (*topk_activation)(const void* u, int64_t T, int64_t F, int64_t stride, int32_t dtype, int32_t activation,
                         const float* norm, int64_t k, int32_t n_threads, int64_t* index, void* kept);
};

// Those of the best instruction set that the processor has.
const KernelTable& kernels();

}  // namespace sparse_ffn
