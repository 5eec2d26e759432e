// AMX tiles of bf16: configuration, operand layouts, and numbers as sums of bf16 parts.
// One part is bf16 itself; two hold fp16 exactly.
#pragma once

#include "vec_avx512.h"

namespace {

using Bf16 = uint16_t;

// All eight tiles are 16 rows of 64 bytes. What torch had configured on this thread is put back.
struct TileSession {
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static const Config kAllTiles;
  Config before;

  TileSession() {
    // The intrinsics tell the compiler of 8 bytes only: what they read must lie in memory already.
    _tile_storeconfig(&before);
    asm volatile("" ::: "memory");
    _tile_loadconfig(&kAllTiles);
  }
  ~TileSession() { before.palette ? _tile_loadconfig(&before) : _tile_release(); }
};

const TileSession::Config TileSession::kAllTiles;

// Of two numbers a = a1 + a2 and b the products that count; a2 b2 is below 2^-16 of the result.
// Each differs from the one before it in one factor: one load less.
template <int kParts>
struct Products;
template <>
struct Products<1> {
  static constexpr int kCount = 1, kA[] = {0}, kB[] = {0};
};
template <>
struct Products<2> {
  static constexpr int kCount = 3, kA[] = {1, 0, 0}, kB[] = {0, 0, 1};
};
inline __m512 widen16(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

// parts[i] (16 elements) <- the i-th part of x; the first keeps large finite numbers finite
template <int kParts>
inline void split(__m512 x, Bf16* first, int64_t part_stride) {
  const __m512 top = _mm512_castsi512_ps(_mm512_set1_epi32(0x7f7f0000));
  for (int i = 0; i < kParts; ++i) {
    __m512 part = x;
    if (kParts > 1 && i == 0) {
      const __mmask16 large =
          _mm512_cmp_ps_mask(_mm512_abs_ps(x), top, _CMP_GT_OQ) &
          _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(__FLT_MAX__), _CMP_LE_OQ);
      part =
          _mm512_mask_mov_ps(x, large, _mm512_or_ps(top, _mm512_and_ps(x, _mm512_set1_ps(-0.0f))));
    }
    const __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(part));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(first + i * part_stride), bits);
    if (i + 1 < kParts) {
      // what is not finite has no further part
      const __mmask16 finite =
          _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(__FLT_MAX__), _CMP_LE_OQ);
      x = _mm512_maskz_sub_ps(finite, x, widen16(bits));
    }
  }
}

// dst (kParts, n padded with zeros to n_padded, a multiple of 32) <- src (n); whether all is finite
template <int kParts>
inline bool split_row(Bf16* dst, int64_t part_stride, const void* src, DType dtype, int64_t n,
                      int64_t n_padded, bool negate) {
  if (!src) {
    for (int i = 0; i < kParts; ++i) memset(dst + i * part_stride, 0, n_padded * sizeof(Bf16));
    return true;
  }
  alignas(64) float row[256];
  load_row<Avx512>(row, src, dtype, n);
  for (int64_t d = round_up(n, 16); d < n_padded; d += 16) Avx512::store(row + d, Avx512::zero());
  const __m512 sign = _mm512_set1_ps(negate ? -0.0f : 0.0f);
  for (int64_t d = 0; d < n_padded; d += 16)
    split<kParts>(_mm512_xor_ps(_mm512_loadu_ps(row + d), sign), dst + d, part_stride);
  return all_finite<Avx512>(row, n_padded);
}

constexpr int64_t kTile = 512;  // bf16 elements of a tile: 16 rows of 32

inline void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// (tiles 0 1; 2 3) <- (tiles 0 1; 2 3) + (a0; a1) (b0 b1); the parts of a and b lie a_part and
// b_part apart
template <int kParts>
inline void multiply_tiles(const Bf16* a0, const Bf16* a1, int64_t a_part, const Bf16* b0,
                           const Bf16* b1, int64_t b_part) {
  using P = Products<kParts>;
#pragma GCC unroll 6
  for (int i = 0; i < P::kCount; ++i) {
    if (i == 0 || P::kA[i] != P::kA[i - 1]) {
      _tile_loadd(4, a0 + P::kA[i] * a_part, 64);
      _tile_loadd(5, a1 + P::kA[i] * a_part, 64);
    }
    if (i == 0 || P::kB[i] != P::kB[i - 1]) {
      _tile_loadd(6, b0 + P::kB[i] * b_part, 64);
      _tile_loadd(7, b1 + P::kB[i] * b_part, 64);
    }
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

inline void store_tiles(float* c0, float* c1, float* c2, float* c3) {
  _tile_stored(0, c0, 64);
  _tile_stored(1, c1, 64);
  _tile_stored(2, c2, 64);
  _tile_stored(3, c3, 64);
}

// tile (16 pairs of k, 16 n, 2) <- rows (16 n, 32 k): the transpose of an operand as B
inline void pack_transposed(Bf16* tile, const Bf16* rows, int64_t ld) {
  Avx512::transpose(reinterpret_cast<const float*>(rows), ld / 2, reinterpret_cast<float*>(tile),
                    16);
}

// tile (16 pairs of k, 16 n, 2) <- rows (32 k, 16 n): an operand as B
inline void pack_paired(Bf16* tile, const Bf16* rows, int64_t ld) {
  for (int k = 0; k < 16; ++k) {
    const Bf16* even = rows + 2 * k * ld;
    const __m512i a =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
    const __m512i b =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + ld)));
    _mm512_storeu_si512(tile + 32 * k, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
  }
}

constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer in the low bits

// 2^(scale x - m) for an integer m; base is kRound - m, or m where kHuge: beyond 2^22 the numbers
// are no longer the low bits of a float. Otherwise n = round(scale x - m) stands in the low bits of
// k, and 2^n is an addition to the exponent. No 2^n below 2^-125 is made: least is (m - 125) /
// scale. Where kEdge, hidden scores of -inf give 0.
template <int kParts, bool kEdge, bool kHuge>
inline __m512 exponential(__m512 x, __m512 scale, __m512 base, __m512 least) {
  using V = Avx512;
  if constexpr (kHuge) return V::exp2(V::fma(x, scale, V::sub(V::zero(), base)));
  const __m512 z = _mm512_max_ps(least, x);  // in this order NaN stays NaN
  const __m512 k = V::fma(z, scale, base);
  const __m512 r = _mm512_fmsub_ps(z, scale, V::sub(k, base));
  __m512 y;
  if constexpr (kParts == 1) {
    y = V::set1(kExp2Short[3]);
    for (int i = 2; i >= 0; --i) y = V::fma(y, r, V::set1(kExp2Short[i]));
  } else {
    y = V::exp2_fraction(r);
  }
  const __m512 e = _mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_castps_si512(y), _mm512_slli_epi32(_mm512_castps_si512(k), 23)));
  return kEdge ? V::zero_where_hidden(e, x) : e;
}

// x to the nearest bf16, still as fp32; of two equally near the one away from zero
inline __m512 round_to_bf16(__m512 x) {
  const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
  return _mm512_castsi512_ps(
      _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

// (even, odd) alternating as bf16, of two vectors that are bf16 already
inline __m512i alternate(__m512 even, __m512 odd) {
  return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16),
                         _mm512_castps_si512(odd));
}

// (first, second) one after the other as bf16, of two vectors that are bf16 already
inline __m512i concatenate(__m512 first, __m512 second) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

}  // namespace
