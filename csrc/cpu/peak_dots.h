// The same for pairs of bf16: 24 accumulators, two vectors of pairs.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace {

inline int64_t dot_loop(int64_t steps) {
  constexpr int kChains = 24;
  // the two products of a pair cancel each other: sums stay where they began
  __m512 c[kChains];
  for (int i = 0; i < kChains; ++i) c[i] = _mm512_set1_ps(static_cast<float>(i));
  const auto pairs = [](uint32_t x) {
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(x)));
  };
  const __m512bh left = pairs(0x3f80bf80), right = pairs(0x3f8a3f8a);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) c[i] = _mm512_dpbf16_ps(c[i], left, right);
  }
  float kept[16];
  for (int i = 1; i < kChains; ++i) c[0] = _mm512_add_ps(c[0], c[i]);
  _mm512_storeu_ps(kept, c[0]);
  asm volatile("" : : "r"(kept) : "memory");
  return steps * kChains * 16 * 2 * 2;
}

}  // namespace
