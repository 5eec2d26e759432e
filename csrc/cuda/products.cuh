// Products of tiles by one warp, its sums in registers: on tensor cores, or with multiply-adds that
// keep every number where the tensor cores would.
#pragma once

#include "device.cuh"
#include "layout.h"

namespace clinattn {

template <class T>
constexpr bool is_bfloat16 = false;
template <>
constexpr bool is_bfloat16<bfloat16> = true;

CLINATTN_DEVICE int lane_index() { return thread_index() % kWarp; }
CLINATTN_DEVICE int warp_index() { return thread_index() / kWarp; }

// Sums of a (16 kM, 8 kN) block, over a warp
template <int kM, int kN>
struct Sums {
  float x[kM][kN][4];

  CLINATTN_DEVICE void clear() {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) x[m][n][e] = 0;
  }

  // f(element, row of the lane, row of the block, column of the block)
  template <class F>
  CLINATTN_DEVICE void each(const F& f) {
    const int lane = lane_index();
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          f(x[m][n][e], 2 * m + e / 2, 16 * m + fragment_row(lane, e),
            8 * n + fragment_column(lane, e));
  }
};

// T on tensor cores, or T converted to float
template <class T, bool kTensorCores>
struct Products;

template <class T>
struct Products<T, true> {
  // sums <- sums + a b^T, of rows [0, 16 kM) of a and rows [0, 8 kN) of b, over their columns
  template <int kM, int kN, int kDim>
  CLINATTN_DEVICE static void rows_by_rows(Sums<kM, kN>& sums, const Tile<T, kDim>& a, int a_row,
                                           const Tile<T, kDim>& b) {
    static_assert(kN % 2 == 0);
    const Place left = left_operand(lane_index()), right = right_operand(lane_index());
    const int left_at = opaque(a.offset(a_row + left.row, left.column)),
              right_at = opaque(b.offset(right.row, right.column));
#pragma unroll
    for (int k = 0; k < kDim; k += 16) {
      uint32_t x[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) load_matrices(x[m], a.base + (left_at ^ k) + 16 * m * kDim);
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t y[4];
        load_matrices(y, b.base + (right_at ^ k) + 8 * n * kDim);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          multiply<T>(sums.x[m][n], x[m], y[0], y[1]);
          multiply<T>(sums.x[m][n + 1], x[m], y[2], y[3]);
        }
      }
    }
  }

  // sums <- sums + w b, of the weights of a warp, rounded, and rows [0, 8 kK) of b
  template <int kM, int kN, int kK>
  CLINATTN_DEVICE static void weights_by_rows(Sums<kM, kN>& sums, const Sums<kM, kK>& w,
                                              const Tile<T, 8 * kN>& b) {
    static_assert(kN % 2 == 0 && kK % 2 == 0);
    const Place right = right_operand_transposed(lane_index());
    const int right_at = opaque(b.offset(right.row, right.column));
#pragma unroll
    for (int k = 0; k < kK; k += 2) {
      uint32_t x[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          x[m][i] = pack<T>(w.x[m][k + i / 2][i % 2 * 2], w.x[m][k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t y[4];
        load_transposed(y, b.base + (right_at ^ 8 * n) + 8 * k * 8 * kN);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          multiply<T>(sums.x[m][n], x[m], y[0], y[1]);
          multiply<T>(sums.x[m][n + 1], x[m], y[2], y[3]);
        }
      }
    }
  }
};

template <class T>
struct Products<T, false> {
  // Rows 8 n + r have column c of a tile at (8 n + r) kDim + (c ^ r kVector), see Tile::offset.
  template <int kM, int kN, int kDim>
  static CLINATTN_DEVICE void rows_by_rows(Sums<kM, kN>& sums, const Tile<T, kDim>& a, int a_row,
                                           const Tile<T, kDim>& b) {
    constexpr int kStep = 4, kVector = Tile<T, kDim>::kVector;
    const int lane = opaque(lane_index());
    const int left_row = fragment_row(lane, 0), left_at = (a_row + left_row) * kDim,
              left_turn = left_row * kVector;
    const int right_row = fragment_column(lane, 0), right_at = right_row * kDim,
              right_turn = right_row * kVector;
#pragma unroll 2
    for (int k = 0; k < kDim; k += kStep) {
      float x[kM][2][kStep];
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          load(x[m][half], a.base + left_at + (16 * m + 8 * half) * kDim + (k ^ left_turn));
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          float y[kStep];
          load(y, b.base + right_at + (8 * n + side) * kDim + (k ^ (right_turn + side * kVector)));
#pragma unroll
          for (int i = 0; i < kStep; ++i)
#pragma unroll
            for (int m = 0; m < kM; ++m)
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                float& sum = sums.x[m][n][2 * half + side];
                sum = fmaf(x[m][half][i], y[i], sum);
              }
        }
    }
  }

  template <int kM, int kN, int kK>
  static CLINATTN_DEVICE void weights_by_rows(Sums<kM, kN>& sums, const Sums<kM, kK>& w,
                                              const Tile<T, 8 * kN>& b) {
    constexpr int kVector = Tile<T, 8 * kN>::kVector, kPart = kM == 1 && kN == 8 ? 4 : 2;
    const int lane = opaque(lane_index()), column = fragment_column(lane, 0);
    // Sums of a tile are formed apart, a few columns at a time: one long chain of sums would have
    // more rounding errors than its parts together.
#pragma unroll
    for (int first = 0; first < kN; first += kPart) {
      Sums<kM, kPart> part;
      part.clear();
#pragma unroll
      for (int k = 0; k < 8 * kK; ++k) {
        // The lane of these rows that has column k
        const int owner = lane / 4 * 4 + k % 8 / 2, turn = k % 8 * kVector;
        const T* row = b.base + k * 8 * kN + (column ^ turn % 8);
        float x[kM][2];
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            x[m][half] = shuffle(w.x[m][k / 8][2 * half + k % 2], owner);
#pragma unroll
        for (int n = 0; n < kPart; ++n) {
          float y[2];
          load(y, row + (8 * (first + n) ^ turn / 8 * 8));
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              part.x[m][n][e] = fmaf(x[m][e / 2], y[e % 2], part.x[m][n][e]);
        }
      }
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kPart; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) sums.x[m][first + n][e] += part.x[m][n][e];
    }
  }

 private:
  // Neighbours of a chunk, in one read
  template <int n>
  CLINATTN_DEVICE static void load(float (&x)[n], const T* from) {
    struct alignas(n * sizeof(T)) Group {
      T x[n];
    };
    const Group group = *reinterpret_cast<const Group*>(from);
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = to_float(group.x[i]);
  }
};

}  // namespace clinattn
