// Gradients of keys and values in float16
#include "dkdv.cuh"

namespace clinattn {

int dkdv_float16(const AttentionParams& p, const CudaScratch& scratch, int capability,
                 void* stream) {
  return launch_dkdv<half>(p, scratch, capability, stream);
}

}  // namespace clinattn
