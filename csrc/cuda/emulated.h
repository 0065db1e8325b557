// emulated.h - device.h's names on the CPU, so that the very same kernels run in tests where there is no GPU.
// A block's threads are fibers that take turns at barriers, in an order that changes from turn to turn; blocks run one
// after the other, the last one first. Slow, and for tests only.
#pragma once
#include <ucontext.h>

#include <cstring>
#include <vector>

#define __global__ static
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

namespace sparse_ffn_cuda {

constexpr int64_t kMaxBlocks = 5;  // few, so that every block has to loop
constexpr int kLanes = 32;

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
inline float float_of(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
inline uint32_t bits_of(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
inline float to_float(float v) { return v; }
inline float to_float(bf16 v) { return float_of(static_cast<uint32_t>(v.bits) << 16); }
inline float to_float(fp16 v) { _Float16 h; memcpy(&h, &v, 2); return static_cast<float>(h); }
inline void from_float(float v, float& out) { out = v; }
inline void from_float(float v, bf16& out) {
  const uint32_t u = bits_of(v);
  out.bits = static_cast<uint16_t>(v != v ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline void from_float(float v, fp16& out) { const _Float16 h = static_cast<_Float16>(v); memcpy(&out, &h, 2); }

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
};
struct Block {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  float exchange[kThreads];
};
inline Block* block = nullptr;
inline int current = 0;
struct Dim { int64_t x; };
inline Dim blockIdx{0}, gridDim{0};
struct ThreadIndex {
  struct { operator int() const { return current; } } x;
};
inline ThreadIndex threadIdx;

// Both barriers wait for the whole block: no kernel has a warp pass one that another warp does not.
inline void __syncthreads() {
  swapcontext(&block->fibers[current].context, &block->scheduler);
}
inline void __syncwarp() { __syncthreads(); }
inline float warp_sum(float v) {
  const int first = current / kLanes * kLanes;
  float value[kLanes];
  block->exchange[current] = v;
  __syncthreads();
  memcpy(value, block->exchange + first, sizeof value);
  __syncthreads();
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; i++) value[i] += value[i + step];
  return value[0];
}

namespace wmma {
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
namespace precision { struct tf32 {}; }
enum layout_t { mem_row_major };
// Lane 0 holds the whole tile and does all the work.
template <class Use, int M, int N, int K, class T, class Layout = row_major> struct fragment {
  float v[256];
};
template <class L> constexpr bool is_row = false;
template <> constexpr bool is_row<row_major> = true;
template <class F> void fill_fragment(F& f, float value) {
  if (current % kLanes == 0) for (float& v : f.v) v = value;
}
template <class T, class L> void load_tile(float* v, int rows, int columns, const T* from, unsigned ld) {
  if (current % kLanes) return;
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < columns; c++) v[r * columns + c] = to_float(is_row<L> ? from[r * ld + c] : from[c * ld + r]);
}
template <int M, int N, int K, class F, class T, class L>
void load_matrix_sync(fragment<matrix_a, M, N, K, F, L>& f, const T* from, unsigned ld) {
  load_tile<T, L>(f.v, M, K, from, ld);
}
template <int M, int N, int K, class F, class T, class L>
void load_matrix_sync(fragment<matrix_b, M, N, K, F, L>& f, const T* from, unsigned ld) {
  load_tile<T, L>(f.v, K, N, from, ld);
}
template <int M, int N, int K, class T, class LA, class LB>
void mma_sync(fragment<accumulator, M, N, K, float>& d, const fragment<matrix_a, M, N, K, T, LA>& a,
              const fragment<matrix_b, M, N, K, T, LB>& b, const fragment<accumulator, M, N, K, float>&) {
  if (current % kLanes) return;
  for (int m = 0; m < M; m++)
    for (int k = 0; k < K; k++)
      for (int n = 0; n < N; n++) d.v[m * N + n] += a.v[m * K + k] * b.v[k * N + n];
}
template <class F> void store_matrix_sync(float* to, const F& f, unsigned ld, layout_t) {
  if (current % kLanes) return;
  for (int r = 0; r < 16; r++)
    for (int c = 0; c < 16; c++) to[r * ld + c] = f.v[r * 16 + c];
}
}  // namespace wmma

template <class Fragment> void round_to_tf32(Fragment& f) {
  if (current % kLanes == 0)
    for (float& v : f.v) v = float_of((bits_of(v) + 0x1000) & ~0x1fffu);
}

template <class Arguments> struct Call { void (*kernel)(Arguments); const Arguments* arguments; };
template <class Arguments> void run_fiber(unsigned low, unsigned high) {
  const auto* call = reinterpret_cast<const Call<Arguments>*>(static_cast<uintptr_t>(high) << 32 | low);
  call->kernel(*call->arguments);
  block->fibers[current].done = true;
}

// 0, or an error where threads of a block do not meet at the same number of barriers.
template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), int64_t blocks, void*, const Arguments& arguments) {
  Block state;
  state.fibers.resize(kThreads);
  for (Fiber& f : state.fibers) f.stack.resize(128 * 1024);
  block = &state;
  const Call<Arguments> call{kernel, &arguments};
  const auto address = reinterpret_cast<uintptr_t>(&call);
  gridDim.x = lesser(blocks, kMaxBlocks);
  for (blockIdx.x = gridDim.x - 1; blockIdx.x >= 0; blockIdx.x--) {
    for (Fiber& f : state.fibers) {
      f.done = false;
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.data();
      f.context.uc_stack.ss_size = f.stack.size();
      f.context.uc_link = &state.scheduler;
      makecontext(&f.context, reinterpret_cast<void (*)()>(run_fiber<Arguments>), 2, static_cast<unsigned>(address),
                  static_cast<unsigned>(address >> 32));
    }
    for (int turn = 0, left = kThreads; left > 0; turn++) {
      left = 0;
      for (int i = 0; i < kThreads; i++) {
        current = (i * 37 + turn * 11) % kThreads;
        Fiber& f = state.fibers[current];
        if (f.done) return 719;  // some have left, others still wait
        swapcontext(&state.scheduler, &f.context);
      }
      for (Fiber& f : state.fibers) left += !f.done;
      if (left != 0 && left != kThreads) return 719;
    }
  }
  return cudaSuccess;
}

}  // namespace sparse_ffn_cuda
