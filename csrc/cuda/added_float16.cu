// Gradients of masks and of relative biases in float16
#include "added.cuh"

namespace clinattn {

int added_float16(const AttentionParams& p, const CudaScratch& scratch, int capability,
                  void* stream) {
  return launch_added<half>(p, scratch, capability, stream);
}

CudaSizes sizes_float16(const AttentionParams& p, int capability) {
  return sizes<half>(p, capability);
}

}  // namespace clinattn
