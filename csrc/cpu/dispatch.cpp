// dispatch.cpp - chooses the instruction set once; the functions of the C interface that take no tensors.
#include <cstdlib>
#include <cstring>

#include "../interface/operands.h"
#include "blocks.h"
#include "kernel_table.h"
#include "scratch.h"

namespace sparse_ffn {

#if defined(SPARSE_FFN_X86)
namespace avx512_bf16 { extern const KernelTable table; }
namespace avx512 { extern const KernelTable table; }
namespace avx2 { extern const KernelTable table; }
#elif defined(SPARSE_FFN_ONE_ISA)
namespace SPARSE_FFN_ONE_ISA { extern const KernelTable table; }
#endif
namespace generic { extern const KernelTable table; }

namespace {

const KernelTable& choose() {
#if defined(SPARSE_FFN_ONE_ISA)  // experiments: one instruction set built, no choice
  return SPARSE_FFN_ONE_ISA::table;
#elif defined(SPARSE_FFN_X86)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  // vdpbf16ps does twice the arithmetic of an fp32 FMA on AMD (Zen 4) but half of it on Intel (Sapphire Rapids: 88
  // against 165 GFLOP/s a core), where widening bf16 to fp32 while packing is the faster way.
  const struct { const KernelTable* table; bool supported, preferred; } order[] = {
      {&avx512_bf16::table, has_bf16, __builtin_cpu_is("amd") != 0},
      {&avx512::table, has_avx512, true},
      {&avx2::table, has_avx2, true},
      {&generic::table, true, true},
  };
  const char* forced = getenv("SPARSE_FFN_ISA");
  if (forced && *forced)
    for (const auto& o : order)
      if (o.supported && !strcmp(forced, o.table->name)) return *o.table;
  for (const auto& o : order)
    if (o.supported && o.preferred) return *o.table;
  return generic::table;
#else
  return generic::table;
#endif
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

}  // namespace sparse_ffn

using namespace sparse_ffn;

extern "C" {

int sparse_ffn_abi_version(void) { return SPARSE_FFN_ABI_VERSION; }
const char* sparse_ffn_error(void) { return last_error(); }
const char* sparse_ffn_isa(void) { return kernels().name; }
void sparse_ffn_release_memory(void) {
  release_scratch();
  release_blocks();
}
void* sparse_ffn_allocate(int64_t bytes) { return bytes > 0 ? take_block(static_cast<size_t>(bytes)) : nullptr; }
void sparse_ffn_free(void* memory, int64_t bytes) { free_block(memory, static_cast<size_t>(bytes)); }
int sparse_ffn_find_pages(void* p, int64_t bytes) {
  if (bytes < 0 || (bytes > 0 && !p)) return refuse(SPARSE_FFN_BAD_ARGUMENT, "there is no memory to find pages for");
  advise_huge_pages(p, static_cast<size_t>(bytes));
  return SPARSE_FFN_OK;
}

}  // extern "C"
