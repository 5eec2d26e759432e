// Gradients of masks and of relative biases in bfloat16
#include "added.cuh"

namespace clinattn {

int added_bfloat16(const AttentionParams& p, const CudaScratch& scratch, int capability,
                   void* stream) {
  return launch_added<bfloat16>(p, scratch, capability, stream);
}

CudaSizes sizes_bfloat16(const AttentionParams& p, int capability) {
  return sizes<bfloat16>(p, capability);
}

}  // namespace clinattn
