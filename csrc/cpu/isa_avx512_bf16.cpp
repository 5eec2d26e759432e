// Kernels for AVX512-BF16 without tiles: products of bf16 by VDPBF16PS, everything else on AVX-512.
#include "bf16_backward.h"
#include "bf16_forward.h"
#include "bf16_scores.h"
#include "dot_products.h"
#include "fma_linear.h"
#include "linear_kernels.h"
#include "peak_dots.h"
#include "tiles.h"
#include "vec_avx512_bf16.h"

namespace clinattn {

const CpuKernels& avx512_bf16_kernels() {
  static const CpuKernels kernels = [] {
    CpuKernels all =
        make_kernels<Bf16Forward<DotProducts>, Bf16Backward<DotProducts>, Bf16Scores<DotProducts>>(
            "avx512_bf16", dot_loop);
    all.linear = &linear_kernels<FmaLinear<Avx512Pairs>>();
    return all;
  }();
  return kernels;
}

}  // namespace clinattn
