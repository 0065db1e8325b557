// api.cu - the C ABI: checks arguments and launches the kernel of their dtype.
#include "bag.h"
#include "product.h"

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

bool missing(const void* pointer, bool needed) { return needed && !pointer; }

int check(const sparse_ffn_cuda_product* p) {
  if (!p || !p->offsets || p->S < 0 || p->E < 0 || p->K < 0 || p->N < 0) return SPARSE_FFN_CUDA_BAD_ARGUMENT;
  if (p->S > kMaxSlots) return SPARSE_FFN_CUDA_TOO_LARGE;
  const bool x = missing(p->x, p->S && p->K), y = missing(p->y, p->S && p->N), w = missing(p->w, p->E && p->K && p->N);
  return x || y || w || (p->w_stride_k != 1 && p->w_stride_n != 1) ? SPARSE_FFN_CUDA_BAD_ARGUMENT : SPARSE_FFN_CUDA_OK;
}

int check(const sparse_ffn_cuda_bag* p, bool by_row) {
  if (!p || p->T < 0 || p->J < 0 || p->N < 0 || p->O < 0) return SPARSE_FFN_CUDA_BAD_ARGUMENT;
  if (p->J > 0 && p->T > kMaxSlots / p->J) return SPARSE_FFN_CUDA_TOO_LARGE;
  const bool any = p->T && p->J, bags = missing(p->bags, p->T && p->O), values = missing(p->values, p->N && p->O);
  const bool members = by_row ? !p->offsets || missing(p->members, any) : missing(p->index, any);
  return bags || values || members ? SPARSE_FFN_CUDA_BAD_ARGUMENT : SPARSE_FFN_CUDA_OK;
}

template <class Arguments, class Run> int run(const Arguments& p, Run with) {
  const cudaError_t error = enter(p.device);
  if (error != cudaSuccess) return status_of(error);
  switch (p.dtype) {
    case 0: return status_of(with(float{}));
    case 1: return status_of(with(bf16{}));
    case 2: return status_of(with(fp16{}));
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

int sparse_ffn_cuda_usable(int32_t device) {
  const cudaError_t error = enter(device);
#if defined(SPARSE_FFN_CUDA_EMULATED)
  return status_of(error);
#else
  if (error != cudaSuccess) return status_of(error);
  cudaFuncAttributes found{};
  return status_of(cudaFuncGetAttributes(&found, multiply<Plain<float, false, false>>));
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

int sparse_ffn_cuda_product_rows(const sparse_ffn_cuda_product* p) {
  if (const int bad = check(p)) return bad;
  return run(*p, [&](auto example) { return product_rows<decltype(example)>(*p); });
}
int sparse_ffn_cuda_product_matrices(const sparse_ffn_cuda_product* p) {
  if (const int bad = check(p)) return bad;
  return run(*p, [&](auto example) { return product_matrices<decltype(example)>(*p); });
}

int sparse_ffn_cuda_bag_sums(const sparse_ffn_cuda_bag* p) {
  if (const int bad = check(p, false)) return bad;
  return run(*p, [&](auto example) { return bag_sums<decltype(example), false>(*p); });
}
int sparse_ffn_cuda_bag_weights(const sparse_ffn_cuda_bag* p) {
  if (const int bad = check(p, false)) return bad;
  if (p->T && p->J && !p->weight) return SPARSE_FFN_CUDA_BAD_ARGUMENT;
  return run(*p, [&](auto example) { return bag_weights<decltype(example)>(*p); });
}
int sparse_ffn_cuda_bag_values(const sparse_ffn_cuda_bag* p) {
  if (const int bad = check(p, true)) return bad;
  return run(*p, [&](auto example) { return bag_sums<decltype(example), true>(*p); });
}

}  // extern "C"
