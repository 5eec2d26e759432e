// The algorithm's entry points for engines of the two passes and of scores, as the table that the
// torch side calls.
#pragma once

#include "backward.h"
#include "concepts.h"
#include "fma_backward.h"
#include "fma_forward.h"
#include "forward.h"
#include "peak.h"
#include "rotary.h"
#include "summary_by_key.h"
#include "summary_by_query.h"

namespace {

template <ScoreEngine S, class Summary, class Task>
void summarise(const AttentionParams& p, const SummaryParams& asked, const Task* tasks,
               int64_t count, void* scratch) {
  [[maybe_unused]] typename S::Session session;
  Summary summary(p, asked, scratch);
  for (int64_t i = 0; i < count; ++i) summary.run(tasks[i]);
}

template <ForwardEngine F, BackwardEngine B, ScoreEngine S>
clinattn::CpuKernels make_kernels(const char* name, int64_t (*peak_loop)(int64_t)) {
  return {
      name,
      F::kRows,
      B::kRows,
      B::kKeys,
      Backward<B>::kWidth,
      Forward<F>::chunk,
      Forward<F>::scratch,
      [](const AttentionParams& p, const ForwardTask* tasks, int64_t count, void* scratch) {
        [[maybe_unused]] typename F::Session session;
        Forward<F> forward(p, scratch);
        for (int64_t i = 0; i < count; ++i) forward.run(tasks[i]);
      },
      Backward<B>::scratch,
      Backward<B>::prepare,
      [](const AttentionParams& p, const BackwardShared& shared, const BackwardTask* tasks,
         int64_t count, void* scratch) {
        [[maybe_unused]] typename B::Session session;
        Backward<B> backward(p, shared, scratch);
        for (int64_t i = 0; i < count; ++i) backward.run(tasks[i]);
      },
      SumByKey<S>::kPanel,
      S::kRows,
      ReduceByQuery<S>::chunk,
      [](const AttentionParams& p, const SummaryParams& asked) {
        return asked.by_key() ? SumByKey<S>(p, asked, nullptr).arena.used
                              : ReduceByQuery<S>(p, asked, nullptr).arena.used;
      },
      summarise<S, SumByKey<S>, BackwardTask>,
      summarise<S, ReduceByQuery<S>, ForwardTask>,
      peak_loop,
      [](const RotaryParams& p, int64_t seq, int64_t begin, int64_t end, void* scratch) {
        Rotary<typename F::V>(p, scratch).run(seq, begin, end);
      },
  };
}

}  // namespace
