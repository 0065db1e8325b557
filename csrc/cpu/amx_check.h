// amx_check.h - whether the matrix tiles of this build multiply as they should: asked once, before anything uses them. Packing
// is not asked: the operands are laid out here by the words of tile.h. Sums of small integers are exact in any order.
#pragma once
#include "tile.h"

SPARSE_FFN_BEGIN

static bool tiles_multiply(Layout layout, int mr, int columns) {
  constexpr int kRows = kTilesMr, kColumns = 2 * VL, kDepth = 4 * kTileSide, kWords = kDepth / 2;  // two steps of k
  const auto a = [](int r, int k) { return static_cast<float>((r * 7 + k * 3 + r * k) % 9 - 4); };
  const auto b = [](int k, int n) { return static_cast<float>((k * 5 + n * 11 + n * k) % 13 - 6); };
  const auto bf16_of = [](float v) { return static_cast<uint16_t>(bits_of(v) >> 16); };
  alignas(64) uint16_t packed_a[2 * kRows * kWords], packed_b[2 * kWords * kColumns];
  alignas(64) float expected[kRows][kColumns] = {}, c[kRows][kColumns];
  float row[kColumns];
  for (int k = 0; k < kDepth; k++) {
    const int u = k / 2, half = k % 2;
    for (int n = 0; n < kColumns; n++) {
      row[n] = b(k, n);
      if (n < columns) packed_b[2 * (u * columns + n) + half] = bf16_of(row[n]);
    }
    for (int r = 0; r < kRows; r++) {
      const float v = a(r, k);
      const int word = layout == Layout::kRows ? r * kWords + u : (u / 16 * 2 + r / 16) * 256 + r % 16 * 16 + u % 16;
      packed_a[2 * word + half] = bf16_of(v);
      if (r < mr)
        for (int n = 0; n < columns; n++) expected[r][n] += v * row[n];
    }
  }
  memset(c, 0, sizeof c);
  int32_t rows[kRows];
  for (int r = 0; r < kRows; r++) rows[r] = r;
  find_tile(layout == Layout::kRows ? Finish::kScatter : Finish::kAdd, layout, Product::kTiles, mr, columns)(
      mr, kWords, reinterpret_cast<const float*>(packed_a), kWords, reinterpret_cast<const float*>(packed_b),
      TileOut{c[0], kColumns, rows, nullptr, 0}, kNoLines);
  return !memcmp(c, expected, sizeof c);
}

static bool tiles_work() {
  const TilesInUse<bf16> tiles;
  for (int mr = kTileSide; mr <= 2 * kTileSide; mr += kTileSide)
    for (int columns = VL; columns <= 2 * VL; columns += VL)
      if (!tiles_multiply(Layout::kTiles, mr, columns) || !tiles_multiply(Layout::kRows, mr, columns)) return false;
  return true;
}

SPARSE_FFN_END
