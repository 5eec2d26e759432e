// AVX2 with FMA and F16C as the vocabulary of the algorithm: 16 registers of 8 floats.
#pragma once

#include <immintrin.h>

#include "rows.h"

namespace {

struct Avx2 {
  using T = float;
  using F = __m256;
  static constexpr int kWidth = 8;
  // 6 x 2 accumulators + 2 vectors of B + 1 broadcast leave 1 of 16 registers
  static constexpr int kMicroRows = 6, kMicroVectors = 2, kStrip = kMicroVectors * kWidth;
  static constexpr int kForwardRows = 48, kForwardKeys = 128;
  static constexpr int kBackwardRows = 48, kBackwardKeys = 96;

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F set1(float x) { return _mm256_set1_ps(x); }
  static F zero() { return _mm256_setzero_ps(); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  using Sum = F;
  static Sum no_sum() { return zero(); }
  static Sum add_product(F a, F b, Sum c) { return fma(a, b, c); }
  static F rounded(Sum x) { return x; }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F abs(F x) { return _mm256_andnot_ps(set1(-0.0f), x); }
  static F with_sign(F size, F x) { return _mm256_or_ps(size, _mm256_and_ps(x, set1(-0.0f))); }
  // The lanes, as bits, in which x >= limit
  static uint32_t reaching(F x, float limit) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x, set1(limit), _CMP_GE_OQ)));
  }
  // a where x is below the limit, else b
  static F where_below(F x, F limit, F a, F b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, limit, _CMP_LT_OQ));
  }
  // x in the lanes whose bit is set, else 0
  static F zero_where_dropped(F x, uint32_t bits) {
    const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lanes);
    return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lanes)));
  }
  // Element i is the maximum (sum) of row i of a (8 x 8), whose elements are added pairwise.
  static F max_rows(const float* a) {
    return reduce_rows(a, [](F x, F y) { return max(x, y); });
  }
  static F sum_rows(const float* a) {
    return reduce_rows(a, [](F x, F y) { return add(x, y); });
  }
  // A transpose that halves the vectors at every step, so that no step waits for many others
  template <class Op>
  static F reduce_rows(const float* a, Op op) {
    F pairs[4], fours[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const F x = load(a + 16 * i), y = load(a + 16 * i + 8);
      pairs[i] = op(_mm256_unpacklo_ps(x, y), _mm256_unpackhi_ps(x, y));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      fours[i] = op(_mm256_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0x44),
                    _mm256_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0xee));
    return op(_mm256_permute2f128_ps(fours[0], fours[1], 0x20),
              _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
  }
  static float hsum(F a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  // -inf where the mask hides
  static F hidden_where_hidden(F x, F mask) {
    const F hidden = set1(-__builtin_inff());
    return _mm256_blendv_ps(x, hidden, _mm256_cmp_ps(mask, hidden, _CMP_EQ_OQ));
  }
  // -inf in the lanes outside [lo, hi)
  static F hidden_but(F x, int64_t lo, int64_t hi) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const auto bound = [](int64_t i) {
      return _mm256_set1_epi32(static_cast<int>(clamp(i, 0, 8)));
    };
    const __m256i outside = _mm256_or_si256(
        _mm256_cmpgt_epi32(bound(lo), lanes),
        _mm256_xor_si256(_mm256_cmpgt_epi32(bound(hi), lanes), _mm256_set1_epi32(-1)));
    return _mm256_blendv_ps(x, set1(-__builtin_inff()), _mm256_castsi256_ps(outside));
  }
  static F zero_where_hidden(F x, F mask) {
    return _mm256_and_ps(x, _mm256_cmp_ps(mask, set1(-__builtin_inff()), _CMP_NEQ_UQ));
  }

  // 2^x within 0.8 ulp; 0 below 2^kLeastPower
  static F exp2(F x) {
    const F top = _mm256_min_ps(set1(254), x), n = round(top);
    return ldexp_or_zero(exp2_fraction(sub(top, n)), n, x);
  }
  static F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F exp2_fraction(F r) {
    F y = set1(kExp2[5]);
#pragma GCC unroll 8
    for (int i = 4; i >= 0; --i) y = fma(y, r, set1(kExp2[i]));
    return fma(y, r, set1(1));
  }
  // Two products put the exponent in, so that what is too large becomes inf.
  static F ldexp_or_zero(F y, F n, F x) {
    const __m256i e = _mm256_cvtps_epi32(_mm256_max_ps(n, set1(kLeastPower))),
                  half = _mm256_srai_epi32(e, 1);
    y = mul(mul(y, power_of_two(half)), power_of_two(_mm256_sub_epi32(e, half)));
    return _mm256_and_ps(y, _mm256_cmp_ps(x, set1(kLeastPower), _CMP_NLT_UQ));
  }
  static F power_of_two(__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
  }

  static F load_as(const float* p) { return load(p); }
  static F load_as(const BFloat16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  static F load_as(const Float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_as(float* p, F x) { store(p, x); }
  static void store_as(BFloat16* p, F x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i even = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i rounded = _mm256_blendv_epi8(even, _mm256_set1_epi32(0x7fc00000), nan);
    const __m256i high = _mm256_srli_epi32(rounded, 16);
    const __m128i packed =
        _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  static void store_as(Float16* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  using Words = __m256i;
  static Words load_words(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static void store_words(uint32_t* p, Words x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
  }
  static Words set_words(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  static Words xor3(Words a, Words b, Words c) {
    return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
  }
  static void multiply_words(Words x, uint32_t factor, Words& high, Words& low) {
    const __m256i even = _mm256_mul_epu32(x, set_words(factor));
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), set_words(factor));
    high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  }
  // keep[i stride] <- whether 16 bytes of row i, 4 in each vector of words, reach its least one
  static void kept_rows(const Words (&bytes)[4], const uint32_t* least, const uint32_t* mask,
                        uint16_t* keep, int64_t stride) {
    const Words masks = load_words(mask), leasts = load_words(least);
    const __m256i a = _mm256_and_si256(bytes[0], masks), b = _mm256_and_si256(bytes[1], masks),
                  c = _mm256_and_si256(bytes[2], masks), d = _mm256_and_si256(bytes[3], masks);
    const __m256i ab[2] = {_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)},
                  cd[2] = {_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d)};
    // rows x and x + 4
    const auto put = [&](int x, __m256i two_rows, __m256i bounds) {
      const uint32_t kept = static_cast<uint32_t>(
          _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(two_rows, bounds), two_rows)));
      keep[x * stride] = static_cast<uint16_t>(kept);
      keep[(x + 4) * stride] = static_cast<uint16_t>(kept >> 16);
    };
    put(0, _mm256_unpacklo_epi64(ab[0], cd[0]), _mm256_shuffle_epi32(leasts, 0x00));
    put(1, _mm256_unpackhi_epi64(ab[0], cd[0]), _mm256_shuffle_epi32(leasts, 0x55));
    put(2, _mm256_unpacklo_epi64(ab[1], cd[1]), _mm256_shuffle_epi32(leasts, 0xaa));
    put(3, _mm256_unpackhi_epi64(ab[1], cd[1]), _mm256_shuffle_epi32(leasts, 0xff));
  }

  // dst (8 x 8) <- src^T
  static void transpose(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
    transpose_first<8>([&](int i) { return src + i * ld_src; }, dst, ld_dst);
  }
  // the same of 8 columns from `at` of 8 rows, of which those past the first n are zeros
  static void transpose_rows(const float* const* rows, int64_t at, int64_t n, float* dst,
                             int64_t ld_dst) {
    const auto row = [&](int i) { return rows[i] + at; };
    n > 4 ? transpose_first<8>(row, dst, ld_dst) : transpose_first<4>(row, dst, ld_dst);
  }
  template <int kFirst, class Row>
  static void transpose_first(const Row& row, float* dst, int64_t ld_dst) {
    __m256 r[8], t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = i < kFirst ? load(row(i)) : zero();
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      store(dst + i * ld_dst, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
      store(dst + (i + 4) * ld_dst, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
  }
};

}  // namespace
