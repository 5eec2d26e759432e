// AVX-512 (F, BW, VL, DQ) as the vocabulary of the algorithm: 32 registers of 16 floats.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "rows.h"

namespace {

struct Avx512 {
  using T = float;
  using F = __m512;
  static constexpr int kWidth = 16;
  // 6 x 4 accumulators + 4 vectors of B + 1 broadcast leave 3 of 32 registers
  static constexpr int kMicroRows = 6, kMicroVectors = 4, kStrip = kMicroVectors * kWidth;
  static constexpr int kForwardRows = 48, kForwardKeys = 128;
  static constexpr int kBackwardRows = 48, kBackwardKeys = 128;

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F zero() { return _mm512_setzero_ps(); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  using Sum = F;
  static Sum no_sum() { return zero(); }
  static Sum add_product(F a, F b, Sum c) { return fma(a, b, c); }
  static F rounded(Sum x) { return x; }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F abs(F x) { return _mm512_abs_ps(x); }
  static F with_sign(F size, F x) { return _mm512_or_ps(size, _mm512_and_ps(x, set1(-0.0f))); }
  // The lanes, as bits, in which x >= limit
  static uint32_t reaching(F x, float limit) {
    return _mm512_cmp_ps_mask(x, set1(limit), _CMP_GE_OQ);
  }
  // a where x is below the limit, else b
  static F where_below(F x, F limit, F a, F b) {
    return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(x, limit, _CMP_LT_OQ), a);
  }
  // x in the lanes whose bit is set, else 0
  static F zero_where_dropped(F x, uint32_t bits) {
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), x);
  }
  // Element i is the maximum (sum) of row i of a (16 x 16), whose elements are added pairwise.
  static F max_rows(const float* a) {
    return reduce_rows(a, [](F x, F y) { return max(x, y); });
  }
  static F sum_rows(const float* a) {
    return reduce_rows(a, [](F x, F y) { return add(x, y); });
  }
  // A transpose that halves the vectors at every step, so that no step waits for many others
  template <class Op>
  static F reduce_rows(const float* a, Op op) {
    F pairs[8], fours[4], halves[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const F x = load(a + 32 * i), y = load(a + 32 * i + 16);
      pairs[i] = op(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      fours[i] = op(_mm512_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0x44),
                    _mm512_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0xee));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      halves[i] = op(_mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x88),
                     _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xdd));
    return op(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
              _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
  }
  // Puts n numbers in among the 16 descending values of each of four lists, behind those that are
  // as large; the last ones leave. Four, since an insertion waits for the one before it.
  template <class List>
  static void insert(List* lists, const float* x, const int32_t* places, int64_t stride,
                     int64_t n) {
    F values[4];
    __m512i at[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      values[i] = load(lists[i].values);
      at[i] = _mm512_loadu_si512(lists[i].places);
    }
    for (int64_t j = 0; j < n; ++j) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const F one = set1(x[i * stride + j]);
        const uint32_t before = _mm512_cmp_ps_mask(values[i], one, _CMP_GE_OQ);
        const auto others = static_cast<__mmask16>(before | ~(before + 1));  // all but the first 0
        values[i] = _mm512_mask_expand_ps(one, others, values[i]);
        at[i] = _mm512_mask_expand_epi32(_mm512_set1_epi32(places[i * stride + j]), others, at[i]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      store(lists[i].values, values[i]);
      _mm512_storeu_si512(lists[i].places, at[i]);
    }
  }
  // The lanes of x whose bit is set, and their places, at the beginning of what is stored
  static void keep(F x, uint32_t lanes, int32_t place, float* to, int32_t* places) {
    const __m512i of_lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i at = _mm512_add_epi32(of_lane, _mm512_set1_epi32(place));
    const auto kept = static_cast<__mmask16>(lanes);
    store(to, _mm512_maskz_compress_ps(kept, x));
    _mm512_storeu_si512(places, _mm512_maskz_compress_epi32(kept, at));
  }
  static float hsum(F a) { return _mm512_reduce_add_ps(a); }
  // -inf where the mask hides
  static F hidden_where_hidden(F x, F mask) {
    const F hidden = set1(-__builtin_inff());
    return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(mask, hidden, _CMP_EQ_OQ), hidden);
  }
  // -inf in the lanes whose interval [lo, hi) does not hold j
  static F hidden_outside(F x, int32_t j, const int32_t* lo, const int32_t* hi) {
    const __m512i at = _mm512_set1_epi32(j);
    const __mmask16 inside = _mm512_cmple_epi32_mask(_mm512_load_si512(lo), at) &
                             _mm512_cmplt_epi32_mask(at, _mm512_load_si512(hi));
    return _mm512_mask_mov_ps(set1(-__builtin_inff()), inside, x);
  }
  // -inf in the lanes outside [lo, hi)
  static F hidden_but(F x, int64_t lo, int64_t hi) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const auto bound = [](int64_t i) {
      return _mm512_set1_epi32(static_cast<int>(clamp(i, 0, 16)));
    };
    const __mmask16 inside =
        _mm512_cmple_epi32_mask(bound(lo), lanes) & _mm512_cmplt_epi32_mask(lanes, bound(hi));
    return _mm512_mask_mov_ps(set1(-__builtin_inff()), inside, x);
  }
  static F zero_where_hidden(F x, F mask) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(mask, set1(-__builtin_inff()), _CMP_NEQ_UQ), x);
  }

  // 2^x within 0.8 ulp; 0 below 2^kLeastPower
  static F exp2(F x) {
    const F n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return ldexp_or_zero(exp2_fraction(sub(x, n)), n, x);
  }
  static F exp2_fraction(F r) {
    F y = set1(kExp2[5]);
#pragma GCC unroll 8
    for (int i = 4; i >= 0; --i) y = fma(y, r, set1(kExp2[i]));
    return fma(y, r, set1(1));
  }
  static F ldexp_or_zero(F y, F n, F x, __mmask16 where = 0xffff) {
    const __mmask16 large = _mm512_mask_cmp_ps_mask(where, x, set1(kLeastPower), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(large, y, n);
  }

  static F load_as(const float* p) { return load(p); }
  static F load_as(const BFloat16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  }
  static F load_as(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store_as(float* p, F x) { store(p, x); }
  static void store_as(BFloat16* p, F x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i even = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i rounded = _mm512_mask_mov_epi32(even, nan, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  static void store_as(Float16* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  using Words = __m512i;
  static Words load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static void store_words(uint32_t* p, Words x) { _mm512_storeu_si512(p, x); }
  static Words set_words(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static Words xor3(Words a, Words b, Words c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
  static void multiply_words(Words x, uint32_t factor, Words& high, Words& low) {
    const __m512i even = _mm512_mul_epu32(x, set_words(factor));
    const __m512i odd = _mm512_mul_epu32(_mm512_shuffle_epi32(x, _MM_PERM_DDBB), set_words(factor));
    high = _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
    low = _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CCAA);
  }
  // keep[i stride] <- whether 16 bytes of row i, 4 in each vector of words, reach its least one
  static void kept_rows(const Words (&bytes)[4], const uint32_t* least, const uint32_t* mask,
                        uint16_t* keep, int64_t stride) {
    const Words masks = load_words(mask), leasts = load_words(least);
    const __m512i a = _mm512_and_si512(bytes[0], masks), b = _mm512_and_si512(bytes[1], masks),
                  c = _mm512_and_si512(bytes[2], masks), d = _mm512_and_si512(bytes[3], masks);
    const __m512i ab[2] = {_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)},
                  cd[2] = {_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d)};
    // rows x, x + 4, x + 8 and x + 12
    const auto put = [&](int x, __m512i four_rows, __m512i bounds) {
      const uint64_t kept = _mm512_cmpge_epu8_mask(four_rows, bounds);
      for (int i = 0; i < 4; ++i)
        keep[(x + 4 * i) * stride] = static_cast<uint16_t>(kept >> (16 * i));
    };
    put(0, _mm512_unpacklo_epi64(ab[0], cd[0]), _mm512_shuffle_epi32(leasts, _MM_PERM_AAAA));
    put(1, _mm512_unpackhi_epi64(ab[0], cd[0]), _mm512_shuffle_epi32(leasts, _MM_PERM_BBBB));
    put(2, _mm512_unpacklo_epi64(ab[1], cd[1]), _mm512_shuffle_epi32(leasts, _MM_PERM_CCCC));
    put(3, _mm512_unpackhi_epi64(ab[1], cd[1]), _mm512_shuffle_epi32(leasts, _MM_PERM_DDDD));
  }
  // keep[j] <- which of 16 rows keep key j, for the 16 bytes of each
  static void kept_columns(const Words (&bytes)[4], const uint32_t* least, const uint32_t* mask,
                           uint16_t* keep) {
    const __m512i by_byte =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i by_key = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const auto by_keys = [&](__m512i x) {
      return _mm512_permutexvar_epi32(by_key, _mm512_shuffle_epi8(x, by_byte));
    };
    const Words masks = load_words(mask), bounds = by_keys(load_words(least));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const uint64_t kept =
          _mm512_cmpge_epu8_mask(by_keys(_mm512_and_si512(bytes[i], masks)), bounds);
      memcpy(keep + 4 * i, &kept, sizeof kept);
    }
  }

  // dst (16 x 16) <- src^T
  static void transpose(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
    transpose_first<16>([&](int i) { return src + i * ld_src; }, dst, ld_dst);
  }
  // the same of 16 columns from `at` of 16 rows, of which those past the first n are zeros
  static void transpose_rows(const float* const* rows, int64_t at, int64_t n, float* dst,
                             int64_t ld_dst) {
    const auto row = [&](int i) { return rows[i] + at; };
    if (n > 8) return transpose_first<16>(row, dst, ld_dst);
    n > 4 ? transpose_first<8>(row, dst, ld_dst) : transpose_first<4>(row, dst, ld_dst);
  }
  template <int kFirst, class Row>
  static void transpose_first(const Row& row, float* dst, int64_t ld_dst) {
    __m512 r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = i < kFirst ? load(row(i)) : zero();
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      store(dst + i * ld_dst, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
      store(dst + (i + 8) * ld_dst, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
      store(dst + (i + 4) * ld_dst, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88));
      store(dst + (i + 12) * ld_dst, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd));
    }
  }
};

}  // namespace
