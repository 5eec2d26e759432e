// One product of fp32 matrices as plain data. No torch.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace clinattn {

// (rows, depth), one of the strides being 1
struct Matrix {
  const float* at;
  int64_t rows, row_stride, depth_stride;
};

// y (a.rows, b.rows), contiguous, <- a b^T + bias
struct LinearParams {
  Matrix a, b;
  int64_t depth;
  const float* bias;  // (b.rows), or null
  float* y;
};

// Part of a product: rows of a and b and a range of their depth.
struct LinearTask {
  int64_t row0, row1, column0, column1, depth0, depth1;
};

// The data that all tasks of one product share.
struct LinearShared {
  void* packed;     // b of the columns and the depth in work
  int64_t column0;  // its first column
};

struct LinearKernels {
  int64_t rows, depth;                                 // most of a task
  size_t (*packed_size)(int64_t rows, int64_t depth);  // bytes of b packed, and of scratch for a
  void (*pack)(const LinearParams&, const LinearShared&, const LinearTask&);
  void (*multiply)(const LinearParams&, const LinearShared&, const LinearTask&, void* scratch);
};

}  // namespace clinattn
