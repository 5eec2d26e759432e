// Gradients of keys and values in bfloat16
#include "dkdv.cuh"

namespace clinattn {

int dkdv_bfloat16(const AttentionParams& p, const CudaScratch& scratch, int capability,
                  void* stream) {
  return launch_dkdv<bfloat16>(p, scratch, capability, stream);
}

}  // namespace clinattn
