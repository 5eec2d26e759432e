// Kernels for AMX-BF16: matrix products on tiles, everything else on AVX-512.
#include "amx_backward.h"
#include "amx_forward.h"
#include "peak_amx.h"
#include "tiles.h"
#include "vec_avx512.h"

namespace clinattn {

const CpuKernels& amx_kernels() {
  static const CpuKernels kernels =
      make_kernels<AmxForward<1>, AmxBackward<1>>("amx", tile_loop);
  return kernels;
}

const CpuKernels& amx_f16_kernels() {
  static const CpuKernels kernels =
      make_kernels<AmxForward<2>, AmxBackward<2>>("amx", tile_loop);
  return kernels;
}

const CpuKernels& amx_f32_kernels() {
  static const CpuKernels kernels =
      make_kernels<AmxForward<3>, AmxBackward<3>>("amx", tile_loop);
  return kernels;
}

}  // namespace clinattn
