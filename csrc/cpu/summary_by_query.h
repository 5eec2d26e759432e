// Numbers of each query from its attention weights: the entropy, the largest, and the top few.
#pragma once

#include <stdint.h>
#include <string.h>

#include "summary_scores.h"

namespace {

using clinattn::ForwardTask;
using clinattn::kMostTop;

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
struct ReduceByQuery : SummaryScores<E> {
  using Base = SummaryScores<E>;
  using V = typename E::V;
  using T = typename V::T;
  static constexpr int64_t kChunk = 384;  // queries of a task, all heads of a group
  using Base::arena, Base::asked, Base::by_mask, Base::group, Base::kKeys, Base::kPanel;
  using Base::kInf;
  using Base::kRows, Base::low, Base::made_good, Base::p, Base::scores, Base::steps;
  using typename Base::Exponent;
  static constexpr T kNone = -2048;  // 2^kNone is 0

  double* total;  // (rows): minus the sum of p log2 p, or the largest p
  Best<T>* best;  // (rows), for kTopK
  T* lanes;       // (kWidth, kWidth): one vector for each of kWidth rows

  static int64_t chunk(const AttentionParams& p) {
    return max64(kRows, kChunk / (p.heads / p.kv_heads) / kRows * kRows);
  }

  ReduceByQuery(const AttentionParams& p, const SummaryParams& asked, void* scratch)
      : Base(p, asked, p.heads / p.kv_heads * chunk(p), scratch) {
    const int64_t rows = group * chunk(p);
    total = arena.template take<double>(rows);
    best = arena.template take<Best<T>>(asked.reduce == Reduce::kTopK ? rows : 0);
    lanes = arena.template take<T>(V::kWidth * V::kWidth);
  }

  void run(const ForwardTask& task) {
    const Sequence seq(p, task.seq);
    const int64_t row1 = min64(task.row1, max64(task.row0, seq.q_end)), n = row1 - task.row0;
    if (n <= 0) return;
    const int64_t head_rows = round_up(n, kRows);
    for (int64_t g = 0; g < group; ++g)
      for (int64_t i = 0; i < n; i += kRows)
        this->load_queries(seq, task.kv_head * group + g, task.row0 + i, min64(kRows, n - i),
                           g * head_rows + i);
    for (int64_t i = 0; i < group * head_rows; ++i) {
      total[i] = 0;
      if (asked.reduce == Reduce::kTopK) best[i].clear();
    }
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
      this->pack(seq, task.kv_head, k0, keys);
      for (int64_t g = 0; g < group; ++g) {
        const int64_t head = task.kv_head * group + g;
        this->look_at_mask(seq, head, k0, keys);
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
      this->multiply(seq, head, i0, n, r, k0, step);
      if (asked.reduce == Reduce::kTopK) {
        for (int64_t i = 0; i < n; ++i) find_best(i, r + i, k0 + step.at, step);
        continue;
      }
      for (int64_t i = 0; i < n; i += V::kWidth) {
        const int64_t together = min64(V::kWidth, n - i);
        asked.reduce == Reduce::kEntropy ? add_entropy(i, r + i, together, step)
                                         : find_largest(i, r + i, together, step);
      }
    }
  }

  // total <- total - sum p log2 p of n rows, at most a vector of them, whose sums are formed
  // together
  void add_entropy(int64_t first, int64_t r, int64_t n, const Step& step) {
    // what is below it is 0, also of a hidden key, and has a finite logarithm
    const auto least = V::set1(kNone);
    gather(first, r, n, step, V::zero(), [&](auto sum, auto power) {
      power = V::max(least, power);
      return V::fma(V::exp2(power), power, sum);
    });
    alignas(64) T sums[V::kWidth];
    V::store(sums, V::sum_rows(lanes));
    for (int64_t i = 0; i < n; ++i) total[r + i] -= static_cast<double>(sums[i]);
  }

  // total <- max(total, p) of as many rows
  void find_largest(int64_t first, int64_t r, int64_t n, const Step& step) {
    gather(first, r, n, step, V::set1(-kInf),
           [](auto most, auto power) { return V::max(power, most); });
    alignas(64) T largest[V::kWidth];
    V::store(largest, V::exp2(V::max_rows(lanes)));
    for (int64_t i = 0; i < n; ++i)
      total[r + i] = largest[i] > total[r + i] ? static_cast<double>(largest[i]) : total[r + i];
  }

  // Row i of lanes <- fold(.., log2 p) over the keys of row first + i, from `begin` on
  template <class Fold>
  void gather(int64_t first, int64_t r, int64_t n, const Step& step, typename V::F begin,
              const Fold& fold) {
    for (int64_t i = 0; i < n; ++i) {
      const Exponent e(*this, first + i, r + i);
      auto found = begin;
      for (int64_t j = step.begin; j < step.end; j += V::kWidth)
        found = fold(found, e.of(V::load(scores.segment(first + i, j))));
      V::store(lanes + i * V::kWidth, found);
    }
  }

  void find_best(int64_t i, int64_t r, int64_t key, const Step& step) {
    const Exponent e(*this, i, r);
    T least = above(best[r].values[asked.top - 1]);
    for (int64_t j = step.begin; j < step.end; j += V::kWidth) {
      const auto weight = V::exp2(e.of(V::load(scores.segment(i, j))));
      uint32_t higher = V::reaching(weight, least);
      if (!higher) continue;
      alignas(64) T found[V::kWidth];
      V::store(found, weight);
      while (higher) {
        const int lane = __builtin_ctz(higher);
        best[r].template insert<V>(found[lane], static_cast<int32_t>(key + j + lane));
        least = above(best[r].values[asked.top - 1]);
        higher &= higher - 1;
        higher &= V::reaching(weight, least);
      }
    }
  }

  void write(const Sequence& seq, int64_t head, int64_t row, int64_t r) {
    const int64_t at = this->stat_at(seq, head, row),
                  count = asked.reduce == Reduce::kTopK ? asked.top : 1;
    T* values = static_cast<T*>(asked.values) + at * count;
    const T lse = static_cast<const T*>(p.lse)[at];
    if (lse != lse) {  // of NaN none was the largest
      for (int64_t i = 0; i < count; ++i) values[i] = lse;
      return;
    }
    const double rest = made_good(low[r]);
    switch (asked.reduce) {
      case Reduce::kEntropy:
        *values = static_cast<T>((total[r] * rest + static_cast<double>(low[r])) * kLn2);
        break;
      case Reduce::kMax:
        *values = static_cast<T>(total[r] * rest);
        break;
      default:
        for (int64_t i = 0; i < count; ++i) {
          values[i] = static_cast<T>(best[r].values[i] * rest);
          asked.places[at * count + i] = best[r].places[i];
        }
    }
  }
};

}  // namespace
