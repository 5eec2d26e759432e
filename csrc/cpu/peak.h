// Loops that only multiply and add, in registers: the most that an instruction set can do.
#pragma once

#include <stdint.h>

namespace {

// As many independent chains as the register block has accumulators; returns the FLOP done.
template <class V>
int64_t fma_loop(int64_t steps) {
  constexpr int kChains = V::kMicroRows * V::kMicroVectors;
  typename V::F c[kChains];
  // different starts, or the chains would be merged into one; all converge to 2
  for (int i = 0; i < kChains; ++i) c[i] = V::set1(i);
  const auto half = V::set1(0.5), one = V::set1(1);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) c[i] = V::fma(c[i], half, one);
  }
  typename V::T kept[V::kWidth];
  for (int i = 1; i < kChains; ++i) c[0] = V::add(c[0], c[i]);
  V::store(kept, c[0]);
  asm volatile("" : : "r"(kept) : "memory");
  return steps * kChains * V::kWidth * 2;
}

}  // namespace
