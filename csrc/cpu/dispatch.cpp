#include "dispatch.h"

#ifdef CLINATTN_HAVE_AVX2
#include <cpuid.h>
#endif
#if defined(CLINATTN_HAVE_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <thread>

namespace clinattn {

namespace {

using Getter = const CpuKernels& (*)();

// The kernels of an instruction set for each type of q, k and v, and for fp32 where less precision
// is allowed; fp64 is portable everywhere.
struct Choice {
  const char* name;
  Getter f32, bf16, f16;
  Getter f32_high = f32, f32_medium = f32;
};

constexpr Choice kScalar{"scalar", scalar_kernels, scalar_kernels, scalar_kernels};
#ifdef CLINATTN_HAVE_AVX2
constexpr Choice kAvx2{"avx2", avx2_kernels, avx2_kernels, avx2_kernels};
#endif
#ifdef CLINATTN_HAVE_AVX512
constexpr Choice kAvx512{"avx512", avx512_kernels, avx512_kernels, avx512_kernels};
#endif
#ifdef CLINATTN_HAVE_AVX512_BF16
constexpr Choice kAvx512Bf16{"avx512_bf16",  avx512_kernels, avx512_bf16_kernels,
                             avx512_kernels, avx512_kernels, avx512_bf16_kernels};

bool avx512_bf16_usable() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
}
#endif
#ifdef CLINATTN_HAVE_AMX
constexpr Choice kAmx{"amx",         amx_three_parts, amx_one_part,
                      amx_two_parts, amx_two_parts,   amx_one_part};

// AMX-BF16 and AMX-TILE, and leave from the kernel for the tile registers
bool amx_usable() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & 1u << 22) || !(d & 1u << 24)) return false;
#ifdef __linux__
  constexpr long kGetPermission = 0x1022, kRequestPermission = 0x1023, kTileData = 18;
  unsigned long granted = 0;
  syscall(SYS_arch_prctl, kRequestPermission, kTileData);
  return syscall(SYS_arch_prctl, kGetPermission, &granted) == 0 && (granted & 1ul << kTileData);
#else
  return false;
#endif
}
#endif

#ifdef CLINATTN_HAVE_AVX2
// Clang's __builtin_cpu_supports takes this name from 17 on.
bool f16c_usable() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

std::vector<const Choice*> usable() {
  std::vector<const Choice*> list{&kScalar};
#ifdef CLINATTN_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c_usable())
    list.push_back(&kAvx2);
#endif
#ifdef CLINATTN_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      list.back() == &kAvx2) {
    list.push_back(&kAvx512);
#ifdef CLINATTN_HAVE_AVX512_BF16
    if (avx512_bf16_usable()) list.push_back(&kAvx512Bf16);
#ifdef CLINATTN_HAVE_AMX
    if (list.back() == &kAvx512Bf16 && amx_usable()) list.push_back(&kAmx);
#endif
#endif
  }
#endif
  return list;
}

std::atomic<const Choice*> in_force{nullptr};

const Choice* choose(const std::string& name) {
  const auto list = usable();
  if (name.empty()) return list.back();
  std::string names;
  for (const auto* c : list) {
    if (name == c->name) return c;
    names += (names.empty() ? "" : ", ") + std::string(c->name);
  }
  throw std::invalid_argument("instruction set '" + name +
                              "' is not usable here; usable: " + names);
}

const Choice& current() {
  const Choice* c = in_force.load(std::memory_order_acquire);
  if (!c) {
    const char* env = std::getenv("CLINATTN_CPU_ISA");
    c = choose(env ? env : "");
    in_force.store(c, std::memory_order_release);
  }
  return *c;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const auto* c : usable()) names.push_back(c->name);
  return names;
}

const char* instruction_set() { return current().name; }

void set_instruction_set(const std::string& name) {
  in_force.store(choose(name), std::memory_order_release);
}

const CpuKernels& cpu_kernels(DType dtype, Precision precision) {
  const Choice& c = current();
  switch (dtype) {
    case DType::kFloat64:
      return scalar_f64_kernels();
    case DType::kBFloat16:
      return c.bf16();
    case DType::kFloat16:
      return c.f16();
    default:
      return precision == Precision::kHighest ? c.f32()
             : precision == Precision::kHigh  ? c.f32_high()
                                              : c.f32_medium();
  }
}

void yield_thread() { std::this_thread::yield(); }

}  // namespace clinattn
