// Kernels for AVX-512 without a matrix unit.
#include "fma_linear.h"
#include "linear_kernels.h"
#include "tiles.h"
#include "vec_avx512.h"

namespace clinattn {

const CpuKernels& avx512_kernels() {
  static const CpuKernels kernels = [] {
    CpuKernels all = make_kernels<FmaForward<Avx512>, FmaBackward<Avx512>, FmaScores<Avx512>>(
        "avx512", fma_loop<Avx512>);
    all.linear = &linear_kernels<FmaLinear<Avx512>>();
    return all;
  }();
  return kernels;
}

}  // namespace clinattn
