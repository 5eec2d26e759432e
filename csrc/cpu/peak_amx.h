// The same for tiles: four accumulators, two operands on each side, nothing loaded in the loop.
#pragma once

#include "amx.h"

namespace {

inline int64_t tile_loop(int64_t steps) {
  alignas(64) Bf16 ones[512];
  for (Bf16& x : ones) x = 0x3f80;
  asm volatile("" : : "r"(ones) : "memory");
  const TileSession session;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, ones, 64);
  _tile_loadd(5, ones, 64);
  _tile_loadd(6, ones, 64);
  _tile_loadd(7, ones, 64);
  for (int64_t step = 0; step < steps; ++step) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  return steps * 4 * (16 * 16 * 32 * 2);
}

}  // namespace
