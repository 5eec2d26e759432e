// The tasks of the two passes, and torch's threads that run them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "isa.h"

namespace clinattn {

template <class Task>
struct Plan {
  std::vector<Task> tasks;
  std::vector<double> cost;  // in scores
  void reserve(int64_t count) {
    tasks.reserve(count);
    cost.reserve(count);
  }
  void add(const Task& task, double scores) {
    tasks.push_back(task);
    cost.push_back(scores);
  }
};

// Tasks of `chunk` queries, or fewer in multiples of `rows` where threads would wait
Plan<ForwardTask> tasks_of_queries(const AttentionParams& p, int64_t chunk, int64_t rows);
// Tasks of `keys` keys
Plan<BackwardTask> tasks_of_keys(const AttentionParams& p, int64_t keys);

// 64-byte aligned memory of a thread, kept between calls so that it stays mapped and in cache.
void* thread_scratch(size_t bytes);

// Where batches of neighbouring tasks end. A thread sets up its tiles for each batch, so small
// tasks come several at a time: up to 8192 scores, which are some microseconds, and few enough that
// every thread gets some, but 2048, which are not worth a thread's start.
std::vector<int64_t> batch_ends(const std::vector<double>& cost);

// Runs batch(tasks, count, scratch) for all tasks on torch's threads. Batches start in order, each
// as soon as a thread is free.
template <class Task, class Batch>
void run_tasks(const Plan<Task>& plan, size_t scratch_bytes, const Batch& batch) {
  std::atomic<int64_t> next{0};
  const std::vector<int64_t> ends = batch_ends(plan.cost);
  const auto count = static_cast<int64_t>(ends.size());
  const int64_t workers = std::min<int64_t>(count, torch::stable::get_num_threads());
  const auto work = [&](int64_t begin, int64_t end) {
    void* scratch = thread_scratch(scratch_bytes);
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        const int64_t first = i == 0 ? 0 : ends[i - 1];
        batch(plan.tasks.data() + first, ends[i] - first, scratch);
      }
  };
  workers == 1 ? work(0, 1) : torch::stable::parallel_for(0, workers, 1, work);
}

}  // namespace clinattn
