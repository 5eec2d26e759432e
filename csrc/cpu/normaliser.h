// The softmax normaliser as two numbers: m + log2 l in base 2 while scores are exponentiated,
// natural for everyone else. The second holds what rounding took from the first: of a score of 1e4
// in fp32 one alone would keep 3 digits behind the point, and every gradient would be off by so
// much.
#pragma once

#include <string.h>

#include "rows.h"

namespace {

template <class T>
struct TwoPart {
  T high, low;
};

constexpr float kLowestFloat = -__FLT_MAX__;
constexpr double kLowestDouble = -__DBL_MAX__;

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

// ln(2^m l). A row whose scores are all the lowest number there is keeps it: its mean is uniform.
inline TwoPart<float> natural(float m, float l, double log_l) {
  if (m == kLowestFloat) return {kLowestFloat, 0};
  if (!(l <= __FLT_MAX__)) return {l, 0};
  const double x = static_cast<double>(m) * kLn2 + log_l;
  const float high = static_cast<float>(x);
  return {high, __builtin_isinf(high) ? 0 : static_cast<float>(x - high)};
}

inline TwoPart<float> base2(float high, float low) {
  const double x = (static_cast<double>(high) + low) * kLog2e;
  const float y = static_cast<float>(x);
  if (y < kLowestFloat) return {kLowestFloat, 0};
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

inline TwoPart<double> natural(double m, double, double log_l) {
  if (m == kLowestDouble) return {kLowestDouble, 0};
  const TwoPart<double> x = multiply(m, kLn2, kLn2Error, 0);
  const double high = x.high + log_l, part = high - x.high;
  return {high, (x.high - (high - part)) + (log_l - part) + x.low};
}

inline TwoPart<double> base2(double high, double low) {
  const TwoPart<double> x = multiply(high, kLog2e, kLog2eError, low * kLog2e);
  return x.high < kLowestDouble ? TwoPart<double>{kLowestDouble, 0} : x;
}

}  // namespace
