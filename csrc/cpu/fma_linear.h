// Linear layers by fused multiply-adds, for any vector type. b is packed in strips of V::kStrip
// columns; rows of a are packed so that its elements are broadcast from consecutive places. Sums of
// kDepth elements each start at 0 and are added in their order: a sum's bits do not depend on what
// is computed beside it.
#pragma once

#include "concepts.h"
#include "gemm.h"
#include "linear_epilogue.h"

namespace {

using clinattn::LinearTask;
using clinattn::Matrix;

// n numbers, as floats, of one row of a matrix or of one place of its depth
template <class V>
inline typename V::F load_numbers(const void* from, DType dtype, int64_t n) {
  if (n == V::kWidth)
    return dtype == DType::kFloat32 ? V::load(static_cast<const float*>(from))
                                    : V::load_as(static_cast<const BFloat16*>(from));
  alignas(64) typename V::T line[V::kWidth];
  load_row<V>(line, from, dtype, n);
  return V::load(line);
}

// The elements of an operand, each one number or as many as V multiplies in a lane
template <class V>
struct LinearOperand {
  static constexpr int64_t kNumbers = 1;
  static constexpr DType kType = DType::kFloat32;  // what lies in memory as elements do
  // to <- n numbers of a row, padded with zeros to whole vectors
  static void put_row(float* to, const void* from, DType dtype, int64_t n) {
    load_row<V>(to, from, dtype, n);
  }
  // Returns the element at `place` of `count` rows, where place(i) is its i-th number, if there.
  template <class Place>
  static typename V::F across(const Place& place, DType dtype, int64_t count) {
    return load_numbers<V>(place(0), dtype, count);
  }
};
template <class V>
  requires requires(typename V::F x) { V::pairs(x, x); }
struct LinearOperand<V> {
  static constexpr int64_t kNumbers = 2;
  static constexpr DType kType = DType::kBFloat16;
  static void put_row(float* to, const void* from, DType dtype, int64_t n) {
    V::put_pairs(to, from, dtype, n);
  }
  template <class Place>
  static typename V::F across(const Place& place, DType dtype, int64_t count) {
    const void* second = place(1);
    return V::pairs(load_numbers<V>(place(0), dtype, count),
                    second ? load_numbers<V>(second, dtype, count) : V::zero());
  }
};

template <FmaVector V>
struct FmaLinear {
  using Operand = LinearOperand<V>;
  static constexpr int64_t kWidth = V::kWidth, kStrip = V::kStrip, kNumbers = Operand::kNumbers;
  static constexpr int64_t kDepth = 384;  // elements of one sum: 96 KB of a strip in L2

  static int64_t elements(int64_t depth) { return round_up(ceil_div(depth, kNumbers), kWidth); }
  static int64_t row_stride(int64_t depth) {
    return elements(depth) + 16;  // rows at a power of two would share few lines of L1
  }
  static size_t strips_size(int64_t strips, int64_t depth) {
    return strips * kStrip * elements(depth) * sizeof(float);
  }
  static size_t rows_size(int64_t rows, int64_t depth) {
    return (rows * (row_stride(depth) + kStrip) + kStrip * kDepth) * sizeof(float);
  }
  // Rows of a that fill 384 KB of L2, whole blocks of the product
  static int64_t panel(int64_t depth) {
    const int64_t fitting = (384 << 10) / ((row_stride(depth) + kStrip) * 4);
    return clamp(fitting, 48, 192) / V::kMicroRows * V::kMicroRows;
  }
  // Columns of y in a strip: where gated, half of the strip has the gates.
  static int64_t strip(const LinearParams& p) { return p.gated ? kStrip / 2 : kStrip; }

  static const char* at(const Matrix& x, int64_t row, int64_t k) {
    return static_cast<const char*>(x.at) +
           (row * x.row_stride + k * x.depth_stride) * dtype_size(x.dtype);
  }
  // Element e of `count` rows from row0, of which each place of the depth is consecutive
  static typename V::F across(const Matrix& x, int64_t row0, int64_t count, int64_t e,
                              int64_t depth) {
    const auto place = [&](int64_t i) {
      return e * kNumbers + i < depth ? at(x, row0, e * kNumbers + i) : nullptr;
    };
    return Operand::across(place, x.dtype, count);
  }

  static void pack_strips(const LinearParams& p, const LinearTask& task, void* strips) {
    float* to = static_cast<float*>(strips);
    for (int64_t s = task.strip0; s < task.strip1; ++s, to += kStrip * elements(p.depth))
      pack_strip(p, s, 0, elements(p.depth), to);
  }

  // to (e1 - e0, kStrip) <- elements [e0, e1) of a strip
  static void pack_strip(const LinearParams& p, int64_t s, int64_t e0, int64_t e1, float* to) {
    const int64_t columns = p.columns(), width = strip(p);
    for (int64_t j = 0; j < kStrip; j += kWidth) {
      const int64_t column = s * width + j % width, first = j < width ? 0 : columns;
      pack_columns(p, first + column, min64(columns - column, kWidth), e0, e1, to + j);
    }
  }

  // to (e1 - e0, kWidth in lines of kStrip) <- `count` rows of b from row0, and zeros
  static void pack_columns(const LinearParams& p, int64_t row0, int64_t count, int64_t e0,
                           int64_t e1, float* to) {
    const Matrix& b = p.b;
    const int64_t there = ceil_div(p.depth, kNumbers);
    if (count <= 0) {
      for (int64_t e = e0; e < e1; ++e, to += kStrip) V::store(to, V::zero());
    } else if (b.depth_stride != 1) {
      for (int64_t e = e0; e < e1; ++e, to += kStrip)
        V::store(to, e < there ? across(b, row0, count, e, p.depth) : V::zero());
    } else {
      const bool as_elements = b.dtype == Operand::kType && b.row_stride % kNumbers == 0;
      alignas(64) float lines[kWidth * kWidth];
      for (int64_t i = count; i < kWidth; ++i) V::store(lines + i * kWidth, V::zero());
      for (int64_t e = e0; e < e1; e += kWidth, to += kWidth * kStrip) {
        const int64_t k = e * kNumbers, n = min64(p.depth - k, kWidth * kNumbers);
        if (e + 4 * kWidth < there)  // rows are far apart
          for (int64_t i = 0; i < count; ++i)
            __builtin_prefetch(at(b, row0 + i, k + 4 * kWidth * kNumbers));
        if (as_elements && count == kWidth && n == kWidth * kNumbers) {
          V::transpose(reinterpret_cast<const float*>(at(b, row0, k)), b.row_stride / kNumbers, to,
                       kStrip);
          continue;
        }
        for (int64_t i = 0; i < count; ++i)
          Operand::put_row(lines + i * kWidth, at(b, row0 + i, k), b.dtype, n);
        V::transpose(lines, kWidth, to, kStrip);
      }
    }
  }

  static void pack_rows(const LinearParams& p, const LinearTask& task, void* rows_of_a) {
    const int64_t stride = row_stride(p.depth), there = ceil_div(p.depth, kNumbers);
    float* to = static_cast<float*>(rows_of_a);
    if (p.a.depth_stride == 1) {
      for (int64_t row = task.row0; row < task.row1; ++row, to += stride)
        Operand::put_row(to, at(p.a, row, 0), p.a.dtype, p.depth);
      return;
    }
    for (int64_t row = task.row0; row < task.row1; row += kWidth, to += kWidth * stride) {
      const int64_t count = min64(task.row1 - row, kWidth);
      for (int64_t e = 0; e < there; e += kWidth) {
        alignas(64) float lines[kWidth * kWidth], turned[kWidth * kWidth];
        for (int64_t i = 0; i < kWidth; ++i)
          V::store(lines + i * kWidth,
                   e + i < there ? across(p.a, row, count, e + i, p.depth) : V::zero());
        V::transpose(lines, kWidth, turned, kWidth);
        for (int64_t i = 0; i < count; ++i)
          V::store(to + i * stride + e, V::load(turned + i * kWidth));
      }
    }
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

  static void finish(const LinearParams& p, int64_t row0, int64_t row1) {
    if (p.norm != Norm::kNone) normalise_rows<V>(p, row0, row1);
  }

  static const clinattn::LinearKernels& kernels() {
    static const clinattn::LinearKernels all{
        .micro_rows = V::kMicroRows,
        .depth = 0,
        .needs_whole = false,
        .panel = panel,
        .strip = strip,
        .strips_size = strips_size,
        .rows_size = rows_size,
        .pack_strips = pack_strips,
        .pack_rows = pack_rows,
        .multiply = multiply,
        .finish = finish,
        .differentiate = differentiate_rows<V>,
    };
    return all;
  }
};

}  // namespace
