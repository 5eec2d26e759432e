// AVX-512 with VDPBF16PS: an element of an operand is a pair of bf16 in the place of a float, and
// products of pairs are added to a float, the second one's first. Denormal numbers count as 0.
#pragma once

#include "vec_avx512.h"

namespace {

struct Avx512Pairs : Avx512 {
  static Sum add_product(F a, F b, Sum c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  // Pairs of a low and a high number
  static F pairs(F low, F high) {
    const __m512i a = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(low)));
    const __m512i b = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(high)));
    return _mm512_castsi512_ps(_mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
  }
  // to <- n consecutive numbers as pairs, rounded, padded with zeros to whole vectors
  static void put_pairs(float* to, const void* from, DType dtype, int64_t n) {
    for (int64_t j = 0; j < n; j += 32, to += 16) {
      const auto there = static_cast<uint32_t>((uint64_t{1} << (n - j < 32 ? n - j : 32)) - 1);
      if (dtype == DType::kBFloat16) {
        _mm512_storeu_si512(
            to, _mm512_maskz_loadu_epi16(there, static_cast<const uint16_t*>(from) + j));
        continue;
      }
      const float* x = static_cast<const float*>(from) + j;
      const F low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there), x);
      const F high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there >> 16), x + 16);
      store(to, reinterpret_cast<F>(_mm512_cvtne2ps_pbh(high, low)));
    }
  }
};

}  // namespace
