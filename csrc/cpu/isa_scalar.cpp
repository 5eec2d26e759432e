// Kernels in portable C++, for fp64 everywhere and for the rest where nothing better runs.
#include "tiles.h"
#include "vec_portable.h"

namespace {

template <class T, int kLanes>
clinattn::CpuKernels make_portable() {
  using V = Portable<T, kLanes>;
  return make_kernels<FmaForward<V>, FmaBackward<V>, FmaScores<V>>("scalar", fma_loop<V>);
}

}  // namespace

namespace clinattn {

const CpuKernels& scalar_kernels() {
  static const CpuKernels kernels = make_portable<float, 8>();
  return kernels;
}

const CpuKernels& scalar_f64_kernels() {
  static const CpuKernels kernels = make_portable<double, 4>();
  return kernels;
}

}  // namespace clinattn
