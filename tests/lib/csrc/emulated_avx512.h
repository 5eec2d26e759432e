// AVX-512 on a machine with AVX2 alone: each intrinsic that csrc/cpu uses, as its manual defines it
// (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2). Included before a unit
// that is compiled without its flags, so that one that is missing here is an error.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

// GCC tells that vectors of 64 bytes are passed in memory: all functions here are inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace emulated {

#define LANES inline __attribute__((always_inline))
// A function of many instructions: a unit that has it everywhere takes minutes to compile.
#define MANY inline __attribute__((noinline))

using Floats = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Shorts = uint16_t __attribute__((vector_size(64)));
using Bytes = uint8_t __attribute__((vector_size(64)));
using Longs = uint64_t __attribute__((vector_size(64)));

// The same bits as another type
template <class To, class From>
LANES To as(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

// op(i) in each of 16 lanes
template <class V, class Op>
LANES V each(Op op) {
  std::remove_cvref_t<decltype(V{}[0])> y[16];
  for (int i = 0; i < 16; ++i) y[i] = op(i);
  return as<V>(y);
}
struct Halves {
  __m256 low, high;
};
LANES __mmask16 mask_of(Ints all_or_no_bits) {
  const Halves x = as<Halves>(all_or_no_bits);
  return static_cast<__mmask16>(_mm256_movemask_ps(x.low) | _mm256_movemask_ps(x.high) << 8);
}
// b where the bit of k is set, else a
LANES __m512 blend(__mmask16 k, __m512 a, __m512 b) {
  const Words bits = each<Words>([](int i) { return 1u << i; });
  const Words on = as<Words>((bits & uint32_t{k}) != 0);
  return as<__m512>((as<Words>(a) & ~on) | (as<Words>(b) & on));
}
LANES __m512i blend(__mmask16 k, __m512i a, __m512i b) {
  return as<__m512i>(blend(k, as<__m512>(a), as<__m512>(b)));
}

LANES __m512 set1_ps(float x) { return as<__m512>(x - Floats{}); }  // -0 too
LANES __m512i set1_epi32(int x) { return as<__m512i>(Words{} + static_cast<uint32_t>(x)); }
LANES __m512i set1_epi16(short x) { return as<__m512i>(Shorts{} + static_cast<uint16_t>(x)); }
LANES __m512 setzero_ps() { return __m512{}; }
LANES __m512i setzero_si512() { return __m512i{}; }
template <class... X>
LANES __m512i setr_epi32(X... x) {
  return as<__m512i>(Ints{x...});
}
LANES __m512i broadcast_i32x4(__m128i x) {
  return as<__m512i>(
      each<Ints>([&](int i) { return as<int32_t __attribute__((vector_size(16)))>(x)[i % 4]; }));
}

LANES __m512 loadu_ps(const void* p) {
  __m512 x;
  memcpy(&x, p, sizeof x);
  return x;
}
LANES __m512i loadu_si512(const void* p) { return as<__m512i>(loadu_ps(p)); }
LANES __m512i castps_si512(__m512 x) { return as<__m512i>(x); }
LANES __m512 castsi512_ps(__m512i x) { return as<__m512>(x); }
LANES __m512i load_si512(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64) abort();
  return loadu_si512(p);
}
LANES void storeu_ps(void* p, __m512 x) { memcpy(p, &x, sizeof x); }
LANES void storeu_si512(void* p, __m512i x) { memcpy(p, &x, sizeof x); }
MANY void mask_storeu_ps(float* p, __mmask16 k, __m512 x) {
  for (int i = 0; i < 16; ++i)
    if (k >> i & 1) p[i] = x[i];
}
MANY __m512 maskz_loadu_ps(__mmask16 k, const float* p) {
  return each<__m512>([&](int i) { return k >> i & 1 ? p[i] : 0.0f; });
}
MANY __m512i maskz_loadu_epi16(__mmask32 k, const void* p) {
  Shorts x{};
  for (int i = 0; i < 32; ++i)
    if (k >> i & 1) {
      uint16_t element;
      memcpy(&element, static_cast<const char*>(p) + 2 * i, 2);
      x[i] = element;
    }
  return as<__m512i>(x);
}

LANES __m512 add_ps(__m512 a, __m512 b) { return a + b; }
LANES __m512 sub_ps(__m512 a, __m512 b) { return a - b; }
LANES __m512 mul_ps(__m512 a, __m512 b) { return a * b; }
LANES __m512 div_ps(__m512 a, __m512 b) { return a / b; }
LANES __m512 max_ps(__m512 a, __m512 b) { return a > b ? a : b; }
LANES __m512 min_ps(__m512 a, __m512 b) { return a < b ? a : b; }
LANES __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const Halves x = as<Halves>(a), y = as<Halves>(b), z = as<Halves>(c);
  return as<__m512>(
      Halves{_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)});
}
LANES __m512 abs_ps(__m512 x) { return as<__m512>(as<Words>(x) & 0x7fffffffu); }
LANES __m512 and_ps(__m512 a, __m512 b) { return as<__m512>(as<Words>(a) & as<Words>(b)); }
LANES __m512 or_ps(__m512 a, __m512 b) { return as<__m512>(as<Words>(a) | as<Words>(b)); }
LANES __m512 xor_ps(__m512 a, __m512 b) { return as<__m512>(as<Words>(a) ^ as<Words>(b)); }
LANES __m512i and_si512(__m512i a, __m512i b) { return a & b; }
LANES __m512i or_si512(__m512i a, __m512i b) { return a | b; }
LANES __m512i xor_si512(__m512i a, __m512i b) { return a ^ b; }
LANES __m512i add_epi32(__m512i a, __m512i b) { return as<__m512i>(as<Words>(a) + as<Words>(b)); }
LANES __m512i sub_epi16(__m512i a, __m512i b) { return as<__m512i>(as<Shorts>(a) - as<Shorts>(b)); }
LANES __m512i min_epu16(__m512i a, __m512i b) {
  return as<__m512i>(as<Shorts>(a) < as<Shorts>(b) ? as<Shorts>(a) : as<Shorts>(b));
}
LANES __m512i slli_epi32(__m512i a, unsigned n) { return as<__m512i>(as<Words>(a) << n); }
LANES __m512i srli_epi32(__m512i a, unsigned n) { return as<__m512i>(as<Words>(a) >> n); }
LANES __m512i ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  __m512i y{};
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) y |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return y;
}
LANES __m512i mul_epu32(__m512i a, __m512i b) {
  return as<__m512i>((as<Longs>(a) & 0xffffffffu) * (as<Longs>(b) & 0xffffffffu));
}
LANES __m512 mask_mov_ps(__m512 a, __mmask16 k, __m512 b) { return blend(k, a, b); }
LANES __m512i mask_mov_epi32(__m512i a, __mmask16 k, __m512i b) { return blend(k, a, b); }
// The elements of x in the lanes of k, in their order, else those of `rest`
MANY __m512i mask_expand_epi32(__m512i rest, __mmask16 k, __m512i x) {
  const Words from = as<Words>(x), others = as<Words>(rest);
  int next = 0;
  return as<__m512i>(each<Words>([&](int i) { return k >> i & 1 ? from[next++] : others[i]; }));
}
MANY __m512 mask_expand_ps(__m512 rest, __mmask16 k, __m512 x) {
  return as<__m512>(mask_expand_epi32(as<__m512i>(rest), k, as<__m512i>(x)));
}
// The elements of x in the lanes of k, one behind the other, then zeros
MANY __m512i maskz_compress_epi32(__mmask16 k, __m512i x) {
  const Words from = as<Words>(x);
  Words y{};
  int next = 0;
  for (int i = 0; i < 16; ++i)
    if (k >> i & 1) y[next++] = from[i];
  return as<__m512i>(y);
}
MANY __m512 maskz_compress_ps(__mmask16 k, __m512 x) {
  return as<__m512>(maskz_compress_epi32(k, as<__m512i>(x)));
}
LANES __m512 maskz_mov_ps(__mmask16 k, __m512 x) { return blend(k, __m512{}, x); }
LANES __m512 maskz_mul_ps(__mmask16 k, __m512 a, __m512 b) { return blend(k, __m512{}, a * b); }
LANES __m512 maskz_sub_ps(__mmask16 k, __m512 a, __m512 b) { return blend(k, __m512{}, a - b); }
LANES __m512 mask_sub_ps(__m512 x, __mmask16 k, __m512 a, __m512 b) { return blend(k, x, a - b); }
LANES __m512 mask_max_ps(__m512 x, __mmask16 k, __m512 a, __m512 b) {
  return blend(k, x, max_ps(a, b));
}
LANES __m512i maskz_srli_epi32(__mmask16 k, __m512i a, unsigned n) {
  return blend(k, __m512i{}, srli_epi32(a, n));
}
LANES __m512i mask_ternarylogic_epi32(__m512i a, __mmask16 k, __m512i b, __m512i c, int table) {
  return blend(k, a, ternarylogic_epi32(a, b, c, table));
}

LANES __mmask16 cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  switch (predicate) {
    case _CMP_EQ_OQ:
      return mask_of(a == b);
    case _CMP_NEQ_UQ:
      return mask_of(~(a == b));
    case _CMP_LT_OQ:
      return mask_of(a < b);
    case _CMP_NLT_UQ:
      return mask_of(~(a < b));
    case _CMP_LE_OQ:
      return mask_of(a <= b);
    case _CMP_NLE_UQ:
      return mask_of(~(a <= b));
    case _CMP_GT_OQ:
      return mask_of(a > b);
    case _CMP_GE_OQ:
      return mask_of(a >= b);
    case _CMP_UNORD_Q:
      return mask_of((a != a) | (b != b));
  }
  abort();
}
LANES __mmask16 mask_cmp_ps_mask(__mmask16 k, __m512 a, __m512 b, int predicate) {
  return k & cmp_ps_mask(a, b, predicate);
}
LANES __mmask16 cmple_epi32_mask(__m512i a, __m512i b) {
  return mask_of(as<Ints>(a) <= as<Ints>(b));
}
LANES __mmask16 cmplt_epi32_mask(__m512i a, __m512i b) {
  return mask_of(as<Ints>(a) < as<Ints>(b));
}
MANY __mmask32 cmpeq_epi16_mask(__m512i a, __m512i b) {
  __mmask32 mask = 0;
  for (int i = 0; i < 32; ++i) mask |= uint32_t{as<Shorts>(a)[i] == as<Shorts>(b)[i]} << i;
  return mask;
}
MANY __mmask64 cmpge_epu8_mask(__m512i a, __m512i b) {
  __mmask64 mask = 0;
  for (int i = 0; i < 64; ++i) mask |= uint64_t{as<Bytes>(a)[i] >= as<Bytes>(b)[i]} << i;
  return mask;
}

MANY __m256i cvtepi32_epi16(__m512i x) {
  uint16_t y[16];
  for (int i = 0; i < 16; ++i) y[i] = static_cast<uint16_t>(as<Words>(x)[i]);
  return as<__m256i>(y);
}
MANY __m512i cvtepu16_epi32(__m256i x) {
  uint16_t y[16];
  memcpy(y, &x, sizeof y);
  return as<__m512i>(each<Words>([&](int i) { return y[i]; }));
}
LANES __m512 cvtph_ps(__m256i x) {
  __m128i y[2];
  memcpy(y, &x, sizeof y);
  return as<__m512>(Halves{_mm256_cvtph_ps(y[0]), _mm256_cvtph_ps(y[1])});
}
LANES __m256i cvtps_ph(__m512 x, int) {
  const Halves y = as<Halves>(x);
  const __m128i z[2] = {_mm256_cvtps_ph(y.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                        _mm256_cvtps_ph(y.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  return as<__m256i>(z);
}
// The nearest bf16, of two equally near the even one; denormal numbers are taken for 0.
LANES uint16_t to_bf16(float x) {
  const uint32_t bits = as<uint32_t>(x), size = bits & 0x7fffffff;
  if (size > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  if (size < 0x00800000) return static_cast<uint16_t>(bits >> 16 & 0x8000);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
MANY __m256i cvtneps_pbh(__m512 x) {
  uint16_t y[16];
  for (int i = 0; i < 16; ++i) y[i] = to_bf16(x[i]);
  return as<__m256i>(y);
}
MANY __m512i cvtne2ps_pbh(__m512 high, __m512 low) {
  uint16_t y[32];
  for (int i = 0; i < 16; ++i) y[i] = to_bf16(low[i]), y[16 + i] = to_bf16(high[i]);
  return as<__m512i>(y);
}

LANES float rounded(float x, int mode) {
  switch (mode & 3) {
    case _MM_FROUND_TO_NEAREST_INT:
      return __builtin_rintf(x);
    case _MM_FROUND_TO_NEG_INF:
      return __builtin_floorf(x);
    case _MM_FROUND_TO_POS_INF:
      return __builtin_ceilf(x);
  }
  abort();
}
MANY __m512 roundscale_ps(__m512 x, int mode) {
  return each<__m512>([&](int i) { return rounded(x[i], mode); });
}
LANES __m512 maskz_roundscale_ps(__mmask16 k, __m512 x, int mode) {
  return blend(k, __m512{}, roundscale_ps(x, mode));
}
MANY __m512 reduce_ps(__m512 x, int mode) {
  return each<__m512>([&](int i) { return std::isinf(x[i]) ? 0.0f : x[i] - rounded(x[i], mode); });
}
LANES float scaled(float x, float power) {
  if (x != x || power != power) return x + power;
  const float whole = __builtin_floorf(power);
  const float limited = whole < -400 ? -400 : whole > 400 ? 400 : whole;
  return std::isinf(power) && x == 0 && power > 0 ? __builtin_nanf("")
                                                  : ldexpf(x, static_cast<int>(limited));
}
MANY __m512 scalef_ps(__m512 x, __m512 power) {
  return each<__m512>([&](int i) { return scaled(x[i], power[i]); });
}
MANY __m512 maskz_scalef_ps(__mmask16 k, __m512 x, __m512 power) {
  return each<__m512>([&](int i) { return k >> i & 1 ? scaled(x[i], power[i]) : 0.0f; });
}
MANY __m512 getexp_ps(__m512 x) {
  return each<__m512>([&](int i) { return std::logb(x[i]); });
}

MANY float reduce_add_ps(__m512 x) {
  float y[16];
  memcpy(y, &x, sizeof y);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) y[i] = y[i] + y[i + half];
  return y[0];
}
MANY float reduce_max_ps(__m512 x) {
  float y[16];
  memcpy(y, &x, sizeof y);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) y[i] = y[i] > y[i + half] ? y[i] : y[i + half];
  return y[0];
}

// Lanes of four: element i of the result comes from a or b, by pick(i), as 4 (i / 4) + its place.
template <class Pick>
LANES __m512i within_fours(__m512i a, __m512i b, Pick pick) {
  return as<__m512i>(each<Words>([&](int i) {
    const int at = pick(i % 4);
    return at < 4 ? as<Words>(a)[i / 4 * 4 + at] : as<Words>(b)[i / 4 * 4 + at - 4];
  }));
}
MANY __m512i shuffle_epi32(__m512i x, int order) {
  return within_fours(x, x, [&](int i) { return order >> (2 * i) & 3; });
}
LANES __m512i mask_shuffle_epi32(__m512i a, __mmask16 k, __m512i x, int order) {
  return blend(k, a, shuffle_epi32(x, order));
}
MANY __m512 shuffle_ps(__m512 a, __m512 b, int order) {
  return as<__m512>(within_fours(as<__m512i>(a), as<__m512i>(b),
                                 [&](int i) { return (order >> (2 * i) & 3) + (i < 2 ? 0 : 4); }));
}
MANY __m512i unpacklo_epi32(__m512i a, __m512i b) {
  return within_fours(a, b, [](int i) { return i / 2 + i % 2 * 4; });
}
MANY __m512i unpackhi_epi32(__m512i a, __m512i b) {
  return within_fours(a, b, [](int i) { return 2 + i / 2 + i % 2 * 4; });
}
MANY __m512i unpacklo_epi64(__m512i a, __m512i b) {
  return within_fours(a, b, [](int i) { return i % 2 + i / 2 * 4; });
}
MANY __m512i unpackhi_epi64(__m512i a, __m512i b) {
  return within_fours(a, b, [](int i) { return 2 + i % 2 + i / 2 * 4; });
}
LANES __m512 unpacklo_ps(__m512 a, __m512 b) {
  return as<__m512>(unpacklo_epi32(as<__m512i>(a), as<__m512i>(b)));
}
LANES __m512 unpackhi_ps(__m512 a, __m512 b) {
  return as<__m512>(unpackhi_epi32(as<__m512i>(a), as<__m512i>(b)));
}
MANY __m512 shuffle_f32x4(__m512 a, __m512 b, int order) {
  return each<__m512>([&](int i) {
    const int from = 4 * (order >> (2 * (i / 4)) & 3) + i % 4;
    return i < 8 ? a[from] : b[from];
  });
}
MANY __m512i permutexvar_epi32(__m512i order, __m512i x) {
  return as<__m512i>(each<Words>([&](int i) { return as<Words>(x)[as<Words>(order)[i] % 16]; }));
}
MANY __m512i shuffle_epi8(__m512i x, __m512i order) {
  Bytes y;
  for (int i = 0; i < 64; ++i) {
    const uint8_t at = as<Bytes>(order)[i];
    y[i] = at & 0x80 ? 0 : as<Bytes>(x)[i / 16 * 16 + at % 16];
  }
  return as<__m512i>(y);
}

#undef LANES
#undef MANY

}  // namespace emulated

#include "emulated_avx512_names.h"
