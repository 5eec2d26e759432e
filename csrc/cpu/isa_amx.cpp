// Kernels for AMX-BF16: matrix products on tiles, everything else on AVX-512.
#include "amx_bf16_linear.h"
#include "amx_linear.h"
#include "amx_products.h"
#include "bf16_backward.h"
#include "bf16_forward.h"
#include "bf16_scores.h"
#include "linear_kernels.h"
#include "peak_amx.h"
#include "tiles.h"
#include "vec_avx512.h"

namespace {

template <int kParts>
clinattn::CpuKernels tile_kernels() {
  using Multiplier = TileProducts<kParts>;
  return make_kernels<Bf16Forward<Multiplier>, Bf16Backward<Multiplier>, Bf16Scores<Multiplier>>(
      "amx", tile_loop<kParts>);
}

}  // namespace

namespace clinattn {

const CpuKernels& amx_one_part() {
  static const CpuKernels kernels = [] {
    CpuKernels all = tile_kernels<1>();
    all.linear = &linear_kernels<TileLinear>();
    return all;
  }();
  return kernels;
}

const CpuKernels& amx_two_parts() {
  static const CpuKernels kernels = tile_kernels<2>();
  return kernels;
}

const CpuKernels& amx_three_parts() {
  static const CpuKernels kernels = [] {
    CpuKernels all = tile_kernels<3>();
    all.linear = &linear_kernels<AmxLinear>();
    return all;
  }();
  return kernels;
}

}  // namespace clinattn
