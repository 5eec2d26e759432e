// Rotary positions: pairs of features turned by angles that every head of a token shares.
#pragma once

#include <string.h>

#include <initializer_list>

#include "../rotary.h"
#include "rows.h"

namespace {

using clinattn::RotaryParams;
using clinattn::RotaryTensor;

// sin r / r and cos r on [-pi/4, pi/4] in powers of r^2, within 2^-37 and 2^-34 (FreeBSD msun)
constexpr double kSine[4] = {-0.166666666416265235595, 0.0083333293858894631756,
                             -0.000198393348360966317347, 0.0000027183114939898219064};
constexpr double kCosine[4] = {-0.499999997251031003120, 0.0416666233237390631894,
                               -0.00138867637746099294692, 0.0000243904487962774090654};
// pi/2 in three parts. The first two have 25 bits, so that their products with up to 2^28 quarter
// turns are exact, with or without a fused multiply-add.
constexpr double kQuarter[3] = {0x1.921fb5p+0, 0x1.110b46p-26, 0x1.1a62633145c07p-54};
constexpr float kLargestReduced = 0x1p28f;

// Without a branch, so that compilers turn it into vectors.
inline void sine_cosine(const float* __restrict angle, float* __restrict sine,
                        float* __restrict cosine, int64_t n) {
  int32_t room = 0;  // negative if an angle is too large, infinite or NaN
  for (int64_t j = 0; j < n; ++j) {
    const double x = angle[j];
    // the nearest number of quarter turns, in the low bits of a sum
    const double shifted = x * 0x1.45f306dc9c883p-1 + 0x1.8p52;
    const double turns = shifted - 0x1.8p52;
    const uint64_t quadrant = __builtin_bit_cast(uint64_t, shifted);
    const double r = x - turns * kQuarter[0] - turns * kQuarter[1] - turns * kQuarter[2];
    const double z = r * r;
    const double s = r + r * z * (kSine[0] + z * (kSine[1] + z * (kSine[2] + z * kSine[3])));
    const double c = 1 + z * (kCosine[0] + z * (kCosine[1] + z * (kCosine[2] + z * kCosine[3])));
    // odd quadrants exchange the two; sin is negative in 2 and 3, cos in 1 and 2
    const uint64_t s_bits = __builtin_bit_cast(uint64_t, s);
    const uint64_t c_bits = __builtin_bit_cast(uint64_t, c);
    const uint64_t exchange = (s_bits ^ c_bits) & (0 - (quadrant & 1));
    const uint64_t s_sign = (quadrant & 2) << 62, c_sign = ((quadrant + 1) & 2) << 62;
    sine[j] = static_cast<float>(__builtin_bit_cast(double, s_bits ^ exchange ^ s_sign));
    cosine[j] = static_cast<float>(__builtin_bit_cast(double, c_bits ^ exchange ^ c_sign));
    const int32_t magnitude = __builtin_bit_cast(int32_t, angle[j]) & 0x7fffffff;
    room |= __builtin_bit_cast(int32_t, kLargestReduced) - magnitude;
  }
  if (room >= 0) return;
  for (int64_t j = 0; j < n; ++j)
    if (!(__builtin_fabsf(angle[j]) <= kLargestReduced)) {
      sine[j] = static_cast<float>(__builtin_sin(angle[j]));
      cosine[j] = static_cast<float>(__builtin_cos(angle[j]));
    }
}

inline void sine_cosine(const double* angle, double* sine, double* cosine, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const double x = angle[j];
    sine[j] = __builtin_sin(x);
    cosine[j] = __builtin_cos(x);
  }
}

// Products and sums are rounded one by one, as in plain torch: every instruction set has its bits.
template <class V>
struct Rotary {
  using T = typename V::T;

  const RotaryParams& p;
  T *cosines, *sines, *row;  // (tokens of the task, pairs) twice; 2 * pairs, padded

  Rotary(const RotaryParams& params, void* scratch) : p(params) {
    cosines = static_cast<T*>(scratch);
    sines = cosines + clinattn::kRotaryTokens * p.pairs;
    row = sines + clinattn::kRotaryTokens * p.pairs;
  }

  // Tokens [begin, end) of one sequence in all heads of q and k.
  void run(int64_t seq, int64_t begin, int64_t end) {
    const T* position = static_cast<const T*>(p.positions) + seq * p.positions_batch;
    const T* frequency = static_cast<const T*>(p.frequencies);
    for (int64_t t = begin; t < end; ++t) {
      T *cosine = cosines + (t - begin) * p.pairs, *sine = sines + (t - begin) * p.pairs;
      for (int64_t j = 0; j < p.pairs; ++j) row[j] = position[t] * frequency[j];
      sine_cosine(row, sine, cosine, p.pairs);
      if (p.inverse)
        for (int64_t j = 0; j < p.pairs; ++j) sine[j] = -sine[j];
    }
    for (const RotaryTensor* x : {&p.q, &p.k}) {
      // along memory
      if (x->x_strides.head < x->x_strides.row) {
        for (int64_t t = begin; t < end; ++t)
          for (int64_t h = 0; h < x->heads; ++h) turn(*x, seq, h, t, t - begin);
      } else {
        for (int64_t h = 0; h < x->heads; ++h)
          for (int64_t t = begin; t < end; ++t) turn(*x, seq, h, t, t - begin);
      }
    }
  }

  void turn(const RotaryTensor& x, int64_t seq, int64_t head, int64_t token, int64_t index) {
    const int64_t width = 2 * p.pairs, element = dtype_size(p.dtype);
    const auto* src = static_cast<const char*>(row_at(x.x, p.dtype, x.x_strides, seq, head, token));
    auto* dst = static_cast<char*>(row_at(x.y, p.dtype, x.y_strides, seq, head, token));
    const T* __restrict c = cosines + index * p.pairs, * __restrict s = sines + index * p.pairs;
    load_row<V>(row, src, p.dtype, width);
    if (p.interleaved) {
      T* __restrict pair = row;
      for (int64_t j = 0; j < p.pairs; ++j) {
        const T a = pair[2 * j], b = pair[2 * j + 1];
        pair[2 * j] = a * c[j] - b * s[j];
        pair[2 * j + 1] = b * c[j] + a * s[j];
      }
    } else {
      T* __restrict first = row, * __restrict second = row + p.pairs;
      for (int64_t j = 0; j < p.pairs; ++j) {
        const T a = first[j], b = second[j];
        first[j] = a * c[j] - b * s[j];
        second[j] = b * c[j] + a * s[j];
      }
    }
    store_row<V>(dst, row, p.dtype, width, [](typename V::F y) { return y; });
    memcpy(dst + width * element, src + width * element, (p.head_dim - width) * element);
  }
};

}  // namespace
