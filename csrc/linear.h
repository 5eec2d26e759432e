// A linear layer, with what follows its product, as plain data. No torch.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "attention.h"

namespace clinattn {

// (rows, depth), one of the strides being 1
struct Matrix {
  const void* at;
  DType dtype;
  int64_t rows, row_stride, depth_stride;
};

// Rows of contiguous numbers
struct RowsOf {
  void* at = nullptr;  // null for none
  DType dtype = DType::kFloat32;
  int64_t stride = 0;  // of a row
};

enum class Activation : int64_t { kNone, kGelu, kGeluTanh, kRelu };
enum class Norm : int64_t { kNone, kLayer, kRms };

// u <- a b^T + bias;  y <- act(u) or, where gated, act(the first half of u) * (the second half);
// y <- residual + dropout(y);  y <- norm(y) gamma + beta
struct LinearParams {
  Matrix a, b;
  int64_t depth;
  const float* bias;  // (b.rows), or null
  RowsOf before;      // u (a.rows, b.rows), for a backward pass
  Activation activation;
  bool gated;
  // Numbers are dropped with probability dropout_threshold / 2^24, as pairs of a query (their row)
  // and a key (their column) are in attention.
  uint32_t dropout_threshold;
  uint64_t seed;
  RowsOf residual;  // (a.rows, columns())
  Norm norm;
  const float *gamma, *beta;  // (columns()), or null
  double eps;
  RowsOf y;  // (a.rows, columns())
  // fp32, (a.rows, b.rows): y before its residual and norm, and the sums of engines that multiply a
  // depth in pieces. May be y.
  RowsOf whole;

  int64_t columns() const { return gated ? b.rows / 2 : b.rows; }
  // Returns whether rows are completed when all of their columns are there.
  bool completes() const { return residual.at || norm != Norm::kNone; }
};

// Part of a product: rows of a, strips of columns, and a range of their depth.
struct LinearTask {
  int64_t row0, row1, strip0, strip1, depth0, depth1;
};

struct LinearKernels {
  int64_t micro_rows;                     // rows of a panel are a multiple of it
  int64_t depth;                          // most of a task, 0 for all
  bool needs_whole;                       // p.whole
  int64_t (*panel)(int64_t depth);        // the rows of a that are packed together
  int64_t (*strip)(const LinearParams&);  // columns of y in a strip
  // Bytes of strips of b and of rows of a, as they are packed for so much depth
  size_t (*strips_size)(int64_t strips, int64_t depth);
  size_t (*rows_size)(int64_t rows, int64_t depth);
  // `strips` begin with task.strip0, `rows` with task.row0.
  void (*pack_strips)(const LinearParams&, const LinearTask&, void* strips);
  void (*pack_rows)(const LinearParams&, const LinearTask&, void* rows);
  // strips: null to pack those of the task here
  void (*multiply)(const LinearParams&, const LinearTask&, const void* strips, void* rows);
  // Completes rows [row0, row1) after all their products where p.whole holds them.
  void (*finish)(const LinearParams&, int64_t row0, int64_t row1);
  // du <- the gradient of u (rows, b.rows) from that of dropout(y): rows [row0, row1)
  void (*differentiate)(const LinearParams&, const RowsOf& dy, const RowsOf& du, int64_t row0,
                        int64_t row1);
};

}  // namespace clinattn
