// The order in which the backward pass goes through the blocks of a tile.
#pragma once

#include "rows.h"

namespace {

// Goes through blocks of 32 queries and 32 keys of [begin, end): slice by slice, in one by
// queries, then keys.
template <int64_t kSlice>
struct AmxPlace {
  int64_t begin, columns_end, end, n, rows, at, i, j;
  AmxPlace(int64_t n, int64_t begin, int64_t columns_end)
      : begin(begin),
        columns_end(columns_end),
        end(round_up(columns_end, 32)),
        n(n),
        rows(round_up(n, 32)),
        at(begin / kSlice * kSlice),
        i(0),
        j(begin) {}
  int64_t j0() const { return max64(begin, at); }
  int64_t j1() const { return min64(end, at + kSlice); }
  int64_t seen_rows() const { return min64(32, n - i); }
  int64_t columns() const { return min64(32, columns_end - j); }
  int64_t slice_blocks() const { return rows / 32 * ((j1() - j0()) / 32); }
  void next() {
    j += 32;
    if (j < j1()) return;
    i += 32;
    if (i == rows) at += kSlice, i = 0;
    j = j0();
  }
};

}  // namespace
