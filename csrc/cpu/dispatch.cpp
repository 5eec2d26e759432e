#include "dispatch.h"

#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <thread>

namespace clinattn {

namespace {

using Getter = const CpuKernels& (*)();

struct Choice {
  const char* name;
  Getter kernels;
};

std::vector<Choice> usable() {
  std::vector<Choice> list{{"scalar", scalar_kernels}};
#ifdef CLINATTN_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    list.push_back({"avx2", avx2_kernels});
#endif
#ifdef CLINATTN_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    list.push_back({"avx512", avx512_kernels});
#endif
  return list;
}

std::atomic<Getter> in_force{nullptr};

Getter choose(const std::string& name) {
  const auto list = usable();
  if (name.empty()) return list.back().kernels;
  std::string names;
  for (const auto& c : list) {
    if (name == c.name) return c.kernels;
    names += (names.empty() ? "" : ", ") + std::string(c.name);
  }
  throw std::invalid_argument("instruction set '" + name +
                              "' is not usable here; usable: " + names);
}

Getter current() {
  Getter g = in_force.load(std::memory_order_acquire);
  if (!g) {
    const char* env = std::getenv("CLINATTN_CPU_ISA");
    g = choose(env ? env : "");
    in_force.store(g, std::memory_order_release);
  }
  return g;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const auto& c : usable()) names.push_back(c.name);
  return names;
}

std::string instruction_set() { return current()().name; }

void set_instruction_set(const std::string& name) {
  in_force.store(choose(name), std::memory_order_release);
}

const CpuKernels& cpu_kernels(DType dtype) {
  return dtype == DType::kFloat64 ? scalar_f64_kernels() : current()();
}

void yield_thread() { std::this_thread::yield(); }

}  // namespace clinattn
