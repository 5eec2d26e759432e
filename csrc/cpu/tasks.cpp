#include "tasks.h"

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <memory>
#include <utility>

#include "../interval.h"
#include "../tensor.h"

namespace clinattn {

namespace {

// Costliest first, so that no thread is left with a long task at the end.
template <class Task>
Plan<Task> by_cost(Plan<Task> plan) {
  if (std::is_sorted(plan.cost.begin(), plan.cost.end(), std::greater<>())) return plan;
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

Plan<ForwardTask> cut_forward(const AttentionParams& p, int64_t chunk) {
  constexpr double kPacking = 96;  // a task packs every key it sees, at the cost of so many scores
  const int64_t group = p.heads / p.kv_heads;
  Plan<ForwardTask> plan;
  plan.reserve(p.num_seqs * p.kv_heads);
  for (int64_t b = 0; b < p.num_seqs; ++b) {
    const Sequence seq(p, b);
    const auto cost_of = [&](int64_t i, int64_t last) -> double {
      if (last < i) return 0;
      const int64_t prefix = seq.k_prefix - seq.k_begin;
      const auto seen = [&](int64_t lo, int64_t hi) {
        return min64(prefix + max64(0, hi - lo), seq.k_end - seq.k_begin);
      };
      const Span some = seq.view(i, last + 1).some;
      const int64_t ends = seen(seq.lo(i), seq.hi(i)) + seen(seq.lo(last), seq.hi(last));
      return 0.5 * (last + 1 - i) * group * ends + kPacking * seen(some.lo, some.hi);
    };
    for (int64_t h = 0; h < p.kv_heads; ++h)
      for (int64_t i = 0; i < seq.rows_q; i += chunk) {
        const int64_t end = std::min(i + chunk, seq.rows_q), last = std::min(end, seq.q_end) - 1;
        const bool alike = h > 0 && seq.rows_q <= chunk;  // short sequences have many heads
        plan.add({b, h, i, end}, alike ? plan.cost.back() : cost_of(i, last));
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

}  // namespace

// Long tasks pack few keys anew, short ones keep all threads busy to the end. Results do not depend
// on how rows are grouped into tasks.
Plan<ForwardTask> tasks_of_queries(const AttentionParams& p, int64_t chunk, int64_t rows) {
  const int64_t threads = torch::stable::get_num_threads();
  const auto few = [&](const Plan<ForwardTask>& plan) {
    return static_cast<int64_t>(plan.tasks.size()) < 16 * threads;
  };
  Plan<ForwardTask> best = cut_forward(p, chunk);
  while (threads > 1 && few(best) && chunk > rows) {
    chunk = round_up(chunk / 2, rows);
    Plan<ForwardTask> finer = cut_forward(p, chunk);
    if (busiest(finer.cost, threads) < busiest(best.cost, threads)) best = std::move(finer);
  }
  return by_cost(std::move(best));
}

// The key tiles of a head come in order, which the turns on dq rely on. As many heads as there are
// threads go side by side, longest sequences first: then turns are rarely waited for.
Plan<BackwardTask> tasks_of_keys(const AttentionParams& p, int64_t keys) {
  struct Head {
    int64_t seq, kv_head, tiles;
    double tile_cost;
  };
  Plan<Head> heads;
  heads.reserve(p.num_seqs * p.kv_heads);
  for (int64_t b = 0; b < p.num_seqs; ++b) {
    const Sequence seq(p, b);
    const int64_t tiles = std::max<int64_t>(1, ceil_div(seq.k_end - seq.k_begin, keys));
    const double group = p.heads / p.kv_heads;
    const double tile_cost = group * seq.q_end * std::min(seq.k_end - seq.k_begin, keys);
    for (int64_t h = 0; h < p.kv_heads; ++h)
      heads.add({b, h, tiles, tile_cost}, static_cast<double>(tiles) * seq.q_end);
  }
  const std::vector<Head> sorted = by_cost(std::move(heads)).tasks;
  Plan<BackwardTask> plan;
  plan.reserve(sorted.size());
  const size_t side_by_side = torch::stable::get_num_threads();
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

void* thread_scratch(size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> block;
  thread_local size_t size = 0;
#ifdef CLINATTN_FRESH_SCRATCH  // for tests: no call finds what an earlier one left
  size = 0;
#endif
  if (size < bytes) {
    bytes = (bytes + 4095) / 4096 * 4096;
    block.reset(std::aligned_alloc(4096, bytes));
    CLINATTN_CHECK(block, "out of memory: ", bytes, " bytes of scratch");
    size = bytes;
  }
  return block.get();
}

std::vector<int64_t> batch_ends(const std::vector<double>& cost) {
  const double total = std::accumulate(cost.begin(), cost.end(), 0.0);
  const double most = std::clamp(total / (4 * torch::stable::get_num_threads()), 2048.0, 8192.0);
  std::vector<int64_t> ends;
  double scores = 0;
  const auto count = static_cast<int64_t>(cost.size());
  for (int64_t i = 0; i < count; ++i) {
    scores += cost[i];
    if (i + 1 < count && scores + cost[i + 1] <= most) continue;
    ends.push_back(i + 1);
    scores = 0;
  }
  return ends;
}

}  // namespace clinattn
