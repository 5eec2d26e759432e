// clinattn._C: facts about the compiled kernels. Importing it registers them with torch's
// dispatcher.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <map>
#include <string>

#include "cpu/dispatch.h"

#ifdef CLINATTN_HAVE_CUDA
#include <cuda_runtime_api.h>
#endif

#define CLINATTN_WORDS(...) #__VA_ARGS__
#define CLINATTN_QUOTED(...) CLINATTN_WORDS(__VA_ARGS__)

namespace {

// Python reads it in the file, before loading: a module for another torch may not even load.
[[gnu::used]] constexpr char kBuiltFor[] = "clinattn built for torch " TORCH_VERSION;

std::map<std::string, std::string> build_info() {
  return {
#ifdef __VERSION__
      {"compiler", __VERSION__},
#endif
      {"torch", TORCH_VERSION},
      {"instruction_sets",
       "scalar"
#ifdef CLINATTN_HAVE_AVX2
       " avx2"
#endif
#ifdef CLINATTN_HAVE_AVX512
       " avx512"
#endif
#ifdef CLINATTN_HAVE_AMX
       " amx"
#endif
      },
#ifdef CLINATTN_HAVE_CUDA
      {"cuda_archs", CLINATTN_QUOTED(CLINATTN_CUDA_ARCHS)},  // as in "8.0,9.0+PTX"
      {"cuda_toolkit",
       std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION / 10 % 100)},
#endif
  };
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled attention kernels and what this machine can run of them.";
  m.def("instruction_sets", clinattn::instruction_sets, "Instruction sets usable here, best last.");
  m.def("instruction_set", clinattn::instruction_set, "The instruction set in force.");
  m.def("set_instruction_set", clinattn::set_instruction_set, pybind11::arg("name"),
        "Forces an instruction set; '' goes back to the best one.");
  m.def("peak_flops", clinattn::peak_flops, pybind11::arg("dtype"),
        pybind11::call_guard<pybind11::gil_scoped_release>(),
        "FLOP/s that multiply-adds in registers reach on torch's threads, for kernels of a dtype.");
  m.def("build_info", build_info, "What the module was built with.");
}
