// The facts of the library that Python reads, beside its ops: C functions, without Python's own
// interface. Loading the library registers its kernels with torch's dispatcher.
#include <exception>
#include <string>
#include <vector>

#include "cpu/dispatch.h"

#ifdef CLINATTN_HAVE_CUDA
#include <cuda_runtime_api.h>
#endif

#define CLINATTN_WORDS(...) #__VA_ARGS__
#define CLINATTN_QUOTED(...) CLINATTN_WORDS(__VA_ARGS__)
#define CLINATTN_EXPORT extern "C" [[gnu::visibility("default")]]

namespace {

thread_local std::string complaint;

// Returns f(), or `failed` with the message kept as the complaint.
template <class Result, class F>
Result guarded(const F& f, Result failed) {
  try {
    return f();
  } catch (const std::exception& error) {
    complaint = error.what();
    return failed;
  }
}

std::string joined(const std::vector<std::string>& words) {
  std::string all;
  for (const std::string& word : words) all += (all.empty() ? "" : " ") + word;
  return all;
}

std::string build_info() {
  constexpr int kMajor = TORCH_TARGET_VERSION >> 56, kMinor = TORCH_TARGET_VERSION >> 48 & 0xff;
  std::string info =
      "torch\t" + std::to_string(kMajor) + "." + std::to_string(kMinor) + " or newer";
#ifdef __VERSION__
  info += "\ncompiler\t" __VERSION__;
#endif
  info += "\ninstruction_sets\tscalar";
#ifdef CLINATTN_HAVE_AVX2
  info += " avx2";
#endif
#ifdef CLINATTN_HAVE_AVX512
  info += " avx512";
#endif
#ifdef CLINATTN_HAVE_AVX512_BF16
  info += " avx512_bf16";
#endif
#ifdef CLINATTN_HAVE_AMX
  info += " amx";
#endif
#ifdef CLINATTN_HAVE_CUDA
  info += "\ncuda_archs\t" CLINATTN_QUOTED(CLINATTN_CUDA_ARCHS);  // as in "8.0,9.0+PTX"
  info += "\ncuda_toolkit\t" + std::to_string(CUDART_VERSION / 1000) + "." +
          std::to_string(CUDART_VERSION / 10 % 100);
#endif
  return info;
}

}  // namespace

// Lines of a name, a tab and a value
CLINATTN_EXPORT const char* clinattn_build_info() {
  static const std::string info = build_info();
  return info.c_str();
}

// The sets usable here, between spaces, best last
CLINATTN_EXPORT const char* clinattn_instruction_sets() {
  static const std::string sets = joined(clinattn::instruction_sets());
  return sets.c_str();
}

// Returns the last failure's message. A function that fails returns a null pointer, false, or 0.
CLINATTN_EXPORT const char* clinattn_complaint() { return complaint.c_str(); }

CLINATTN_EXPORT const char* clinattn_instruction_set() {
  return guarded<const char*>(clinattn::instruction_set, nullptr);
}

CLINATTN_EXPORT bool clinattn_set_instruction_set(const char* name) {
  return guarded([&] { return clinattn::set_instruction_set(name), true; }, false);
}

CLINATTN_EXPORT double clinattn_peak_flops(const char* dtype) {
  return guarded([&] { return clinattn::peak_flops(dtype); }, 0.0);
}
