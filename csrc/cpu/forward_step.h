#pragma once

#include <cstdint>

namespace {

// Keys [at + begin, at + end) of a panel, which has `keys` keys from `at` on. Where edge, some
// query does not see some key; where masked, the mask may hide or change some scores.
struct Step {
  int64_t index, at, keys, begin, end;  // index: of the step, counted from the first valid key
  bool edge, masked;
};

// Rows of o that engine E reads and writes at a time: of a tile, unless it says otherwise.
template <class E>
inline constexpr int64_t kRowsTouched = E::kRows;

// The state of queries between steps, from the first query of a tile on
template <class T>
struct Rows {
  T *m, *top, *l, *o;  // m: the maximum in base 2; top: the natural one of a large row
};

}  // namespace
