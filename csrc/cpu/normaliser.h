// The softmax normaliser as two numbers: m + log2 l in base 2 while scores are exponentiated,
// natural for everyone else. The second holds what rounding took from the first: of a score of 1e4
// in fp32 one alone would keep 3 digits behind the point, and every gradient would be off by so
// much.
#pragma once

#include "rows.h"

namespace {

template <class T>
struct TwoPart {
  T high, low;
};

constexpr float kLowestFloat = -__FLT_MAX__;
constexpr double kLowestDouble = -__DBL_MAX__;

// ln(2^m l). A row whose scores are all the lowest number there is keeps it: its mean is uniform.
inline TwoPart<float> natural(float m, float l) {
  if (m == kLowestFloat) return {kLowestFloat, 0};
  const double x = static_cast<double>(m) * kLn2 + __builtin_log(static_cast<double>(l));
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

inline TwoPart<double> natural(double m, double l) {
  if (m == kLowestDouble) return {kLowestDouble, 0};
  const double log_l = __builtin_log(l);
  const TwoPart<double> x = multiply(m, kLn2, kLn2Error, 0);
  const double high = x.high + log_l, part = high - x.high;
  return {high, (x.high - (high - part)) + (log_l - part) + x.low};
}

inline TwoPart<double> base2(double high, double low) {
  const TwoPart<double> x = multiply(high, kLog2e, kLog2eError, low * kLog2e);
  return x.high < kLowestDouble ? TwoPart<double>{kLowestDouble, 0} : x;
}

}  // namespace
