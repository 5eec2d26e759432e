// Numbers as sums of bf16 parts, in the layouts of operands of products of bf16, and exponentials.
// One part is bf16 itself; two hold fp16 exactly, three fp32.
#pragma once

#include "vec_avx512.h"

namespace {

using Bf16 = uint16_t;

inline __m512 widen16(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

// first + i part_stride (32 elements) <- the i-th part of (a, b). Parts before the last are rounded
// as integers: to widen what was converted costs more.
template <int kParts>
inline void split(__m512 a, __m512 b, Bf16* first, int64_t part_stride) {
  const __m512i half = _mm512_set1_epi32(0x8000), mask = _mm512_set1_epi32(-0x10000);
  const auto rounded = [&](__m512 x) {
    const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(x), half);
    return _mm512_castsi512_ps(_mm512_and_si512(bits, mask));
  };
  for (int i = 0; i < kParts; ++i) {
    const bool last = i + 1 == kParts;
    const __m512 part_a = last ? a : rounded(a), part_b = last ? b : rounded(b);
    _mm512_storeu_si512(first + i * part_stride,
                        reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(part_b, part_a)));
    if (!last) a = _mm512_sub_ps(a, part_a), b = _mm512_sub_ps(b, part_b);
  }
}

// The same for any 16 elements x: the first part of a large finite number stays finite, what is not
// finite has no further part, and small parts are kept although products will take them for 0.
template <int kParts>
inline void split_special(__m512 x, Bf16* first, int64_t part_stride) {
  const __m512 top = _mm512_castsi512_ps(_mm512_set1_epi32(0x7f7f0000));
  const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0f));
  for (int i = 0; i < kParts; ++i) {
    const __m512 magnitude = _mm512_abs_ps(x);
    const __mmask16 finite = _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(__FLT_MAX__), _CMP_LE_OQ);
    const __mmask16 large = finite & _mm512_cmp_ps_mask(magnitude, top, _CMP_GT_OQ);
    __m512i bits = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
    bits = _mm512_mask_mov_epi32(bits, large, _mm512_castps_si512(_mm512_or_ps(top, sign)));
    const __m512 odd = widen16(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
    bits = _mm512_mask_mov_epi32(_mm512_castps_si512(odd), finite, bits);
    bits = _mm512_srli_epi32(bits, 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(first + i * part_stride),
                        _mm512_cvtepi32_epi16(bits));
    x = _mm512_maskz_sub_ps(finite, x, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
  }
}

// The contents of rows: whether all numbers are finite, whether one is too small for its parts as
// they were packed, and the largest magnitudes but for NaN, lane by lane.
struct Contents {
  bool finite = true, small = false;
  __m512 largest = _mm512_setzero_ps();
  void add(const Contents& x) {
    finite &= x.finite;
    small |= x.small;
    largest = _mm512_max_ps(x.largest, largest);
  }
  float size() const { return _mm512_reduce_max_ps(largest); }
};

// Products take bf16 below 2^-126 for 0, and with them the later parts of fp32 numbers below 2^-110
// and of their products with weights. So numbers are multiplied by a power of two as they are
// packed, which changes no digit; by kRaised, or more, no number but a denormal one is small.
constexpr float kSmall = 0x1p-94f, kRaised = 0x1p24f;

// Rows that were multiplied by the same factor. Scores of two such packings are multiples of the
// product of their units, below overflow where the numbers of one are ordinary.
struct Packing {
  float unit;  // 1 / factor
  bool finite, small;
};
constexpr float kOrdinary = 0x1p35f;

// Packs rows of q or k by kRaised, or by less where the products of such large ones would overflow.
// What parts then lack counts only where both are large.
template <int kParts, class Pack>
Packing packed_by_parts(const Pack& pack) {
  float factor = kParts == 1 ? 1 : kRaised;
  Contents found = pack(factor);
  if (kParts > 1 && !(found.size() < kOrdinary)) {
    factor = 1 / kRaised;
    found = pack(factor);
  }
  return {1 / factor, found.finite, found.small};
}

// Where a row goes in lines of 32 elements: those of a part lie `line` elements apart.
struct Lines {
  Bf16* at;
  int64_t part, line;
};

// to <- src, of bf16, which is its own only part
__attribute__((always_inline)) inline Contents copy_row(const Lines& to, const Bf16* src, int64_t n,
                                                        int64_t n_padded, bool negate) {
  const __m512i sign = _mm512_set1_epi32(negate ? static_cast<int>(0x80008000) : 0);
  const __m512i infinite = _mm512_set1_epi16(0x7f80);
  __mmask32 special = 0;
  const auto put = [&](int64_t d, __m512i x) {
    special |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, infinite), infinite);
    _mm512_storeu_si512(to.at + d / 32 * to.line, _mm512_xor_si512(x, sign));
  };
  int64_t d = 0;
  for (; d + 32 <= n; d += 32) put(d, _mm512_loadu_si512(src + d));
  if (d < n_padded) put(d, _mm512_maskz_loadu_epi16((1u << (n - d)) - 1, src + d));
  return {special == 0, false, _mm512_set1_ps(1)};
}

// Returns whether some factor x (n) other than 0 is smaller than kSmall.
inline bool any_small(const float* x, int64_t n, float factor) {
  __mmask16 found = 0;
  for (int64_t d = 0; d < n; d += 16) {
    const __m512 y = _mm512_loadu_ps(x + d);
    const __m512 size = _mm512_abs_ps(_mm512_mul_ps(y, _mm512_set1_ps(factor)));
    found |= _mm512_cmp_ps_mask(size, _mm512_set1_ps(kSmall), _CMP_LT_OQ) &
             _mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  }
  return found != 0;
}

// to (kParts, n padded with zeros to n_padded, a multiple of 32) <- factor src (n), of which the
// size is a power of two
template <int kParts>
__attribute__((always_inline)) inline Contents split_row(const Lines& to, const void* src,
                                                         DType dtype, int64_t n, int64_t n_padded,
                                                         float factor) {
  if (!src) {
    for (int i = 0; i < kParts; ++i)
      for (int64_t d = 0; d < n_padded; d += 32)
        _mm512_storeu_si512(to.at + i * to.part + d / 32 * to.line, _mm512_setzero_si512());
    return {};
  }
  if (kParts == 1 && dtype == DType::kBFloat16)
    return copy_row(to, static_cast<const Bf16*>(src), n, n_padded, factor < 0);
  alignas(64) float padded[256];
  const float* row = static_cast<const float*>(src);
  if (dtype != DType::kFloat32 || n != n_padded) {
    load_row<Avx512>(padded, src, dtype, n);
    for (int64_t d = round_up(n, 16); d < n_padded; d += 16)
      Avx512::store(padded + d, Avx512::zero());
    row = padded;
  }
  const __m512 top = _mm512_castsi512_ps(_mm512_set1_epi32(0x7f7f0000));
  const __m512 factors = _mm512_set1_ps(factor);
  __m512 largest = _mm512_setzero_ps();
  __mmask16 special = 0;
  Bf16* line = to.at;
  for (int64_t d = 0; d < n_padded; d += 32, line += to.line) {
    const __m512 a = _mm512_loadu_ps(row + d), b = _mm512_loadu_ps(row + d + 16);
    special |= _mm512_cmp_ps_mask(_mm512_abs_ps(a), top, _CMP_NLE_UQ) |
               _mm512_cmp_ps_mask(_mm512_abs_ps(b), top, _CMP_NLE_UQ);
    largest = _mm512_max_ps(_mm512_abs_ps(a), _mm512_max_ps(_mm512_abs_ps(b), largest));
    split<kParts>(_mm512_mul_ps(a, factors), _mm512_mul_ps(b, factors), line, to.part);
  }
  const bool small =
      kParts > 1 && __builtin_fabsf(factor) < kRaised && any_small(row, n_padded, factor);
  if (special || small)
    for (int64_t d = 0; d < n_padded; d += 16)
      split_special<kParts>(_mm512_mul_ps(_mm512_loadu_ps(row + d), factors),
                            to.at + d / 32 * to.line + d % 32, to.part);
  return {!special || all_finite<Avx512>(row, n_padded), small, largest};
}

constexpr int64_t kTile = 512;  // bf16 elements of a tile: 16 rows of 32

// Divides an amount of work equally among so many calls: next() returns how much is to be done by
// the end of a call. Only the constructor divides.
struct Shares {
  int64_t share, sum = 0;
  Shares(int64_t amount, int64_t calls) : share(calls ? (amount << 20) / calls + 1 : 0) {}
  int64_t next() { return (sum += share) >> 20; }
};

// to <- to + from, vectors of them, an equal share in each of calls calls
struct Addition {
  float* to;
  const float* from;
  Shares shares;
  int64_t done = 0;
  Addition(float* to, const float* from, int64_t vectors, int64_t calls)
      : to(to), from(from), shares(vectors, calls) {}
  void operator()() {
    for (const int64_t until = shares.next(); done < until; ++done)
      Avx512::store(to + 16 * done,
                    Avx512::add(Avx512::load(to + 16 * done), Avx512::load(from + 16 * done)));
  }
};

// tile (16 pairs of k, 16 n, 2) <- rows (16 n, 32 k): the transpose of an operand as B
inline void pack_transposed(Bf16* tile, const Bf16* rows, int64_t ld) {
  Avx512::transpose(reinterpret_cast<const float*>(rows), ld / 2, reinterpret_cast<float*>(tile),
                    16);
}

// tile (16 pairs of k, 16 n, 2) <- rows (32 k, 16 n): an operand as B. A pair are two neighbours of
// k, or k and k + 16 where kHalves.
template <bool kHalves>
inline void pack_paired(Bf16* tile, const Bf16* rows, int64_t ld) {
  for (int k = 0; k < 16; ++k) {
    const Bf16* even = rows + (kHalves ? k : 2 * k) * ld;
    const Bf16* odd = even + (kHalves ? 16 : 1) * ld;
    const __m512i a =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
    const __m512i b =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
    _mm512_storeu_si512(tile + 32 * k, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
  }
}

// 2^(scale x + offset) for an integer offset; 0 below 2^kLeastPower. Of one part 16 bits are
// enough. Else the fraction is taken from scale x itself: rounding the sum of both would cost it
// digits.
template <int kParts>
inline __m512 exponential(__m512 x, __m512 scale, __m512 offset, __mmask16 where = 0xffff) {
  using V = Avx512;
  const __m512 y = V::fma(x, scale, offset);
  if constexpr (kParts > 1) {
    const __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return V::ldexp_or_zero(V::exp2_fraction(V::fma(x, scale, V::sub(offset, n))), n, y, where);
  }
  const __m512 r = _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 e = V::set1(kExp2Short[3]);
#pragma GCC unroll 3
  for (int i = 2; i >= 0; --i) e = V::fma(e, r, V::set1(kExp2Short[i]));
  return V::ldexp_or_zero(e, y, y, where);  // by the integer below y
}

// The unit of weights. Of one part it leaves room for sums of large v; of more parts v itself is
// packed for that.
template <int kParts>
constexpr float kWeightUnit = kParts == 1 ? 0x1p-10f : 1.0f;

// kWeightUnit 2^(scale x + offset), as exact as fp32 where the power is below 2. Of one part
// denormal numbers must be flushed: to ask for those that are too small costs as much as two steps
// of a polynomial.
template <int kParts>
inline __m512 weight_of(__m512 x, __m512 scale, __m512 offset) {
  using V = Avx512;
  if constexpr (kParts > 1) return exponential<kParts>(x, scale, offset);
  const __m512 y = V::fma(x, scale, offset);
  const __m512 r = _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 e = V::set1(kExp2Above[5] * kWeightUnit<kParts>);
#pragma GCC unroll 5
  for (int i = 4; i >= 0; --i) e = V::fma(e, r, V::set1(kExp2Above[i] * kWeightUnit<kParts>));
  return _mm512_scalef_ps(e, y);
}

// While an object of this type exists, vector instructions give 0 for denormal results.
struct FlushDenormals {
  const unsigned before = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(before | _MM_FLUSH_ZERO_ON); }
  ~FlushDenormals() { _mm_setcsr(before); }
  FlushDenormals(const FlushDenormals&) = delete;
};

inline __m512 round_down_to_bf16(__m512 x) {
  return _mm512_castsi512_ps(
      _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

// The next of kParts parts of x, as the upper 16 bits; x keeps the rest. Of one part or two the
// part is the nearest bf16 (of two equally near the one away from zero), of three the bits
// themselves: three times 8 hold all of them.
template <int kParts>
inline __m512 take_part(__m512& x, int part) {
  __m512i bits = _mm512_castps_si512(x);
  if (kParts < 3) bits = _mm512_add_epi32(bits, _mm512_set1_epi32(0x8000));
  const __m512 taken = _mm512_castsi512_ps(bits);
  if (part + 1 < kParts) x = _mm512_sub_ps(x, round_down_to_bf16(taken));
  return taken;
}

// (even, odd) alternating as bf16, of the upper 16 bits of each
inline __m512i alternate(__m512 even, __m512 odd) {
  return _mm512_ternarylogic_epi32(_mm512_srli_epi32(_mm512_castps_si512(even), 16),
                                   _mm512_castps_si512(odd),
                                   _mm512_set1_epi32(static_cast<int>(0xffff0000)), 0xf8);
}

// The same of those lanes of each that are kept, else 0
inline __m512i alternate_kept(__m512 even, __m512 odd, __mmask16 keep_even, __mmask16 keep_odd) {
  const __m512i low = _mm512_maskz_srli_epi32(keep_even, _mm512_castps_si512(even), 16);
  return _mm512_mask_ternarylogic_epi32(low, keep_odd, _mm512_castps_si512(odd),
                                        _mm512_set1_epi32(static_cast<int>(0xffff0000)), 0xf8);
}

inline void copy_line(Bf16* to, const Bf16* from) {
  _mm512_storeu_si512(to, _mm512_loadu_si512(from));
}

}  // namespace
