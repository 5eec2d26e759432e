// The table of the kernels of an engine for linear layers.
#pragma once

#include "linear_epilogue.h"

namespace {

template <class E>
const clinattn::LinearKernels& linear_kernels() {
  static const clinattn::LinearKernels all{
      .micro_rows = E::kMicroRows,
      .depth = E::kMostDepth,
      .needs_whole = E::kNeedsWhole,
      .panel = E::panel,
      .strip = E::strip,
      .strips_size = E::strips_size,
      .rows_size = E::rows_size,
      .pack_strips = E::pack_strips,
      .pack_rows = E::pack_rows,
      .multiply = E::multiply,
      .finish = E::finish,
      .differentiate = differentiate_rows<typename E::V>,
  };
  return all;
}

}  // namespace
