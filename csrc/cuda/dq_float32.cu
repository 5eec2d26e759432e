// Gradients of queries in float32
#include "dq.cuh"

namespace clinattn {

int dq_float32(const AttentionParams& p, const CudaScratch& scratch, int capability, void* stream) {
  return launch_dq<float>(p, scratch, capability, stream);
}

}  // namespace clinattn
