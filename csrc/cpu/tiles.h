// The algorithm's entry points for one vector type, as the table that the torch side calls.
#pragma once

#include "backward.h"
#include "forward.h"

namespace {

template <class V>
clinattn::CpuKernels make_kernels(const char* name) {
  return {
      name,
      V::kForwardRows,
      V::kBackwardRows,
      V::kBackwardKeys,
      V::kWidth,
      Forward<V>::chunk,
      Forward<V>::scratch,
      [](const AttentionParams& p, const ForwardTask& t, void* scratch) {
        Forward<V>(p, scratch).run(t);
      },
      Backward<V>::scratch,
      Backward<V>::prepare,
      [](const AttentionParams& p, const BackwardShared& shared, const BackwardTask& t,
         void* scratch) { Backward<V>(p, shared, scratch).run(t); },
  };
}

}  // namespace
