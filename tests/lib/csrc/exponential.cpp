// Measures how far the exponentials of one instruction set are from 2^x. Compiled with the flags of
// its unit, which choose the set; prints a line for each exponential: its name and its largest
// error on [-100, 126], in ulp of the result, or relative where 16 bits are enough.
//
// Every float with 2^-26 <= |x| up to -100 and 126 is tried, 5.5e8 of them. Of the rest, for which
// 2^x is 1, 0 or inf in fp32 whatever the lower bits of x, every 61st.
#include <cstdint>
#include <cstdio>
#include <initializer_list>

#if defined(__AVX512BF16__)
#include "cpu/bf16_parts.h"
using V = Avx512;
#elif defined(__AVX512F__)
#include "cpu/vec_avx512.h"
using V = Avx512;
#elif defined(__AVX2__)
#include "cpu/vec_avx2.h"
using V = Avx2;
#else
#include "cpu/vec_portable.h"
using V = Portable<float, 8>;
#endif

namespace {

constexpr int kLanes = 32;  // a multiple of every set's vector

struct Exp2 {
  static constexpr bool kRelative = false;
  static constexpr float kLeast = -100;  // the power below which it is 0
  static V::F of(V::F x) { return V::exp2(x); }
};

#if defined(__AVX512BF16__)
struct Short {
  static constexpr bool kRelative = true;
  static constexpr float kLeast = -100;
  static V::F of(V::F x) { return exponential<1>(x, V::set1(1), V::zero()); }
};

struct Weight {
  static constexpr bool kRelative = true;
  static constexpr float kLeast = -116;  // in its unit of 2^-10 the least power that is no denormal
  static V::F of(V::F x) {
    const FlushDenormals flush;
    return V::mul(weight_of<1>(x, V::set1(1), V::zero()), V::set1(1 / kWeightUnit<1>));
  }
};
#endif

template <class E>
inline void apply(const float* x, float* y) {
  for (int i = 0; i < kLanes; i += V::kWidth) V::store(y + i, E::of(V::load(x + i)));
}

// 1 / k! ln2^k
struct Series {
  double term[14];
  constexpr Series() : term{1} {
    for (int k = 1; k < 14; ++k) term[k] = term[k - 1] * 0.69314718055994530942 / k;
  }
};
constexpr Series kSeries;

// 2^(x - n), to 4e-16, for the integer n nearest x; factor <- 2^-n
inline double power(double x, double& factor) {
  // adding it leaves the nearest integer in the low bits, and the vectorizer knows no rounding
  const double shifted = x + 0x1.8p52, r = x - (shifted - 0x1.8p52);
  const int64_t n = __builtin_bit_cast(int64_t, shifted) - __builtin_bit_cast(int64_t, 0x1.8p52);
  factor = __builtin_bit_cast(double, (1023 - n) << 52);
  double y = kSeries.term[13];
  for (int k = 12; k >= 0; --k) y = y * r + kSeries.term[k];
  return y;
}

inline float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }

// The largest error over the floats whose bits are first, first + step, ... up to last.
template <class E>
double largest_error(uint32_t first, uint32_t last, uint32_t step) {
  double worst[kLanes] = {};
  for (uint64_t at = first; at <= last; at += uint64_t{kLanes} * step) {
    alignas(64) float x[kLanes], y[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t bits = at + uint64_t{step} * i;
      x[i] = float_of(bits < last ? bits : last);
    }
    apply<E>(x, y);
    for (int i = 0; i < kLanes; ++i) {
      double factor;
      const double truth = power(x[i], factor), error = y[i] * factor - truth;
      const double unit = E::kRelative ? truth : truth < 1 ? 0x1p-24 : 0x1p-23;
      const double size = (error < 0 ? -error : error) / unit;
      worst[i] = size <= worst[i] ? worst[i] : size;  // NaN wins, and is kept
    }
  }
  double all = 0;
  for (double w : worst) all = w <= all ? all : w;
  return all;
}

// Returns whether every 61st float from first to last gives `expected`.
template <class E>
bool all_give(float expected, uint32_t first, uint32_t last) {
  bool good = true;
  for (uint64_t at = first; at <= last; at += uint64_t{kLanes} * 61) {
    alignas(64) float x[kLanes], y[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t bits = at + 61 * i;
      x[i] = float_of(bits < last ? bits : last);
    }
    apply<E>(x, y);
    for (int i = 0; i < kLanes; ++i) good &= bits_of(y[i]) == bits_of(expected);
  }
  return good;
}

template <class E>
bool report(const char* name) {
  const uint32_t minus = 0x80000000, small = bits_of(0x1p-26f);
  const uint32_t infinite = 0x7f800000;
  double worst = 0;
  for (uint32_t sign : {0u, minus}) {
    const double tiny = largest_error<E>(sign, sign | small, 61);
    const double rest = largest_error<E>(sign | small, sign | bits_of(sign ? 100 : 126), 1);
    worst = tiny <= worst ? worst : tiny;
    worst = rest <= worst ? worst : rest;
  }
  printf("%s %.6g\n", name, worst);
  const bool outside = all_give<E>(0, bits_of(E::kLeast) + 1, minus | infinite) &&
                       all_give<E>(__builtin_inff(), bits_of(129), infinite);
  if (!outside)
    printf("%s is not 0 below %g or not inf from 129 on\n", name, static_cast<double>(E::kLeast));
  alignas(64) float x[kLanes], y[kLanes];
  for (float& e : x) e = __builtin_nanf("");
  apply<E>(x, y);
  const bool nan = y[0] != y[0];
  if (!nan) printf("%s of NaN is a number\n", name);
  return outside && nan;
}

}  // namespace

int main() {
  bool good = report<Exp2>("exp2");
#if defined(__AVX512BF16__)
  good &= report<Short>("short");
  good &= report<Weight>("weight");
#endif
  return good ? 0 : 1;
}
