// Activations of linear layers and their derivatives, on vectors of floats.
#pragma once

#include <initializer_list>

#include "rows.h"

namespace {

// log2 of the normal distribution's tail beyond t is -t^2 log2(e) / 2 + a polynomial on [0, 6]:
// least squares, reweighted until the largest error of t Phi(t) against the unit of its result was
// flat, 2.4e-8
constexpr float kTail[10] = {-1.0f,          -1.151106f,     0.26214546f,    -0.05251468f,
                             0.0070862030f,  -1.4464348e-4f, -1.9281711e-4f, 4.5840679e-5f,
                             -4.7731287e-6f, 1.9706870e-7f};

// The normal distribution function, and its density where asked for
template <class V>
struct Normal {
  using F = typename V::F;
  F below, power;  // power: log2 of sqrt(2 pi) times the density

  explicit Normal(F x) {
    const F size = V::abs(x), t = V::sub(V::zero(), V::max(V::sub(V::zero(), size), V::set1(-6)));
    F y = V::set1(kTail[9]);
#pragma GCC unroll 9
    for (int i = 8; i >= 0; --i) y = V::fma(y, t, V::set1(kTail[i]));
    power = V::mul(V::mul(x, x), V::set1(static_cast<float>(-kLog2e / 2)));
    const F tail = V::exp2(V::add(power, y));
    below = V::where_below(x, V::zero(), tail, V::sub(V::set1(1), tail));
  }
  F density() const { return V::mul(V::exp2(power), V::set1(0.3989422804f)); }
};

struct Identity {
  template <class V>
  static typename V::F value(typename V::F x) {
    return x;
  }
  template <class V>
  static typename V::F slope(typename V::F) {
    return V::set1(1);
  }
};

// x Phi(x) (Hendrycks and Gimpel, arXiv 1606.08415)
struct Gelu {
  template <class V>
  static typename V::F value(typename V::F x) {
    return V::mul(x, Normal<V>(x).below);
  }
  template <class V>
  static typename V::F slope(typename V::F x) {
    const Normal<V> normal(x);
    return V::fma(x, normal.density(), normal.below);
  }
};

// The approximation of Gelu by x / (1 + e^(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
struct GeluTanh {
  static constexpr float kCubic = 0.044715f, kTwoRoots = 1.5957691216f;
  template <class V>
  static typename V::F gate(typename V::F x) {
    const auto one = V::set1(1), u = V::mul(x, V::fma(V::mul(x, x), V::set1(kCubic), one));
    return V::div(
        one, V::add(one, V::exp2(V::mul(u, V::set1(static_cast<float>(-kTwoRoots * kLog2e))))));
  }
  template <class V>
  static typename V::F value(typename V::F x) {
    return V::mul(x, gate<V>(x));
  }
  template <class V>
  static typename V::F slope(typename V::F x) {
    const auto one = V::set1(1), s = gate<V>(x);
    const auto du = V::mul(V::fma(V::mul(x, x), V::set1(3 * kCubic), one), V::set1(kTwoRoots));
    return V::fma(V::mul(V::mul(x, s), V::sub(one, s)), du, s);
  }
};

struct Relu {
  template <class V>
  static typename V::F value(typename V::F x) {
    return V::max(V::zero(), x);  // the second where it is NaN
  }
  template <class V>
  static typename V::F slope(typename V::F x) {
    return V::where_below(V::zero(), x, V::set1(1), V::zero());
  }
};

}  // namespace
