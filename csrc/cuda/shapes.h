// The rows that a block of each kernel works on, by type, head dim and kind of card.
#pragma once

#include "copies.cuh"

namespace clinattn {

enum class Pass { kForward, kDq, kDkdv, kWeights };

// The shared memory that a block may have: on 7.5, and on 8.6 and 8.9, the least of the other cards
constexpr int kTuringShared = 64 * 1024, kAmpereShared = 99 * 1024;

// Each of `warps` warps keeps the sums of 16 x tiles rows; tiles of `streamed` rows pass by.
struct Shape {
  int warps, tiles, streamed;

  CLINATTN_SHARED constexpr int threads() const { return warps * kWarp; }
  CLINATTN_SHARED constexpr int warp_rows() const { return 16 * tiles; }
  CLINATTN_SHARED constexpr int rows() const { return warps * warp_rows(); }
};

// size: bytes of an element. dim: 64, 128 or 256. turing: cards below 8.0, whose blocks have 64 KB
// of shared memory. Footprints: rows that stay (q; q and do; k and v), and twice two streamed
// tiles, once on turing; kWeights has one tensor of each, q and k. The streamed rows are as many
// whether pairs differ or not: sums keep their order. 16 rows a warp read each streamed row from
// shared memory twice as often as 32 do, which on cards from 8.0 on costs more than the products;
// registers allow 32 where named.
CLINATTN_SHARED constexpr Shape shape(Pass pass, int size, int dim, bool pairs, bool turing) {
  const bool wide = size == 4;
  if (pass == Pass::kForward) {
    if (turing) {
      if (dim == 64) return Shape{4, 1, wide ? 32 : 64};                // 32, 24 KB
      if (dim == 128) return wide ? Shape{4, 1, 16} : Shape{4, 1, 32};  // 48, 32
      return wide ? Shape{2, 1, 8} : Shape{4, 1, 16};                   // 48, 48
    }
    if (dim == 64) return Shape{4, wide && pairs ? 1 : 2, wide ? 32 : 64};  // 64, 48
    if (dim == 128) return Shape{4, pairs ? 1 : 2, wide ? 16 : 32};         // 96, 64
    return wide ? Shape{4, 1, 8} : Shape{4, 1, 32};                         // 96, 96
  }
  if (pass == Pass::kWeights) {
    if (turing) {
      if (dim == 64) return Shape{4, wide ? 1 : 2, 32};                 // 24, 20
      if (dim == 128) return wide ? Shape{4, 1, 16} : Shape{4, 1, 32};  // 40, 24
      return wide ? Shape{2, 1, 8} : Shape{4, 1, 32};                   // 40, 48
    }
    if (dim == 64) return Shape{4, pairs ? 1 : 2, wide ? 32 : 64};                // 48, 32
    if (dim == 128) return wide ? Shape{4, 1, 16} : Shape{4, pairs ? 1 : 2, 32};  // 48, 48
    return wide ? Shape{4, 1, 8} : Shape{4, pairs ? 1 : 2, 16};                   // 80, 80
  }
  if (turing) {
    if (dim == 64) return Shape{4, 1, 32};                           // 48, 24
    if (dim == 128) return wide ? Shape{2, 1, 8} : Shape{4, 1, 16};  // 40, 40
    return wide ? Shape{1, 1, 8} : Shape{2, 1, 16};                  // 48, 48
  }
  if (pass == Pass::kDq) {
    if (dim == 64) return wide ? Shape{4, 1, 32} : Shape{4, pairs ? 1 : 2, 32};  // 64, 48
    if (dim == 128) return wide ? Shape{4, 1, 16} : Shape{4, 1, 64};             // 96, 96
    return wide ? Shape{2, 1, 8} : Shape{4, 1, 16};                              // 96, 96
  }
  if (dim == 64) return wide ? Shape{4, 1, 32} : Shape{4, pairs ? 1 : 2, 32};  // 64, 48
  if (dim == 128) return wide ? Shape{4, 1, 16} : Shape{4, 1, 32};             // 96, 64
  return wide ? Shape{2, 1, 8} : Shape{4, 1, 16};                              // 96, 96
}

// Returns the Copies of a kernel's tiles.
CLINATTN_SHARED constexpr Copies copies(int size, int dim, bool turing) {
  if (!turing) return Copies::kAsync;
  return size * dim >= 512 ? Copies::kLate : Copies::kStaged;
}

}  // namespace clinattn
