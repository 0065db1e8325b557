/* sparse_ffn.h - plain C ABI of the CPU core of sparse-ffn.
 *
 * Conventions
 *  - No torch, no C++ in the interface. A tensor crosses it as memory, dtype, sizes and strides in elements (not bytes);
 *    every function checks that its tensors fit each other before it touches any memory, and otherwise refuses the call.
 *  - A function takes one block of tensors, inputs first, then options. What a comment calls "or absent" may be all zero.
 *    T tokens, D d_model, O d_out, E experts, G hidden units per expert, K experts per token, S = T*K slots. Slot t*K+j is
 *    the j-th choice of token t. Equal letters are equal sizes.
 *  - A slot whose expert is E names none: it is void. It adds exactly 0, reads no weights, and its gate or reduction weight
 *    gets a gradient of exactly 0.
 *  - Tensors are dense and row-major unless it says "rows" (unit stride in the last dimension, any others) or otherwise.
 *  - Storage is fp32, bf16 or fp16 (one dtype per call, that of tensors without one in the comments); every sum is
 *    accumulated in fp32.
 *  - Every function returns SPARSE_FFN_OK or an error code and never throws; sparse_ffn_error() says why. Outputs are
 *    fully written: nothing needs to be zeroed by the caller. Results are deterministic and do not depend on the number of
 *    threads.
 *  - Threads: n_threads of the OpenMP runtime of the process are used, never a second pool.
 *  - Scratch is kept per thread and reused between calls. What a call of many tokens leaves there is freed when it is more
 *    than 256 MiB.
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

#define SPARSE_FFN_ABI_VERSION 11

enum sparse_ffn_status {
  SPARSE_FFN_OK = 0,
  SPARSE_FFN_BAD_ARGUMENT = 1,   /* a tensor that is missing or does not fit the others, an unknown option */
  SPARSE_FFN_BAD_INDEX = 2,      /* an index lies outside its table; nothing was read through it */
  SPARSE_FFN_NO_MEMORY = 3,
  SPARSE_FFN_TOO_LARGE = 4,      /* more than 2^31-1 slots or rows in one call */
  SPARSE_FFN_BAD_DTYPE = 5
};
enum sparse_ffn_dtype {
  SPARSE_FFN_ABSENT = 0, SPARSE_FFN_FP32 = 1, SPARSE_FFN_BF16 = 2, SPARSE_FFN_FP16 = 3,
  SPARSE_FFN_INT64 = 4, SPARSE_FFN_INT32 = 5, SPARSE_FFN_BOOL = 6,
  SPARSE_FFN_INT8 = 7, SPARSE_FFN_UINT8 = 8,
  SPARSE_FFN_FOREIGN = 9         /* any other, or memory of another device: always refused */
};
enum sparse_ffn_activation {
  SPARSE_FFN_RELU = 0, SPARSE_FFN_GELU = 1, SPARSE_FFN_GELU_TANH = 2,
  SPARSE_FFN_SILU = 3, SPARSE_FFN_IDENTITY = 4, SPARSE_FFN_SQUARED_RELU = 5,
  SPARSE_FFN_SQUARE = 6,
  SPARSE_FFN_LAST_ACTIVATION = SPARSE_FFN_SQUARE
};

/* ---- Tensors ---------------------------------------------------------------------------------------------------- */
typedef struct sparse_ffn_tensor {
  int64_t dims;        /* sizes and strides in use, 1 to 4 */
  int64_t dtype;       /* sparse_ffn_dtype */
  void* data;          /* may be null where a size is 0 */
  int64_t size[4];
  int64_t stride[4];
} sparse_ffn_tensor;

SPARSE_FFN_API int sparse_ffn_abi_version(void);
/* A sentence: why the last call of this thread that did not return SPARSE_FFN_OK did not. */
SPARSE_FFN_API const char* sparse_ffn_error(void);
/* Name of the instruction set in use, one of those that the CPU supports. SPARSE_FFN_ISA=<name> in the environment forces
 * one (for tests); it is read once, at the first call. Null if it names none of them: callers should stop then. */
SPARSE_FFN_API const char* sparse_ffn_isa(void);
/* All that the CPU supports of "amx", "avx512_bf16", "avx512", "avx2" and "generic", in this order, separated by spaces;
 * "neon" on aarch64. Where SPARSE_FFN_ISA forces another one, "amx" is not among them: Linux is not asked for its tiles. */
SPARSE_FFN_API const char* sparse_ffn_isas(void);
/* Memory for a large output: it starts at a huge page (2 MiB), and is mapped, with huge pages where the system has them.
 * Null when there is none. Up to 256 MiB of what is freed, with the number of bytes that was asked for, is kept for
 * outputs of the same size, or until memory runs out. */
SPARSE_FFN_API void* sparse_ffn_allocate(int64_t bytes);
SPARSE_FFN_API void sparse_ffn_free(void* memory, int64_t bytes);

/* ---- Expert FFN -------------------------------------------------------------------------------------------------
 * y_t = sum_j gate[t,j] * h(t,j) @ values[e],  e = index[t,j]
 * h   = act(up) * dropout_mask,                   up       = keys[e] x_t + key_bias[e]
 * h   = act(glu_gate) * up * dropout_mask  (GLU), glu_gate = gate_keys[e] x_t */
typedef struct sparse_ffn_units {
  sparse_ffn_tensor x;             /* [T, D], rows */
  sparse_ffn_tensor keys;          /* [E, G, D] */
  sparse_ffn_tensor values;        /* [E, G, O] */
  sparse_ffn_tensor gate_keys;     /* [E, G, D], or absent: no GLU */
  sparse_ffn_tensor key_bias;      /* [E, G], or absent */
} sparse_ffn_units;

/* What a forward pass keeps for the backward pass. The slots are sorted by expert, in their order: order [S] int32 holds
 * the slot at each sorted position, and expert e owns positions offsets[e] .. offsets[e+1]-1, offsets [E+1] int32. Void
 * slots lie behind offsets[E]; nothing of what is kept there is read.
 * up [S, G], and with a GLU glu_gate [S, G], hold in that order the pre-activations, but for ReLU the activations. */
typedef struct sparse_ffn_saved {
  sparse_ffn_tensor order, offsets, up, glu_gate;
} sparse_ffn_saved;

typedef struct sparse_ffn_experts_forward_args {
  sparse_ffn_units units;
  sparse_ffn_tensor index;         /* [T, K] int64 in [0, E] */
  sparse_ffn_tensor gate;          /* [T, K] fp32 */
  sparse_ffn_tensor dropout_mask;  /* [T, K, G], or absent: dropout's multiplier */
  sparse_ffn_tensor out;           /* [T, O] */
  sparse_ffn_saved saved;          /* all absent: inference */
} sparse_ffn_experts_forward_args;
/* Inference for at most decode_tokens tokens reads the touched experts where they lie; others are packed. */
SPARSE_FFN_API int sparse_ffn_experts_forward(const sparse_ffn_experts_forward_args* args, int32_t activation,
                                              int32_t decode_tokens, int32_t n_threads);

/* Gradients that are absent are not computed. */
typedef struct sparse_ffn_experts_backward_args {
  sparse_ffn_units units;
  sparse_ffn_tensor gate, dropout_mask;              /* of the forward pass */
  sparse_ffn_saved saved;
  sparse_ffn_tensor dout;                            /* [T, O], rows */
  sparse_ffn_tensor dx, dkeys, dvalues, dgate_keys, dkey_bias;
  sparse_ffn_tensor dgate;                           /* fp32 */
} sparse_ffn_experts_backward_args;
SPARSE_FFN_API int sparse_ffn_experts_backward(const sparse_ffn_experts_backward_args* args, int32_t activation,
                                               int32_t n_threads);

/* ---- MoE layer: a linear router and the expert FFN behind it, in one call ---------------------------------------
 * scores = router_weight x_t in fp32; the K best of scores + router_bias are selected (as all selections here)
 * and R >= E rows of the router take part: slots that select one of those from E on are void. The selected slots
 * weigh sigmoid(score), the softmax over all scores, the softmax over the selected ones, or 1. fp32 and bf16 only. */
enum sparse_ffn_gate {
  SPARSE_FFN_GATE_SIGMOID = 0, SPARSE_FFN_GATE_SOFTMAX = 1, SPARSE_FFN_GATE_SOFTMAX_TOPK = 2, SPARSE_FFN_GATE_UNWEIGHTED = 3,
  SPARSE_FFN_LAST_GATE = SPARSE_FFN_GATE_UNWEIGHTED
};
typedef struct sparse_ffn_moe_forward_args {
  sparse_ffn_units units;
  sparse_ffn_tensor router_weight; /* [R, D] */
  sparse_ffn_tensor router_bias;   /* [R] fp32, for the ranking only, or absent */
  sparse_ffn_tensor mask;          /* [T] bool, false for padding, which the sums leave out; or absent */
  sparse_ffn_tensor dropout_mask;  /* [T, K, G], or absent */
  sparse_ffn_tensor out;           /* [T, O] */
  sparse_ffn_tensor index;         /* [T, K] int64, an output too */
  sparse_ffn_tensor gate;          /* [T, K] fp32, or absent */
  sparse_ffn_tensor softmax_sums;  /* [B, R] fp32, or absent: for each run of T/B tokens the sum of their softmaxes */
  sparse_ffn_saved saved;          /* all absent: inference */
} sparse_ffn_moe_forward_args;
SPARSE_FFN_API int sparse_ffn_moe_forward(const sparse_ffn_moe_forward_args* args, int32_t gate_function,
                                          int32_t activation, int32_t decode_tokens, int32_t n_threads);

typedef struct sparse_ffn_moe_backward_args {
  sparse_ffn_units units;
  sparse_ffn_tensor router_weight, mask, dropout_mask, index, gate;  /* of the forward pass */
  sparse_ffn_saved saved;
  sparse_ffn_tensor dout;                            /* [T, O], rows */
  sparse_ffn_tensor dgate, dsoftmax_sums;            /* what reached these outputs, fp32, or absent */
  sparse_ffn_tensor dx, drouter_weight, dkeys, dvalues, dgate_keys, dkey_bias;
} sparse_ffn_moe_backward_args;
SPARSE_FFN_API int sparse_ffn_moe_backward(const sparse_ffn_moe_backward_args* args, int32_t gate_function,
                                           int32_t activation, int32_t n_threads);

/* ---- CVMM: rows grouped by expert times that expert's matrix ----------------------------------------------------
 * out[scatter_index[s]] += reduction_weight[s] * x[gather_index[s]] @ weight[expert_index[s]], out zero before.
 * Absent indices are the identity, absent reduction weights 1. weight may be a transposed view. */
typedef struct sparse_ffn_slots {
  sparse_ffn_tensor expert_index;      /* [S] int64 in [0, E] */
  sparse_ffn_tensor gather_index;      /* [S] int64 in [0, N), or absent: then S = N */
  sparse_ffn_tensor scatter_index;     /* [S] int64 in [0, R), or absent: then S = R */
  sparse_ffn_tensor reduction_weight;  /* [S] fp32, or absent */
} sparse_ffn_slots;
typedef struct sparse_ffn_cvmm_forward_args {
  sparse_ffn_tensor x;                 /* [N, M], rows */
  sparse_ffn_tensor weight;            /* [E, M, L], unit stride in one of the last two dimensions */
  sparse_ffn_slots slots;
  sparse_ffn_tensor out;               /* [R, L] */
} sparse_ffn_cvmm_forward_args;
SPARSE_FFN_API int sparse_ffn_cvmm_forward(const sparse_ffn_cvmm_forward_args* args, int32_t n_threads);

typedef struct sparse_ffn_cvmm_backward_args {
  sparse_ffn_tensor x, weight;
  sparse_ffn_slots slots;
  sparse_ffn_tensor dout;              /* [R, L], rows */
  sparse_ffn_tensor dx;                /* [N, M], or absent */
  sparse_ffn_tensor dweight;           /* [E, M, L], or absent; dense, or dense with its last two dimensions transposed */
  sparse_ffn_tensor dreduction_weight; /* [S] fp32, or absent */
} sparse_ffn_cvmm_backward_args;
SPARSE_FFN_API int sparse_ffn_cvmm_backward(const sparse_ffn_cvmm_backward_args* args, int32_t n_threads);

/* ---- CVMM by quantised rows -------------------------------------------------------------------------------------
 * The same, W[e] made of codes: expert e has G rows of C columns, in P groups of C/P columns with a scale each, and
 * number = scale * (code - zero). qdata is int8 [E, G, C], or uint8 [E, G, C/2]: codes of 4 bits, that of column 2j in
 * the low half of byte j. Without zero points int8 codes are signed, and those of 4 bits have 8 added; with them int8
 * holds codes of 0 to 255 less 128, and a zero point of 4-bit codes is at most 15. Up, a row is an output's: W[e] = rows^T [C, G]. Down, an input's: W[e] = rows [G, C].
 * Groups of 4-bit codes are whole bytes. Numbers are multiplied in fp32 or in the dtype of x, and x is as it is. */
typedef struct sparse_ffn_code_rows {
  sparse_ffn_tensor qdata;             /* [E, G, C] or [E, G, C/2], rows */
  sparse_ffn_tensor scale;             /* [E, G, P], rows */
  sparse_ffn_tensor zero_point;        /* [E, G, P] uint8, rows; or absent */
} sparse_ffn_code_rows;
typedef struct sparse_ffn_quantized_cvmm_args {
  sparse_ffn_tensor x;                 /* [N, M], rows; M is C up and G down */
  sparse_ffn_code_rows rows;
  sparse_ffn_slots slots;
  sparse_ffn_tensor out;               /* [R, L]; L is G up and C down */
} sparse_ffn_quantized_cvmm_args;
SPARSE_FFN_API int sparse_ffn_quantized_cvmm(const sparse_ffn_quantized_cvmm_args* args, int32_t down, int32_t n_threads);

/* A MoE layer whose experts are such rows, for inference: otherwise as sparse_ffn_moe_forward. */
typedef struct sparse_ffn_quantized_moe_args {
  sparse_ffn_tensor x;                 /* [T, D], rows */
  sparse_ffn_code_rows keys;           /* numbers [E, G, D] */
  sparse_ffn_code_rows values;         /* [E, G, O] */
  sparse_ffn_code_rows gate_keys;      /* [E, G, D], or all absent: no GLU */
  sparse_ffn_tensor key_bias;          /* [E, G], or absent */
  sparse_ffn_tensor router_weight, router_bias;
  sparse_ffn_tensor out;               /* [T, O] */
  sparse_ffn_tensor index;             /* [T, K] int64, an output too */
} sparse_ffn_quantized_moe_args;
SPARSE_FFN_API int sparse_ffn_quantized_moe(const sparse_ffn_quantized_moe_args* args, int32_t gate_function,
                                            int32_t activation, int32_t n_threads);

/* ---- Weighted bag -----------------------------------------------------------------------------------------------
 * out[t] = sum_j weight[t,j] * values[index[t,j]] */
typedef struct sparse_ffn_table {
  sparse_ffn_tensor values;            /* [N, O] */
  sparse_ffn_tensor index;             /* [T, J] int64 in [0, N) */
  sparse_ffn_tensor weight;            /* [T, J] */
} sparse_ffn_table;
typedef struct sparse_ffn_bag_forward_args {
  sparse_ffn_table table;
  sparse_ffn_tensor out;               /* [T, O] */
} sparse_ffn_bag_forward_args;
/* skip_zeros: rows of weight zero need not be read; what is not finite there may not be met. */
SPARSE_FFN_API int sparse_ffn_bag_forward(const sparse_ffn_bag_forward_args* args, int32_t skip_zeros, int32_t n_threads);

typedef struct sparse_ffn_bag_backward_args {
  sparse_ffn_table table;
  sparse_ffn_tensor dout;              /* [T, O] */
  sparse_ffn_tensor dweight;           /* [T, J], or absent */
  sparse_ffn_tensor dvalues;           /* [N, O], zero where a row is unused; or absent */
} sparse_ffn_bag_backward_args;
SPARSE_FFN_API int sparse_ffn_bag_backward(const sparse_ffn_bag_backward_args* args, int32_t n_threads);

/* Row-sparse: R is how many rows of the table index names. */
typedef struct sparse_ffn_bag_backward_sparse_args {
  sparse_ffn_table table;
  sparse_ffn_tensor dout, dweight;     /* as before */
  sparse_ffn_tensor dvalue_rows;       /* [R, O]: the gradients of these rows, in ascending order */
} sparse_ffn_bag_backward_sparse_args;
SPARSE_FFN_API int sparse_ffn_bag_backward_sparse(const sparse_ffn_bag_backward_sparse_args* args, int32_t n_threads);

/* ---- Wide product -----------------------------------------------------------------------------------------------
 * out[b] = x[b] w[b]^T in fp32, whatever the dtype.
 * With a norm, each of P pieces of N/P columns is normalised: (z - mean) * scale with scale 1 / sqrt(variance + 1e-5), or
 * z / sqrt(mean(z^2) + 1e-5). */
enum sparse_ffn_norm { SPARSE_FFN_NORM_NONE = 0, SPARSE_FFN_NORM_LAYER = 1, SPARSE_FFN_NORM_RMS = 2 };
typedef struct sparse_ffn_wide_product_args {
  sparse_ffn_tensor x;                 /* [B, M, K], rows */
  sparse_ffn_tensor w;                 /* [B, N, K] */
  sparse_ffn_tensor out;               /* [B, M, N] fp32 */
  sparse_ffn_tensor scale;             /* [B, M, P] fp32; absent without a norm; not written where w has no rows */
} sparse_ffn_wide_product_args;
SPARSE_FFN_API int sparse_ffn_wide_product_forward(const sparse_ffn_wide_product_args* args, int32_t norm,
                                                   int32_t n_threads);

/* Gradient of what a norm was applied to: M rows of P pieces of W columns. */
typedef struct sparse_ffn_normalised_args {
  sparse_ffn_tensor dout;              /* [M, P, W] fp32, rows */
  sparse_ffn_tensor out, scale;        /* [M, P, W] and [M, P] fp32, of the forward pass */
  sparse_ffn_tensor dproduct;          /* [M, P, W] */
} sparse_ffn_normalised_args;
SPARSE_FFN_API int sparse_ffn_normalised_backward(const sparse_ffn_normalised_args* args, int32_t norm,
                                                  int32_t n_threads);

/* ---- Selection --------------------------------------------------------------------------------------------------
 * All selections are exact and in torch.topk's order: NaN first, then by value descending; ties, also among NaNs, go to
 * the lower index. */
/* Product keys: the K best of the n*n sums scores[t,h,0,i] + scores[t,h,1,j] of each row; index = i*n + j; ties go to the
 * lower position in the K x K list of both halves' best. NaN is found where a half has it, not where an infinite and a
 * minus infinite score meet. */
typedef struct sparse_ffn_product_key_topk_args {
  sparse_ffn_tensor scores;            /* [T, H, 2, n] fp32, rows */
  sparse_ffn_tensor index;             /* [T, H, K] int64 */
  sparse_ffn_tensor sums;              /* [T, H, K] fp32, or absent */
} sparse_ffn_product_key_topk_args;
SPARSE_FFN_API int sparse_ffn_product_key_topk(const sparse_ffn_product_key_topk_args* args, int32_t n_threads);

typedef struct sparse_ffn_product_key_topk_backward_args {
  sparse_ffn_tensor dsums, index;      /* [T, H, K] fp32; [T, H, K] int64 in [0, n*n) */
  sparse_ffn_tensor dscores;           /* [T, H, 2, n] fp32, rows, any order of the other dimensions but no gaps */
} sparse_ffn_product_key_topk_backward_args;
SPARSE_FFN_API int sparse_ffn_product_key_topk_backward(const sparse_ffn_product_key_topk_backward_args* args,
                                                        int32_t n_threads);

/* TopKFFN between its products: of h = act(up) * dropout_mask, or act(glu_gate) * up * dropout_mask with a GLU, the k units
 * of the largest |h| * norm. Ascending units take the places of K = k. Outputs that are absent are not wanted. */
typedef struct sparse_ffn_topk_saved {
  sparse_ffn_tensor selected;          /* [T, W] int32, W = ceil(F/32): bit i % 32 of word i / 32 is set for a selected unit i */
  sparse_ffn_tensor up;                /* [T, K] */
  sparse_ffn_tensor glu_gate;          /* [T, K]; absent: no GLU */
} sparse_ffn_topk_saved;
typedef struct sparse_ffn_topk_hidden_forward_args {
  sparse_ffn_tensor up;                /* [T, F] */
  sparse_ffn_tensor glu_gate;          /* [T, F], or absent: no GLU */
  sparse_ffn_tensor dropout_mask;      /* [T, F], or absent */
  sparse_ffn_tensor norm;              /* [F] fp32, or absent */
  sparse_ffn_tensor index;             /* [T, K] int64, or absent */
  sparse_ffn_tensor kept;              /* [T, K], or absent: h there */
  sparse_ffn_tensor hidden;            /* [T, F], or absent: h, 0 where a unit is not selected */
  sparse_ffn_topk_saved saved;         /* all absent: inference */
} sparse_ffn_topk_hidden_forward_args;
SPARSE_FFN_API int sparse_ffn_topk_hidden_forward(const sparse_ffn_topk_hidden_forward_args* args, int32_t activation,
                                                  int32_t k, int32_t n_threads);

/* Of hidden as above. dup may be dhidden. */
typedef struct sparse_ffn_topk_hidden_backward_args {
  sparse_ffn_topk_saved saved;
  sparse_ffn_tensor dropout_mask;      /* of the forward pass */
  sparse_ffn_tensor dhidden;           /* [T, F] */
  sparse_ffn_tensor hidden;            /* [T, F], as above, an output */
  sparse_ffn_tensor dup, dglu_gate;    /* [T, F]; dglu_gate is absent without a GLU */
} sparse_ffn_topk_hidden_backward_args;
SPARSE_FFN_API int sparse_ffn_topk_hidden_backward(const sparse_ffn_topk_hidden_backward_args* args, int32_t activation,
                                                   int32_t n_threads);

/* The selected units of F in ascending order. */
typedef struct sparse_ffn_topk_index_args {
  sparse_ffn_tensor selected;          /* [T, W] int32, as above */
  sparse_ffn_tensor index;             /* [T, K] int64 */
} sparse_ffn_topk_index_args;
SPARSE_FFN_API int sparse_ffn_topk_index(const sparse_ffn_topk_index_args* args, int32_t n_units, int32_t n_threads);

#ifdef __cplusplus
}
#endif
#endif /* SPARSE_FFN_H */
