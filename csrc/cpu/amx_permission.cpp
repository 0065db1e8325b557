// amx_permission.cpp - see amx_permission.h.
#include "amx_permission.h"

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace sparse_ffn {
namespace {

constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
constexpr long kTileData = 18;               // XFEATURE_XTILEDATA

struct Leaf {
  unsigned a = 0, b = 0, c = 0, d = 0;
  Leaf(unsigned leaf, unsigned subleaf) {
    if (!__get_cpuid_count(leaf, subleaf, &a, &b, &c, &d)) a = b = c = d = 0;
  }
};

bool processor_has_tiles() {
  const Leaf features(7, 0), palette(0x1d, 1);
  const bool tiles = features.d >> 24 & 1, bf16 = features.d >> 22 & 1;
  const unsigned bytes_per_tile = palette.a >> 16, bytes_per_row = palette.b & 0xffff, count = palette.b >> 16;
  const unsigned rows = palette.c & 0xffff;
  return tiles && bf16 && bytes_per_tile == 1024 && bytes_per_row == 64 && count >= 8 && rows == 16;
}

bool system_saves_tiles() {
  const bool osxsave = Leaf(1, 0).c >> 27 & 1;
  if (!osxsave) return false;
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low >> 17 & 3) == 3;  // their configuration and their data
}

}  // namespace

bool amx_permitted() {
  return processor_has_tiles() && system_saves_tiles() && !syscall(SYS_arch_prctl, kRequestPermission, kTileData);
}

bool amx_has_fp16() { return Leaf(7, 1).a >> 21 & 1; }

}  // namespace sparse_ffn
#else
namespace sparse_ffn {
bool amx_permitted() { return false; }
bool amx_has_fp16() { return false; }
}  // namespace sparse_ffn
#endif
