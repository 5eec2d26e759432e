// The terms of scores, the mask and the intervals laid over a tile of scores. What is added belongs
// to natural scores, so that finite numbers stay finite: all scores of a call with float masks or
// terms are natural, those of all others as they come.
#pragma once

#include "terms.h"

namespace {

// Returns whether a cover leaves natural scores. A scale of 0 calls for them, too: times 0 the -inf
// of a hidden score would be NaN.
inline bool makes_natural(const AttentionParams& p, bool masked) {
  return has_terms(p) || (masked && p.mask.dtype != DType::kBool) || p.scale == 0;
}

// Queries [i0, i0 + n) and columns [begin, end) of the keys from k0; row by row of the scores.
template <class E>
struct RowCover {
  using V = typename E::V;
  using T = typename V::T;
  static constexpr T kInf = static_cast<T>(__builtin_inf());

  const AttentionParams& p;
  const Sequence& seq;
  E& engine;
  T* mask_row;
  int64_t head, i0, n, k0, begin, end;

  // Gives -inf to the scores of keys that their query does not see; returns makes_natural.
  bool hide(int64_t keys, T scale, bool masked) const {
    const bool terms = has_terms(p), is_natural = makes_natural(p, masked);
    if (terms) {
      const Terms<V, true, E::kRows, E::kKeys> shape(p, seq, head, i0, n, k0, begin, end);
      add_mask(min64(end, keys), masked,
               [&](auto x, int64_t i, int64_t j) { return shape(x, i, j, engine.gain_at(i, j)); });
    } else if (is_natural) {
      add_mask(min64(end, keys), masked,
               [&](auto x, int64_t, int64_t) { return V::mul(x, V::set1(scale)); });
    } else if (masked) {
      add_mask(min64(end, keys), true, [&](auto x, int64_t, int64_t) { return x; });
    }
    if (end > keys || !seq.view(i0, i0 + n).all_see(k0 + begin, k0 + end))
      for (int64_t i = 0; i < n; ++i) hide_outside(i);
    return is_natural;
  }

  // s <- shape(s) + mask
  template <class Shape>
  void add_mask(int64_t last, bool masked, const Shape& shape) const {
    if (!masked) {
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = begin; j < end; j += V::kWidth) {
          T* x = engine.segment(i, j);
          V::store(x, shape(V::load(x), i, j));
        }
      return;
    }
    for (int64_t j = begin; j < end; ++j) mask_row[j] = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (i == 0 || p.mask.row != 0)
        load_mask(mask_row + begin, p.mask, seq.index, head, i0 + i, k0 + begin, last - begin);
      for (int64_t j = begin; j < end; j += V::kWidth) {
        T* x = engine.segment(i, j);
        const auto bias = V::load(mask_row + j);
        V::store(x, V::hidden_where_hidden(V::add(shape(V::load(x), i, j), bias), bias));
      }
    }
  }

  void hide_outside(int64_t i) const {
    const int64_t lo = clamp(seq.lo(i0 + i) - k0, begin, end);
    const int64_t hi = clamp(seq.hi(i0 + i) - k0, lo, end), prefix = seq.k_prefix - k0;
    for (int64_t j = begin; j < end; j += V::kWidth) {
      if ((j >= lo && j + V::kWidth <= hi) || j + V::kWidth <= prefix) continue;
      T* x = engine.segment(i, j);
      if (j >= prefix) {
        V::store(x, V::hidden_but(V::load(x), lo - j, hi - j));
        continue;
      }
      for (int64_t lane = max64(j, prefix); lane < j + V::kWidth; ++lane)
        if (lane < lo || lane >= hi) x[lane - j] = -kInf;
    }
  }
};

// The same where a vector of scores belongs to one key and kWidth queries: engine.column(i, j).
// Queries past the last one are of no account.
template <class E>
struct ColumnCover {
  using V = typename E::V;
  using T = typename V::T;
  static constexpr int64_t kWidth = V::kWidth;
  static constexpr T kInf = static_cast<T>(__builtin_inf());

  const AttentionParams& p;
  const Sequence& seq;
  E& engine;
  T* mask_row;
  int64_t head, i0, n, k0, begin, end;

  bool hide(int64_t keys, T scale, bool masked) const {
    const bool terms = has_terms(p), is_natural = makes_natural(p, masked);
    if (terms) {
      const Terms<V, false, 32, 32> shape(p, seq, head, i0, n, k0, begin, end);
      add_mask(min64(end, keys), masked, [&](auto x, int64_t i, int64_t j) {
        return shape(V::mul(x, V::set1(engine.unit)), i, j, engine.gain_at(i, j));
      });
    } else if (is_natural) {
      add_mask(min64(end, keys), masked,
               [&](auto x, int64_t, int64_t) { return V::mul(x, V::set1(scale * engine.unit)); });
    } else if (masked) {
      add_mask(min64(end, keys), true, [&](auto x, int64_t, int64_t) { return x; });
    }
    if (end > keys || !seq.view(i0, i0 + n).all_see(k0 + begin, k0 + end))
      for (int64_t i = 0; i < n; i += kWidth) hide_outside(i);
    return is_natural;
  }

  // s <- shape(s) + mask
  template <class Shape>
  void add_mask(int64_t last, bool masked, const Shape& shape) const {
    if (!masked) {
      for (int64_t i = 0; i < n; i += kWidth)
        for (int64_t j = begin; j < end; ++j) {
          T* x = engine.column(i, j);
          V::store(x, shape(V::load(x), i, j));
        }
      return;
    }
    const bool by_key = p.mask.row == 0;
    for (int64_t j = begin; j < end; ++j) mask_row[j] = 0;
    if (by_key) load_mask(mask_row + begin, p.mask, seq.index, head, i0, k0 + begin, last - begin);
    for (int64_t i = 0; i < n; i += kWidth)
      for (int64_t j = begin; j < end; j += kWidth) {
        alignas(64) T rows[kWidth * kWidth] = {}, columns[kWidth * kWidth];
        if (!by_key) {
          for (int64_t r = 0; r < min64(kWidth, n - i); ++r)
            load_mask(rows + r * kWidth, p.mask, seq.index, head, i0 + i + r, k0 + j,
                      min64(kWidth, last - j));
          V::transpose(rows, kWidth, columns, kWidth);
        }
        for (int64_t c = 0; c < min64(kWidth, end - j); ++c) {
          T* x = engine.column(i, j + c);
          const auto bias = by_key ? V::set1(mask_row[j + c]) : V::load(columns + c * kWidth);
          V::store(x, V::hidden_where_hidden(V::add(shape(V::load(x), i, j + c), bias), bias));
        }
      }
  }

  // kWidth queries from i; where all see a key nothing is done.
  void hide_outside(int64_t i) const {
    const int64_t rows = min64(kWidth, n - i), prefix = clamp(seq.k_prefix - k0, begin, end);
    const Span all = seq.view(i0 + i, i0 + i + rows).all;
    alignas(64) int32_t lo[kWidth], hi[kWidth];
    seq.columns(i0 + i, rows, k0, begin, end, lo, hi);
    for (int64_t r = rows; r < kWidth; ++r) lo[r] = hi[r] = static_cast<int32_t>(end);
    for (int64_t j = begin; j < end; ++j) {
      T* x = engine.column(i, j);
      if (j < prefix || (j + k0 >= all.lo && j + k0 < all.hi)) continue;
      V::store(x, V::hidden_outside(V::load(x), static_cast<int32_t>(j), lo, hi));
    }
  }
};

}  // namespace
