// Sums of attention weights over the queries, for a panel of keys: what each key receives.
#pragma once

#include "summary_scores.h"

namespace {

using clinattn::BackwardTask;

template <ScoreEngine E>
struct SumByKey : SummaryScores<E> {
  using Base = SummaryScores<E>;
  using V = typename E::V;
  using T = typename V::T;
  using Blocks = QueryBlocks<E::kRows>;
  using Base::arena, Base::asked, Base::by_mask, Base::group, Base::kPanel, Base::p;
  using Base::products, Base::scores, Base::steps, Base::weights;
  using typename Base::Exponent;

  double* sums;  // (kPanel)

  SumByKey(const AttentionParams& p, const SummaryParams& asked, void* scratch)
      : Base(p, asked, E::kRows, scratch) {
    sums = arena.template take<double>(kPanel);
  }

  void run(const BackwardTask& task) {
    const Sequence seq(p, task.seq);
    const int64_t k0 = seq.k_begin + task.tile * kPanel, keys = min64(kPanel, seq.k_end - k0);
    if (keys <= 0) return;
    this->pack(seq, task.kv_head, k0, keys);
    const Span seeing = k0 < seq.k_prefix ? Span{0, seq.q_end}
                                          : Span{seq.first_query(k0), seq.last_query(k0 + keys)};
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = task.kv_head * group + g;
      this->look_at_mask(seq, head, k0, keys);
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
    this->load_queries(seq, head, i0, n, 0);
    for (int64_t i = 0; i < count; ++i) {
      this->multiply(seq, head, i0, n, 0, k0, steps[i]);
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
      if (weights[i] == 0) continue;  // its scores may be NaN
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
        if constexpr (kEdge) {  // a value or a weight may be NaN where the key is not seen
          totals[v] = V::add(totals[v], V::zero_where_hidden(V::mul(weight, f), score));
        } else {
          totals[v] = V::fma(weight, f, totals[v]);
        }
      }
    }
    alignas(64) T columns[kVectors * V::kWidth];
    for (int v = 0; v < kVectors; ++v) V::store(columns + v * V::kWidth, totals[v]);
    for (int64_t x = 0; x < kVectors * V::kWidth; ++x)
      sums[step.at + j + x] += static_cast<double>(columns[x]);
  }
};

}  // namespace
