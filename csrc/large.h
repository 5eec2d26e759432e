// Rows of scores so large that base 2 does not keep their digits: the rounding of a large maximum
// alone takes more than a weight can bear, and the logarithm of the sum is lost beside the maximum.
// The scores of such a row stay natural, rounded as plain mathematics rounds them, until the
// maximum or the normaliser is taken off.
#pragma once

#include "attention.h"

namespace {

// The least maximum, in base 2, of a large row. Below this limit rounding takes at most 4 from the
// maximum, which leaves weights in range.
template <class T>
constexpr T kLarge = static_cast<T>(sizeof(T) == 8 ? 0x1p55 : 0x1p26);
template <class T>
CLINATTN_SHARED inline bool is_large(T m) {
  return m >= kLarge<T> || (m <= -kLarge<T> && m != -static_cast<T>(__builtin_inf()));
}

// The least natural normaliser of a large row
template <class T>
constexpr T kLargeNormaliser = static_cast<T>(kLarge<T> * 0.69314718055994530942);
template <class T>
CLINATTN_SHARED inline bool is_large_normaliser(T lse) {
  const T size = lse < 0 ? -lse : lse;
  return size >= kLargeNormaliser<T> && size < static_cast<T>(__builtin_inf());
}

// Returns x, moved by some units where it is not on the side of the limit where rows are large or
// not: next to the limit the sum of weights can have carried the normaliser of a row across.
template <class T>
CLINATTN_SHARED inline T on_side(T x, bool large) {
  constexpr T kBelow =
      static_cast<T>(kLargeNormaliser<T> * (1 - T(sizeof(T) == 8 ? 0x1p-53 : 0x1p-24)));
  if (is_large_normaliser(x) == large) return x;
  const T size = large ? kLargeNormaliser<T> : kBelow;
  return x < 0 ? -size : size;
}

}  // namespace
