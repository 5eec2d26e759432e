// The two passes on a CPU: allocation, and the order of what threads do.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "../interval.h"
#include "added_gradients.h"
#include "call.h"
#include "dispatch.h"
#include "tasks.h"

namespace clinattn {

namespace {

Precision precision_of(int64_t number) { return static_cast<Precision>(number); }

Tensor allocate_o(AttentionParams& p, const Tensor& q) {
  Tensor o = empty(output_shape(p, q), q.scalar_type(), q);
  p.o = o.mutable_data_ptr();
  p.o_strides = strides_of(o);
  return o;
}

void run_forward(const AttentionParams& p, Precision precision) {
  const CpuKernels& kernels = cpu_kernels(p.dtype, precision);
  run_tasks(tasks_of_queries(p, kernels.forward_chunk(p), kernels.forward_rows),
            kernels.forward_scratch(p),
            [&](const ForwardTask* batch, int64_t tasks, void* scratch) {
              kernels.forward(p, batch, tasks, scratch);
            });
}

// Returns o, lse and lse_low.
std::array<Tensor, 3> forward(const Arguments& a, Precision precision) {
  AttentionParams p = check(a);
  const auto stat_sizes = stat_shape(p);
  const Tensor o = allocate_o(p, a.q), lse = empty(stat_sizes, stat_type(a.q), a.q),
               lse_low = empty(stat_sizes, stat_type(a.q), a.q);
  if (o.numel() > 0) {
    if (p.cu_seqlens_q && p.cu_seqlens_q[p.num_seqs] < p.total_q) {
      zero(o);
      fill(lse, -std::numeric_limits<double>::infinity());
      zero(lse_low);
    }
    p.lse = lse.mutable_data_ptr();
    p.lse_low = lse_low.mutable_data_ptr();
    run_forward(p, precision);
  }
  return {o, lse, lse_low};
}

void cpu_forward(StableIValue* values, uint64_t count, uint64_t) {
  Stack stack(values, count);
  const Arguments a = stack.pop_arguments();
  const auto [o, lse, lse_low] = forward(a, precision_of(stack.pop<int64_t>()));
  stack.push({o, lse, lse_low});
}

void cpu_bare_forward(StableIValue* values, uint64_t count, uint64_t) {
  Stack stack(values, count);
  const Arguments a = stack.pop_bare();
  const auto [o, lse, lse_low] = forward(a, precision_of(stack.pop<int64_t>()));
  stack.push({o, lse, lse_low});
}

// o alone, which is all that inference takes
void cpu_bare_output(StableIValue* values, uint64_t count, uint64_t) {
  Stack stack(values, count);
  const Arguments a = stack.pop_bare();
  const Precision precision = precision_of(stack.pop<int64_t>());
  AttentionParams p = check(a);
  p.lse = p.lse_low = nullptr;
  const Tensor o = allocate_o(p, a.q);
  if (o.numel() > 0) run_forward(p, precision);
  stack.push({o});
}

// A block of query rows of a sequence
struct Block {
  int64_t sequence, index;
};

std::vector<Block> query_blocks(const AttentionParams& p, const CpuKernels& kernels) {
  std::vector<Block> blocks;
  for (int64_t b = 0; b < p.num_seqs; ++b) {
    const int64_t count = ceil_div(Sequence(p, b).rows_q, kernels.backward_rows) + 1;
    for (int64_t i = 0; i < count; ++i) blocks.push_back({b, i});
  }
  return blocks;
}

// dq itself accumulates when its rows are whole vectors of the arithmetic's type.
Tensor accumulator(const AttentionParams& p, const CpuKernels& kernels, const Tensor& dq) {
  const int64_t width = round_up(p.head_dim, kernels.vector);
  if (width == p.head_dim && dq.scalar_type() == stat_type(dq)) return dq;
  auto sizes = dq.sizes().vec();
  sizes.back() = width;
  return empty(sizes, stat_type(dq), dq);
}

// The memory that the tasks of a backward call share
class BackwardMemory {
 public:
  BackwardMemory(const AttentionParams& p, const CpuKernels& kernels, const Tensor& dq,
                 const AddedSums& added)
      : blocks(query_blocks(p, kernels)),
        dq_acc_(accumulator(p, kernels, dq)),
        statistics_(empty(three(stat_shape(p)), stat_type(dq), dq)),
        first_turns_(p.num_seqs),
        turns_(blocks.size() * p.heads),
        largest_(p.num_seqs * p.kv_heads * 2) {
    for (size_t i = blocks.size(); i-- > 0;) first_turns_[blocks[i].sequence] = i * p.heads;
    char* statistics = static_cast<char*>(statistics_.mutable_data_ptr());
    const int64_t size = statistics_.stride(0) * (p.dtype == DType::kFloat64 ? 8 : 4);
    shared.lse2 = statistics;
    shared.lse2_low = statistics + size;
    shared.delta = statistics + 2 * size;
    shared.dq_acc = dq_acc_.mutable_data_ptr();
    shared.dq_acc_strides = strides_of(dq_acc_);
    shared.turns = turns_.data();
    shared.block_offsets = first_turns_.data();
    shared.largest = largest_.data();
    shared.added = added;
  }

  const std::vector<Block> blocks;
  BackwardShared shared{};

 private:
  static Shape three(const Shape& x) {
    Shape shape{{3}, x.rank + 1};
    std::copy_n(x.sizes.begin(), x.rank, shape.sizes.begin() + 1);
    return shape;
  }

  Tensor dq_acc_, statistics_;  // lse2, lse2_low and delta
  std::vector<int64_t> first_turns_;
  std::vector<std::atomic<int32_t>> turns_;
  std::vector<std::atomic<uint32_t>> largest_;
};

void prepare(const AttentionParams& p, const CpuKernels& kernels, const BackwardMemory& memory) {
  const auto blocks = static_cast<int64_t>(memory.blocks.size());
  torch::stable::parallel_for(0, blocks * p.heads, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Block& block = memory.blocks[i % blocks];
      kernels.backward_prepare(p, memory.shared, block.sequence, i / blocks, block.index);
    }
  });
}

Plan<BackwardTask> of_sequence(const Plan<BackwardTask>& plan, int64_t sequence) {
  Plan<BackwardTask> some;
  for (size_t i = 0; i < plan.tasks.size(); ++i)
    if (plan.tasks[i].seq == sequence) some.add(plan.tasks[i], plan.cost[i]);
  return some;
}

void run_backward(const AttentionParams& p, const CpuKernels& kernels, const BackwardShared& shared,
                  bool one_by_one) {
  const auto run = [&](const Plan<BackwardTask>& plan) {
    run_tasks(plan, kernels.backward_scratch(p, shared),
              [&](const BackwardTask* batch, int64_t tasks, void* scratch) {
                kernels.backward(p, shared, batch, tasks, scratch);
              });
  };
  const Plan<BackwardTask> plan = tasks_of_keys(p, kernels.backward_keys);
  if (!one_by_one) return run(plan);
  for (int64_t b = 0; b < p.num_seqs; ++b) run(of_sequence(plan, b));
}

// Returns dq, dk and dv, and the gradients that `added` sums.
std::array<Tensor, 3> backward(const BackwardArguments& b, AttentionParams& p, Precision precision,
                               const AddedGradientSums& added) {
  const BackwardInputs inputs(p, b);
  const auto grads = allocate_gradients(p, b.call);
  const auto& [dq, dk, dv] = grads;
  if (p.cu_seqlens_q && p.cu_seqlens_q[p.num_seqs] < p.total_q) zero(dq);
  if (p.cu_seqlens_k && p.cu_seqlens_k[p.num_seqs] < p.total_k) zero(dk), zero(dv);
  if (p.num_seqs > 0 && p.heads > 0) {
    const CpuKernels& kernels = cpu_kernels(p.dtype, precision);
    const BackwardMemory memory(p, kernels, dq, added.sums());
    prepare(p, kernels, memory);
    run_backward(p, kernels, memory.shared, added.one_by_one());
  }
  return grads;
}

void cpu_backward(StableIValue* values, uint64_t count, uint64_t) {
  Stack stack(values, count);
  const BackwardArguments b = stack.pop_backward();
  const Precision precision = precision_of(stack.pop<int64_t>());
  AttentionParams p = check(b.call);
  check_needs(b.call, b.needs);
  const AddedGradientSums added(b.call, p, b.needs);
  const auto [dq, dk, dv] = backward(b, p, precision, added);
  stack.push({dq, dk, dv, added.mask(), added.decay(), added.slopes(), added.relative()});
}

void cpu_bare_backward(StableIValue* values, uint64_t count, uint64_t) {
  Stack stack(values, count);
  const BackwardArguments b = stack.pop_bare_backward();
  const Precision precision = precision_of(stack.pop<int64_t>());
  AttentionParams p = check(b.call);
  const AddedGradientSums added(b.call, p, b.needs);
  const auto [dq, dk, dv] = backward(b, p, precision, added);
  stack.push({dq, dk, dv});
}

}  // namespace

}  // namespace clinattn

STABLE_TORCH_LIBRARY_IMPL(clinattn, CPU, m) {
  m.impl("cpu_forward", clinattn::cpu_forward);
  m.impl("cpu_backward", clinattn::cpu_backward);
  m.impl("cpu_bare_output", clinattn::cpu_bare_output);
  m.impl("cpu_bare_forward", clinattn::cpu_bare_forward);
  m.impl("cpu_bare_backward", clinattn::cpu_bare_backward);
}
