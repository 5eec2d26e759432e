// Gradients of queries in float16
#include "dq.cuh"

namespace clinattn {

int dq_float16(const AttentionParams& p, const CudaScratch& scratch, int capability, void* stream) {
  return launch_dq<half>(p, scratch, capability, stream);
}

}  // namespace clinattn
