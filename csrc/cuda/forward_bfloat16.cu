// Forward pass in bfloat16
#include "forward.cuh"

namespace clinattn {

int forward_bfloat16(const AttentionParams& p, int capability, void* stream) {
  return launch_forward<bfloat16>(p, capability, stream);
}

}  // namespace clinattn
