// Gradients of queries in bfloat16
#include "dq.cuh"

namespace clinattn {

int dq_bfloat16(const AttentionParams& p, const CudaScratch& scratch, int capability,
                void* stream) {
  return launch_dq<bfloat16>(p, scratch, capability, stream);
}

}  // namespace clinattn
