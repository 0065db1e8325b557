// amx_emulated.h - the functions of amx.h in plain C++, for tests on processors without AMX. A tile that is used without a
// configuration, in a thread whose configuration was released or never loaded, ends the process, as it does on AMX.
#pragma once

SPARSE_FFN_BEGIN

struct EmulatedTiles {
  V row[8][kTileSide];
  bool configured = false;
};
inline thread_local EmulatedTiles emulated;

static inline void configure_tiles(const TileConfig& config) {
  if (config.palette != 1 || config.start_row) __builtin_trap();
  for (int i = 0; i < 16; i++)
    if (config.row_bytes[i] != (i < 8 ? kTileBytes : 0) || config.rows[i] != (i < 8 ? kTileSide : 0)) __builtin_trap();
  memset(emulated.row, 0, sizeof emulated.row);
  emulated.configured = true;
}
static inline void release_tiles() { emulated.configured = false; }
template <int kTile> static V* emulated_tile() {
  if (!emulated.configured) __builtin_trap();
  return emulated.row[kTile];
}
template <int kTile> static void tile_zero() { memset(emulated_tile<kTile>(), 0, sizeof emulated.row[kTile]); }
template <int kTile> static void tile_load(const float* p, int64_t stride) {
  V* tile = emulated_tile<kTile>();
  for (int r = 0; r < kTileSide; r++) memcpy(&tile[r], reinterpret_cast<const char*>(p) + r * stride, kTileBytes);
}
template <int kTile> static void tile_store(float* p, int64_t stride) {
  const V* tile = emulated_tile<kTile>();
  for (int r = 0; r < kTileSide; r++) memcpy(reinterpret_cast<char*>(p) + r * stride, &tile[r], kTileBytes);
}

static ALWAYS_INLINE V without_subnormals(VI bits) {
  return reinterpret_cast<V>((bits & 0x7f800000) != 0 ? bits : bits & static_cast<int32_t>(0x80000000));
}
static ALWAYS_INLINE V low_half(VI pairs) { return without_subnormals(pairs << 16); }
static ALWAYS_INLINE V high_half(VI pairs) { return without_subnormals(pairs & static_cast<int32_t>(0xffff0000)); }
static ALWAYS_INLINE V low_half_fp16(VI pairs) {
  V v{};
  for (int i = 0; i < VL; i++) v[i] = to_float(fp16{static_cast<uint16_t>(pairs[i])});
  return v;
}
// The two numbers of a pair have sums of their own, as on AMX; their rounding is that of fused multiplications there.
template <bool kFp16, int kC, int kA, int kB> static void tile_dot() {
  V* c = emulated_tile<kC>();
  const V *a = emulated_tile<kA>(), *b = emulated_tile<kB>();
  for (int m = 0; m < kTileSide; m++) {
    const VI pairs = reinterpret_cast<VI>(a[m]);
    V low = zero(), high = zero();
    for (int k = 0; k < kTileSide; k++) {
      const VI pair = VI{} + pairs[k], other = reinterpret_cast<VI>(b[k]);
      if constexpr (kFp16) {
        low = fma(low_half_fp16(pair), low_half_fp16(other), low);
        high = fma(low_half_fp16(pair >> 16), low_half_fp16(other >> 16), high);
      } else {
        low = fma(low_half(pair), low_half(other), low);
        high = fma(high_half(pair), high_half(other), high);
      }
    }
    c[m] = without_subnormals(reinterpret_cast<VI>(c[m] + (low + high)));
  }
}

SPARSE_FFN_END
