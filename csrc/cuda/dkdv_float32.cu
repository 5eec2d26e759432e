// Gradients of keys and values in float32
#include "dkdv.cuh"

namespace clinattn {

int dkdv_float32(const AttentionParams& p, const CudaScratch& scratch, int capability,
                 void* stream) {
  return launch_dkdv<float>(p, scratch, capability, stream);
}

}  // namespace clinattn
