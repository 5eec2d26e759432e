// Kernels for AVX2 with FMA and F16C.
#include "fma_linear.h"
#include "linear_kernels.h"
#include "tiles.h"
#include "vec_avx2.h"

namespace clinattn {

const CpuKernels& avx2_kernels() {
  static const CpuKernels kernels = [] {
    CpuKernels all =
        make_kernels<FmaForward<Avx2>, FmaBackward<Avx2>, FmaScores<Avx2>>("avx2", fma_loop<Avx2>);
    all.linear = &linear_kernels<FmaLinear<Avx2>>();
    return all;
  }();
  return kernels;
}

}  // namespace clinattn
