// dispatch.cpp - chooses the instruction set once; the functions of the C interface that take no tensors.
#include <cstdlib>
#include <cstring>

#include "../interface/operands.h"
#include "amx_permission.h"
#include "large_memory.h"
#include "kernel_table.h"

namespace sparse_ffn {

#if defined(SPARSE_FFN_HAS_AMX_EMULATED)
namespace amx_emulated { extern const KernelTable table; }
#endif
#if defined(SPARSE_FFN_HAS_AMX)
namespace amx { extern const KernelTable table; }
#endif
#if defined(__aarch64__)
#define SPARSE_FFN_EVERYWHERE neon
#else
#define SPARSE_FFN_EVERYWHERE generic
#endif
#if defined(SPARSE_FFN_X86)
namespace avx512_bf16 { extern const KernelTable table; }
namespace avx512 { extern const KernelTable table; }
namespace avx2 { extern const KernelTable table; }
#endif
namespace SPARSE_FFN_EVERYWHERE { extern const KernelTable table; }

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

// forced: the name to look for, or null. amx: whether the system may be asked for its tiles, and they be tried.
Choice choose(const char* forced, [[maybe_unused]] bool amx) {
  const struct { const KernelTable* table; bool supported, preferred; } candidates[] = {
#if defined(SPARSE_FFN_HAS_AMX_EMULATED)
      {&amx_emulated::table, true, false},  // whoever builds it knows that the processor can run it
#endif
#if defined(SPARSE_FFN_HAS_AMX)
      {&amx::table, has_avx512() && __builtin_cpu_supports("avx512bf16") && amx && amx_permitted(), true},
#endif
#if defined(SPARSE_FFN_X86)
      // vdpbf16ps does twice the arithmetic of an fp32 FMA on AMD (Zen 4) but half of it on Intel (Sapphire Rapids: 88
      // against 165 GFLOP/s a core), where widening bf16 to fp32 while packing is the faster way.
      {&avx512_bf16::table, has_avx512() && __builtin_cpu_supports("avx512bf16"), __builtin_cpu_is("amd") != 0},
      {&avx512::table, has_avx512(), true},
      {&avx2::table, has_avx2(), true},
#endif
      {&SPARSE_FFN_EVERYWHERE::table, true, true},
  };
  Choice found{nullptr, false, ""};
  const KernelTable* last = nullptr;
  for (const auto& c : candidates) {
    if (!c.supported || (c.table->works && !c.table->works())) continue;
    if (last) strcat(found.names, " ");
    strcat(found.names, c.table->name);
    if (!found.table && (forced ? !strcmp(forced, c.table->name) : c.preferred)) found.table = c.table;
    last = c.table;
  }
  found.refused = !found.table;
  if (found.refused) found.table = last;
  return found;
}

Choice choose() {
#if defined(SPARSE_FFN_X86)
  __builtin_cpu_init();
#endif
  const char* forced = getenv("SPARSE_FFN_ISA");
  if (!forced || !*forced) return choose(nullptr, true);
  const Choice found = choose(forced, false);
  return found.refused ? choose(forced, true) : found;
}

const Choice& choice() {
  static const Choice found = choose();
  return found;
}

}  // namespace

const KernelTable& kernels() { return *choice().table; }

}  // namespace sparse_ffn

using namespace sparse_ffn;

extern "C" {

int sparse_ffn_abi_version(void) { return SPARSE_FFN_ABI_VERSION; }
const char* sparse_ffn_error(void) { return last_error(); }
const char* sparse_ffn_isa(void) { return choice().refused ? nullptr : kernels().name; }
const char* sparse_ffn_isas(void) { return choice().names; }
void* sparse_ffn_allocate(int64_t bytes) { return bytes > 0 ? take_memory(static_cast<size_t>(bytes)) : nullptr; }
void sparse_ffn_free(void* memory, int64_t bytes) { free_memory(memory, static_cast<size_t>(bytes)); }

}  // extern "C"
