// Forward pass in float16
#include "forward.cuh"

namespace clinattn {

int forward_float16(const AttentionParams& p, int capability, void* stream) {
  return launch_forward<half>(p, capability, stream);
}

}  // namespace clinattn
