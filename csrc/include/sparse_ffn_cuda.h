/* sparse_ffn_cuda.h - plain C ABI of the CUDA kernels of sparse-ffn, for NVIDIA GPUs where Triton is missing.
 *
 * Conventions
 *  - No torch, no C++ in the interface: raw device pointers, int64 sizes, strides in elements, a stream. Argument
 *    blocks themselves are host memory. Nothing waits for the device, so every call can be captured in a CUDA graph.
 *  - Storage is fp32, bf16 or fp16 (one dtype per call), numbered 0, 1 and 2; every sum is accumulated in fp32.
 *    With tf32 set, products of fp32 operands may round them to tf32; without it they are plain fp32.
 *  - Outputs are fully written: nothing needs to be zeroed. Results are deterministic: no float atomics anywhere.
 *  - Slots are sorted by expert by the caller: gather, scatter and scale are given in sorted order. Void slots, which have
 *    no expert, lie behind offsets[E] and add 0.
 *  - Indices are trusted: checking them would mean waiting for the device.
 *  - The caller gives the workspace, of at least as many bytes as the function *_workspace says, 256-byte aligned.
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

#define SPARSE_FFN_CUDA_ABI_VERSION 1

enum sparse_ffn_cuda_status {
  SPARSE_FFN_CUDA_OK = 0,
  SPARSE_FFN_CUDA_BAD_ARGUMENT = 1,  /* negative size, null pointer, unknown dtype, workspace too small */
  SPARSE_FFN_CUDA_TOO_LARGE = 4,     /* more than 2^31-1 slots in one call */
  SPARSE_FFN_CUDA_RUNTIME = 1000     /* + cudaError_t */
};

SPARSE_FFN_CUDA_API int sparse_ffn_cuda_abi_version(void);
/* 1 if this library was built to run the same kernels on the CPU, for tests; its pointers are then host pointers. */
SPARSE_FFN_CUDA_API int sparse_ffn_cuda_emulated(void);
SPARSE_FFN_CUDA_API int sparse_ffn_cuda_device_count(int32_t* count);
SPARSE_FFN_CUDA_API const char* sparse_ffn_cuda_status_text(int status);

/* ---- CVMM -------------------------------------------------------------------------------------------------------
 * out[scatter[s]] += scale[s] * x[gather[s]] @ W[e],  s in offsets[e] .. offsets[e+1]-1, out zero before.
 * W [E, M, L] is read through three strides, one of w_stride_m and w_stride_l must be 1.
 *
 * Several slots may write one row of out: then the caller gives the slots sorted by row, stably, as members [S] (sorted
 * slots) and offsets [rows+1]; a row's slots are summed in that order, and void slots lie behind offsets[rows]. Null
 * instead of the two says that the rows in question have one slot each: those of void slots are left as they are. */
typedef struct sparse_ffn_cuda_cvmm {
  int64_t rows_x, rows_out, S, E, M, L;
  int32_t dtype, tf32, device, reserved;
  void* stream;
  void* workspace;
  int64_t workspace_bytes;
  const void* x;               /* [rows_x, M], row stride x_stride */
  int64_t x_stride;
  const void* w;
  int64_t w_stride_e, w_stride_m, w_stride_l;
  const int32_t* offsets;      /* [E+1] */
  const int64_t* gather;       /* [S], values in [0, rows_x); null: the identity */
  const int64_t* scatter;      /* [S], values in [0, rows_out); null: the identity */
  const float* scale;          /* [S]; null: one */
  const int32_t* out_members;  /* [S] slots sorted by scatter, and */
  const int32_t* out_offsets;  /* [rows_out+1], or both null: for the forward pass */
  const int32_t* x_members;    /* [S] slots sorted by gather, and */
  const int32_t* x_offsets;    /* [rows_x+1], or both null: for the backward pass; dscale needs them */
} sparse_ffn_cuda_cvmm;

SPARSE_FFN_CUDA_API int64_t sparse_ffn_cuda_cvmm_forward_workspace(const sparse_ffn_cuda_cvmm* args);
SPARSE_FFN_CUDA_API int sparse_ffn_cuda_cvmm_forward(const sparse_ffn_cuda_cvmm* args, void* out /* [rows_out, L] */);
/* dx [rows_x, M], dw [E, M, L] contiguous, dscale [S]; any may be null. dout [rows_out, L], row stride dout_stride. */
SPARSE_FFN_CUDA_API int64_t sparse_ffn_cuda_cvmm_backward_workspace(const sparse_ffn_cuda_cvmm* args);
SPARSE_FFN_CUDA_API int sparse_ffn_cuda_cvmm_backward(const sparse_ffn_cuda_cvmm* args, const void* dout,
                                                      int64_t dout_stride, void* dx, void* dw, float* dscale);

/* ---- Weighted bag -----------------------------------------------------------------------------------------------
 * out[t] = sum_j weight[t,j] * values[index[t,j]];  values [N, O], index [T, J], weight [T, J] fp32.
 * An index outside [0, N) adds nothing, and its weight's gradient is zero.
 * The backward pass takes the T*J slots sorted by index, stably: members [T*J] and offsets [rows+1]. rows is N, or the
 * number of used rows where dvalues [rows, O] shall hold only those. */
typedef struct sparse_ffn_cuda_bag {
  int64_t T, J, N, O, rows;
  int32_t dtype, device;
  void* stream;
  void* workspace;
  int64_t workspace_bytes;
  const void* values;
  const int64_t* index;
  const float* weight;
  const int32_t* members;
  const int32_t* offsets;
} sparse_ffn_cuda_bag;

SPARSE_FFN_CUDA_API int sparse_ffn_cuda_bag_forward(const sparse_ffn_cuda_bag* args, void* out /* [T, O] */);
/* dout [T, O] contiguous, dweight [T, J] fp32, dvalues [rows, O]; either output may be null. */
SPARSE_FFN_CUDA_API int64_t sparse_ffn_cuda_bag_backward_workspace(const sparse_ffn_cuda_bag* args);
SPARSE_FFN_CUDA_API int sparse_ffn_cuda_bag_backward(const sparse_ffn_cuda_bag* args, const void* dout, float* dweight,
                                                     void* dvalues);

#ifdef __cplusplus
}
#endif
#endif /* SPARSE_FFN_CUDA_H */
