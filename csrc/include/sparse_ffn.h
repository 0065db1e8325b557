/* sparse_ffn.h - plain C ABI of the native CPU core of sparse-ffn.
 *
 * Conventions
 *  - No torch, no C++ in the interface: raw pointers, int64 sizes, strides in elements (not bytes).
 *  - Tensors are dense and row-major unless a stride is given. T tokens, D d_model, O d_out, E experts, G hidden units
 *    per expert, K experts per token, S = T*K slots. Slot t*K+j is the j-th choice of token t.
 *  - Storage is fp32, bf16 or fp16 (one dtype per call); every sum is accumulated in fp32.
 *  - Every function returns SPARSE_FFN_OK or an error code and never throws. Outputs are fully written: nothing needs
 *    to be zeroed by the caller. Results are deterministic and do not depend on the number of threads.
 *  - Threads: n_threads of the OpenMP runtime of the process are used, never a second pool.
 *  - Scratch is kept per calling thread and reused between calls; sparse_ffn_release_memory() frees the caller's.
 */
#ifndef SPARSE_FFN_H
#define SPARSE_FFN_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define SPARSE_FFN_API __declspec(dllexport)
#else
#define SPARSE_FFN_API __attribute__((visibility("default")))
#endif

#define SPARSE_FFN_ABI_VERSION 4

enum sparse_ffn_status {
  SPARSE_FFN_OK = 0,
  SPARSE_FFN_BAD_ARGUMENT = 1,   /* negative size, null pointer, unknown dtype or activation */
  SPARSE_FFN_BAD_INDEX = 2,      /* an index lies outside its table; nothing was read through it */
  SPARSE_FFN_NO_MEMORY = 3,
  SPARSE_FFN_TOO_LARGE = 4       /* more than 2^31-1 slots in one call */
};
enum sparse_ffn_dtype { SPARSE_FFN_FP32 = 0, SPARSE_FFN_BF16 = 1, SPARSE_FFN_FP16 = 2 };
enum sparse_ffn_activation {
  SPARSE_FFN_RELU = 0, SPARSE_FFN_GELU = 1, SPARSE_FFN_GELU_TANH = 2,
  SPARSE_FFN_SILU = 3, SPARSE_FFN_IDENTITY = 4, SPARSE_FFN_SQUARED_RELU = 5
};

SPARSE_FFN_API int sparse_ffn_abi_version(void);
/* Name of the instruction set in use, one of those that the CPU supports. SPARSE_FFN_ISA=<name> in the environment forces
 * one (for tests); it is read once, at the first call. Null if it names none of them: callers should stop then. */
SPARSE_FFN_API const char* sparse_ffn_isa(void);
/* All that the CPU supports of "avx512_bf16", "avx512", "avx2" and "generic", in this order, separated by spaces. */
SPARSE_FFN_API const char* sparse_ffn_isas(void);
/* Frees the scratch of the calling thread and the outputs' memory that is kept for the next ones. */
SPARSE_FFN_API void sparse_ffn_release_memory(void);
/* Memory for a large output: it starts at a huge page (2 MiB). Null when there is none. Up to 256 MiB of what is freed,
 * with the number of bytes that was asked for, is kept for outputs of the same size. */
SPARSE_FFN_API void* sparse_ffn_allocate(int64_t bytes);
SPARSE_FFN_API void sparse_ffn_free(void* memory, int64_t bytes);
/* Finds the memory behind a fresh buffer that others will write, with huge pages where there are. All functions here do
 * so for their own large outputs. */
SPARSE_FFN_API int sparse_ffn_find_pages(void* p, int64_t bytes);

/* ---- Routing ----------------------------------------------------------------------------------------------------
 * Stable counting sort of the slots by expert. index [S] in [0, E) -> order [S] (sorted position -> slot) and
 * offsets [E+1] (expert e owns sorted positions offsets[e] .. offsets[e+1]-1). */
SPARSE_FFN_API int sparse_ffn_route(const int64_t* index, int64_t S, int64_t E, int32_t* order, int32_t* offsets);

/* ---- Expert FFN -------------------------------------------------------------------------------------------------
 * y_t = sum_j gate[t,j] * h(t,j) @ values[e],  e = index[t,j]
 * h   = act(z) * hidden_scale,             z  = keys[e] x_t + key_bias[e]
 * h   = act(zg) * z * hidden_scale  (GLU), zg = gate_keys[e] x_t */
typedef struct sparse_ffn_experts {
  int64_t T, D, O, E, G, K;
  int32_t dtype, activation, n_threads, reserved;
  const void* x;             /* [T, D], row stride x_stride */
  int64_t x_stride;
  const void* keys;          /* [E, G, D] */
  const void* gate_keys;     /* [E, G, D] or null: no GLU */
  const void* values;        /* [E, G, O] */
  const void* key_bias;      /* [E, G] or null */
  const float* gate;         /* [T, K] */
  const void* hidden_scale;  /* [T, K, G] or null: dropout's multiplier */
  const int32_t* order;      /* [S] and */
  const int32_t* offsets;    /* [E+1]: of sparse_ffn_route */
} sparse_ffn_experts;

/* out [T, O], contiguous. saved_z and saved_zg [S, G] hold, in expert order, what the backward needs (for ReLU the
 * activation, else the pre-activation); saved_zg only with GLU. Both may be null for inference. */
SPARSE_FFN_API int sparse_ffn_experts_forward(const sparse_ffn_experts* args, void* out, void* saved_z, void* saved_zg);

/* The same for inference in one call: routes index [T, K] into scratch first (order and offsets are ignored). */
SPARSE_FFN_API int sparse_ffn_experts_infer(const sparse_ffn_experts* args, const int64_t* index, void* out);

/* Any output may be null (not needed). dgate [T, K] is fp32, the others have the dtype of their tensor. */
SPARSE_FFN_API int sparse_ffn_experts_backward(
    const sparse_ffn_experts* args, const void* dout, int64_t dout_stride, const void* saved_z, const void* saved_zg,
    void* dx, void* dkeys, void* dgate_keys, void* dvalues, void* dkey_bias, float* dgate);

/* ---- MoE layer: a linear router and the expert FFN behind it, in one call ---------------------------------------
 * scores = weight x_t in fp32; the K best of scores + bias are selected (as all selections here) and weigh
 * sigmoid(score), the softmax over all scores, the softmax over the selected ones, or 1. fp32 and bf16 only. */
enum sparse_ffn_gate {
  SPARSE_FFN_GATE_SIGMOID = 0, SPARSE_FFN_GATE_SOFTMAX = 1, SPARSE_FFN_GATE_SOFTMAX_SELECTED = 2, SPARSE_FFN_GATE_ONE = 3
};
typedef struct sparse_ffn_router {
  const void* weight;        /* [E, D] in x's dtype */
  const float* bias;         /* [E], for the ranking only, or null */
  const uint8_t* mask;       /* [T], 0 for padding, which the sums leave out; or null */
  int64_t groups;            /* runs of T / groups tokens with sums of their own */
  int32_t gate, reserved;
} sparse_ffn_router;
/* As experts_forward; index, gate [T, K], order [T*K] and offsets [E+1] are outputs here (those in args are ignored);
 * all but index may be null.
 * softmax_sums [groups, E], the sum of the tokens' softmax over all scores, may be null. */
SPARSE_FFN_API int sparse_ffn_moe_forward(const sparse_ffn_experts* args, const sparse_ffn_router* router, void* out,
                                          void* saved_z, void* saved_zg, int64_t* index, float* gate, int32_t* order,
                                          int32_t* offsets, float* softmax_sums);
/* As experts_backward, with the router's part in dx and its own gradient drouter [E, D]. dgate [T, K] and dsums
 * [groups, E] are the gradients that reached the other outputs; either may be null. */
SPARSE_FFN_API int sparse_ffn_moe_backward(const sparse_ffn_experts* args, const sparse_ffn_router* router,
                                           const void* dout, int64_t dout_stride, const void* saved_z,
                                           const void* saved_zg, const int64_t* index, const float* dgate,
                                           const float* dsums, void* dx, void* drouter, void* dkeys, void* dgate_keys,
                                           void* dvalues, void* dkey_bias);

/* ---- CVMM: rows grouped by expert times that expert's matrix ----------------------------------------------------
 * out[scatter[s]] += scale[s] * x[gather[s]] @ W[e],  s in offsets[e] .. offsets[e+1]-1, out zero before.
 * W [E, M, L] is read through three strides, so a transposed view works as it is (one of w_stride_m, w_stride_l
 * must be 1). gather and scatter may be null (the identity), scale may be null (one). */
typedef struct sparse_ffn_cvmm {
  int64_t rows_x, rows_out, S, E, M, L;
  int32_t dtype, n_threads;
  const void* x;             /* [rows_x, M], row stride x_stride */
  int64_t x_stride;
  const void* w;
  int64_t w_stride_e, w_stride_m, w_stride_l;
  const int32_t* offsets;    /* [E+1] */
  const int32_t* gather;     /* [S], values in [0, rows_x) */
  const int32_t* scatter;    /* [S], values in [0, rows_out) */
  const float* scale;        /* [S] */
} sparse_ffn_cvmm;
SPARSE_FFN_API int sparse_ffn_cvmm_forward(const sparse_ffn_cvmm* args, void* out /* [rows_out, L] */);
/* dx [rows_x, M], dw [E, M, L] contiguous, dscale [S]; any may be null. */
SPARSE_FFN_API int sparse_ffn_cvmm_backward(const sparse_ffn_cvmm* args, const void* dout, int64_t dout_stride,
                                            void* dx, void* dw, float* dscale);

/* ---- Weighted bag -----------------------------------------------------------------------------------------------
 * out[t] = sum_j weight[t,j] * values[index[t,j]];  values [N, O], index [T, J] int64, weight [T, J] of values' dtype. */
typedef struct sparse_ffn_bag {
  int64_t T, J, N, O;
  int32_t dtype, n_threads;
  const void* values;
  const int64_t* index;
  const void* weight;
} sparse_ffn_bag;
SPARSE_FFN_API int sparse_ffn_bag_forward(const sparse_ffn_bag* args, void* out);
/* dweight [T, J] and dvalues [N, O] (zero where a row is unused); either may be null. */
SPARSE_FFN_API int sparse_ffn_bag_backward(const sparse_ffn_bag* args, const void* dout, void* dweight, void* dvalues);
/* Row-sparse: rows [min(T*J, N)] receives the touched row ids in ascending order, dvalue_rows [min(T*J, N), O] their
 * gradients, *n_rows how many. dweight may be null. */
SPARSE_FFN_API int sparse_ffn_bag_backward_sparse(const sparse_ffn_bag* args, const void* dout, void* dweight,
                                                  int64_t* rows, void* dvalue_rows, int64_t* n_rows);

/* ---- Wide product -----------------------------------------------------------------------------------------------
 * out[b] = x[b] w[b]^T in fp32, whatever the dtype: x [B, M, K] with strides of its first two dimensions, w [B, N, K].
 * With a norm, each piece of norm_width columns (a divisor of N) is normalised: (z - mean) * scale with scale
 * 1 / sqrt(variance + 1e-5), or z / sqrt(mean(z^2) + 1e-5). */
enum sparse_ffn_norm { SPARSE_FFN_NORM_NONE = 0, SPARSE_FFN_NORM_LAYER = 1, SPARSE_FFN_NORM_RMS = 2 };
typedef struct sparse_ffn_wide_product {
  int64_t B, M, N, K;
  int64_t x_stride_b, x_stride_m, norm_width;
  int32_t dtype, norm, n_threads, reserved;
  const void* x;
  const void* w;
} sparse_ffn_wide_product;
/* out [B, M, N]; scale [B, M, N / norm_width], only with a norm. */
SPARSE_FFN_API int sparse_ffn_wide_product_forward(const sparse_ffn_wide_product* args, float* out, float* scale);

/* Gradient of what a norm was applied to: M rows of `pieces` pieces; dout piece at m * stride_m + piece * stride_piece. */
typedef struct sparse_ffn_normalised {
  int64_t M, pieces, width;
  int64_t stride_m, stride_piece;
  int32_t dtype, norm, n_threads, reserved;
} sparse_ffn_normalised;
/* out [M, pieces, width] and scale [M, pieces] of the forward; dproduct [M, pieces, width] in the dtype. */
SPARSE_FFN_API int sparse_ffn_normalised_backward(const sparse_ffn_normalised* args, const float* dout, const float* out,
                                                  const float* scale, void* dproduct);

/* ---- Selection --------------------------------------------------------------------------------------------------
 * All selections are exact and in torch.topk's order: NaN first, then by value descending; ties, also among NaNs, go to
 * the lower index. */
/* Product keys. Row (t, h) has two tables of n scores, at scores + t * stride_t + h * stride_h (+ stride_s). */
typedef struct sparse_ffn_product_keys {
  int64_t T, H, n, k;
  int64_t stride_t, stride_h, stride_s;
  int32_t n_threads, reserved;
} sparse_ffn_product_keys;
/* Top-k of the n*n sums first[i] + second[j] of each row; index [T, H, k] = i*n + j; ties go to the lower position in the
 * k x k list of both halves' best. sums [T, H, k] may be null. */
SPARSE_FFN_API int sparse_ffn_product_key_topk(const sparse_ffn_product_keys* args, const float* scores, int64_t* index,
                                               float* sums);
/* Gradient of the scores, in the strides of args: 2*T*H*n elements without gaps, each written. */
SPARSE_FFN_API int sparse_ffn_product_key_topk_backward(const sparse_ffn_product_keys* args, const float* dsums,
                                                        const int64_t* index, float* dscores);
/* Top-k of each row of scores [R, n] (row stride given); values may be null. */
SPARSE_FFN_API int sparse_ffn_topk(const float* scores, int64_t R, int64_t n, int64_t stride, int64_t k,
                                   int32_t n_threads, int64_t* index, float* values);
/* TopKFFN: the k units of u [T, F] with the largest |act(u)| * norm (norm [F] fp32 may be null), index ascending by rank; kept
 * [T, k] receives act(u) at those units, in u's dtype. */
SPARSE_FFN_API int sparse_ffn_topk_activation(const void* u, int64_t T, int64_t F, int64_t stride, int32_t dtype,
                                              int32_t activation, const float* norm, int64_t k, int32_t n_threads,
                                              int64_t* index, void* kept);

#ifdef __cplusplus
}
#endif
#endif /* SPARSE_FFN_H */
