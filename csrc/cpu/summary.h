// Summaries of the weights p of attention, over an engine E of scores: for a tile of queries and
// kKeys keys at a time
//   s <- q k^T;  p <- 2^(s - lse);  dp <- do v^T where it is asked for
// and p goes into sums over the queries of a panel of keys, or into numbers of each query.
#pragma once

#include <stdint.h>
#include <string.h>

#include "concepts.h"
#include "cover.h"
#include "isa.h"
#include "normaliser.h"
#include "steps.h"

namespace {

using clinattn::BackwardTask;
using clinattn::ForwardTask;
using clinattn::kMostTop;
using clinattn::Reduce;
using clinattn::SummaryParams;

// The largest weights of a query, descending, with the places of their keys
template <class T>
struct Best {
  alignas(64) T values[kMostTop];
  alignas(64) int32_t places[kMostTop];

  void clear() {
    for (int64_t i = 0; i < kMostTop; ++i) values[i] = 0, places[i] = -1;
  }
  // Puts x in behind those that are as large; the last one leaves.
  template <class V>
  void insert(T x, int32_t place) {
    if constexpr (requires { V::insert(values, places, x, place); }) {
      V::insert(values, places, x, place);
    } else {
      int64_t i = kMostTop - 1;
      for (; i > 0 && x > values[i - 1]; --i) {
        values[i] = values[i - 1];
        places[i] = places[i - 1];
      }
      values[i] = x;
      places[i] = place;
    }
  }
};

// The next number above x >= 0
inline float above(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  ++bits;
  memcpy(&x, &bits, sizeof bits);
  return x;
}
inline double above(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  ++bits;
  memcpy(&x, &bits, sizeof bits);
  return x;
}

template <ScoreEngine E>
struct Summary {
  using V = typename E::V;
  using T = typename V::T;
  using Blocks = QueryBlocks<E::kRows>;
  static constexpr int64_t kRows = E::kRows, kKeys = E::kKeys;
  static constexpr int64_t kPanel = 256;  // keys packed together: k of them takes 64 KB at D 64
  static constexpr int64_t kChunk = 384;  // queries of a task by rows, all heads of a group
  static constexpr T kInf = static_cast<T>(__builtin_inf());
  static_assert(kPanel % kKeys == 0);

  const AttentionParams& p;
  const SummaryParams& asked;
  const int64_t group;  // query heads of a kv head
  const int64_t rows;   // queries whose state is here
  Arena arena;
  E scores, products;  // q k^T, and do v^T
  T* mask_row;         // (kKeys)
  // (rows): what is added to log2 p, minus the normaliser but for a large row; what rounding took
  // from that; and the weight of a query, by which what was taken is made good
  T *shift, *low, *weights;
  bool* large;
  T* to_base2;      // (kRows): the factors of the scores at hand
  Sight* by_mask;   // what the mask leaves of each kKeys keys of the panel
  Step* steps;      // those of a tile of queries
  double* sums;     // (kPanel), over queries
  double* entropy;  // (rows)
  T* lanes;         // (kWidth, kWidth): one vector for each of kWidth rows
  Best<T>* best;    // (rows)

  static int64_t chunk(const AttentionParams& p) {
    return max64(kRows, kChunk / (p.heads / p.kv_heads) / kRows * kRows);
  }

  Summary(const AttentionParams& p, const SummaryParams& asked, void* scratch)
      : p(p),
        asked(asked),
        group(p.heads / p.kv_heads),
        rows(asked.by_key() ? kRows : group * chunk(p)),
        arena{static_cast<char*>(scratch)},
        scores(arena, p.head_dim, rows, kPanel),
        products(arena, asked.needs_dp() ? p.value_dim : 0, rows, kPanel) {
    mask_row = arena.take<T>(kKeys);
    shift = arena.take<T>(rows);
    low = arena.take<T>(rows);
    weights = arena.take<T>(rows);
    large = arena.take<bool>(rows);
    to_base2 = arena.take<T>(kRows);
    lanes = arena.take<T>(V::kWidth * V::kWidth);
    by_mask = arena.take<Sight>(kPanel / kKeys);
    steps = arena.take<Step>(kPanel / kKeys);
    sums = arena.take<double>(kPanel);
    entropy = arena.take<double>(rows);
    best = arena.take<Best<T>>(rows);
  }

  static size_t scratch(const AttentionParams& p, const SummaryParams& asked) {
    return Summary(p, asked, nullptr).arena.used;
  }

  // log2 p of a query, but for what rounding took from its normaliser: row i of the tile, r of the
  // state
  struct Exponent {
    typename V::F scale, shift;
    Exponent(const Summary& s, int64_t i, int64_t r)
        : scale(V::set1(s.to_base2[i])), shift(V::set1(s.shift[r])) {}
    typename V::F of(typename V::F score) const { return V::fma(score, scale, shift); }
  };

  // Sums over queries for the keys of a panel
  void run(const BackwardTask& task) {
    const Sequence seq(p, task.seq);
    const int64_t k0 = seq.k_begin + task.tile * kPanel, keys = min64(kPanel, seq.k_end - k0);
    if (keys <= 0) return;
    pack(seq, task.kv_head, k0, keys);
    const Span seeing = k0 < seq.k_prefix ? Span{0, seq.q_end}
                                          : Span{seq.first_query(k0), seq.last_query(k0 + keys)};
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = task.kv_head * group + g;
      look_at_mask(seq, head, k0, keys);
      for (int64_t j = 0; j < kPanel; ++j) sums[j] = 0;
      int64_t b = Blocks::of(seq, 0);
      for (; Blocks::start(seq, b) < min64(seq.q_prefix, seeing.lo); ++b)
        add_block(seq, head, b, k0, keys);
      for (b = max64(b, Blocks::of(seq, seeing.lo)); Blocks::start(seq, b) < seeing.hi; ++b)
        add_block(seq, head, b, k0, keys);
      T* to =
          static_cast<T*>(asked.values) + k0 +
          (p.cu_seqlens_k ? head * p.total_k + seq.k_row0 : (seq.index * p.heads + head) * p.max_k);
      for (int64_t j = 0; j < keys; ++j) to[j] = static_cast<T>(sums[j]);
    }
  }

  void add_block(const Sequence& seq, int64_t head, int64_t index, int64_t k0, int64_t keys) {
    const int64_t i0 = max64(0, Blocks::start(seq, index));
    const int64_t n = min64(Blocks::start(seq, index + 1), seq.q_end) - i0;
    if (n <= 0) return;
    const int64_t count = visible_steps<E>(p, seq, i0, n, k0, keys, by_mask, steps);
    if (count == 0) return;
    load_queries(seq, head, i0, n, 0);
    for (int64_t i = 0; i < count; ++i) {
      multiply(seq, head, i0, n, 0, k0, steps[i]);
      switch (asked.reduce) {
        case Reduce::kGradient:
          add_columns<Reduce::kGradient>(n, steps[i]);
          break;
        case Reduce::kRelevance:
          add_columns<Reduce::kRelevance>(n, steps[i]);
          break;
        default:
          add_columns<Reduce::kReceived>(n, steps[i]);
      }
    }
  }

  template <Reduce kReduce>
  void add_columns(int64_t n, const Step& step) {
    constexpr int kTogether = 4;
    int64_t j = step.begin;
    for (; j + kTogether * V::kWidth <= step.end; j += kTogether * V::kWidth)
      add_vectors<kReduce, kTogether>(n, step, j);
    for (; j < step.end; j += V::kWidth) add_vectors<kReduce, 1>(n, step, j);
  }
  template <Reduce kReduce, int kVectors>
  void add_vectors(int64_t n, const Step& step, int64_t j) {
    step.edge ? add_vectors<kReduce, kVectors, true>(n, step, j)
              : add_vectors<kReduce, kVectors, false>(n, step, j);
  }

  // sums <- sums + sum_i w_i f(p_i) for so many vectors of keys from j on
  template <Reduce kReduce, int kVectors, bool kEdge>
  void add_vectors(int64_t n, const Step& step, int64_t j) {
    typename V::F totals[kVectors];
    for (auto& total : totals) total = V::zero();
    for (int64_t i = 0; i < n; ++i) {
      const Exponent e(*this, i, i);
      const auto weight = V::set1(weights[i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int64_t key = j + v * V::kWidth;
        const auto score = V::load(scores.segment(i, key));
        auto f = V::exp2(e.of(score));
        if constexpr (kReduce != Reduce::kReceived)
          f = V::mul(f, V::load(products.segment(i, key)));
        if constexpr (kReduce == Reduce::kRelevance) f = V::max(V::zero(), f);
        // a value or a weight may be NaN, and a key is not seen
        if constexpr (kEdge) f = V::zero_where_hidden(f, score);
        totals[v] = kEdge ? V::add(totals[v], V::zero_where_hidden(V::mul(weight, f), score))
                          : V::fma(weight, f, totals[v]);
      }
    }
    alignas(64) T columns[kVectors * V::kWidth];
    for (int v = 0; v < kVectors; ++v) V::store(columns + v * V::kWidth, totals[v]);
    for (int64_t x = 0; x < kVectors * V::kWidth; ++x)
      sums[step.at + j + x] += static_cast<double>(columns[x]);
  }

  // Numbers of each query of the task
  void run(const ForwardTask& task) {
    const Sequence seq(p, task.seq);
    const int64_t row1 = min64(task.row1, max64(task.row0, seq.q_end)), n = row1 - task.row0;
    if (n <= 0) return;
    const int64_t head_rows = round_up(n, kRows);
    for (int64_t g = 0; g < group; ++g)
      for (int64_t i = 0; i < n; i += kRows)
        load_queries(seq, task.kv_head * group + g, task.row0 + i, min64(kRows, n - i),
                     g * head_rows + i);
    for (int64_t i = 0; i < group * head_rows; ++i) entropy[i] = 0, best[i].clear();
    const Span some = seq.view(task.row0, row1).some;
    // where keys are cut does not depend on the task
    const int64_t first = (some.lo - seq.k_begin) / kKeys * kKeys,
                  prefix = round_up(seq.k_prefix - seq.k_begin, kKeys);
    panels(seq, task, n, seq.k_begin, min64(seq.k_begin + prefix, seq.k_end));
    if (!some.empty()) panels(seq, task, n, seq.k_begin + max64(first, prefix), some.hi);
    for (int64_t g = 0; g < group; ++g)
      for (int64_t i = 0; i < n; ++i)
        write(seq, task.kv_head * group + g, task.row0 + i, g * head_rows + i);
  }

  void panels(const Sequence& seq, const ForwardTask& task, int64_t n, int64_t k0, int64_t k1) {
    for (; k0 < k1; k0 += kPanel) {
      const int64_t keys = min64(kPanel, k1 - k0);
      pack(seq, task.kv_head, k0, keys);
      for (int64_t g = 0; g < group; ++g) {
        const int64_t head = task.kv_head * group + g;
        look_at_mask(seq, head, k0, keys);
        for (int64_t i = 0; i < n; i += kRows)
          fold(seq, head, task.row0 + i, min64(kRows, n - i), g * round_up(n, kRows) + i, k0, keys);
      }
    }
  }

  // Keys [k0, k0 + keys) into n queries from i0, whose state lies from r on
  void fold(const Sequence& seq, int64_t head, int64_t i0, int64_t n, int64_t r, int64_t k0,
            int64_t keys) {
    const int64_t count = visible_steps<E>(p, seq, i0, n, k0, keys, by_mask, steps);
    for (int64_t at = 0; at < count; ++at) {
      const Step& step = steps[at];
      multiply(seq, head, i0, n, r, k0, step);
      if (asked.reduce == Reduce::kEntropy) {
        for (int64_t i = 0; i < n; i += V::kWidth)
          add_entropy(i, r + i, min64(V::kWidth, n - i), step);
      } else {
        for (int64_t i = 0; i < n; ++i) find_best(i, r + i, k0 + step.at, step);
      }
    }
  }

  // entropy <- entropy - sum p log2 p of at most a vector of rows, whose sums are formed together
  void add_entropy(int64_t first, int64_t r, int64_t n, const Step& step) {
    for (int64_t i = 0; i < n; ++i) {
      const Exponent e(*this, first + i, r + i);
      auto total = V::zero();
      for (int64_t j = step.begin; j < step.end; j += V::kWidth) {
        // a weight that is 0 below this has a finite logarithm, also of a hidden key
        const auto power =
            V::max(V::set1(2 * kLeastPower), e.of(V::load(scores.segment(first + i, j))));
        total = V::fma(V::exp2(power), power, total);
      }
      V::store(lanes + i * V::kWidth, total);
    }
    alignas(64) T totals[V::kWidth];
    V::store(totals, V::sum_rows(lanes));
    for (int64_t i = 0; i < n; ++i) entropy[r + i] -= static_cast<double>(totals[i]);
  }

  void find_best(int64_t i, int64_t r, int64_t key, const Step& step) {
    const Exponent e(*this, i, r);
    const int64_t last = asked.reduce == Reduce::kMax ? 0 : asked.top - 1;
    T least = above(best[r].values[last]);
    for (int64_t j = step.begin; j < step.end; j += V::kWidth) {
      const auto weight = V::exp2(e.of(V::load(scores.segment(i, j))));
      uint32_t higher = V::reaching(weight, least);
      if (!higher) continue;
      alignas(64) T found[V::kWidth];
      V::store(found, weight);
      while (higher) {
        const int lane = __builtin_ctz(higher);
        best[r].template insert<V>(found[lane], static_cast<int32_t>(key + j + lane));
        least = above(best[r].values[last]);
        higher &= higher - 1;
        higher &= V::reaching(weight, least);
      }
    }
  }

  void write(const Sequence& seq, int64_t head, int64_t row, int64_t r) {
    const int64_t at = stat_at(seq, head, row),
                  count = asked.reduce == Reduce::kTopK ? asked.top : 1;
    T* values = static_cast<T*>(asked.values) + at * count;
    const T lse = static_cast<const T*>(p.lse)[at];
    if (lse != lse) {  // of NaN none was the largest
      for (int64_t i = 0; i < count; ++i) values[i] = lse;
    } else if (asked.reduce == Reduce::kEntropy) {
      *values =
          static_cast<T>((entropy[r] * made_good(low[r]) + static_cast<double>(low[r])) * kLn2);
    } else {
      for (int64_t i = 0; i < count; ++i)
        values[i] = static_cast<T>(best[r].values[i] * made_good(low[r]));
      for (int64_t i = 0; asked.reduce == Reduce::kTopK && i < count; ++i)
        asked.places[at * count + i] = best[r].places[i];
    }
  }

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
      weights[r + i] = asked.weights ? static_cast<const T*>(asked.weights)[at] : 1;
      const bool read = lse != -kInf && weights[r + i] != 0;
      const TwoPart<T> two = !read                      ? TwoPart<T>{kInf, 0}
                             : is_large_normaliser(lse) ? TwoPart<T>{lse, base2(lse_low, 0).high}
                                                        : base2(lse, lse_low);
      large[r + i] = read && is_large_normaliser(lse);
      shift[r + i] = large[r + i] ? 0 : -two.high;
      low[r + i] = two.low;
      weights[r + i] = static_cast<T>(weights[r + i] * made_good(two.low));
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
