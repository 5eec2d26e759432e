// The FLOP/s that the register loop of a type's kernels reaches on all of torch's threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>

#include "dispatch.h"

namespace clinattn {

namespace {

DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float64") return DType::kFloat64;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw std::invalid_argument("dtype is '" + name +
                              "'; expected float32, float64, bfloat16 or float16");
}

struct Round {
  double seconds, flops_per_second;
};

Round run(const CpuKernels& kernels, int64_t steps) {
  using Clock = std::chrono::steady_clock;
  std::atomic<int64_t> flops{0};
  const auto start = Clock::now();
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i)
                                  flops += kernels.peak_loop(steps);
                              });
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  return {seconds, static_cast<double>(flops) / seconds};
}

}  // namespace

double peak_flops(const std::string& dtype) {
  constexpr double kRoundSeconds = 1e-3;  // within a time slice: other work costs rounds, not speed
  constexpr int kRounds = 40;
  const CpuKernels& kernels = cpu_kernels(dtype_named(dtype));
  int64_t steps = 1 << 10;
  // the shorter of two: other work makes a round longer, and then steps would be too few
  while (std::min(run(kernels, steps).seconds, run(kernels, steps).seconds) < kRoundSeconds)
    steps *= 2;
  double best = 0;
  for (int i = 0; i < kRounds; ++i) best = std::max(best, run(kernels, steps).flops_per_second);
  return best;
}

}  // namespace clinattn
