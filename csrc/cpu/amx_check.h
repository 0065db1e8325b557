// amx_check.h - whether the matrix tiles of this build multiply as they should: asked once, before anything uses them. Packing
// is not asked: the operands are laid out here by the words of tile.h. Sums of small integers are exact in any order. In fp16
// A is scaled down to subnormal numbers, which those instructions are not to take as zero.
#pragma once
#include "amx_permission.h"
#include "tile.h"

SPARSE_FFN_BEGIN

template <class T> static bool tiles_multiply(Layout layout, int mr, int columns) {
  constexpr int kRows = kTilesMr, kColumns = 2 * VL, kDepth = 4 * kTileSide, kWords = kDepth / 2;  // two steps of k
  constexpr float kScale = kPackedProduct<T> == Product::kTilesFp16 ? 0x1p-20f : 1.f;
  const auto a = [](int r, int k) { return kScale * static_cast<float>((r * 7 + k * 3 + r * k) % 9 - 4); };
  const auto b = [](int k, int n) { return static_cast<float>((k * 5 + n * 11 + n * k) % 13 - 6); };
  const auto rounded = [](float v) {
    T number;
    from_float(v, &number);
    return number.bits;
  };
  alignas(64) uint16_t packed_a[2 * kRows * kWords], packed_b[2 * kWords * kColumns];
  alignas(64) float expected[kRows][kColumns] = {}, c[kRows][kColumns];
  float row[kColumns];
  for (int k = 0; k < kDepth; k++) {
    const int u = k / 2, half = k % 2;
    for (int n = 0; n < kColumns; n++) {
      row[n] = b(k, n);
      if (n < columns) packed_b[2 * (u * columns + n) + half] = rounded(row[n]);
    }
    for (int r = 0; r < kRows; r++) {
      const float v = a(r, k);
      const int word = layout == Layout::kRows ? r * kWords + u : (u / 16 * 2 + r / 16) * 256 + r % 16 * 16 + u % 16;
      packed_a[2 * word + half] = rounded(v);
      if (r < mr)
        for (int n = 0; n < columns; n++) expected[r][n] += v * row[n];
    }
  }
  memset(c, 0, sizeof c);
  int32_t rows[kRows];
  for (int r = 0; r < kRows; r++) rows[r] = r;
  find_tile(layout == Layout::kRows ? Finish::kScatter : Finish::kAdd, layout, kPackedProduct<T>, mr, columns)(
      mr, kWords, reinterpret_cast<const float*>(packed_a), kWords, reinterpret_cast<const float*>(packed_b),
      TileOut{c[0], kColumns, rows, nullptr, 0}, kNoLines);
  return !memcmp(c, expected, sizeof c);
}

template <class T> static bool tiles_multiply() {
  const TilesInUse<T> tiles;
  for (int mr = kTileSide; mr <= 2 * kTileSide; mr += kTileSide)
    for (int columns = VL; columns <= 2 * VL; columns += VL)
      if (!tiles_multiply<T>(Layout::kTiles, mr, columns) || !tiles_multiply<T>(Layout::kRows, mr, columns)) return false;
  return true;
}
static bool tiles_work() { return tiles_multiply<bf16>(); }

bool tiles_multiply_fp16() {
#if defined(SPARSE_FFN_AMX_EMULATED)
  static const bool result = tiles_multiply<tiled_fp16>();
#else
  static const bool result = amx_has_fp16() && tiles_multiply<tiled_fp16>();
#endif
  return result;
}

SPARSE_FFN_END
