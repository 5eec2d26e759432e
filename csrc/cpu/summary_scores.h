// Weights p of tiles of attention for summaries, over an engine E of scores:
//   s <- q k^T;  p <- 2^(s - lse);  dp <- do v^T where it is asked for
#pragma once

#include "concepts.h"
#include "cover.h"
#include "isa.h"
#include "normaliser.h"
#include "steps.h"

namespace {

using clinattn::Reduce;
using clinattn::SummaryParams;

// State of `rows` queries, and a panel of keys
template <ScoreEngine E>
struct SummaryScores {
  using V = typename E::V;
  using T = typename V::T;
  static constexpr int64_t kRows = E::kRows, kKeys = E::kKeys;
  static constexpr int64_t kPanel = 256;  // keys packed together: k of them takes 64 KB at D 64
  static constexpr T kInf = static_cast<T>(__builtin_inf());
  static_assert(kPanel % kKeys == 0);

  const AttentionParams& p;
  const SummaryParams& asked;
  const int64_t group;  // query heads of a kv head
  Arena arena;
  E scores, products;  // q k^T, and do v^T
  T* mask_row;         // (kKeys)
  // (rows): what is added to log2 p, minus the normaliser but for a large row; what rounding took
  // from that; and the weight of a query, by which what was taken is made good, 0 where it is not
  // read
  T *shift, *low, *weights;
  bool* large;
  T* to_base2;     // (kRows): the factors of the scores at hand
  Sight* by_mask;  // what the mask leaves of each kKeys keys of the panel
  Step* steps;     // those of a tile of queries

  SummaryScores(const AttentionParams& p, const SummaryParams& asked, int64_t rows, void* scratch)
      : p(p),
        asked(asked),
        group(p.heads / p.kv_heads),
        arena{static_cast<char*>(scratch)},
        scores(arena, p.head_dim, rows, kPanel),
        products(arena, asked.needs_dp() ? p.value_dim : 0, rows, kPanel) {
    mask_row = arena.take<T>(kKeys);
    shift = arena.take<T>(rows);
    low = arena.take<T>(rows);
    weights = arena.take<T>(rows);
    large = arena.take<bool>(rows);
    to_base2 = arena.take<T>(kRows);
    by_mask = arena.take<Sight>(kPanel / kKeys);
    steps = arena.take<Step>(kPanel / kKeys);
  }

  // log2 p of a query, but for what rounding took from its normaliser: row i of the tile, r of the
  // state
  struct Exponent {
    typename V::F scale, shift;
    Exponent(const SummaryScores& s, int64_t i, int64_t r)
        : scale(V::set1(s.to_base2[i])), shift(V::set1(s.shift[r])) {}
    typename V::F of(typename V::F score) const { return V::fma(score, scale, shift); }
  };

  // 2^-low
  static double made_good(T low) {
    return low == 0 ? 1 : __builtin_exp2(-static_cast<double>(low));
  }

  int64_t stat_at(const Sequence& seq, int64_t head, int64_t row) const {
    return p.cu_seqlens_q ? head * p.total_q + seq.q_row0 + row
                          : (seq.index * p.heads + head) * p.max_q + row;
  }

  // A query that sees nothing, or of weight 0, is packed as zeros: whatever it holds reaches no
  // sum.
  void load_queries(const Sequence& seq, int64_t head, int64_t i0, int64_t n, int64_t r) {
    const void *q_rows[kRows], *do_rows[kRows];
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = stat_at(seq, head, i0 + i), row = seq.q_row0 + i0 + i;
      const T lse = static_cast<const T*>(p.lse)[at];
      const T lse_low = p.lse_low ? static_cast<const T*>(p.lse_low)[at] : 0;
      const T weight = asked.weights ? static_cast<const T*>(asked.weights)[at] : 1;
      const bool read = lse != -kInf && weight != 0;
      const TwoPart<T> two = !read                      ? TwoPart<T>{kInf, 0}
                             : is_large_normaliser(lse) ? TwoPart<T>{lse, base2(lse_low, 0).high}
                                                        : base2(lse, lse_low);
      large[r + i] = read && is_large_normaliser(lse);
      shift[r + i] = large[r + i] ? 0 : -two.high;
      low[r + i] = two.low;
      weights[r + i] = read ? static_cast<T>(weight * made_good(two.low)) : 0;
      q_rows[i] = read ? row_at(p.q, p.dtype, p.q_strides, seq.index, head, row) : nullptr;
      if (asked.needs_dp())
        do_rows[i] = read ? row_at(p.dout, p.dtype, p.do_strides, seq.index, head, row) : nullptr;
    }
    scores.put_queries(r, n, q_rows, p.dtype, p.scale < 0);
    if (asked.needs_dp()) products.put_queries(r, n, do_rows, p.dtype, false);
  }

  void pack(const Sequence& seq, int64_t kv_head, int64_t k0, int64_t keys) {
    for (int64_t j = 0; j < keys; j += E::kBlock) {
      const KeyRows<E::kBlock> rows_of(p, seq, kv_head, k0 + j, keys - j);
      const int64_t n = min64(E::kBlock, keys - j);
      scores.put_keys(j, n, rows_of.k, p.dtype);
      if (asked.needs_dp()) products.put_keys(j, n, rows_of.v, p.dtype);
    }
  }

  void look_at_mask(const Sequence& seq, int64_t head, int64_t k0, int64_t keys) {
    for (int64_t at = 0; at < keys; at += kKeys)
      by_mask[at / kKeys] = mask_sight(p, seq, head, k0 + at, min64(kKeys, keys - at), mask_row);
  }

  // s <- scores of n queries from i0, packed from r on, with the keys of a step, -inf where they
  // are not seen; of a large row natural ones less lse.
  void multiply(const Sequence& seq, int64_t head, int64_t i0, int64_t n, int64_t r, int64_t k0,
                const Step& step) {
    scores.multiply(r, n, step.at, step.begin, step.end);
    if (asked.needs_dp()) products.multiply(r, n, step.at, step.begin, step.end);
    Units<T> units = Units<T>::of(p);
    if (step.edge) {
      const typename E::Cover cover{p,  seq, scores,       mask_row,   head,
                                    i0, n,   k0 + step.at, step.begin, step.end};
      if (cover.hide(step.keys, units.natural, step.masked)) units = Units<T>::of_natural();
    }
    for (int64_t i = 0; i < n; ++i) {
      to_base2[i] = units.base2;
      if (!large[r + i]) continue;
      to_base2[i] = static_cast<T>(kLog2e);
      const T lse = static_cast<const T*>(p.lse)[stat_at(seq, head, i0 + i)];
      for (int64_t j = step.begin; j < step.end; j += V::kWidth) {
        T* x = scores.segment(i, j);
        V::store(x, V::sub(V::mul(V::load(x), V::set1(units.natural)), V::set1(lse)));
      }
    }
  }
};

}  // namespace
