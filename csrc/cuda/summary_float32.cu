// Summaries of weights in float32
#include "summary.cuh"

namespace clinattn {

int summary_float32(const AttentionParams& p, const SummaryParams& s, const CudaScratch& scratch,
                    int capability, void* stream) {
  return launch_summary<float>(p, s, scratch, capability, stream);
}

}  // namespace clinattn
