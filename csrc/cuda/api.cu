// api.cu - the C ABI: checks arguments, lays out the workspace, launches kernels.
#include "../include/sparse_ffn_cuda.h"
#include "kernels.h"

namespace sparse_ffn_cuda {
namespace {

constexpr int64_t kMaxSlots = 0x7fffffff;

int status_of(cudaError_t error) {
  return error == cudaSuccess ? SPARSE_FFN_CUDA_OK : SPARSE_FFN_CUDA_RUNTIME + static_cast<int>(error);
}

// The caller's framework has a runtime of its own: make its device this one's, too.
cudaError_t enter(int32_t device) {
#if defined(SPARSE_FFN_CUDA_EMULATED)
  return device < 0 ? 101 : cudaSuccess;
#else
  return cudaSetDevice(device);
#endif
}

bool known_dtype(int32_t dtype) { return dtype >= 0 && dtype <= 2; }
int64_t size_of(int32_t dtype) { return dtype == 0 ? 4 : 2; }

int check(const sparse_ffn_cuda_cvmm* p) {
  if (!p || !known_dtype(p->dtype) || !p->offsets) return SPARSE_FFN_CUDA_BAD_ARGUMENT;
  if (p->rows_x < 0 || p->rows_out < 0 || p->S < 0) return SPARSE_FFN_CUDA_BAD_ARGUMENT;
  if (p->E < 0 || p->M < 0 || p->L < 0) return SPARSE_FFN_CUDA_BAD_ARGUMENT;
  if (p->S > kMaxSlots) return SPARSE_FFN_CUDA_TOO_LARGE;
  if (p->w_stride_m != 1 && p->w_stride_l != 1) return SPARSE_FFN_CUDA_BAD_ARGUMENT;
  if (p->S > 0 && p->E > 0 && p->M > 0 && (!p->x || (p->L > 0 && !p->w))) return SPARSE_FFN_CUDA_BAD_ARGUMENT;
  if (!p->out_offsets != !p->out_members && p->S > 0) return SPARSE_FFN_CUDA_BAD_ARGUMENT;
  if (!p->x_offsets != !p->x_members && p->S > 0) return SPARSE_FFN_CUDA_BAD_ARGUMENT;
  return SPARSE_FFN_CUDA_OK;
}

int check(const sparse_ffn_cuda_bag* p) {
  if (!p || !known_dtype(p->dtype)) return SPARSE_FFN_CUDA_BAD_ARGUMENT;
  if (p->T < 0 || p->J < 0 || p->N < 0 || p->O < 0 || p->rows < 0) return SPARSE_FFN_CUDA_BAD_ARGUMENT;
  if (p->J > 0 && p->T > kMaxSlots / p->J) return SPARSE_FFN_CUDA_TOO_LARGE;
  if (p->T * p->J > 0 && (!p->index || !p->weight || (p->O > 0 && !p->values))) return SPARSE_FFN_CUDA_BAD_ARGUMENT;
  return SPARSE_FFN_CUDA_OK;
}

// Rows of slots that wait to be summed, and the pieces of that sum.
int64_t pieces_bytes(int64_t slots, int64_t columns) { return slots / kPiece * columns * 4; }
int64_t rows_bytes(int64_t slots, int64_t columns, int32_t dtype) {
  return round_up(slots * columns * size_of(dtype), 256);
}
int64_t slots_bytes(int64_t slots, int64_t columns, int32_t dtype) {
  return rows_bytes(slots, columns, dtype) + pieces_bytes(slots, columns);
}
int64_t partial_bytes(const sparse_ffn_cuda_cvmm& p) {
  const int64_t parts = split_parts(p.S, p.E, p.M, p.L);
  return parts > 1 ? parts * p.E * p.M * p.L * 4 : 0;
}
int64_t forward_bytes(const sparse_ffn_cuda_cvmm& p) { return p.out_offsets ? slots_bytes(p.S, p.L, p.dtype) : 0; }
int64_t backward_bytes(const sparse_ffn_cuda_cvmm& p) {  // the passes follow one another: they share it
  return larger(p.x_offsets ? slots_bytes(p.S, p.M, p.dtype) : 0, partial_bytes(p));
}
bool enough(const void* workspace, int64_t bytes, int64_t needed) {
  return needed == 0 || (workspace && bytes >= needed);
}

template <class T> Rows<T> rows_of(const void* data, int64_t stride, const int64_t* index) {
  const T* typed = static_cast<const T*>(data);
  return {typed, stride, index, aligned16(typed, stride)};
}

// One product of rows with W or its transpose, then the sum over the slots of a row where several may share one.
struct Product {
  const void* a;
  int64_t a_stride, K, N, w_stride_k, w_stride_n, rows_out;
  const int64_t *gather, *scatter;
  const int32_t *members, *offsets;
  void* out;
};
template <class T> cudaError_t multiply_rows(const sparse_ffn_cuda_cvmm& p, const Product& q) {
  Grouped<T> g{};
  g.S = p.S;
  g.E = p.E;
  g.K = q.K;
  g.N = q.N;
  g.offsets = p.offsets;
  g.a = rows_of<T>(q.a, q.a_stride, q.gather);
  g.w = static_cast<const T*>(p.w);
  g.w_stride_e = p.w_stride_e;
  g.w_stride_k = q.w_stride_k;
  g.w_stride_n = q.w_stride_n;
  g.w_aligned = aligned16(g.w, q.w_stride_n == 1 ? q.w_stride_k : q.w_stride_n) && aligned16(g.w, p.w_stride_e);
  g.tf32 = p.tf32 != 0;
  g.out_stride = q.N;
  if (!q.offsets) {
    g.target = q.scatter;
    g.scale = p.scale;
    g.out = static_cast<T*>(q.out);
    g.out_aligned = aligned16(g.out, q.N);
    return run_grouped(g, p.stream);
  }
  g.out = static_cast<T*>(p.workspace);
  g.out_aligned = aligned16(g.out, q.N);
  const cudaError_t error = run_grouped(g, p.stream);
  if (error != cudaSuccess) return error;
  SegmentSum<T> sum{};
  sum.rows = q.rows_out;
  sum.columns = q.N;
  sum.n_members = p.S;
  sum.offsets = q.offsets;
  sum.members = q.members;
  sum.weight = p.scale;
  sum.divisor = 1;
  sum.source = g.out;
  sum.stride = q.N;
  sum.out = static_cast<T*>(q.out);
  sum.aligned = g.out_aligned && aligned16(sum.out, q.N);
  sum.pieces = reinterpret_cast<float*>(static_cast<char*>(p.workspace) + rows_bytes(p.S, q.N, p.dtype));
  if (p.S < kPiece) sum.pieces = nullptr;
  return run_segment_sum(sum, p.stream);
}

template <class T> cudaError_t cvmm_forward(const sparse_ffn_cuda_cvmm& p, void* out) {
  return multiply_rows<T>(p, {p.x, p.x_stride, p.M, p.L, p.w_stride_m, p.w_stride_l, p.rows_out, p.gather, p.scatter,
                              p.out_members, p.out_offsets, out});
}

template <class T>
cudaError_t cvmm_backward(const sparse_ffn_cuda_cvmm& p, const void* dout, int64_t dout_stride, void* dx, void* dw,
                          float* dscale) {
  cudaError_t error = cudaSuccess;
  if (dx) {
    error = multiply_rows<T>(p, {dout, dout_stride, p.L, p.M, p.w_stride_l, p.w_stride_m, p.rows_x, p.scatter, p.gather,
                                 p.x_members, p.x_offsets, dx});
    if (error != cudaSuccess) return error;
  }
  if (dscale) {  // the slots' rows of dx before scaling are still in the workspace
    const T *unscaled = static_cast<const T*>(p.workspace), *x = static_cast<const T*>(p.x);
    error = run_dots(Dots<T>{p.S, p.M, 1, p.offsets + p.E, unscaled, x, p.M, p.x_stride, p.gather, p.rows_x, dscale},
                     p.stream);
    if (error != cudaSuccess) return error;
  }
  if (dw) {
    Outer<T> o{};
    o.E = p.E;
    o.M = p.M;
    o.L = p.L;
    o.parts = split_parts(p.S, p.E, p.M, p.L);
    o.offsets = p.offsets;
    o.a = rows_of<T>(p.x, p.x_stride, p.gather);
    o.b = rows_of<T>(dout, dout_stride, p.scatter);
    o.scale = p.scale;
    o.tf32 = p.tf32 != 0;
    o.out = static_cast<T*>(dw);
    o.partial = static_cast<float*>(p.workspace);
    o.aligned = aligned16(o.out, p.L);
    error = run_outer(o, p.stream);
  }
  return error;
}

template <class T> cudaError_t bag_forward(const sparse_ffn_cuda_bag& p, void* out) {
  SegmentSum<T> sum{};
  sum.rows = p.T;
  sum.columns = p.O;
  sum.length = p.J;
  sum.weight = p.weight;
  sum.index = p.index;
  sum.source_rows = p.N;
  sum.divisor = 1;
  sum.source = static_cast<const T*>(p.values);
  sum.stride = p.O;
  sum.out = static_cast<T*>(out);
  sum.aligned = aligned16(sum.source, p.O) && aligned16(sum.out, p.O);
  return run_segment_sum(sum, p.stream);
}

template <class T>
cudaError_t bag_backward(const sparse_ffn_cuda_bag& p, const void* dout, float* dweight, void* dvalues) {
  const T* grad = static_cast<const T*>(dout);
  if (dweight) {
    const T* values = static_cast<const T*>(p.values);
    const Dots<T> dots{p.T * p.J, p.O, larger<int64_t>(p.J, 1), nullptr, grad, values, p.O, p.O, p.index, p.N, dweight};
    const cudaError_t error = run_dots(dots, p.stream);
    if (error != cudaSuccess) return error;
  }
  if (!dvalues) return cudaSuccess;
  SegmentSum<T> sum{};
  sum.rows = p.rows;
  sum.columns = p.O;
  sum.n_members = p.T * p.J;
  sum.offsets = p.offsets;
  sum.members = p.members;
  sum.weight = p.weight;
  sum.divisor = larger<int64_t>(p.J, 1);
  sum.source = grad;
  sum.stride = p.O;
  sum.out = static_cast<T*>(dvalues);
  sum.aligned = aligned16(grad, p.O) && aligned16(sum.out, p.O);
  sum.pieces = sum.n_members < kPiece ? nullptr : static_cast<float*>(p.workspace);
  return run_segment_sum(sum, p.stream);
}

template <class Run> int run_for(int32_t dtype, int32_t device, Run run) {
  const cudaError_t error = enter(device);
  if (error != cudaSuccess) return status_of(error);
  switch (dtype) {
    case 0: return status_of(run(float{}));
    case 1: return status_of(run(bf16{}));
    case 2: return status_of(run(fp16{}));
  }
  return SPARSE_FFN_CUDA_BAD_ARGUMENT;
}

}  // namespace
}  // namespace sparse_ffn_cuda

using namespace sparse_ffn_cuda;

extern "C" {

int sparse_ffn_cuda_abi_version(void) { return SPARSE_FFN_CUDA_ABI_VERSION; }

int sparse_ffn_cuda_emulated(void) {
#if defined(SPARSE_FFN_CUDA_EMULATED)
  return 1;
#else
  return 0;
#endif
}

int sparse_ffn_cuda_device_count(int32_t* count) {
  if (!count) return SPARSE_FFN_CUDA_BAD_ARGUMENT;
#if defined(SPARSE_FFN_CUDA_EMULATED)
  *count = 1;
  return SPARSE_FFN_CUDA_OK;
#else
  int n = 0;
  const cudaError_t error = cudaGetDeviceCount(&n);
  *count = error == cudaSuccess ? n : 0;
  return status_of(error);
#endif
}

const char* sparse_ffn_cuda_status_text(int status) {
  if (status == SPARSE_FFN_CUDA_OK) return "ok";
  if (status == SPARSE_FFN_CUDA_BAD_ARGUMENT) return "bad argument";
  if (status == SPARSE_FFN_CUDA_TOO_LARGE) return "more than 2^31 - 1 slots in one call";
#if !defined(SPARSE_FFN_CUDA_EMULATED)
  if (status > SPARSE_FFN_CUDA_RUNTIME)
    return cudaGetErrorString(static_cast<cudaError_t>(status - SPARSE_FFN_CUDA_RUNTIME));
#endif
  return "unknown error";
}

int64_t sparse_ffn_cuda_cvmm_forward_workspace(const sparse_ffn_cuda_cvmm* args) {
  return check(args) ? 0 : forward_bytes(*args);
}
int sparse_ffn_cuda_cvmm_forward(const sparse_ffn_cuda_cvmm* args, void* out) {
  if (const int bad = check(args)) return bad;
  if (!enough(args->workspace, args->workspace_bytes, forward_bytes(*args))) return SPARSE_FFN_CUDA_BAD_ARGUMENT;
  if (args->rows_out == 0 || args->L == 0) return SPARSE_FFN_CUDA_OK;
  if (!out) return SPARSE_FFN_CUDA_BAD_ARGUMENT;
  return run_for(args->dtype, args->device, [&](auto example) { return cvmm_forward<decltype(example)>(*args, out); });
}

int64_t sparse_ffn_cuda_cvmm_backward_workspace(const sparse_ffn_cuda_cvmm* args) {
  return check(args) ? 0 : backward_bytes(*args);
}
int sparse_ffn_cuda_cvmm_backward(const sparse_ffn_cuda_cvmm* args, const void* dout, int64_t dout_stride, void* dx,
                                  void* dw, float* dscale) {
  if (const int bad = check(args)) return bad;
  if (!enough(args->workspace, args->workspace_bytes, backward_bytes(*args))) return SPARSE_FFN_CUDA_BAD_ARGUMENT;
  if (args->S > 0 && args->L > 0 && !dout) return SPARSE_FFN_CUDA_BAD_ARGUMENT;
  if (args->S > 0 && dscale && (!dx || !args->x_offsets)) return SPARSE_FFN_CUDA_BAD_ARGUMENT;
  return run_for(args->dtype, args->device, [&](auto example) {
    return cvmm_backward<decltype(example)>(*args, dout, dout_stride, dx, dw, dscale);
  });
}

int sparse_ffn_cuda_bag_forward(const sparse_ffn_cuda_bag* args, void* out) {
  if (const int bad = check(args)) return bad;
  if (args->T == 0 || args->O == 0) return SPARSE_FFN_CUDA_OK;
  if (!out) return SPARSE_FFN_CUDA_BAD_ARGUMENT;
  return run_for(args->dtype, args->device, [&](auto example) { return bag_forward<decltype(example)>(*args, out); });
}

int64_t sparse_ffn_cuda_bag_backward_workspace(const sparse_ffn_cuda_bag* args) {
  return check(args) ? 0 : pieces_bytes(args->T * args->J, args->O);
}
int sparse_ffn_cuda_bag_backward(const sparse_ffn_cuda_bag* args, const void* dout, float* dweight, void* dvalues) {
  if (const int bad = check(args)) return bad;
  const int64_t slots = args->T * args->J;
  if (slots > 0 && args->O > 0 && !dout) return SPARSE_FFN_CUDA_BAD_ARGUMENT;
  if (dvalues && (!args->offsets || (slots > 0 && !args->members))) return SPARSE_FFN_CUDA_BAD_ARGUMENT;
  if (dvalues && !enough(args->workspace, args->workspace_bytes, pieces_bytes(slots, args->O)))
    return SPARSE_FFN_CUDA_BAD_ARGUMENT;
  return run_for(args->dtype, args->device,
                 [&](auto example) { return bag_backward<decltype(example)>(*args, dout, dweight, dvalues); });
}

}  // extern "C"
