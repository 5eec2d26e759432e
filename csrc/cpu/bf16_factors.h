// The powers of two by which the backward pass multiplies rows before it splits them, so that no
// digit of small numbers is lost in products and no sum overflows.
#pragma once

#include <stdint.h>
#include <string.h>

#include "bf16_parts.h"

namespace {

struct Bf16Factors {
  float raised = 1, gradient = 1;  // of q, k and v; of do
  float largest_q = 0, largest_do = 0;
  int64_t terms = 0;  // of a sum over queries or keys

  // The factors that sums of such rows carry: 1 / scores(), ds() and so on. dk is as dq.
  float scores() const { return 1 / (raised * raised); }
  float ds() const { return raised * gradient; }
  float dq() const { return raised * raised * gradient; }

  // The largest magnitudes of q, and of do and dlse, as bits. do is packed to be below 2^33; 2^76
  // is as far as 1 / dq() is a normal number.
  static Bf16Factors of(uint32_t q_bits, uint32_t do_bits, int64_t terms) {
    Bf16Factors x;
    memcpy(&x.largest_q, &q_bits, sizeof q_bits);
    memcpy(&x.largest_do, &do_bits, sizeof do_bits);
    x.terms = terms;
    x.raised = kRaised;
    const int64_t power = min64(159 - static_cast<int64_t>(do_bits >> 23), 76);
    x.gradient = __builtin_ldexpf(1, static_cast<int>(power));
    return x;
  }

  // Returns whether scores, ds, dv, dk or dq may overflow with these largest magnitudes of k and v.
  bool outgrown(double largest_k, double largest_v, int64_t width) const {
    if (raised == 1) return false;
    const double most = 0x1p126, n = static_cast<double>(terms), d = static_cast<double>(width);
    const double q = static_cast<double>(largest_q) * raised, k = largest_k * raised,
                 v = largest_v * raised, grad = static_cast<double>(largest_do) * gradient,
                 ds_size = (2 * v * d + raised) * grad;
    return !(q * k * d < most && ds_size < most && grad * n < most && ds_size * q * n < most &&
             ds_size * k * n < most);
  }
};

}  // namespace
