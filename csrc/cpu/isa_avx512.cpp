// Kernels for AVX-512 without a matrix unit.
#include "tiles.h"
#include "vec_avx512.h"

namespace clinattn {

const CpuKernels& avx512_kernels() {
  static const CpuKernels kernels =
      make_kernels<FmaForward<Avx512>, FmaBackward<Avx512>>("avx512", fma_loop<Avx512>);
  return kernels;
}

}  // namespace clinattn
