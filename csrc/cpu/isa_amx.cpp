// Kernels for AMX-BF16: matrix products on tiles, everything else on AVX-512.
#include "amx_backward.h"
#include "amx_forward.h"
#include "amx_linear.h"
#include "peak_amx.h"
#include "tiles.h"
#include "vec_avx512.h"

namespace clinattn {

const CpuKernels& amx_one_part() {
  static const CpuKernels kernels =
      make_kernels<AmxForward<1>, AmxBackward<1>>("amx", tile_loop<1>);
  return kernels;
}

const CpuKernels& amx_two_parts() {
  static const CpuKernels kernels =
      make_kernels<AmxForward<2>, AmxBackward<2>>("amx", tile_loop<2>);
  return kernels;
}

const CpuKernels& amx_three_parts() {
  static const LinearKernels linear{AmxLinear::kRows, AmxLinear::kDepth, AmxLinear::packed_size,
                                    AmxLinear::pack, AmxLinear::multiply};
  static const CpuKernels kernels = [] {
    CpuKernels all = make_kernels<AmxForward<3>, AmxBackward<3>>("amx", tile_loop<3>);
    all.linear = &linear;
    return all;
  }();
  return kernels;
}

}  // namespace clinattn
