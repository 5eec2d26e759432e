// Linear layers of bf16 numbers on AMX tiles: 32 rows and 32 columns at a time, the parts of a
// depth in its order. The bits of a sum do not depend on what is computed beside it.
#pragma once

#include "amx_products.h"
#include "linear_epilogue.h"
#include "linear_packing.h"
#include "vec_avx512_bf16.h"

namespace {

using clinattn::LinearTask;

struct TileLinear {
  using V = Avx512Pairs;
  using Packing = LinearPacking<V>;
  static constexpr int64_t kMicroRows = 32, kMostDepth = 0;
  static constexpr bool kNeedsWhole = false;
  static constexpr int64_t kWidth = V::kWidth, kStrip = 32;
  static constexpr int64_t kFloats = kTile / 2;        // of a tile
  static constexpr int64_t kSteps = 16;                // multiplied at once: 32 KB of a strip in L1
  static constexpr Block kBlock{kWidth, 2 * kFloats};  // two tiles of a step lie side by side

  static int64_t steps(int64_t depth) { return ceil_div(depth, int64_t{32}); }
  // Floats of 32 rows of either operand
  static int64_t pair_of_tiles(int64_t depth) { return 2 * kFloats * steps(depth); }
  static size_t strips_size(int64_t strips, int64_t depth) {
    return strips * pair_of_tiles(depth) * sizeof(float);
  }
  // Behind rows there is room for their sums and for a strip.
  static size_t rows_size(int64_t rows, int64_t depth) {
    const int64_t blocks = ceil_div(rows, int64_t{32});
    return (blocks * (pair_of_tiles(depth) + 4 * kFloats) + pair_of_tiles(depth)) * sizeof(float);
  }
  // Rows of a that fill 512 KB of L2
  static int64_t panel(int64_t depth) { return clamp((256 << 10) / depth, 64, 256) / 32 * 32; }
  static int64_t strip(const LinearParams& p) { return p.gated ? 16 : 32; }

  static void pack_strips(const LinearParams& p, const LinearTask& task, void* strips) {
    float* to = static_cast<float*>(strips);
    for (int64_t s = task.strip0; s < task.strip1; ++s, to += pair_of_tiles(p.depth))
      for (int64_t j = 0; j < kStrip; j += kWidth) {
        const SummedRows rows(p, s, strip(p), j, kWidth);
        Packing::columns(p.b, p.depth, rows.first, rows.count, 0, Packing::elements(p.depth),
                         to + j / kWidth * kFloats, kBlock);
      }
  }

  static void pack_rows(const LinearParams& p, const LinearTask& task, void* rows) {
    float* to = static_cast<float*>(rows);
    for (int64_t row = task.row0; row < task.row1; row += 32, to += pair_of_tiles(p.depth))
      for (int64_t half = 0; half < 2 && row + 16 * half < task.row1; ++half)
        Packing::rows(p.a, p.depth, row + 16 * half, min64(task.row1 - row - 16 * half, kWidth),
                      to + half * kFloats, kBlock);
  }

  static void multiply(const LinearParams& p, const LinearTask& task, const void* strips,
                       void* rows) {
    const TileSession session;
    const int64_t count = task.row1 - task.row0, blocks = ceil_div(count, int64_t{32});
    float* sums = static_cast<float*>(rows) + blocks * pair_of_tiles(p.depth);
    float* own = sums + blocks * 4 * kFloats;
    for (int64_t s = task.strip0; s < task.strip1; ++s) {
      const float* b = own;
      if (strips) {
        b = static_cast<const float*>(strips) + (s - task.strip0) * pair_of_tiles(p.depth);
      } else {
        pack_strips(p, {task.row0, task.row1, s, s + 1, 0, p.depth}, own);
      }
      add_products(static_cast<const float*>(rows), b, count, steps(p.depth), sums);
      finish_strip(p, task, s, sums);
    }
  }

  static constexpr auto finish = complete_rows<V>;

 private:
  // sums (blocks of 2 x 2 tiles) <- rows of a times a strip
  static void add_products(const float* a, const float* b, int64_t count, int64_t depth,
                           float* sums) {
    TileProducts<1> tiles;
    for (int64_t k = 0; k < depth; k += kSteps) {
      const int64_t n = min64(depth - k, kSteps);
      for (int64_t row = 0; row < count; row += 32) {
        const Operand left = operand(a + row / 32 * (2 * kFloats * depth), k, count - row > 16),
                      right = operand(b, k, true);
        float* c = sums + row / 32 * (4 * kFloats);
        if (k == 0) {
          tiles.multiply<false, true>(left, right, n, c);
        } else {
          tiles.multiply<true, true>(left, right, n, c);
        }
      }
    }
  }

  static Operand operand(const float* at, int64_t step, bool two) {
    return {reinterpret_cast<const Bf16*>(at + step * 2 * kFloats), kTile, 0, 2 * kTile, two};
  }

  static void finish_strip(const LinearParams& p, const LinearTask& task, int64_t s,
                           const float* sums) {
    for (int64_t half = 0; half < (p.gated ? 1 : 2); ++half) {
      const int64_t column = s * strip(p) + half * kWidth;
      if (column >= p.columns()) break;
      const Epilogue<Avx512, kWidth> epilogue(p, column, min64(p.columns() - column, kWidth));
      for (int64_t row = task.row0; row < task.row1; row += 16) {
        const float* tile = sums + (row - task.row0) / 16 * (2 * kFloats);
        epilogue.run(row, min64(task.row1 - row, 16), tile + half * kFloats,
                     p.gated ? tile + kFloats : nullptr, kWidth);
      }
    }
  }
};

}  // namespace
