// Summaries of attention weights on a CPU.
#include <torch/csrc/stable/library.h>

#include "call.h"
#include "dispatch.h"
#include "tasks.h"

namespace clinattn {

namespace {

void run(const AttentionParams& p, const SummaryParams& asked, const CpuKernels& kernels) {
  const size_t scratch = kernels.summary_scratch(p, asked);
  if (asked.by_key()) {
    run_tasks(tasks_of_keys(p, kernels.summary_keys), scratch,
              [&](const BackwardTask* batch, int64_t tasks, void* memory) {
                kernels.sum_by_key(p, asked, batch, tasks, memory);
              });
  } else {
    run_tasks(tasks_of_queries(p, kernels.summary_chunk(p), kernels.summary_rows), scratch,
              [&](const ForwardTask* batch, int64_t tasks, void* memory) {
                kernels.reduce_by_query(p, asked, batch, tasks, memory);
              });
  }
}

void cpu_summary(StableIValue* values, uint64_t count, uint64_t) {
  Stack stack(values, count);
  const SummaryArguments a = stack.pop_summary();
  const auto precision = static_cast<Precision>(stack.pop<int64_t>());
  AttentionParams p = check(a.call);
  SummaryParams asked;
  const SummaryInputs inputs(p, asked, a);
  const auto [found, places] = allocate_summary(p, asked, a.call.q);
  if (found.numel() > 0 && p.num_seqs > 0) run(p, asked, cpu_kernels(p.dtype, precision));
  stack.push({found, places});
}

}  // namespace

}  // namespace clinattn

STABLE_TORCH_LIBRARY_IMPL(clinattn, CPU, m) { m.impl("cpu_summary", clinattn::cpu_summary); }
