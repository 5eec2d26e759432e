// Linear layers by fused multiply-adds, for any vector type. b is packed in strips of V::kStrip
// columns; rows of a are packed so that its elements are broadcast from consecutive places. Sums of
// kDepth elements each start at 0 and are added in their order: a sum's bits do not depend on what
// is computed beside it.
#pragma once

#include "concepts.h"
#include "gemm.h"
#include "linear_epilogue.h"
#include "linear_packing.h"

namespace {

using clinattn::LinearTask;

template <FmaVector Lanes>
struct FmaLinear {
  using V = Lanes;
  using Packing = LinearPacking<V>;
  static constexpr int64_t kMicroRows = V::kMicroRows, kMostDepth = 0;
  static constexpr bool kNeedsWhole = false;
  static constexpr int64_t kWidth = V::kWidth, kStrip = V::kStrip;
  static constexpr int64_t kDepth = 128;  // elements of one sum: 32 KB of a strip in L1

  static int64_t elements(int64_t depth) { return Packing::elements(depth); }
  static int64_t row_stride(int64_t depth) {
    return elements(depth) + 16;  // rows at a power of two would share few lines of L1
  }
  static size_t strips_size(int64_t strips, int64_t depth) {
    return strips * kStrip * elements(depth) * sizeof(float);
  }
  static size_t rows_size(int64_t rows, int64_t depth) {
    return (rows * (row_stride(depth) + kStrip) + kStrip * kDepth) * sizeof(float);
  }
  // Rows of a that fill most of L2, whole blocks of the product; few panels are shared out
  // unevenly.
  static int64_t panel(int64_t depth) {
    const int64_t fitting = (768 << 10) / ((row_stride(depth) + kStrip) * 4);
    return clamp(fitting, 126, 192) / V::kMicroRows * V::kMicroRows;
  }
  // Columns of y in a strip: where gated, half of the strip has the gates.
  static int64_t strip(const LinearParams& p) { return p.gated ? kStrip / 2 : kStrip; }

  static void pack_strips(const LinearParams& p, const LinearTask& task, void* strips) {
    float* to = static_cast<float*>(strips);
    for (int64_t s = task.strip0; s < task.strip1; ++s, to += kStrip * elements(p.depth))
      pack_strip(p, s, 0, elements(p.depth), to);
  }

  // to (e1 - e0, kStrip) <- elements [e0, e1) of a strip
  static void pack_strip(const LinearParams& p, int64_t s, int64_t e0, int64_t e1, float* to) {
    for (int64_t j = 0; j < kStrip; j += kWidth) {
      const SummedRows rows(p, s, strip(p), j, kWidth);
      Packing::columns(p.b, p.depth, rows.first, rows.count, e0, e1, to + j,
                       {kStrip, kWidth * kStrip});
    }
  }

  static void pack_rows(const LinearParams& p, const LinearTask& task, void* rows_of_a) {
    const int64_t stride = row_stride(p.depth);
    float* to = static_cast<float*>(rows_of_a);
    for (int64_t row = task.row0; row < task.row1; row += kWidth, to += kWidth * stride)
      Packing::rows(p.a, p.depth, row, min64(task.row1 - row, kWidth), to, {stride, kWidth});
  }

  // strips: those from task.strip0 on, or null: then they are packed here, block by block. rows:
  // those from task.row0 on, and room for their sums and a block of a strip
  static void multiply(const LinearParams& p, const LinearTask& task, const void* strips,
                       void* rows_of_a) {
    const int64_t depth = elements(p.depth), stride = row_stride(p.depth), width = strip(p);
    const int64_t rows = task.row1 - task.row0;
    const float *a = static_cast<float*>(rows_of_a), *b = static_cast<const float*>(strips);
    float *sums = static_cast<float*>(rows_of_a) + rows * stride, *block = sums + rows * kStrip;
    for (int64_t s = task.strip0; s < task.strip1; ++s) {
      const int64_t done = s - task.strip0, count = task.strip1 - task.strip0;
      prefetch_residual(p, task.row0 + rows * done / count, task.row0 + rows * (done + 1) / count);
      for (int64_t e = 0; e < depth; e += kDepth) {
        const int64_t n = min64(depth - e, kDepth);
        if (!strips) pack_strip(p, s, e, e + n, block);
        const float* here = strips ? b + ((s - task.strip0) * depth + e) * kStrip : block;
        if (e == 0) {
          gemm<V, false, Update::kSet>(rows, kStrip, n, a, stride, here, kStrip, 0, sums, kStrip);
        } else {
          gemm<V, false, Update::kAdd>(rows, kStrip, n, a + e, stride, here, kStrip, 0, sums,
                                       kStrip);
        }
      }
      const int64_t column = s * width;
      Epilogue<V, kStrip>(p, column, min64(p.columns() - column, width))
          .run(task.row0, rows, sums, p.gated ? sums + width : nullptr, kStrip);
    }
  }

  // Asks for rows of the residual, which are added when all strips are done.
  static void prefetch_residual(const LinearParams& p, int64_t row0, int64_t row1) {
    if (!p.residual.at) return;
    const int64_t bytes = p.columns() * dtype_size(p.residual.dtype);
    for (int64_t row = row0; row < row1; ++row) prefetch_row(line_of(p.residual, row, 0), bytes);
  }

  static constexpr auto finish = complete_rows<V>;
};

}  // namespace
