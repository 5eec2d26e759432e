// Products of AVX512-BF16 on a machine that has none, by AVX2: each intrinsic that csrc/cpu uses,
// as its manual defines it (see emulated_avx512.h).
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "emulated_avx512.h"

namespace emulated {

// c + the products of pairs: first of the odd numbers, then of the even ones, by fused
// multiplications and additions; denormal numbers are 0 on the way in and out.
inline __attribute__((noinline)) __m512 dpbf16_ps(__m512 c, __m512bh a, __m512bh b) {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
  const Words x = as<Words>(a), y = as<Words>(b);
  const Halves odd_a = as<Halves>(x & 0xffff0000u), odd_b = as<Halves>(y & 0xffff0000u),
               even_a = as<Halves>(x << 16), even_b = as<Halves>(y << 16);
  Halves sum = as<Halves>(c);
  sum.low = _mm256_fmadd_ps(odd_a.low, odd_b.low, sum.low);
  sum.high = _mm256_fmadd_ps(odd_a.high, odd_b.high, sum.high);
  sum.low = _mm256_fmadd_ps(even_a.low, even_b.low, sum.low);
  sum.high = _mm256_fmadd_ps(even_a.high, even_b.high, sum.high);
  _mm_setcsr(before);
  return as<__m512>(sum);
}

}  // namespace emulated

#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps emulated::dpbf16_ps
