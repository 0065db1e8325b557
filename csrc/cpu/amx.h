// amx.h - the tiles of AMX, 16 rows x 64 bytes (16 bf16 pairs or fp32 numbers a row), and the instructions that the core uses
// on them, in the builds `amx` and, emulated for tests, `amx_emulated`. They are inline assembly because GCC's intrinsics for
// loads do not tell the compiler that they read memory: stores may be moved past them.
#pragma once
#include <cstddef>

#include "vec.h"

SPARSE_FFN_BEGIN

constexpr int kTileSide = 16;   // rows of a tile, words in a row
constexpr int kTileBytes = 64;  // in a row
constexpr int kTileWords = kTileSide * kTileSide;

SPARSE_FFN_END

#if defined(SPARSE_FFN_AMX)
SPARSE_FFN_BEGIN

static_assert(VL == kTileSide && kTileBytes == 4 * kTileSide, "a row of a tile is a vector");

// What LDTILECFG reads, the format of palette 1: all eight tiles whole. Parts of tiles are padded in memory.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {kTileBytes, kTileBytes, kTileBytes, kTileBytes, kTileBytes, kTileBytes, kTileBytes, kTileBytes};
  uint8_t rows[16] = {kTileSide, kTileSide, kTileSide, kTileSide, kTileSide, kTileSide, kTileSide, kTileSide};
};
static_assert(sizeof(TileConfig) == 64, "LDTILECFG reads 64 bytes");
static_assert(offsetof(TileConfig, row_bytes) == 16 && offsetof(TileConfig, rows) == 48, "at these places");

SPARSE_FFN_END

#if defined(SPARSE_FFN_AMX_EMULATED)
#include "amx_emulated.h"
#else
SPARSE_FFN_BEGIN

static ALWAYS_INLINE void configure_tiles(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
static ALWAYS_INLINE void release_tiles() { asm volatile("tilerelease" ::: "memory"); }
template <int kTile> static ALWAYS_INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(kTile)); }
// Rows from p on, `stride` bytes apart.
template <int kTile> static ALWAYS_INLINE void tile_load(const float* p, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(p), "r"(stride) : "memory");
}
template <int kTile> static ALWAYS_INLINE void tile_store(float* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(p), "r"(stride) : "memory");
}
// C[m][n] += sum over pairs k of A[m][k] . B[k][n]; sums, and numbers of bf16, below the smallest normal one count as zero.
template <bool kFp16, int kC, int kA, int kB> static ALWAYS_INLINE void tile_dot() {
  if constexpr (kFp16)  // tdpfp16ps, which few assemblers know
    asm volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1" ::"i"((15 - kB) << 3 | 3), "i"(0xc0 | kC << 3 | kA));
  else
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

SPARSE_FFN_END
#endif
#endif
