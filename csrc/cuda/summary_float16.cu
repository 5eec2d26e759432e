// Summaries of weights in float16
#include "summary.cuh"

namespace clinattn {

int summary_float16(const AttentionParams& p, const SummaryParams& s, const CudaScratch& scratch,
                    int capability, void* stream) {
  return launch_summary<half>(p, s, scratch, capability, stream);
}

}  // namespace clinattn
