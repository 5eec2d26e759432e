// Portable C++ as the vocabulary of the algorithm: arrays that any compiler turns into the
// machine's own vectors. Also serves fp64.
#pragma once

#include <string.h>

#include "rows.h"

namespace {

template <class Number, int kLanes>
struct Portable {
  using T = Number;
  struct F {
    T x[kLanes];
  };
  static constexpr int kWidth = kLanes;
  static constexpr int kMicroRows = 4, kMicroVectors = 1, kStrip = kMicroVectors * kWidth;
  static constexpr int kForwardRows = 32, kForwardKeys = 64;
  static constexpr int kBackwardRows = 32, kBackwardKeys = 64;

  template <class Op>
  static F each(Op op) {
    F y;
    for (int i = 0; i < kLanes; ++i) y.x[i] = op(i);
    return y;
  }
  static F load(const T* p) {
    return each([&](int i) { return p[i]; });
  }
  static void store(T* p, F a) {
    for (int i = 0; i < kLanes; ++i) p[i] = a.x[i];
  }
  static F set1(T v) {
    return each([&](int) { return v; });
  }
  static F zero() { return set1(0); }
  static F add(F a, F b) {
    return each([&](int i) { return a.x[i] + b.x[i]; });
  }
  static F sub(F a, F b) {
    return each([&](int i) { return a.x[i] - b.x[i]; });
  }
  static F mul(F a, F b) {
    return each([&](int i) { return a.x[i] * b.x[i]; });
  }
  static F div(F a, F b) {
    return each([&](int i) { return a.x[i] / b.x[i]; });
  }
  // Two roundings, where without the hardware a fused one is a slow library call: for what is far
  // from the scores' largest terms.
  static F fma(F a, F b, F c) {
    return each([&](int i) { return a.x[i] * b.x[i] + c.x[i]; });
  }
  // Sums of products keep what a fused multiply-add would, in fp64 where there is none.
#ifdef __FP_FAST_FMAF
  using Wide = T;
#else
  using Wide = double;
#endif
  struct Sum {
    Wide x[kLanes];
  };
  static Sum no_sum() { return {}; }
  static Sum add_product(F a, F b, Sum c) {
    for (int i = 0; i < kLanes; ++i) {
#ifdef __FP_FAST_FMAF
      c.x[i] = sizeof(T) == 8 ? __builtin_fma(a.x[i], b.x[i], c.x[i])
                              : __builtin_fmaf(a.x[i], b.x[i], c.x[i]);
#else
      c.x[i] += static_cast<Wide>(a.x[i]) * b.x[i];
#endif
    }
    return c;
  }
  static F rounded(const Sum& s) {
    return each([&](int i) { return static_cast<T>(s.x[i]); });
  }
  static F max(F a, F b) {
    return each([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
  }
  static F abs(F a) {
    return each([&](int i) { return a.x[i] < 0 ? -a.x[i] : a.x[i]; });
  }
  static F with_sign(F size, F a) {
    return each([&](int i) { return a.x[i] < 0 ? -size.x[i] : size.x[i]; });
  }
  // The lanes, as bits, in which a >= limit
  static uint32_t reaching(F a, T limit) {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(a.x[i] >= limit) << i;
    return bits;
  }
  // a where x is below the limit, else b
  static F where_below(F x, F limit, F a, F b) {
    return each([&](int i) { return x.x[i] < limit.x[i] ? a.x[i] : b.x[i]; });
  }
  // x in the lanes whose bit is set, else 0
  static F zero_where_dropped(F a, uint32_t bits) {
    return each([&](int i) { return bits >> i & 1 ? a.x[i] : T(0); });
  }
  // Element i is the maximum (sum) of row i of a (kLanes x kLanes).
  static F max_rows(const T* a) {
    F y = set1(-static_cast<T>(__builtin_inf()));
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < kLanes; ++j)
        y.x[i] = a[i * kLanes + j] > y.x[i] ? a[i * kLanes + j] : y.x[i];
    return y;
  }
  static F sum_rows(const T* a) {
    F y = zero();
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < kLanes; ++j) y.x[i] += a[i * kLanes + j];
    return y;
  }
  static T hsum(F a) {
    T y = 0;
    for (int i = 0; i < kLanes; ++i) y += a.x[i];
    return y;
  }
  // -inf where the mask hides
  static F hidden_where_hidden(F a, F mask) {
    constexpr T kHidden = -static_cast<T>(__builtin_inf());
    return each([&](int i) { return mask.x[i] == kHidden ? kHidden : a.x[i]; });
  }
  // -inf in the lanes outside [lo, hi)
  static F hidden_but(F a, int64_t lo, int64_t hi) {
    constexpr T kHidden = -static_cast<T>(__builtin_inf());
    return each([&](int i) { return i < lo || i >= hi ? kHidden : a.x[i]; });
  }
  static F zero_where_hidden(F a, F mask) {
    return each(
        [&](int i) { return mask.x[i] == -static_cast<T>(__builtin_inf()) ? T(0) : a.x[i]; });
  }

  // 2^x; in single precision within 1.1 ulp and 0 below 2^kLeastPower
  static F exp2(F a) {
    return each([&](int i) -> T {
      if constexpr (sizeof(T) == 8) return __builtin_exp2(a.x[i]);
      const T n = round(a.x[i]);
      return ldexp_or_zero(a.x[i] - n, n, a.x[i]);
    });
  }
  // The nearest integer from -127 to 254: adding 1.5 * 2^23 rounds to an integer in the low bits.
  static float round(float x) {
    const float t = x < 254.0f ? x : 254.0f;
    return (t > -127.0f ? t : -127.0f) + 0x1.8p23f - 0x1.8p23f;
  }
  // 2^(n + r), 0 where x is below kLeastPower. Two products put the exponent in, so
  // that what is too large becomes inf.
  static float ldexp_or_zero(float r, float n, float x) {
    float y = kExp2[5];
    for (int i = 4; i >= 0; --i) y = y * r + kExp2[i];
    const int32_t e = static_cast<int32_t>(n == n ? n : 0);
    y = (y * r + 1) * power_of_two(e / 2) * power_of_two(e - e / 2);
    return x < kLeastPower ? 0 : x == x ? y : x;
  }
  static float power_of_two(int32_t e) {
    const uint32_t bits = static_cast<uint32_t>(e + 127) << 23;
    float y;
    memcpy(&y, &bits, 4);
    return y;
  }

  static F load_as(const T* p) { return load(p); }
  template <class E>
  static F load_as(const E* p) {
    return each([&](int i) { return static_cast<T>(widen(p[i])); });
  }
  static void store_as(T* p, F a) { store(p, a); }
  template <class E>
  static void store_as(E* p, F a) {
    for (int i = 0; i < kLanes; ++i) narrow(static_cast<float>(a.x[i]), p + i);
  }
  static void narrow(float v, BFloat16* p) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    p->bits = v != v ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  static void narrow(float v, Float16* p) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    uint32_t y;
    if (bits > 0x7f800000) {
      y = 0x7e00;
    } else if (bits >= 0x477ff000) {  // 65520 and above round to inf
      y = 0x7c00;
    } else if (bits <
               0x38800000) {  // subnormal: adding 0.5 leaves the rounded value in the low bits
      float f;
      memcpy(&f, &bits, 4);
      f += 0.5f;
      memcpy(&y, &f, 4);
      y -= 0x3f000000;
    } else {
      y = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
    }
    p->bits = static_cast<uint16_t>(sign | y);
  }

  struct Words {
    uint32_t x[kLanes];
  };
  template <class Op>
  static Words each_word(Op op) {
    Words y;
    for (int i = 0; i < kLanes; ++i) y.x[i] = op(i);
    return y;
  }
  static Words load_words(const uint32_t* p) {
    return each_word([&](int i) { return p[i]; });
  }
  static void store_words(uint32_t* p, const Words& a) {
    for (int i = 0; i < kLanes; ++i) p[i] = a.x[i];
  }
  static Words set_words(uint32_t v) {
    return each_word([&](int) { return v; });
  }
  static Words xor3(const Words& a, const Words& b, const Words& c) {
    return each_word([&](int i) { return a.x[i] ^ b.x[i] ^ c.x[i]; });
  }
  static void multiply_words(const Words& a, uint32_t factor, Words& high, Words& low) {
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t product = static_cast<uint64_t>(a.x[i]) * factor;
      high.x[i] = static_cast<uint32_t>(product >> 32);
      low.x[i] = static_cast<uint32_t>(product);
    }
  }
  // keep[i stride] <- whether 16 bytes of row i, 4 in each vector of words, reach its least one
  static void kept_rows(const Words (&bytes)[4], const uint32_t* least, const uint32_t* mask,
                        uint16_t* keep, int64_t stride) {
    for (int i = 0; i < kLanes; ++i) {
      uint32_t kept = 0;
      for (int j = 0; j < 16; ++j) {
        const uint32_t byte = (bytes[j / 4].x[i] & mask[i]) >> (8 * (j % 4)) & 0xff;
        kept |= static_cast<uint32_t>(byte >= (least[i] & 0xff)) << j;
      }
      keep[i * stride] = static_cast<uint16_t>(kept);
    }
  }

  static void transpose(const T* src, int64_t ld_src, T* dst, int64_t ld_dst) {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < kLanes; ++j) dst[j * ld_dst + i] = src[i * ld_src + j];
  }
  // the same of kLanes columns from `at` of kLanes rows, of which those past the first n are zeros
  static void transpose_rows(const T* const* rows, int64_t at, int64_t, T* dst, int64_t ld_dst) {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < kLanes; ++j) dst[j * ld_dst + i] = rows[i][at + j];
  }
};

}  // namespace
