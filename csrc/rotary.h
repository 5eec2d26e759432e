// One call of rotary positions as plain data. No torch.
#pragma once

#include "attention.h"

namespace clinattn {

// Rows that share one set of angles while they are in cache.
constexpr int64_t kRotaryTokens = 32;

// A (batch, head, token, head_dim) view whose last stride is 1; y <- x turned.
struct RotaryTensor {
  const void* x;
  void* y;
  Strides x_strides, y_strides;
  int64_t heads;
};

struct RotaryParams {
  DType dtype;
  int64_t batch, tokens, head_dim;
  int64_t pairs;                // features turned: 2 * pairs, the first ones of head_dim
  const void* positions;        // (batch or 1, tokens): float, or double for kFloat64
  int64_t positions_batch = 0;  // stride, 0 where one row serves the batch
  const void* frequencies;      // (pairs), as positions
  bool interleaved;             // pairs are (0, 1), (2, 3), ... and not (i, i + pairs)
  bool inverse;                 // turns the other way
  RotaryTensor q, k;

  // Elements of scratch, of the type of the angles: tables of cos and sin, and a row padded to
  // whole vectors.
  static constexpr int64_t scratch(int64_t pairs) { return 2 * pairs * (kRotaryTokens + 1) + 16; }
};

}  // namespace clinattn
