// Linear layers in fp32 on AMX tiles, with the operands of amx_linear_operand.h and sums in fp32.
// The bits of an element do not depend on the rows beside it.
#pragma once

#include "amx_linear_operand.h"
#include "amx_products.h"
#include "linear_epilogue.h"

namespace {

using clinattn::LinearTask;

struct AmxLinear : AmxLinearOperand {
  static constexpr int64_t kMicroRows = 32, kMostDepth = kDepth;
  static constexpr bool kNeedsWhole = true;
  using V = Avx512;

  static size_t strips_size(int64_t strips, int64_t depth) {
    return packed_size(32 * strips, depth);
  }
  // Behind rows there is room for a strip.
  static size_t rows_size(int64_t rows, int64_t depth) { return packed_size(rows + 32, depth); }
  static int64_t panel(int64_t) { return 128; }
  // Columns of y in a strip: 32 rows of b, in order, are one.
  static int64_t strip(const LinearParams& p) { return p.gated ? 16 : 32; }

  static void pack_strips(const LinearParams& p, const LinearTask& task, void* strips) {
    alignas(64) Bf16 lines[kParts * 16 * kSection];
    const int64_t depth = task.depth1 - task.depth0, part = steps(depth) * kTile;
    const int64_t row0 = 32 * task.strip0, row1 = min64(32 * task.strip1, p.b.rows);
    Bf16* const packed = static_cast<Bf16*>(strips);
    split_all(packed, row1 - row0, depth, [&](int64_t row, int64_t k, bool again) {
      Bf16* const to = packed + row / 16 * sixteen(depth);
      const int64_t count = min64(depth - k, kSection);
      split_rows(p.b, row0 + row, task.depth0 + k, count, {lines, 16 * kSection, kTile},
                 powers(to, depth), again);
      for (int i = 0; i < kParts; ++i)
        for (int64_t step = 0; step < steps(count); ++step)
          pack_transposed(to + i * part + (k / 32 + step) * kTile,
                          lines + i * 16 * kSection + step * kTile, 32);
    });
  }

  static void pack_rows(const LinearParams& p, const LinearTask& task, void* rows) {
    const int64_t depth = task.depth1 - task.depth0;
    Bf16* const packed = static_cast<Bf16*>(rows);
    split_all(packed, task.row1 - task.row0, depth, [&](int64_t row, int64_t k, bool again) {
      Bf16* const to = packed + row / 16 * sixteen(depth);
      split_rows(p.a, task.row0 + row, task.depth0 + k, min64(depth - k, kSection),
                 {to + k / 32 * kTile, steps(depth) * kTile, kTile}, powers(to, depth), again);
    });
  }

  static void multiply(const LinearParams& p, const LinearTask& task, const void* strips,
                       void* rows) {
    const TileSession session;
    const auto* a = static_cast<const Bf16*>(rows);
    if (strips) return AmxLinear(p, task, static_cast<const Bf16*>(strips), a).run();
    const int64_t depth = task.depth1 - task.depth0;
    char* strip = static_cast<char*>(rows) + packed_size(task.row1 - task.row0, depth);
    for (int64_t s = task.strip0; s < task.strip1; ++s) {
      const LinearTask one{task.row0, task.row1, s, s + 1, task.depth0, task.depth1};
      pack_strips(p, one, strip);
      AmxLinear(p, one, reinterpret_cast<const Bf16*>(strip), a).run();
    }
  }

  // y <- what follows the sums that whole holds: rows [row0, row1)
  static void finish(const LinearParams& p, int64_t row0, int64_t row1) {
    constexpr int64_t kLine = 64;
    for (int64_t column = 0; column < p.columns(); column += kLine) {
      const int64_t n = min64(p.columns() - column, kLine);
      const Epilogue<Avx512, kLine> epilogue(p, column, n);
      const auto* sums = reinterpret_cast<const float*>(line_of(p.whole, row0, column));
      const int64_t ld = p.whole.stride, gates = p.columns();
      if (n % 16 == 0) {
        epilogue.run(row0, row1 - row0, sums, p.gated ? sums + gates : nullptr, ld);
        continue;
      }
      for (int64_t row = row0; row < row1; ++row, sums += ld) {  // sums end within a vector
        alignas(64) float padded[2 * kLine];
        load_row<Avx512>(padded, sums, DType::kFloat32, n);
        if (p.gated) load_row<Avx512>(padded + kLine, sums + gates, DType::kFloat32, n);
        epilogue.run(row, 1, padded, p.gated ? padded + kLine : nullptr, kLine);
      }
    }
    complete_rows<Avx512>(p, row0, row1);
  }

 private:
  const LinearParams& p;
  const LinearTask& task;
  const int64_t depth = task.depth1 - task.depth0, column0 = 32 * task.strip0,
                column1 = min64(32 * task.strip1, p.b.rows);
  const Bf16 *packed, *rows;  // b of the columns and a of the rows

  AmxLinear(const LinearParams& p, const LinearTask& task, const Bf16* packed, const Bf16* rows)
      : p(p), task(task), packed(packed), rows(rows) {}

  // 32 rows of a packed operand
  Operand operand(const Bf16* at, int64_t row, bool two) const {
    return {at + row / 16 * sixteen(depth), sixteen(depth), steps(depth) * kTile, kTile, two};
  }

  // The powers of 16 rows of an operand
  __m512 powers_of(const Operand& x, int64_t half) const {
    return _mm512_loadu_ps(powers(x.at + half * x.other, depth));
  }

  // Returns whether some row of x has a power in the relation kCompare to `power`.
  template <int kCompare>
  bool any_power(const Operand& x, float power) const {
    const __m512 y = _mm512_set1_ps(power);
    return (_mm512_cmp_ps_mask(powers_of(x, 0), y, kCompare) |
            _mm512_cmp_ps_mask(powers_of(x, 1), y, kCompare)) != 0;
  }

  void run() {
    alignas(64) float sums[2][4 * 256];
    int turn = 0;
    TileProducts<kParts> tiles;
    Block done(*this);
    const int64_t blocks = ceil_div(task.row1 - task.row0, 32);
    const int64_t lines = 2 * sixteen(depth) / 32, calls = blocks * tiles.calls(steps(depth));
    for (int64_t column = column0; column < column1; column += 32) {
      const Operand b = operand(packed, column - column0, column1 - column > 16);
      // The next columns come to L2 meanwhile.
      const Bf16* ahead = b.at + 2 * sixteen(depth);
      Shares ahead_shares(column + 32 < column1 ? lines : 0, calls);
      int64_t fetched = 0;
      const auto work = [&] {
        for (const int64_t until = ahead_shares.next(); fetched < until; ++fetched)
          __builtin_prefetch(ahead + 32 * fetched, 0, 2);
        done();
      };
      for (int64_t row = task.row0; row < task.row1; row += 32, turn ^= 1) {
        const Operand a = operand(rows, row - task.row0, task.row1 - row > 16);
        tiles.multiply(a, b, steps(depth), sums[turn], work);
        done.finish();
        done = Block(*this, sums[turn], row, column);
        if (any_power<_CMP_NEQ_UQ>(a, kUsual) || any_power<_CMP_NEQ_UQ>(b, kUsual)) {
          tiles.finish();
          done.write_unusual(a, b);
        }
      }
    }
    tiles.finish();
    done.finish();
  }

  // whole <- sums of 32 rows and columns, multiplied back, or whole + that where depth was worked
  // on before: beside the products of the next block, whose first call comes before the sums are
  // stored
  struct Block {
    const AmxLinear* task;
    const float* sums;
    int64_t row = 0, column = 0, rows = 0, columns = 0;
    int64_t written = 0;
    Shares shares;
    bool stored = false;

    explicit Block(const AmxLinear& task, const float* sums = nullptr, int64_t row = 0,
                   int64_t column = 0)
        : task(&task), sums(sums), row(row), column(column), shares(0, 0) {
      if (!sums) return;
      rows = min64(task.task.row1 - row, 32), columns = min64(task.column1 - column, 32);
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
    }

    void write(int64_t i) const {
      const Line y(*this, i);
      for (int64_t half = 0; 16 * half < columns; ++half)
        y.put(half, sums_of(sums, i, half), _mm512_set1_ps(kBack));
    }

    static __m512 sums_of(const float* sums, int64_t i, int64_t half) {
      return _mm512_loadu_ps(sums + (i / 16 * 2 + half) * 256 + i % 16 * 16);
    }

    // Row i of whole, and what sums are added to there
    struct Line {
      float* y;
      const float* more;
      int64_t columns;

      Line(const Block& block, int64_t i) : columns(block.columns) {
        const RowsOf& whole = block.task->p.whole;
        y = reinterpret_cast<float*>(line_of(whole, block.row + i, block.column));
        more = block.task->task.depth0 ? y : nullptr;
      }

      __mmask16 there(int64_t half) const {
        return static_cast<__mmask16>((1u << min64(columns - 16 * half, 16)) - 1);
      }

      // whole <- factor x + more: 16 columns
      void put(int64_t half, __m512 x, __m512 factor) const {
        const __mmask16 mask = there(half);
        x = more ? _mm512_fmadd_ps(x, factor, _mm512_maskz_loadu_ps(mask, more + 16 * half))
                 : _mm512_mul_ps(x, factor);
        _mm512_mask_storeu_ps(y + 16 * half, mask, x);
      }
    };

    // All of a block in which some row or column has another power than the usual one. What is not
    // finite comes from first parts alone, which have the signs of numbers: other parts of
    // infinity are 0, and infinity times the later parts of a number has any sign or is NaN.
    __attribute__((noinline)) void write_unusual(const Operand& a, const Operand& b) {
      alignas(64) float first[4 * 256];
      if (task->any_power<_CMP_EQ_OQ>(a, kNotFinite) || task->any_power<_CMP_EQ_OQ>(b, kNotFinite))
        TileProducts<1>().multiply(a, b, steps(task->depth), first);
      Digits digits(*task, a, b);
      for (; written < rows; ++written) {
        const int64_t i = written;
        const Line y(*this, i);
        const __m512 down = _mm512_set1_ps(powers(a.at + i / 16 * a.other, task->depth)[i % 16]);
        for (int64_t half = 0; 16 * half < columns; ++half) {
          const __m512 across = task->powers_of(b, half), power = _mm512_add_ps(down, across);
          const __mmask16 usual = _mm512_cmp_ps_mask(power, _mm512_set1_ps(2 * kUsual), _CMP_EQ_OQ);
          const __mmask16 infinite = _mm512_cmp_ps_mask(_mm512_max_ps(down, across),
                                                        _mm512_set1_ps(kNotFinite), _CMP_EQ_OQ);
          const __m512 sum = sums_of(sums, i, half);
          __m512 x = _mm512_mask_mov_ps(_mm512_scalef_ps(sum, power), usual, sum);
          if (infinite) x = _mm512_mask_mov_ps(x, infinite, sums_of(first, i, half));
          const uint32_t small =
              y.there(half) & ~(usual | infinite) &
              _mm512_cmp_ps_mask(_mm512_abs_ps(sum), _mm512_set1_ps(Digits::kSure), _CMP_LT_OQ);
          if (small) {
            alignas(64) float exact[16];
            Avx512::store(exact, x);
            for (int64_t j = 0; j < 16; ++j)
              if (small >> j & 1 && digits.lost(i, 16 * half + j))
                exact[j] = task->one_by_one(row + i, column + 16 * half + j);
            x = Avx512::load(exact);
          }
          y.put(half, x, _mm512_mask_mov_ps(_mm512_set1_ps(1), usual, _mm512_set1_ps(kBack)));
        }
      }
    }
  };

  // Finds sums that may lack digits because tiles took these for 0, of two rows of which one was
  // not raised: numbers in such a row may be 2^150 times as large as others. Where all products are
  // large enough they are whole. Where the sum is, its loss, at most 1024 times 2^4 numbers below
  // 2^-126 times 2^56, is less than a unit of the sum.
  struct Digits {
    static constexpr float kSure = 0x1p-32f, kWhole = 0x1p-98f;
    const AmxLinear& task;
    const Operand &a, &b;
    float rows[32], columns[32];  // the least magnitude other than 0 of each
    bool known = false;

    Digits(const AmxLinear& task, const Operand& a, const Operand& b) : task(task), a(a), b(b) {}

    bool lost(int64_t i, int64_t j) {
      if (!known) {
        for (int64_t half = 0; half < 2; ++half) {
          find_least(
              a.at + half * a.other, [](int64_t line, int64_t) { return line; }, rows + 16 * half);
          find_least(
              b.at + half * b.other, [](int64_t, int64_t lane) { return lane / 2; },
              columns + 16 * half);
        }
        known = true;
      }
      return min(rows[i], columns[j]) < kWhole || rows[i] * columns[j] < kWhole;
    }

    static float min(float x, float y) { return x < y ? x : y; }

    // least (16) <- the least first part other than 0, of rows row_of(line of a tile, lane of it)
    template <class RowOf>
    void find_least(const Bf16* at, const RowOf& row_of, float* least) const {
      for (int64_t row = 0; row < 16; ++row) least[row] = kInfinity;
      for (int64_t line = 0; line < 16; ++line) {
        // Less one, 0 is the largest of all.
        alignas(64) uint16_t lanes[32];
        __m512i found = _mm512_set1_epi16(-1);
        for (int64_t step = 0; step < steps(task.depth); ++step) {
          const __m512i x = _mm512_loadu_si512(at + step * kTile + 32 * line);
          const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi16(0x7fff));
          found = _mm512_min_epu16(found, _mm512_sub_epi16(magnitude, _mm512_set1_epi16(1)));
        }
        _mm512_storeu_si512(lanes, found);
        for (int64_t lane = 0; lane < 32; ++lane) {
          if (lanes[lane] == 0xffff) continue;
          float& of_row = least[row_of(line, lane)];
          of_row = min(of_row, widen(BFloat16{static_cast<Bf16>(lanes[lane] + 1)}));
        }
      }
    }
  };

  float one_by_one(int64_t row, int64_t column) const {
    const float* a = static_cast<const float*>(p.a.at) + row * p.a.row_stride;
    const float* b = static_cast<const float*>(p.b.at) + column * p.b.row_stride;
    double sum = 0;
    for (int64_t k = task.depth0; k < task.depth1; ++k)
      sum += static_cast<double>(a[k * p.a.depth_stride]) * b[k * p.b.depth_stride];
    return static_cast<float>(sum);
  }
};

}  // namespace
