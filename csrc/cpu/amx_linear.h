// Products of fp32 matrices on AMX tiles: each number as the sum of three bf16 parts, which hold
// all its 24 bits, and sums in fp32. What an element is does not depend on the rows beside it.
#pragma once

#include "../linear.h"
#include "amx_products.h"

namespace {

using clinattn::LinearParams;
using clinattn::LinearShared;
using clinattn::LinearTask;
using clinattn::Matrix;

// Parts of either operand lie sixteen rows after sixteen: (3, steps of 32, 16 rows, 32), as B
// packed.
struct AmxLinear {
  static constexpr int kParts = 3;
  static constexpr int64_t kRows = 128, kDepth = 1024, kSection = 256;

  static int64_t steps(int64_t depth) { return ceil_div(depth, int64_t{32}); }
  static int64_t sixteen(int64_t depth) { return kParts * steps(depth) * kTile; }

  // Bytes of the parts of so many rows of either operand
  static size_t parts_size(int64_t rows, int64_t depth) {
    return round_up(rows, 32) / 16 * sixteen(depth) * sizeof(Bf16);
  }

  // to <- parts of 16 rows of x from row0 on, of [depth0, depth0 + count), at most a section; what
  // lies outside x is 0
  static void split_rows(const Matrix& x, int64_t row0, int64_t depth0, int64_t count,
                         const Lines& to, float* sizes) {
    alignas(64) float turned[16 * kSection];
    const int64_t rows = x.rows - row0 < 16 ? x.rows - row0 : 16;
    const float* from = x.at + row0 * x.row_stride + depth0 * x.depth_stride;
    int64_t stride = x.row_stride;
    if (x.depth_stride != 1) {
      int64_t k = 0;
      if (rows == 16)
        for (; k + 16 <= count; k += 16)
          Avx512::transpose(from + k * x.depth_stride, x.depth_stride, turned + k, kSection);
      for (; k < count; ++k)
        for (int64_t row = 0; row < rows; ++row)
          turned[row * kSection + k] = from[row + k * x.depth_stride];
      from = turned, stride = kSection;
    }
    for (int64_t row = 0; row < 16; ++row) {
      const Lines line{to.at + 32 * row, to.part, to.line};
      const void* source = row < rows ? from + row * stride : nullptr;
      const Contents found =
          split_row<kParts>(line, source, DType::kFloat32, count, round_up(count, 32), 1);
      if (row < rows) {
        const float size = static_cast<float>(found.size());
        if (depth0 == 0 || size > sizes[row]) sizes[row] = size;
      }
    }
  }

  static void pack(const LinearParams& p, const LinearShared& shared, const LinearTask& task) {
    alignas(64) Bf16 lines[kParts * 16 * kSection];
    const int64_t depth = task.depth1 - task.depth0, all = steps(depth) * kTile;
    for (int64_t k = 0; k < depth; k += kSection) {
      const int64_t count = min64(depth - k, kSection);
      for (int64_t column = task.column0; column < round_up(task.column1, 32); column += 16) {
        split_rows(p.b, column, task.depth0 + k, count, {lines, 16 * kSection, kTile},
                   shared.column_sizes + column);
        Bf16* to = static_cast<Bf16*>(shared.packed) +
                   (column - shared.column0) / 16 * sixteen(depth) + k / 32 * kTile;
        for (int part = 0; part < kParts; ++part)
          for (int64_t step = 0; step < steps(count); ++step)
            pack_transposed(to + part * all + step * kTile,
                            lines + part * 16 * kSection + step * kTile, 32);
      }
    }
  }

  static void multiply(const LinearParams& p, const LinearShared& shared, const LinearTask& task,
                       void* scratch) {
    const TileSession session;
    AmxLinear(p, shared, task, scratch).run();
  }

 private:
  const LinearParams& p;
  const LinearShared& shared;
  const LinearTask& task;
  const int64_t depth = task.depth1 - task.depth0;
  Bf16* const parts;  // (row / 16, parts, steps, 16, 32)

  AmxLinear(const LinearParams& p, const LinearShared& shared, const LinearTask& task,
            void* scratch)
      : p(p), shared(shared), task(task), parts(static_cast<Bf16*>(scratch)) {}

  // Where the parts of 16 rows start in what sixteen() counts
  Operand operand(const Bf16* at, int64_t row, bool two) const {
    return {at + row / 16 * sixteen(depth), sixteen(depth), steps(depth) * kTile, kTile, two};
  }

  void run() {
    for (int64_t k = 0; k < depth; k += kSection)
      for (int64_t row = 0; row < round_up(task.row1 - task.row0, 32); row += 16)
        split_rows(
            p.a, task.row0 + row, task.depth0 + k, min64(depth - k, kSection),
            {parts + row / 16 * sixteen(depth) + k / 32 * kTile, steps(depth) * kTile, kTile},
            task.row_sizes + task.row0 + row);
    const Bf16* packed = static_cast<const Bf16*>(shared.packed);
    alignas(64) float sums[2][4 * 256];
    int turn = 0;
    TileProducts<kParts> tiles;
    Block done(*this);
    const int64_t blocks = ceil_div(task.row1 - task.row0, 32);
    const int64_t lines = 2 * sixteen(depth) / 32, calls = blocks * tiles.calls(steps(depth));
    for (int64_t column = task.column0; column < task.column1; column += 32) {
      const Operand b = operand(packed, column - shared.column0, task.column1 - column > 16);
      // The next columns come to L2 meanwhile.
      const Bf16* ahead = b.at + 2 * sixteen(depth);
      Shares ahead_shares(column + 32 < task.column1 ? lines : 0, calls);
      int64_t fetched = 0;
      const auto work = [&] {
        for (const int64_t until = ahead_shares.next(); fetched < until; ++fetched)
          __builtin_prefetch(ahead + 32 * fetched, 0, 2);
        done();
      };
      for (int64_t row = task.row0; row < task.row1; row += 32, turn ^= 1) {
        const Operand a = operand(parts, row - task.row0, task.row1 - row > 16);
        tiles.multiply(a, b, steps(depth), sums[turn], work);
        done.finish();
        done = Block(*this, sums[turn], row, column);
      }
    }
    tiles.finish();
    done.finish();
  }

  // y <- sums of 32 rows and columns, with the bias, or y + sums where depth was worked on before:
  // beside the products of the next block, whose first call comes before the sums are stored
  struct Block {
    const AmxLinear* task;
    const float* sums;
    int64_t row = 0, column = 0, rows = 0, columns = 0;
    int64_t written = 0;
    Shares shares;
    bool stored = false;
    __mmask16 finite = 0xffff;

    explicit Block(const AmxLinear& task, const float* sums = nullptr, int64_t row = 0,
                   int64_t column = 0)
        : task(&task), sums(sums), row(row), column(column), shares(0, 0) {
      if (!sums) return;
      rows = min64(task.task.row1 - row, 32), columns = min64(task.task.column1 - column, 32);
      shares = Shares(rows, TileProducts<kParts>::calls(steps(task.depth)) - 1);
    }

    void operator()() {
      if (!stored) {
        stored = true;
        return;
      }
      for (const int64_t until = min64(shares.next(), rows); written < until; ++written)
        write(written);
    }

    void finish() {
      for (; written < rows; ++written) write(written);
      if (rows && task->task.depth1 == task->p.depth) task->mend(*this);
    }

    void write(int64_t i) {
      const LinearParams& p = task->p;
      float* y = p.y + (row + i) * p.b.rows + column;
      const float* more = task->task.depth0 ? y : p.bias ? p.bias + column : nullptr;
      for (int64_t half = 0; 16 * half < columns; ++half) {
        const auto mask = static_cast<__mmask16>((1u << min64(columns - 16 * half, 16)) - 1);
        __m512 x = _mm512_loadu_ps(sums + (i / 16 * 2 + half) * 256 + i % 16 * 16);
        if (more) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, more + 16 * half));
        _mm512_mask_storeu_ps(y + 16 * half, mask, x);
        finite &= _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(__FLT_MAX__), _CMP_LE_OQ);
      }
    }
  };

  // Whether magnitudes of a row and a column, or of their products, are too small for parts
  static bool lost(double a, double b) {
    const auto t = [](double x) { return x > 0 && x < kSmall; };
    return t(a) || t(b) || t(a * b);
  }

  static float least(const float* sizes, int64_t count) {
    float least = __FLT_MAX__;
    for (int64_t i = 0; i < count; ++i) least = sizes[i] > 0 && sizes[i] < least ? sizes[i] : least;
    return least;
  }

  // What parts cannot tell: products with infinity, whose other parts are 0, and numbers so small
  // that tiles take their later parts for 0.
  void mend(const Block& block) const {
    const float* row_sizes = task.row_sizes + block.row;
    const float* column_sizes = shared.column_sizes + block.column;
    if (block.finite == 0xffff &&
        !lost(least(row_sizes, block.rows), least(column_sizes, block.columns)))
      return;
    bool nan_columns[32];
    for (int64_t j = 0; j < block.columns; ++j) nan_columns[j] = has_nan(p.b, block.column + j);
    for (int64_t i = 0; i < block.rows; ++i) {
      const bool nan_row = has_nan(p.a, block.row + i);
      for (int64_t j = 0; j < block.columns; ++j) {
        float& y = p.y[(block.row + i) * p.b.rows + block.column + j];
        if (nan_row || nan_columns[j]) {
          y = __builtin_nanf("");
        } else if (!(__builtin_fabsf(y) <= __FLT_MAX__) || lost(row_sizes[i], column_sizes[j])) {
          y = one_by_one(block.row + i, block.column + j);
        }
      }
    }
  }

  bool has_nan(const Matrix& x, int64_t row) const {
    const float* from = x.at + row * x.row_stride;
    bool found = false;
    for (int64_t k = 0; k < p.depth; ++k) found |= __builtin_isnan(from[k * x.depth_stride]);
    return found;
  }

  float one_by_one(int64_t row, int64_t column) const {
    const float* a = p.a.at + row * p.a.row_stride;
    const float* b = p.b.at + column * p.b.row_stride;
    double sum = p.bias ? p.bias[column] : 0;
    for (int64_t k = 0; k < p.depth; ++k)
      sum += static_cast<double>(a[k * p.a.depth_stride]) * b[k * p.b.depth_stride];
    return static_cast<float>(sum);
  }
};

}  // namespace
