// Gradients of masks and of relative biases in float32
#include "added.cuh"

namespace clinattn {

int added_float32(const AttentionParams& p, const CudaScratch& scratch, int capability,
                  void* stream) {
  return launch_added<float>(p, scratch, capability, stream);
}

CudaSizes sizes_float32(const AttentionParams& p, int capability) {
  return sizes<float>(p, capability);
}

}  // namespace clinattn
