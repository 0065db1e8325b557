// ops.h - entry points of one instruction set besides the expert FFN; see kernel_table.h for what they do.
#pragma once
#include "problem.h"
#include "types.h"

SPARSE_FFN_BEGIN

int bag_forward(const sparse_ffn_bag&, void* out);
int bag_backward(const sparse_ffn_bag&, const void* dout, void* dweight, void* dvalues, int64_t* rows, int64_t* n_rows);
int wide_product(const sparse_ffn_wide_product&, float* out, float* scale);
int normalised_backward(const sparse_ffn_normalised&, const float* dout, const float* out, const float* scale,
                        void* dproduct);
int product_key_topk(const sparse_ffn_product_keys&, const float* scores, int64_t* index, float* sums);
int product_key_topk_backward(const sparse_ffn_product_keys&, const float* dsums, const int64_t* index,
                              float* dscores);
int topk(const float* scores, int64_t R, int64_t n, int64_t stride, int64_t k, int32_t n_threads, int64_t* index,
         float* values);
int topk_activation(const void* u, int64_t T, int64_t F, int64_t stride, int32_t dtype, int32_t activation,
                    const float* norm, int64_t k, int32_t n_threads, int64_t* index, void* kept);
int cvmm_forward(const sparse_ffn_cvmm&, void* out);
int cvmm_backward(const sparse_ffn_cvmm&, const void* dout, int64_t dout_stride, void* dx, void* dw, float* dscale);

SPARSE_FFN_END
