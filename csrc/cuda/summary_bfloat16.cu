// Summaries of weights in bfloat16
#include "summary.cuh"

namespace clinattn {

int summary_bfloat16(const AttentionParams& p, const SummaryParams& s, const CudaScratch& scratch,
                     int capability, void* stream) {
  return launch_summary<bfloat16>(p, s, scratch, capability, stream);
}

}  // namespace clinattn
