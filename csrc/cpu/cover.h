// The mask and the intervals laid over a tile of scores that an edge runs through.
#pragma once

#include "rows.h"

namespace {

// Queries [i0, i0 + n) and columns [begin, end) of the panel that starts at key k0.
template <class E>
struct Cover {
  using V = typename E::V;
  using T = typename V::T;
  static constexpr T kInf = static_cast<T>(__builtin_inf());

  const AttentionParams& p;
  const Sequence& seq;
  E& engine;
  T* mask_row;
  int64_t head, i0, n, k0, begin, end;

  // Gives -inf to the scores of keys that their query does not see. Where the mask has a say, or
  // 0 * -inf would be NaN, scores are scaled on the way: then it returns true.
  bool hide(int64_t keys, T scale2, bool masked) const {
    const bool scaled = masked || scale2 == 0;
    if (scaled) add_mask(min64(end, keys), scale2, masked);
    for (int64_t i = 0; i < n; ++i) hide_outside(i);
    return scaled;
  }

  // s <- scale2 * s + mask
  void add_mask(int64_t last, T scale2, bool masked) const {
    for (int64_t j = begin; j < end; ++j) mask_row[j] = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (masked && (i == 0 || p.mask.row != 0))
        load_mask(mask_row + begin, p.mask, seq.index, head, i0 + i, k0 + begin, last - begin);
      for (int64_t j = begin; j < end; j += V::kWidth) {
        T* x = engine.segment(i, j);
        const auto bias = V::load(mask_row + j);
        V::store(x,
                 V::hidden_where_hidden(V::add(V::mul(V::load(x), V::set1(scale2)), bias), bias));
      }
    }
  }

  void hide_outside(int64_t i) const {
    const int64_t lo = clamp(seq.lo(i0 + i) - k0, begin, end);
    const int64_t hi = clamp(seq.hi(i0 + i) - k0, lo, end);
    for (int64_t j = begin; j < end; j += V::kWidth) {
      if (j >= lo && j + V::kWidth <= hi) continue;
      T* x = engine.segment(i, j);
      for (int64_t lane = 0; lane < V::kWidth; ++lane)
        if (j + lane < lo || j + lane >= hi) x[lane] = -kInf;
    }
  }
};

}  // namespace
