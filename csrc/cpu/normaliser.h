// The softmax normaliser as two numbers: m + log2 l in base 2 while scores are exponentiated, a
// natural logarithm elsewhere. The second holds what rounding took from the first: of a score of
// 1e4 in fp32 the first alone would keep 3 digits behind the point, and every gradient would be off
// by so much. Of a large row (large.h) both stay natural.
#pragma once

#include <string.h>

#include <type_traits>

#include "../large.h"
#include "rows.h"

namespace {

template <class T>
struct TwoPart {
  T high, low;
};

// The factors that take scores to base 2, and to natural ones
template <class T>
struct Units {
  T base2, natural;

  // The factors for scores q.k
  static Units of(const AttentionParams& p) {
    const double scale = __builtin_fabs(p.scale);
    return {static_cast<T>(scale * kLog2e), static_cast<T>(scale)};
  }
  // The factors for scores that are multiples of unit
  Units times(T unit) const { return {base2 * unit, natural * unit}; }
  static Units of_natural() { return {static_cast<T>(kLog2e), 1}; }
};

// Returns the power of 2 to multiply the weights of a row with when its maximum, their reference
// point, moves. Of a large row the natural maximum is the reference point.
template <class T>
inline T growth(T m_old, T top_old, T m_new, T top_new) {
  using Wide = std::conditional_t<sizeof(T) == 8, long double, double>;
  const auto reference = [](T m, T top) {
    return is_large(m) ? static_cast<Wide>(top) * static_cast<Wide>(kLog2e) : static_cast<Wide>(m);
  };
  return static_cast<T>(reference(m_old, top_old) - reference(m_new, top_new));
}

// ln x for an ordinary float x > 0 within 2e-14, without branches, so that a loop of them becomes
// vectors
inline double log_of(float x) {
  constexpr uint64_t kRootHalf = 0x3fe6a09e667f3bcd;
  const double wide = x;
  uint64_t bits;
  memcpy(&bits, &wide, 8);
  const int64_t exponent = static_cast<int64_t>(bits - kRootHalf) >> 52;
  bits -= static_cast<uint64_t>(exponent) << 52;
  double y;  // of [sqrt 1/2, sqrt 2)
  memcpy(&y, &bits, 8);
  // ln y = 2 artanh t = 2 (t + t^3 / 3 + ...), |t| < 0.172
  const double t = (y - 1) / (y + 1), square = t * t;
  double sum = 1.0 / 17;
#pragma GCC unroll 8
  for (int n = 15; n > 0; n -= 2) sum = sum * square + 1.0 / n;
  return static_cast<double>(exponent) * kLn2 + 2 * t * sum;
}

inline double log_of(double x) { return __builtin_log(x); }

// ln(2^m l)
inline TwoPart<float> natural(float m, float l, double log_l) {
  if (!(l <= __FLT_MAX__)) return {l, 0};
  const double x = static_cast<double>(m) * kLn2 + log_l;
  const float high = on_side(static_cast<float>(x), false);
  return {high, static_cast<float>(x - high)};
}

// ln(e^top l) of a large row
template <class T>
inline TwoPart<T> natural_of_large(T top, T l, double log_l) {
  if (!(l <= static_cast<T>(sizeof(T) == 8 ? __DBL_MAX__ : __FLT_MAX__))) return {l, 0};
  const T high = on_side(static_cast<T>(top + log_l), true);
  return {high, static_cast<T>((static_cast<double>(top) - high) + log_l)};
}

inline TwoPart<float> base2(float high, float low) {
  const double x = (static_cast<double>(high) + low) * kLog2e;
  const float y = static_cast<float>(x);
  return {y, __builtin_isinf(y) ? 0 : static_cast<float>(x - y)};
}

// x c + rest, where c_low is what rounding took from the constant c
inline TwoPart<double> multiply(double x, double c, double c_low, double rest) {
  const double product = x * c;
  const double error = __builtin_fma(x, c, -product) + x * c_low + rest;
  const double high = product + error;
  return {high, __builtin_isinf(high) ? 0 : error - (high - product)};
}

constexpr double kLn2Error = 2.3190468138462996e-17, kLog2eError = 2.0355273740931033e-17;

inline TwoPart<double> natural(double m, double l, double log_l) {
  if (!(l <= __DBL_MAX__)) return {l, 0};
  const TwoPart<double> x = multiply(m, kLn2, kLn2Error, 0);
  const double sum = x.high + log_l, part = sum - x.high, high = on_side(sum, false);
  const double low = (x.high - (sum - part)) + (log_l - part) + x.low;
  return {high, low + (sum - high)};
}

inline TwoPart<double> base2(double high, double low) {
  return multiply(high, kLog2e, kLog2eError, low * kLog2e);
}

}  // namespace
