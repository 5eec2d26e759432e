// The same for tiles: four accumulators, two operands on each side, nothing loaded in the loop.
#pragma once

#include "amx_products.h"

namespace {

// Numbers of kParts parts: as many tile products as they need count once.
template <int kParts>
int64_t tile_loop(int64_t steps) {
  // numbers of both signs and many digits: tiles multiply zeros and ones at a higher clock
  alignas(64) Bf16 numbers[4 * kTile];
  uint32_t state = 1;
  for (Bf16& x : numbers) {
    state = state * 1664525u + 1013904223u;
    x = static_cast<Bf16>(0x3f00 | (state >> 16 & 0x807f));
  }
  asm volatile("" : : "r"(numbers) : "memory");
  const TileSession session;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, numbers, 64);
  _tile_loadd(5, numbers + kTile, 64);
  _tile_loadd(6, numbers + 2 * kTile, 64);
  _tile_loadd(7, numbers + 3 * kTile, 64);
  for (int64_t step = 0; step < steps; ++step) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  return steps * 4 * (16 * 16 * 32 * 2) / Products<kParts>::kCount;
}

}  // namespace
