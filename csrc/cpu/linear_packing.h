// The operands of linear layers, packed from matrices of fp32 or bf16 whose rows or columns are
// consecutive.
#pragma once

#include "../linear.h"
#include "rows.h"

namespace {

using clinattn::LinearParams;
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

// The rows of b of which kWidth sums of a strip come, from the j-th sum on: the first of them, and
// how many are there. width: columns of y in a strip; where gated, the sums behind them are gates.
struct SummedRows {
  int64_t first, count;
  SummedRows(const LinearParams& p, int64_t strip, int64_t width, int64_t j, int64_t lanes) {
    const int64_t column = strip * width + j % width;
    first = (j < width ? 0 : p.columns()) + column;
    count = min64(p.columns() - column, lanes);
  }
};

// Places of kWidth elements of kWidth rows: `line` floats from one element or row to the next,
// `next` to the next kWidth elements.
struct Block {
  int64_t line, next;
};

template <class V>
struct LinearPacking {
  using Operand = LinearOperand<V>;
  static constexpr int64_t kWidth = V::kWidth, kNumbers = Operand::kNumbers;

  static int64_t elements(int64_t depth) { return round_up(ceil_div(depth, kNumbers), kWidth); }

  // to (elements [e0, e1), kWidth) <- `count` rows of x from row0, and zeros. Lines are elements.
  static void columns(const Matrix& x, int64_t depth, int64_t row0, int64_t count, int64_t e0,
                      int64_t e1, float* to, Block block) {
    const bool as_elements = x.dtype == Operand::kType && x.row_stride % kNumbers == 0;
    alignas(64) float lines[kWidth * kWidth];
    for (int64_t i = max64(count, 0); i < kWidth; ++i) V::store(lines + i * kWidth, V::zero());
    for (int64_t e = e0; e < e1; e += kWidth, to += block.next) {
      const int64_t k = e * kNumbers, n = min64(depth - k, kWidth * kNumbers);
      if (count <= 0) {
        for (int64_t i = 0; i < kWidth; ++i) V::store(to + i * block.line, V::zero());
      } else if (x.depth_stride != 1) {
        for (int64_t i = 0; i < kWidth; ++i)
          V::store(to + i * block.line, across(x, depth, row0, count, e + i));
      } else {
        if (k + 5 * kWidth * kNumbers < depth)  // rows are far apart
          for (int64_t i = 0; i < count; ++i)
            __builtin_prefetch(at(x, row0 + i, k + 4 * kWidth * kNumbers));
        if (as_elements && count == kWidth && n == kWidth * kNumbers) {
          V::transpose(reinterpret_cast<const float*>(at(x, row0, k)), x.row_stride / kNumbers, to,
                       block.line);
          continue;
        }
        for (int64_t i = 0; i < count; ++i)
          Operand::put_row(lines + i * kWidth, at(x, row0 + i, k), x.dtype, n);
        V::transpose(lines, kWidth, to, block.line);
      }
    }
  }

  // to (kWidth, elements) <- `count` rows of x from row0. Lines are rows, of which those that are
  // not there keep what they hold.
  static void rows(const Matrix& x, int64_t depth, int64_t row0, int64_t count, float* to,
                   Block block) {
    if (x.depth_stride == 1 && block.next == kWidth) {
      for (int64_t i = 0; i < count; ++i)
        Operand::put_row(to + i * block.line, at(x, row0 + i, 0), x.dtype, depth);
      return;
    }
    for (int64_t e = 0; e < elements(depth); e += kWidth, to += block.next) {
      alignas(64) float lines[kWidth * kWidth], turned[kWidth * kWidth];
      if (x.depth_stride == 1) {
        const int64_t k = e * kNumbers;
        for (int64_t i = 0; i < count; ++i)
          Operand::put_row(to + i * block.line, at(x, row0 + i, k), x.dtype,
                           min64(depth - k, kWidth * kNumbers));
      } else {
        for (int64_t i = 0; i < kWidth; ++i)
          V::store(lines + i * kWidth, across(x, depth, row0, count, e + i));
        V::transpose(lines, kWidth, turned, kWidth);
        for (int64_t i = 0; i < count; ++i)
          V::store(to + i * block.line, V::load(turned + i * kWidth));
      }
    }
  }

 private:
  static const char* at(const Matrix& x, int64_t row, int64_t k) {
    return static_cast<const char*>(x.at) +
           (row * x.row_stride + k * x.depth_stride) * dtype_size(x.dtype);
  }

  // Element e of `count` rows from row0, whose numbers are consecutive
  static typename V::F across(const Matrix& x, int64_t depth, int64_t row0, int64_t count,
                              int64_t e) {
    if (e * kNumbers >= depth) return V::zero();
    const auto place = [&](int64_t i) {
      return e * kNumbers + i < depth ? at(x, row0, e * kNumbers + i) : nullptr;
    };
    return Operand::across(place, x.dtype, count);
  }
};

}  // namespace
