// dispatch.cpp - the C ABI: checks arguments, chooses the instruction set once, calls its kernels.
#include <cstdlib>
#include <cstring>

#include "kernel_table.h"
#include "phases.h"
#include "blocks.h"
#include "scratch.h"

namespace sparse_ffn {

#if defined(SPARSE_FFN_X86)
namespace avx512_bf16 { extern const KernelTable table; }
namespace avx512 { extern const KernelTable table; }
namespace avx2 { extern const KernelTable table; }
#endif
namespace generic { extern const KernelTable table; }

namespace {

#if defined(SPARSE_FFN_X86)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

struct Choice {
  const KernelTable* table;
  bool refused;    // SPARSE_FFN_ISA names none of those below
  char names[64];  // of all that can run here
};

Choice choose() {
#if defined(SPARSE_FFN_X86)
  __builtin_cpu_init();
#endif
  const struct { const KernelTable* table; bool supported, preferred; } candidates[] = {
#if defined(SPARSE_FFN_X86)
      // vdpbf16ps does twice the arithmetic of an fp32 FMA on AMD (Zen 4) but half of it on Intel (Sapphire Rapids: 88
      // against 165 GFLOP/s a core), where widening bf16 to fp32 while packing is the faster way.
      {&avx512_bf16::table, has_avx512() && __builtin_cpu_supports("avx512bf16"), __builtin_cpu_is("amd") != 0},
      {&avx512::table, has_avx512(), true},
      {&avx2::table, has_avx2(), true},
#endif
      {&generic::table, true, true},
  };
  const char* forced = getenv("SPARSE_FFN_ISA");
  if (forced && !*forced) forced = nullptr;
  Choice found{nullptr, false, ""};
  const KernelTable* last = nullptr;
  for (const auto& c : candidates) {
    if (!c.supported) continue;
    if (last) strcat(found.names, " ");
    strcat(found.names, c.table->name);
    if (!found.table && (forced ? !strcmp(forced, c.table->name) : c.preferred)) found.table = c.table;
    last = c.table;
  }
  found.refused = !found.table;
  if (found.refused) found.table = last;
  return found;
}

const Choice& choice() {
  static const Choice found = choose();
  return found;
}

const KernelTable& kernels() { return *choice().table; }

constexpr int64_t kMaxSlots = 0x7fffffff;

bool known_dtype(int32_t dtype) { return dtype >= SPARSE_FFN_FP32 && dtype <= SPARSE_FFN_FP16; }

bool known_norm(int32_t norm) { return norm >= SPARSE_FFN_NORM_NONE && norm <= SPARSE_FFN_NORM_RMS; }

int check(const sparse_ffn_experts* p, bool needs_order) {
  if (!p) return SPARSE_FFN_BAD_ARGUMENT;
  if (p->T < 0 || p->D < 0 || p->O < 0 || p->E < 0 || p->G < 0 || p->K < 0) return SPARSE_FFN_BAD_ARGUMENT;
  if (!known_dtype(p->dtype)) return SPARSE_FFN_BAD_ARGUMENT;
  if (p->activation < SPARSE_FFN_RELU || p->activation > SPARSE_FFN_SQUARED_RELU) return SPARSE_FFN_BAD_ARGUMENT;
  if (p->K > 0 && p->T > kMaxSlots / p->K) return SPARSE_FFN_TOO_LARGE;
  const bool any = p->T > 0 && p->K > 0;
  if (any && ((p->D > 0 && !p->x) || !p->gate)) return SPARSE_FFN_BAD_ARGUMENT;
  if (p->E > 0 && p->G > 0 && ((p->D > 0 && !p->keys) || (p->O > 0 && !p->values))) return SPARSE_FFN_BAD_ARGUMENT;
  if (needs_order && ((any && !p->order) || !p->offsets)) return SPARSE_FFN_BAD_ARGUMENT;
  return SPARSE_FFN_OK;
}

int check(const sparse_ffn_experts* p, const sparse_ffn_router* r) {
  if (!p || !r || p->E < 1 || p->K < 1 || p->K > p->E || p->T < 0 || p->D < 0) return SPARSE_FFN_BAD_ARGUMENT;
  if (p->dtype != SPARSE_FFN_FP32 && p->dtype != SPARSE_FFN_BF16) return SPARSE_FFN_BAD_ARGUMENT;
  if (r->gate < SPARSE_FFN_GATE_SIGMOID || r->gate > SPARSE_FFN_GATE_ONE) return SPARSE_FFN_BAD_ARGUMENT;
  if (r->groups < 1 || p->T % r->groups) return SPARSE_FFN_BAD_ARGUMENT;
  return p->T > 0 && p->D > 0 && (!p->x || !r->weight) ? SPARSE_FFN_BAD_ARGUMENT : SPARSE_FFN_OK;
}

template <class Index> bool all_below(const Index* index, int64_t n, int64_t limit) {
  for (int64_t i = 0; i < n; i++)
    if (static_cast<uint64_t>(static_cast<int64_t>(index[i])) >= static_cast<uint64_t>(limit)) return false;
  return true;
}

int check(const sparse_ffn_cvmm* p) {
  if (!p || !known_dtype(p->dtype) || !p->offsets) return SPARSE_FFN_BAD_ARGUMENT;
  if (p->rows_x < 0 || p->rows_out < 0 || p->S < 0 || p->E < 0 || p->M < 0 || p->L < 0) return SPARSE_FFN_BAD_ARGUMENT;
  if (p->S > kMaxSlots) return SPARSE_FFN_TOO_LARGE;
  if (p->w_stride_m != 1 && p->w_stride_l != 1) return SPARSE_FFN_BAD_ARGUMENT;
  if (p->S > 0 && ((p->M > 0 && !p->x) || (p->M > 0 && p->L > 0 && !p->w))) return SPARSE_FFN_BAD_ARGUMENT;
  if (p->offsets[0] != 0 || p->offsets[p->E] != p->S) return SPARSE_FFN_BAD_ARGUMENT;
  for (int64_t e = 0; e < p->E; e++)
    if (p->offsets[e + 1] < p->offsets[e]) return SPARSE_FFN_BAD_ARGUMENT;
  if (p->gather ? !all_below(p->gather, p->S, p->rows_x) : p->S > p->rows_x) return SPARSE_FFN_BAD_INDEX;
  if (p->scatter ? !all_below(p->scatter, p->S, p->rows_out) : p->S > p->rows_out) return SPARSE_FFN_BAD_INDEX;
  return SPARSE_FFN_OK;
}

int check(const sparse_ffn_bag* p) {
  if (!p || !known_dtype(p->dtype)) return SPARSE_FFN_BAD_ARGUMENT;
  if (p->T < 0 || p->J < 0 || p->N < 0 || p->O < 0) return SPARSE_FFN_BAD_ARGUMENT;
  if (p->J > 0 && p->T > kMaxSlots / p->J) return SPARSE_FFN_TOO_LARGE;
  if (p->T * p->J > 0 && (!p->index || !p->weight || (p->O > 0 && !p->values))) return SPARSE_FFN_BAD_ARGUMENT;
  return all_below(p->index, p->T * p->J, p->N) ? SPARSE_FFN_OK : SPARSE_FFN_BAD_INDEX;
}

int check(const sparse_ffn_product_keys* p) {
  if (!p || p->T < 0 || p->H < 0 || p->n < 0 || p->k < 0 || (p->n <= 0xffff && p->k > p->n * p->n))
    return SPARSE_FFN_BAD_ARGUMENT;
  return p->n > 0x7fff ? SPARSE_FFN_TOO_LARGE : SPARSE_FFN_OK;  // pairs of positions are kept in 32 bits
}

// Up to here reading the touched weights dominates, and the decode path reads each of them once, unpacked.
constexpr int64_t kDecodeTokens = 32;

}  // namespace
}  // namespace sparse_ffn

using namespace sparse_ffn;

extern "C" {

int sparse_ffn_abi_version(void) { return SPARSE_FFN_ABI_VERSION; }
const char* sparse_ffn_isa(void) { return choice().refused ? nullptr : kernels().name; }
const char* sparse_ffn_isas(void) { return choice().names; }
void sparse_ffn_release_memory(void) {
  release_scratch();
  release_blocks();
}
void* sparse_ffn_allocate(int64_t bytes) { return bytes > 0 ? take_block(static_cast<size_t>(bytes)) : nullptr; }
void sparse_ffn_free(void* memory, int64_t bytes) { free_block(memory, static_cast<size_t>(bytes)); }
int sparse_ffn_find_pages(void* p, int64_t bytes) {
  if (bytes < 0 || (bytes > 0 && !p)) return SPARSE_FFN_BAD_ARGUMENT;
  advise_huge_pages(p, static_cast<size_t>(bytes));
  return SPARSE_FFN_OK;
}

int sparse_ffn_route(const int64_t* index, int64_t S, int64_t E, int32_t* order, int32_t* offsets) {
  if (S < 0 || E < 0 || !offsets || (S > 0 && (!index || !order))) return SPARSE_FFN_BAD_ARGUMENT;
  if (S > kMaxSlots) return SPARSE_FFN_TOO_LARGE;
  // Counts go one place up, so that after the prefix sum next[e] is the first position of expert e and, when all are
  // placed, of expert e + 1: no second array.
  memset(offsets, 0, static_cast<size_t>(E + 1) * sizeof(int32_t));
  for (int64_t s = 0; s < S; s++) {
    if (static_cast<uint64_t>(index[s]) >= static_cast<uint64_t>(E)) return SPARSE_FFN_BAD_INDEX;
    offsets[index[s]]++;
  }
  int32_t total = 0;
  for (int64_t e = 0; e <= E; e++) {
    const int32_t count = offsets[e];
    offsets[e] = total;
    total += count;
  }
  for (int64_t s = 0; s < S; s++) order[offsets[index[s]]++] = static_cast<int32_t>(s);
  for (int64_t e = E; e > 0; e--) offsets[e] = offsets[e - 1];
  offsets[0] = 0;
  return SPARSE_FFN_OK;
}

int sparse_ffn_experts_forward(const sparse_ffn_experts* args, void* out, void* saved_z, void* saved_zg) {
  if (const int bad = check(args, true)) return bad;
  if (!out && args->T > 0 && args->O > 0) return SPARSE_FFN_BAD_ARGUMENT;
  if (args->T <= kDecodeTokens && !saved_z) return PHASE("decode", kernels().experts_decode(*args, out));
  return kernels().experts_forward(*args, out, saved_z, saved_zg);
}

int sparse_ffn_experts_infer(const sparse_ffn_experts* args, const int64_t* index, void* out) {
  if (const int bad = check(args, false)) return bad;
  const int64_t S = args->T * args->K;
  int32_t* order = static_cast<int32_t*>(scratch(kSlotOrder, static_cast<size_t>(S + 1) * 4));
  int32_t* offsets = static_cast<int32_t*>(scratch(kSlotOffsets, static_cast<size_t>(args->E + 1) * 4));
  if (!order || !offsets) return SPARSE_FFN_NO_MEMORY;
  if (const int bad = sparse_ffn_route(index, S, args->E, order, offsets)) return bad;
  sparse_ffn_experts p = *args;
  p.order = order;
  p.offsets = offsets;
  return sparse_ffn_experts_forward(&p, out, nullptr, nullptr);
}

int sparse_ffn_experts_backward(const sparse_ffn_experts* args, const void* dout, int64_t dout_stride,
                                const void* saved_z, const void* saved_zg, void* dx, void* dkeys, void* dgate_keys,
                                void* dvalues, void* dkey_bias, float* dgate) {
  if (const int bad = check(args, true)) return bad;
  const bool any = args->T > 0 && args->K > 0;
  if (any && ((args->O > 0 && !dout) || (args->G > 0 && (!saved_z || (args->gate_keys && !saved_zg)))))
    return SPARSE_FFN_BAD_ARGUMENT;
  return kernels().experts_backward(*args, dout, dout_stride, saved_z, saved_zg, dx, dkeys, dgate_keys, dvalues,
                                    dkey_bias, dgate);
}

int sparse_ffn_moe_forward(const sparse_ffn_experts* args, const sparse_ffn_router* router, void* out, void* saved_z,
                           void* saved_zg, int64_t* index, float* gate, int32_t* order, int32_t* offsets,
                           float* softmax_sums) {
  if (const int bad = check(args, router)) return bad;
  sparse_ffn_experts p = *args;
  if (!gate) gate = static_cast<float*>(scratch(kSlotDgate, static_cast<size_t>(p.T * p.K + 1) * 4));
  if (!order) order = static_cast<int32_t*>(scratch(kSlotOrder, static_cast<size_t>(p.T * p.K + 1) * 4));
  if (!offsets) offsets = static_cast<int32_t*>(scratch(kSlotOffsets, static_cast<size_t>(p.E + 1) * 4));
  if (!gate || !order || !offsets) return SPARSE_FFN_NO_MEMORY;
  p.gate = gate;
  p.order = order;
  p.offsets = offsets;
  if (const int bad = check(&p, true)) return bad;
  if (const int bad = PHASE("route", kernels().route_tokens(p, *router, index, gate, softmax_sums))) return bad;
  if (const int bad = PHASE("sort", sparse_ffn_route(index, p.T * p.K, p.E, order, offsets))) return bad;
  return sparse_ffn_experts_forward(&p, out, saved_z, saved_zg);
}

int sparse_ffn_moe_backward(const sparse_ffn_experts* args, const sparse_ffn_router* router, const void* dout,
                            int64_t dout_stride, const void* saved_z, const void* saved_zg, const int64_t* index,
                            const float* dgate, const float* dsums, void* dx, void* drouter, void* dkeys,
                            void* dgate_keys, void* dvalues, void* dkey_bias) {
  if (const int bad = check(args, router)) return bad;
  if (const int bad = check(args, true)) return bad;
  const bool any = args->T > 0 && args->K > 0;
  if (any && (!index || (args->O > 0 && !dout) || (args->G > 0 && (!saved_z || (args->gate_keys && !saved_zg)))))
    return SPARSE_FFN_BAD_ARGUMENT;
  return kernels().moe_backward(*args, *router, dout, dout_stride, saved_z, saved_zg, index, dgate, dsums, dx, drouter,
                                dkeys, dgate_keys, dvalues, dkey_bias);
}

int sparse_ffn_cvmm_forward(const sparse_ffn_cvmm* args, void* out) {
  if (const int bad = check(args)) return bad;
  if (!out && args->rows_out > 0 && args->L > 0) return SPARSE_FFN_BAD_ARGUMENT;
  return kernels().cvmm_forward(*args, out);
}

int sparse_ffn_cvmm_backward(const sparse_ffn_cvmm* args, const void* dout, int64_t dout_stride, void* dx, void* dw,
                             float* dscale) {
  if (const int bad = check(args)) return bad;
  if (!dout && args->S > 0 && args->L > 0) return SPARSE_FFN_BAD_ARGUMENT;
  return kernels().cvmm_backward(*args, dout, dout_stride, dx, dw, dscale);
}

int sparse_ffn_bag_forward(const sparse_ffn_bag* args, void* out) {
  if (const int bad = check(args)) return bad;
  if (!out && args->T > 0 && args->O > 0) return SPARSE_FFN_BAD_ARGUMENT;
  return PHASE("bag", kernels().bag_forward(*args, out));
}

int sparse_ffn_bag_backward(const sparse_ffn_bag* args, const void* dout, void* dweight, void* dvalues) {
  if (const int bad = check(args)) return bad;
  if (!dout && args->T * args->J > 0 && args->O > 0) return SPARSE_FFN_BAD_ARGUMENT;
  return PHASE("dbag", kernels().bag_backward(*args, dout, dweight, dvalues, nullptr, nullptr));
}

int sparse_ffn_bag_backward_sparse(const sparse_ffn_bag* args, const void* dout, void* dweight, int64_t* rows,
                                   void* dvalue_rows, int64_t* n_rows) {
  if (const int bad = check(args)) return bad;
  if (!n_rows || (args->T * args->J > 0 && (!rows || (args->O > 0 && (!dout || !dvalue_rows))))) return SPARSE_FFN_BAD_ARGUMENT;
  *n_rows = 0;
  if (args->T * args->J == 0) return SPARSE_FFN_OK;
  return kernels().bag_backward(*args, dout, dweight, dvalue_rows, rows, n_rows);
}

int sparse_ffn_wide_product_forward(const sparse_ffn_wide_product* p, float* out, float* scale) {
  if (!p || !known_dtype(p->dtype) || !known_norm(p->norm)) return SPARSE_FFN_BAD_ARGUMENT;
  if (p->B < 0 || p->M < 0 || p->N < 0 || p->K < 0) return SPARSE_FFN_BAD_ARGUMENT;
  if (p->norm && (p->norm_width < 1 || p->N % p->norm_width)) return SPARSE_FFN_BAD_ARGUMENT;
  if (p->B * p->M * p->N == 0) return SPARSE_FFN_OK;
  if (!out || (p->norm && !scale) || (p->K > 0 && (!p->x || !p->w))) return SPARSE_FFN_BAD_ARGUMENT;
  if (p->x_stride_b < 0 || p->x_stride_m < 0) return SPARSE_FFN_BAD_ARGUMENT;
  if (p->M > kMaxSlots / p->B || (p->B - 1) * p->x_stride_b + (p->M - 1) * p->x_stride_m > kMaxSlots)
    return SPARSE_FFN_TOO_LARGE;
  return PHASE(p->norm ? "query" : "scores", kernels().wide_product(*p, out, scale));
}

int sparse_ffn_normalised_backward(const sparse_ffn_normalised* p, const float* dout, const float* out,
                                   const float* scale, void* dproduct) {
  if (!p || !known_dtype(p->dtype) || !known_norm(p->norm) || !p->norm) return SPARSE_FFN_BAD_ARGUMENT;
  if (p->M < 0 || p->pieces < 0 || p->width < 0) return SPARSE_FFN_BAD_ARGUMENT;
  if (p->M * p->pieces * p->width == 0) return SPARSE_FFN_OK;
  if (!dout || !out || !scale || !dproduct) return SPARSE_FFN_BAD_ARGUMENT;
  return PHASE("dnorm", kernels().normalised_backward(*p, dout, out, scale, dproduct));
}

int sparse_ffn_product_key_topk(const sparse_ffn_product_keys* args, const float* scores, int64_t* index, float* sums) {
  if (const int bad = check(args)) return bad;
  if (args->T * args->H * args->k == 0) return SPARSE_FFN_OK;
  if (!scores || !index) return SPARSE_FFN_BAD_ARGUMENT;
  return PHASE("select", kernels().product_key_topk(*args, scores, index, sums));
}

int sparse_ffn_product_key_topk_backward(const sparse_ffn_product_keys* args, const float* dsums, const int64_t* index,
                                         float* dscores) {
  if (const int bad = check(args)) return bad;
  const int64_t rows = args->T * args->H;
  if (rows * args->n == 0) return SPARSE_FFN_OK;
  if (!dscores || (args->k > 0 && (!dsums || !index))) return SPARSE_FFN_BAD_ARGUMENT;
  if (!all_below(index, rows * args->k, args->n * args->n)) return SPARSE_FFN_BAD_INDEX;
  return PHASE("dselect", kernels().product_key_topk_backward(*args, dsums, index, dscores));
}

int sparse_ffn_topk(const float* scores, int64_t R, int64_t n, int64_t stride, int64_t k, int32_t n_threads,
                    int64_t* index, float* values) {
  if (R < 0 || n < 0 || k < 0 || k > n || (R > 0 && k > 0 && (!scores || !index))) return SPARSE_FFN_BAD_ARGUMENT;
  if (n > kMaxSlots) return SPARSE_FFN_TOO_LARGE;
  return k ? kernels().topk(scores, R, n, stride, k, n_threads, index, values) : SPARSE_FFN_OK;
}

int sparse_ffn_topk_activation(const void* u, int64_t T, int64_t F, int64_t stride, int32_t dtype, int32_t activation,
                               const float* norm, int64_t k, int32_t n_threads, int64_t* index, void* kept) {
  if (T < 0 || F < 0 || k < 0 || k > F || !known_dtype(dtype)) return SPARSE_FFN_BAD_ARGUMENT;
  if (activation < SPARSE_FFN_RELU || activation > SPARSE_FFN_SQUARED_RELU) return SPARSE_FFN_BAD_ARGUMENT;
  if (T > 0 && k > 0 && (!u || !index || !kept)) return SPARSE_FFN_BAD_ARGUMENT;
  if (F > kMaxSlots) return SPARSE_FFN_TOO_LARGE;
  return k ? kernels().topk_activation(u, T, F, stride, dtype, activation, norm, k, n_threads, index, kept) : SPARSE_FFN_OK;
}

}  // extern "C"
