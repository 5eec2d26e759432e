#pragma once

#include <cstdint>

namespace {

// Keys [at + begin, at + end) of a panel, of which keys from at are there. Where edge, some query
// does not see some key; where masked, the mask has a say in it.
struct Step {
  int64_t index, at, keys, begin, end;  // index: of the step, counted from the first valid key
  bool edge, masked;
};

// What folding keeps of queries, from the first of a tile on
template <class T>
struct Rows {
  T *m, *top, *l, *o;  // m: the maximum in base 2; top: the natural one of a large row
};

}  // namespace
