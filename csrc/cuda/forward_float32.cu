// Forward pass in float32
#include "forward.cuh"

namespace clinattn {

int forward_float32(const AttentionParams& p, int capability, void* stream) {
  return launch_forward<float>(p, capability, stream);
}

}  // namespace clinattn
