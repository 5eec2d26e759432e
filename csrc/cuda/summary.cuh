// A summary of the weights: sums by key, or numbers by query
#pragma once

#include "summary_by_key.cuh"
#include "summary_by_query.cuh"

namespace clinattn {

template <class T>
int launch_summary(const AttentionParams& p, const SummaryParams& s, const CudaScratch& scratch,
                   int capability, void* stream) {
  SummaryParams largest = s;  // the first of the largest few
  largest.top = 1, largest.places = nullptr;
  switch (s.reduce) {
    case Reduce::kReceived:
      return launch_by_key<T, false>(p, s, scratch, capability, stream);
    case Reduce::kGradient:
    case Reduce::kRelevance:
      return launch_by_key<T, true>(p, s, scratch, capability, stream);
    case Reduce::kEntropy:
      return launch_by_query<T, false>(p, s, capability, stream);
    case Reduce::kMax:
      return launch_by_query<T, true>(p, largest, capability, stream);
    default:
      return launch_by_query<T, true>(p, s, capability, stream);
  }
}

}  // namespace clinattn
