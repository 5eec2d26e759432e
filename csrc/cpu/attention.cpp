// The torch side of the CPU kernels: allocation, the list of tasks, threads.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "../interval.h"
#include "added_gradients.h"
#include "dispatch.h"

namespace clinattn {

namespace {

// torch refuses to answer where its old and new settings contradict each other.
Precision matmul_precision() {
  try {
    switch (at::globalContext().float32MatmulPrecision()) {
      case at::Float32MatmulPrecision::MEDIUM:
        return Precision::kMedium;
      case at::Float32MatmulPrecision::HIGH:
        return Precision::kHigh;
      default:
        return Precision::kHighest;
    }
  } catch (const c10::Error&) {
    return Precision::kHighest;
  }
}

// 64-byte aligned memory of a thread, kept between calls so that it stays mapped and in cache.
void* thread_scratch(size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> block;
  thread_local size_t size = 0;
  if (size < bytes) {
    bytes = (bytes + 4095) / 4096 * 4096;
    block.reset(std::aligned_alloc(4096, bytes));
    TORCH_CHECK(block, "out of memory: ", bytes, " bytes of scratch");
    size = bytes;
  }
  if (poison()) std::memset(block.get(), 0xff, bytes);
  return block.get();
}

template <class Task>
struct Plan {
  std::vector<Task> tasks;
  std::vector<double> cost;  // in scores
  void add(const Task& task, double scores) {
    tasks.push_back(task);
    cost.push_back(scores);
  }
};
using ForwardPlan = Plan<ForwardTask>;

// Where batches of neighbouring tasks end. A thread sets up its tiles for each batch, so small
// tasks come several at a time: up to 8192 scores, which are some microseconds, and few enough that
// every thread gets some.
template <class Task>
std::vector<int64_t> batch_ends(const Plan<Task>& plan) {
  const double total = std::accumulate(plan.cost.begin(), plan.cost.end(), 0.0);
  const double most = std::min(8192.0, total / (4 * at::get_num_threads()));
  std::vector<int64_t> ends;
  double scores = 0;
  const auto count = static_cast<int64_t>(plan.tasks.size());
  for (int64_t i = 0; i < count; ++i) {
    scores += plan.cost[i];
    if (i + 1 < count && scores + plan.cost[i + 1] <= most) continue;
    ends.push_back(i + 1);
    scores = 0;
  }
  return ends;
}

// Runs batch(tasks, count, scratch) for all tasks on torch's threads. Batches start in order, each
// as soon as a thread is free.
template <class Task, class Batch>
void run_tasks(const Plan<Task>& plan, size_t scratch_bytes, const Batch& batch) {
  std::atomic<int64_t> next{0};
  const std::vector<int64_t> ends = batch_ends(plan);
  const auto count = static_cast<int64_t>(ends.size());
  const int64_t workers = std::min<int64_t>(count, at::get_num_threads());
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    void* scratch = thread_scratch(scratch_bytes);
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        const int64_t first = i == 0 ? 0 : ends[i - 1];
        batch(plan.tasks.data() + first, ends[i] - first, scratch);
      }
  });
}

// Costliest first, so that no thread is left with a long task at the end.
template <class Task>
Plan<Task> by_cost(const Plan<Task>& plan) {
  std::vector<int64_t> order(plan.tasks.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return plan.cost[a] > plan.cost[b]; });
  Plan<Task> sorted;
  sorted.tasks.reserve(order.size());
  sorted.cost.reserve(order.size());
  for (int64_t i : order) sorted.add(plan.tasks[i], plan.cost[i]);
  return sorted;
}

ForwardPlan cut_forward(const AttentionParams& p, int64_t chunk) {
  constexpr double kPacking = 96;  // a task packs every key it sees, at the cost of so many scores
  const int64_t group = p.heads / p.kv_heads;
  ForwardPlan plan;
  for (int64_t b = 0; b < p.num_seqs; ++b) {
    const Sequence seq(p, b);
    for (int64_t h = 0; h < p.kv_heads; ++h)
      for (int64_t i = 0; i < seq.rows_q; i += chunk) {
        const int64_t end = std::min(i + chunk, seq.rows_q), last = std::min(end, seq.q_end) - 1;
        double cost = 0;
        if (last >= i) {
          const int64_t prefix = seq.k_prefix - seq.k_begin;
          const auto seen = [&](int64_t lo, int64_t hi) {
            return min64(prefix + max64(0, hi - lo), seq.k_end - seq.k_begin);
          };
          const Span some = seq.view(i, last + 1).some;
          const int64_t ends = seen(seq.lo(i), seq.hi(i)) + seen(seq.lo(last), seq.hi(last));
          cost = 0.5 * (last + 1 - i) * group * ends + kPacking * seen(some.lo, some.hi);
        }
        plan.add({b, h, i, end}, cost);
      }
  }
  return plan;
}

// The cost of the busiest of so many threads, each of which takes the costliest task that is left.
double busiest(std::vector<double> cost, int64_t threads) {
  std::sort(cost.begin(), cost.end(), std::greater<>());
  std::vector<double> load(threads, 0);  // a heap with the least loaded thread on top
  for (double x : cost) {
    std::pop_heap(load.begin(), load.end(), std::greater<>());
    load.back() += x;
    std::push_heap(load.begin(), load.end(), std::greater<>());
  }
  return *std::max_element(load.begin(), load.end());
}

// Long tasks pack few keys anew, short ones keep all threads busy to the end. Results do not depend
// on how rows are grouped into tasks.
ForwardPlan forward_tasks(const AttentionParams& p, const CpuKernels& kernels) {
  const int64_t threads = at::get_num_threads();
  const auto few = [&](const ForwardPlan& plan) {
    return static_cast<int64_t>(plan.tasks.size()) < 16 * threads;
  };
  int64_t chunk = kernels.forward_chunk(p);
  ForwardPlan best = cut_forward(p, chunk);
  while (threads > 1 && few(best) && chunk > kernels.forward_rows) {
    chunk = round_up(chunk / 2, kernels.forward_rows);
    ForwardPlan finer = cut_forward(p, chunk);
    if (busiest(finer.cost, threads) < busiest(best.cost, threads)) best = std::move(finer);
  }
  return by_cost(best);
}

std::tuple<Tensor, Tensor, Tensor> cpu_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& q_lengths, const OptionalTensor& kv_start, const OptionalTensor& kv_end,
    const OptionalTensor& lo, const OptionalTensor& hi, const OptionalTensor& times,
    const OptionalTensor& decay, const OptionalTensor& slopes, const OptionalTensor& relative,
    const OptionalTensor& seed, double scale, int64_t window_left, int64_t window_right,
    bool bottom_right, int64_t /*max_seqlen_q*/, int64_t /*max_seqlen_k*/, double softcap,
    int64_t global_prefix, double dropout_p) {
  AttentionParams p = check({q,
                             k,
                             v,
                             mask,
                             cu_seqlens_q,
                             cu_seqlens_k,
                             q_lengths,
                             kv_start,
                             kv_end,
                             lo,
                             hi,
                             times,
                             decay,
                             slopes,
                             relative,
                             seed,
                             scale,
                             window_left,
                             window_right,
                             bottom_right,
                             softcap,
                             global_prefix,
                             dropout_p});
  const auto stat = q.options().dtype(stat_type(q));
  Tensor o = allocate(q.sizes(), q.options());
  const auto stat_sizes = stat_shape(p);
  Tensor lse = allocate(stat_sizes, stat), lse_low = allocate(stat_sizes, stat);
  if (o.numel() == 0) return {o, lse, lse_low};
  if (p.cu_seqlens_q && p.cu_seqlens_q[p.num_seqs] < p.total_q) {
    o.zero_();
    lse.fill_(-std::numeric_limits<double>::infinity());
    lse_low.zero_();
  }
  p.o = o.mutable_data_ptr();
  p.o_strides = strides_of(o);
  p.lse = lse.mutable_data_ptr();
  p.lse_low = lse_low.mutable_data_ptr();
  const CpuKernels& kernels = cpu_kernels(p.dtype, matmul_precision());
  const auto tasks = forward_tasks(p, kernels);
  run_tasks(tasks, kernels.forward_scratch(p),
            [&](const ForwardTask* batch, int64_t count, void* scratch) {
              kernels.forward(p, batch, count, scratch);
            });
  return {o, lse, lse_low};
}

// The key tiles of a head come in order, which the turns on dq rely on. As many heads as there are
// threads go side by side, longest sequences first: then turns are rarely waited for.
Plan<BackwardTask> backward_tasks(const AttentionParams& p, const CpuKernels& kernels) {
  struct Head {
    int64_t seq, kv_head, tiles;
    double tile_cost;
  };
  Plan<Head> heads;
  for (int64_t b = 0; b < p.num_seqs; ++b) {
    const Sequence seq(p, b);
    const int64_t tiles =
        std::max<int64_t>(1, ceil_div(seq.k_end - seq.k_begin, kernels.backward_keys));
    const double group = p.heads / p.kv_heads;
    const double tile_cost =
        group * seq.q_end * std::min(seq.k_end - seq.k_begin, kernels.backward_keys);
    for (int64_t h = 0; h < p.kv_heads; ++h)
      heads.add({b, h, tiles, tile_cost}, static_cast<double>(tiles) * seq.q_end);
  }
  const std::vector<Head> sorted = by_cost(heads).tasks;
  Plan<BackwardTask> plan;
  const size_t side_by_side = at::get_num_threads();
  for (size_t first = 0; first < sorted.size(); first += side_by_side) {
    const size_t last = std::min(first + side_by_side, sorted.size());
    bool more = true;
    for (int64_t tile = 0; more; ++tile) {
      more = false;
      for (size_t h = first; h < last; ++h) {
        const Head& head = sorted[h];
        if (tile < head.tiles) plan.add({head.seq, head.kv_head, tile}, head.tile_cost);
        more |= tile + 1 < head.tiles;
      }
    }
  }
  return plan;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients cpu_backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& o,
                       const Tensor& lse, const OptionalTensor& lse_low, const Tensor& q,
                       const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                       const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                       const OptionalTensor& q_lengths, const OptionalTensor& kv_start,
                       const OptionalTensor& kv_end, const OptionalTensor& lo,
                       const OptionalTensor& hi, const OptionalTensor& times,
                       const OptionalTensor& decay, const OptionalTensor& slopes,
                       const OptionalTensor& relative, const OptionalTensor& seed, double scale,
                       int64_t window_left, int64_t window_right, bool bottom_right,
                       int64_t /*max_seqlen_q*/, int64_t /*max_seqlen_k*/, double softcap,
                       int64_t global_prefix, double dropout_p, int64_t needs) {
  const Arguments arguments{q,
                            k,
                            v,
                            mask,
                            cu_seqlens_q,
                            cu_seqlens_k,
                            q_lengths,
                            kv_start,
                            kv_end,
                            lo,
                            hi,
                            times,
                            decay,
                            slopes,
                            relative,
                            seed,
                            scale,
                            window_left,
                            window_right,
                            bottom_right,
                            softcap,
                            global_prefix,
                            dropout_p};
  AttentionParams p = check(arguments);
  check_needs(arguments, needs);
  const bool packed = p.cu_seqlens_q != nullptr;
  const auto stat = q.options().dtype(stat_type(q));
  const auto stat_sizes = stat_shape(p);
  const BackwardInputs inputs(p, q, dout, dlse, o, lse, lse_low);
  // Clang cannot capture the names of a structured binding under OpenMP.
  const auto gradients = allocate_gradients(p, q, k);
  const Tensor &dq = gradients[0], &dk = gradients[1], &dv = gradients[2];
  const AddedGradientSums added(arguments, p, needs);
  const auto results = [&]() -> Gradients {
    const auto more = added.results();
    return {dq, dk, dv, more.mask, more.decay, more.slopes, more.relative};
  };
  if (packed && p.cu_seqlens_q[p.num_seqs] < p.total_q) dq.zero_();
  if (packed && p.cu_seqlens_k[p.num_seqs] < p.total_k) dk.zero_(), dv.zero_();
  if (p.num_seqs == 0 || p.heads == 0) return results();
  const CpuKernels& kernels = cpu_kernels(p.dtype, matmul_precision());
  BackwardShared shared{};
  const Tensor lse2 = at::empty(stat_sizes, stat), lse2_low = at::empty(stat_sizes, stat),
               delta = at::empty(stat_sizes, stat);
  shared.lse2 = lse2.mutable_data_ptr();
  shared.lse2_low = lse2_low.mutable_data_ptr();
  shared.delta = delta.mutable_data_ptr();
  // dq itself accumulates when its rows are whole vectors of the arithmetic's type
  const int64_t width = round_up(p.head_dim, kernels.vector);
  Tensor dq_acc = dq;
  if (width != p.head_dim || q.scalar_type() != stat_type(q)) {
    auto sizes = q.sizes().vec();
    sizes.back() = width;
    dq_acc = at::empty(sizes, stat);
  }
  shared.dq_acc = dq_acc.mutable_data_ptr();
  shared.dq_acc_strides = strides_of(dq_acc);

  std::vector<int64_t> block_offsets(p.num_seqs);
  std::vector<std::pair<int64_t, int64_t>> rows;  // (sequence, block)
  for (int64_t b = 0; b < p.num_seqs; ++b) {
    block_offsets[b] = static_cast<int64_t>(rows.size()) * p.heads;
    const int64_t blocks = ceil_div(Sequence(p, b).rows_q, kernels.backward_rows) + 1;
    for (int64_t i = 0; i < blocks; ++i) rows.push_back({b, i});
  }
  const int64_t blocks = static_cast<int64_t>(rows.size());
  std::vector<std::atomic<int32_t>> turns(blocks * p.heads);
  shared.turns = turns.data();
  shared.block_offsets = block_offsets.data();
  std::vector<std::atomic<uint32_t>> largest(p.num_seqs * p.kv_heads * 2);
  shared.largest = largest.data();
  shared.added = added.sums();
  at::parallel_for(0, blocks * p.heads, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels.backward_prepare(p, shared, rows[i % blocks].first, i / blocks,
                               rows[i % blocks].second);
  });
  const auto run = [&](const Plan<BackwardTask>& plan) {
    run_tasks(plan, kernels.backward_scratch(p, shared),
              [&](const BackwardTask* batch, int64_t count, void* scratch) {
                kernels.backward(p, shared, batch, count, scratch);
              });
  };
  const auto tasks = backward_tasks(p, kernels);
  if (added.one_by_one()) {
    for (int64_t b = 0; b < p.num_seqs; ++b) {
      Plan<BackwardTask> of_sequence;
      for (size_t i = 0; i < tasks.tasks.size(); ++i)
        if (tasks.tasks[i].seq == b) of_sequence.add(tasks.tasks[i], tasks.cost[i]);
      run(of_sequence);
    }
  } else {
    run(tasks);
  }
  return results();
}

}  // namespace

}  // namespace clinattn

TORCH_LIBRARY_IMPL(clinattn, CPU, m) {
  m.impl("cpu_forward", clinattn::cpu_forward);
  m.impl("cpu_backward", clinattn::cpu_backward);
}
