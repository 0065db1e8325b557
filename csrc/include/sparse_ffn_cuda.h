/* sparse_ffn_cuda.h - plain C ABI of the CUDA kernels of sparse-ffn, for NVIDIA GPUs where Triton is missing.
 *
 * Conventions
 *  - No torch, no C++ in the interface: raw device pointers, int64 sizes, strides in elements, a stream. Argument
 *    blocks themselves are host memory. Nothing waits for the device, so every call can be captured in a CUDA graph.
 *  - Storage is fp32, bf16 or fp16 (one dtype per call), numbered 0, 1 and 2; every sum is accumulated in fp32.
 *    With tf32 set, products of fp32 operands may round them to tf32; without it they are plain fp32.
 *  - Results are deterministic: no float atomics anywhere. Nothing is allocated, and nothing needs a workspace.
 *  - Slots are sorted by expert by the caller; void slots, which have no expert, lie behind offsets[E].
 *  - Every function returns SPARSE_FFN_CUDA_OK, a code below, or SPARSE_FFN_CUDA_RUNTIME + the cudaError_t.
 */
#ifndef SPARSE_FFN_CUDA_H
#define SPARSE_FFN_CUDA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define SPARSE_FFN_CUDA_API __declspec(dllexport)
#else
#define SPARSE_FFN_CUDA_API __attribute__((visibility("default")))
#endif

#define SPARSE_FFN_CUDA_ABI_VERSION 3

enum sparse_ffn_cuda_status {
  SPARSE_FFN_CUDA_OK = 0,
  SPARSE_FFN_CUDA_BAD_ARGUMENT = 1,  /* negative size, null pointer, unknown dtype */
  SPARSE_FFN_CUDA_TOO_LARGE = 4,     /* more than 2^31-1 slots in one call */
  SPARSE_FFN_CUDA_RUNTIME = 1000     /* + cudaError_t */
};

SPARSE_FFN_CUDA_API int sparse_ffn_cuda_abi_version(void);
/* 1 if this library was built to run the same kernels on the CPU, for tests; its pointers are then host pointers. */
SPARSE_FFN_CUDA_API int sparse_ffn_cuda_emulated(void);
SPARSE_FFN_CUDA_API int sparse_ffn_cuda_device_count(int32_t* count);
/* Whether the kernels have code for this device that its driver takes: what a launch would return. */
SPARSE_FFN_CUDA_API int sparse_ffn_cuda_usable(int32_t device);
SPARSE_FFN_CUDA_API const char* sparse_ffn_cuda_status_text(int status);

/* ---- Products ---------------------------------------------------------------------------------------------------
 * y[y_rows[s]] = scale[s] * x[x_rows[s]] @ w[e] for the slots s in offsets[e] .. offsets[e+1]-1 of each expert e. */
typedef struct sparse_ffn_cuda_product {
  int64_t S, E, K, N;        /* slots, experts, and the sides of w [E, K, N] */
  int32_t dtype, tf32, device, reserved;
  void* stream;
  void* x;                   /* rows of K numbers */
  int64_t x_stride;
  void* y;                   /* rows of N numbers */
  int64_t y_stride;
  void* w;
  int64_t w_stride_e, w_stride_k, w_stride_n; /* one of w_stride_k and w_stride_n is 1 */
  const int32_t* offsets;    /* [E+1] */
  const int64_t* x_rows;     /* [S]; null: row s */
  const int64_t* y_rows;     /* [S]; null: row s */
  const float* scale;        /* [S]; null: one */
} sparse_ffn_cuda_product;

/* Writes y: rows that no slot of an expert names stay as they are, and no two slots may name one. */
SPARSE_FFN_CUDA_API int sparse_ffn_cuda_product_rows(const sparse_ffn_cuda_product* args);
/* Writes the gradient of w, contiguous, where y holds the gradient of y: w[e] = sum of x[..]^T (scale[s] * y[..]). */
SPARSE_FFN_CUDA_API int sparse_ffn_cuda_product_matrices(const sparse_ffn_cuda_product* args);

/* ---- Weighted bags ----------------------------------------------------------------------------------------------
 * bags[t] = sum of weight[m] * values[index[m]] over the members m = t*J .. t*J+J-1 of bag t. A member whose index lies
 * outside [0, N) adds nothing. All rows are contiguous. */
typedef struct sparse_ffn_cuda_bag {
  int64_t T, J, N, O;        /* bags, members of one, rows of values, numbers of a row */
  int32_t dtype, device;
  void* stream;
  void* bags;                /* [T, O] */
  void* values;              /* [N, O] */
  float* weight;             /* [T, J]; null: one */
  const int64_t* index;      /* [T, J]; not read by bag_values */
  const int32_t* members;    /* [T*J] members sorted by row of values, stably, and */
  const int32_t* offsets;    /* [N+1] where those of each row begin; both for bag_values only */
} sparse_ffn_cuda_bag;

SPARSE_FFN_CUDA_API int sparse_ffn_cuda_bag_sums(const sparse_ffn_cuda_bag* args); /* writes bags */
/* Write the gradients of weight and of values, where bags holds that of bags. */
SPARSE_FFN_CUDA_API int sparse_ffn_cuda_bag_weights(const sparse_ffn_cuda_bag* args);
SPARSE_FFN_CUDA_API int sparse_ffn_cuda_bag_values(const sparse_ffn_cuda_bag* args);

#ifdef __cplusplus
}
#endif
#endif /* SPARSE_FFN_CUDA_H */
