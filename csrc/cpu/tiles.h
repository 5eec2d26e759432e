// The algorithm's entry points for one pair of engines, as the table that the torch side calls.
#pragma once

#include "backward.h"
#include "fma_forward.h"
#include "forward.h"

namespace {

template <class E, class B>
clinattn::CpuKernels make_kernels(const char* name) {
  return {
      name,
      E::kRows,
      B::kRows,
      B::kKeys,
      B::kWidth,
      Forward<E>::chunk,
      Forward<E>::scratch,
      [](const AttentionParams& p, const ForwardTask& t, void* scratch) {
        Forward<E>(p, scratch).run(t);
      },
      B::scratch,
      B::prepare,
      [](const AttentionParams& p, const BackwardShared& shared, const BackwardTask& t,
         void* scratch) { B(p, shared, scratch).run(t); },
  };
}

}  // namespace
