// Scores q k^T of a tile by fused multiply-adds, for any vector type.
#pragma once

#include "concepts.h"
#include "cover.h"
#include "gemm.h"

namespace {

template <FmaVector Lanes>
struct FmaScores {
  using V = Lanes;
  using T = typename V::T;
  struct Session {};  // nothing to set up for a task
  using Cover = RowCover<FmaScores>;
  static constexpr int64_t kRows = V::kForwardRows;               // queries of a tile
  static constexpr int64_t kKeys = V::kForwardKeys;               // keys of a tile
  static constexpr int64_t kBlock = V::kWidth;                    // keys packed at a time
  static constexpr int64_t kBegin = V::kStrip, kEnd = V::kWidth;  // where columns may begin and end

  const int64_t head_dim;
  const int64_t width;  // padded to the vector
  T* q;                 // (rows, width): 384 x 64 x 4 bytes = 96 KB in L2
  T* kt;                // K^T in strips: 128 x 64 x 4 bytes = 32 KB in L2
  T* s;                 // (kRows, kKeys): 48 x 128 x 4 bytes = 24 KB in L1

  FmaScores(Arena& a, int64_t head_dim, int64_t rows, int64_t keys)
      : head_dim(head_dim), width(round_up(head_dim, V::kWidth)) {
    q = a.take<T>(rows * width);
    kt = a.take<T>(keys * width);
    s = a.take<T>(kRows * kKeys);
  }

  // kWidth scores of one row
  T* segment(int64_t row, int64_t key) { return s + row * kKeys + key; }
  T* gain_at(int64_t, int64_t) { return nullptr; }  // for the backward pass

  // n queries from row r, at most kRows; a null row is packed as zeros.
  void put_queries(int64_t r, int64_t n, const void* const* rows, DType dtype, bool negate) {
    for (int64_t i = 0; i < n; ++i) {
      T* dst = q + (r + i) * width;
      load_row_or_zeros<V>(dst, rows[i], dtype, head_dim);
      if (negate) negate_row<V>(dst, width);
    }
  }

  // n keys from j0, at most kBlock; a null row is hidden from all and packed as zeros. k^T is zeros
  // past n too, in columns of scores that are hidden.
  void put_keys(int64_t j0, int64_t n, const void* const* k_rows, DType dtype) {
    const T* rows[kBlock];
    for (int64_t j = 0; j < n; ++j)
      rows[j] = row_or_copy<V>(k_rows[j], dtype, head_dim, s + j * width);
    for (int64_t j = n; j < kBlock; ++j) rows[j] = kZeroRow<T>;
    T* strip = kt + j0 / V::kStrip * (V::kStrip * width) + j0 % V::kStrip;
    for (int64_t d = 0; d < width; d += V::kWidth)
      V::transpose_rows(rows, d, n, strip + d * V::kStrip, V::kStrip);
  }

  // s <- q k^T for n queries from row r and columns [begin, end) of the keys from `at` on
  void multiply(int64_t r, int64_t n, int64_t at, int64_t begin, int64_t end) {
    const int64_t first = at + begin;
    gemm<V, false, Update::kSet>(n, end - begin, width, q + r * width, width,
                                 kt + first / V::kStrip * (V::kStrip * width), V::kStrip,
                                 V::kStrip * width, s + begin, kKeys);
  }
};

}  // namespace
