// kernel_table.h - the kernels that each instruction set offers; csrc/interface checks the arguments and calls them.
#pragma once
#include <cstdint>

#include "problem.h"

#define SPARSE_FFN_KERNELS(KERNEL)                                                                                       \
  KERNEL(experts_forward, (const sparse_ffn_experts&, void* out, void* saved_up, void* saved_glu_gate))                  \
  KERNEL(experts_decode, (const sparse_ffn_experts&, void* out))                                                         \
  KERNEL(experts_backward, (const sparse_ffn_experts&, const void* dout, int64_t dout_stride, const void* saved_up,      \
                            const void* saved_glu_gate, void* dx, void* dkeys, void* dgate_keys, void* dvalues,          \
                            void* dkey_bias, float* dgate))                                                              \
  KERNEL(route_tokens, (const sparse_ffn_experts&, const sparse_ffn_router&, int64_t* index, float* gate,                \
                        float* softmax_sums))                                                                            \
  KERNEL(moe_backward, (const sparse_ffn_experts&, const sparse_ffn_router&, const void* dout, int64_t dout_stride,      \
                        const void* saved_up, const void* saved_glu_gate, const int64_t* index, const float* dgate,      \
                        const float* dsums, void* dx, void* drouter, void* dkeys, void* dgate_keys, void* dvalues,       \
                        void* dkey_bias))                                                                                \
  KERNEL(cvmm_forward, (const sparse_ffn_cvmm&, void* out))                                                              \
  KERNEL(cvmm_backward, (const sparse_ffn_cvmm&, const void* dout, int64_t dout_stride, void* dx, void* dw,              \
                         float* dscale))                                                                                 \
  KERNEL(quantized_cvmm, (const sparse_ffn_quantized&, void* out))                                                       \
  KERNEL(quantized_experts, (const sparse_ffn_quantized_experts&, void* out))                                            \
  KERNEL(bag_forward, (const sparse_ffn_bag&, void* out))                                                                \
  KERNEL(bag_backward, (const sparse_ffn_bag&, const void* dout, void* dweight, void* dvalues, int64_t sparse_rows))     \
  KERNEL(wide_product, (const sparse_ffn_wide_product&, float* out, float* scale))                                       \
  KERNEL(normalised_backward, (const sparse_ffn_normalised&, const float* dout, const float* out, const float* scale,    \
                               void* dproduct))                                                                          \
  KERNEL(product_key_topk, (const sparse_ffn_product_keys&, const float* scores, int64_t* index, float* sums))           \
  KERNEL(product_key_topk_backward, (const sparse_ffn_product_keys&, const float* dsums, const int64_t* index,           \
                                     float* dscores))                                                                    \
  KERNEL(topk_hidden_forward, (const sparse_ffn_topk_hidden&, const sparse_ffn_topk_hidden_out&))                         \
  KERNEL(topk_hidden_backward, (const sparse_ffn_topk_kept&, const void* dh, void* h, void* d_up, void* d_glu_gate))    \
  KERNEL(topk_index, (const int32_t* selected, int64_t T, int64_t F, int64_t K, int32_t n_threads, int64_t* index))

namespace sparse_ffn {

struct KernelTable {
  const char* name;
  bool (*works)();  // null: nothing to try. Asked where the processor says that it has the instruction set
#define SPARSE_FFN_MEMBER(kernel, parameters) int(*kernel) parameters;
  SPARSE_FFN_KERNELS(SPARSE_FFN_MEMBER)
#undef SPARSE_FFN_MEMBER
};

// Those of the best instruction set that the processor has.
const KernelTable& kernels();

}  // namespace sparse_ffn
