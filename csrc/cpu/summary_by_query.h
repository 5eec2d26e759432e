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
  // Puts numbers in behind those that are as large; only the first `top` are kept.
  void insert(T x, int32_t place, int64_t top) {
    if (!(x > values[top - 1])) return;
    int64_t i = top - 1;
    for (; i > 0 && x > values[i - 1]; --i) {
      values[i] = values[i - 1];
      places[i] = places[i - 1];
    }
    values[i] = x;
    places[i] = place;
  }
};

// A margin for the errors of an exponential and of log2_below, many times as large as both
constexpr float kSlack = 0.001f;

// At most log2 x, less by 0.09 + kSlack at most: the logarithm is concave, and linear between the
// powers of two it is below itself. -2048 for what is below the normal numbers.
inline float log2_below(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits < 1 << 23 ? -2048 : static_cast<float>(bits) * 0x1p-23f - (127 + kSlack);
}
inline double log2_below(double x) {
  int64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits < int64_t{1} << 52 ? -2048 : static_cast<double>(bits) * 0x1p-52 - (1023 + kSlack);
}

// Puts the lanes of x whose bit is set, and their places, behind each other; returns how many.
template <class V>
int64_t keep(typename V::F x, uint32_t lanes, int32_t place, typename V::T* to, int32_t* places) {
  if constexpr (requires { V::keep(x, lanes, place, to, places); }) {
    V::keep(x, lanes, place, to, places);
  } else if (lanes) {
    alignas(64) typename V::T all[V::kWidth];
    V::store(all, x);
    for (uint32_t rest = lanes; rest; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      *to++ = all[lane];
      *places++ = place + lane;
    }
  }
  return __builtin_popcount(lanes);
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
  static constexpr T kNone = -2048;                    // 2^kNone is 0
  static constexpr int64_t kTogether = 4;              // rows whose lists grow side by side
  static constexpr int64_t kRoom = kKeys + V::kWidth;  // numbers are stored by whole vectors

  double* total;  // (rows): minus the sum of p log2 p, or the largest p
  Best<T>* best;  // (rows), for kTopK
  T* lanes;       // (kWidth, kWidth): one vector for each of kWidth rows
  // (kTogether, kRoom): keys of a step that may be among the best, log2 p and then p
  T* powers;
  int32_t* places;

  static int64_t chunk(const AttentionParams& p) {
    return max64(kRows, kChunk / (p.heads / p.kv_heads) / kRows * kRows);
  }

  ReduceByQuery(const AttentionParams& p, const SummaryParams& asked, void* scratch)
      : Base(p, asked, p.heads / p.kv_heads * chunk(p), scratch) {
    const int64_t rows = group * chunk(p);
    total = arena.template take<double>(rows);
    best = arena.template take<Best<T>>(asked.reduce == Reduce::kTopK ? rows : 0);
    lanes = arena.template take<T>(V::kWidth * V::kWidth);
    powers = arena.template take<T>(kTogether * kRoom);
    places = arena.template take<int32_t>(kTogether * kRoom);
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
        for (int64_t i = 0; i < n; i += kTogether)
          find_best(i, r + i, min64(kTogether, n - i), k0 + step.at, step);
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

  // Puts keys of n rows, at most kTogether, into the lists of these rows.
  void find_best(int64_t first, int64_t r, int64_t n, int64_t key, const Step& step) {
    int64_t counts[kTogether] = {}, most = 0;
    for (int64_t i = 0; i < n; ++i) {
      counts[i] = candidates(first + i, r + i, key, step, powers + i * kRoom, places + i * kRoom);
      most = max64(most, counts[i]);
    }
    if (!most) return;
    for (int64_t i = 0; i < n; ++i) {
      T* weights = powers + i * kRoom;
      for (int64_t at = 0; at < counts[i]; at += V::kWidth)
        V::store(weights + at, V::exp2(V::load(weights + at)));
      for (int64_t at = counts[i]; at < most; at += V::kWidth) V::store(weights + at, V::zero());
    }
    if constexpr (requires { V::insert(best, powers, places, kRoom, most); }) {
      if (n == kTogether) return V::insert(best + r, powers, places, kRoom, most);
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t at = 0; at < counts[i]; ++at)
        best[r + i].insert(powers[i * kRoom + at], places[i * kRoom + at], asked.top);
  }

  // Writes the powers and places of the keys of a row that may be among its best, which are few:
  // where the list is not full, as many lanes reach a bound as it has places. Returns how many.
  int64_t candidates(int64_t i, int64_t r, int64_t key, const Step& step, T* to, int32_t* at) {
    const Exponent e(*this, i, r);
    auto most = V::set1(-kInf);
    for (int64_t j = step.begin; j < step.end; j += V::kWidth)
      most = V::max(e.of(V::load(scores.segment(i, j))), most);
    const T last = best[r].values[asked.top - 1],
            least = last > 0 ? log2_below(last) : reached(most);
    if (!V::reaching(most, least)) return 0;
    int64_t n = 0;
    for (int64_t j = step.begin; j < step.end; j += V::kWidth) {
      const auto power = e.of(V::load(scores.segment(i, j)));
      n += keep<V>(power, V::reaching(power, least), static_cast<int32_t>(key + j), to + n, at + n);
    }
    return n;
  }

  // Returns a number that the powers of as many lanes reach as the list has places, or kNone.
  T reached(typename V::F most) const {
    alignas(64) T of_lane[V::kWidth];
    V::store(of_lane, most);
    // the lane that the fewest lanes reach, but enough; its number behind what is too many
    uint32_t found = ~0u;
    for (uint32_t lane = 0; lane < V::kWidth; ++lane) {
      const int reaching = __builtin_popcount(V::reaching(most, of_lane[lane]));
      const uint32_t order = static_cast<uint32_t>(reaching - asked.top) * V::kWidth + lane;
      found = order < found ? order : found;
    }
    return found < V::kWidth * V::kWidth ? of_lane[found % V::kWidth] - kSlack : kNone;
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
