// Products of bf16 numbers by VDPBF16PS, on operands laid out as those of AMX tiles: a tile of B
// holds pairs of k for 16 columns, which are a vector; a pair of A is broadcast to all of them.
#pragma once

#include "bf16_products.h"

namespace {

// Products of two tiles of A with two of B. Each sum is one chain in the order of k, whatever is
// beside it. work() is called after every tile of A, for vector instructions to run beside the
// products of the next one: out of order, as far as the processor looks ahead.
struct DotProducts {
  static constexpr int kParts = 1;
  static constexpr bool kDelayed = false;  // sums are stored when multiply returns
  struct Session {};
  // 8 x 2 accumulators, 2 vectors of B and 1 of A; a sum is added to every 8 cycles, and takes 6
  static constexpr int kRows = 8;

  // c (four tiles: 00, 01, 10, 11) <- (a0; a1) (b0 b1), or c + that where kAdd; where an operand
  // has one tile, only what that gives
  template <bool kAdd = false, bool kStream = false, class P = Products<1>, class Work = NoWork>
  void multiply(const Operand& a, const Operand& b, int64_t steps, float* c, Work&& work = {}) {
    const Bf16* left = a.at;
    for (int64_t tile = 0; tile <= a.two; ++tile, left += a.other, c += 512) {
      for (int64_t row = 0; row < 16; row += kRows) {
        if (b.two) {
          rows<2, kAdd>(left + row * 32, a.step, b, steps, c + row * 16);
        } else {
          rows<1, kAdd>(left + row * 32, a.step, b, steps, c + row * 16);
        }
      }
      work();
    }
  }

  // Returns how often multiply calls work where A has two tiles.
  template <class P = Products<1>>
  static int64_t calls(int64_t) {
    return 2;
  }

  static void finish() {}

  // sums + the upper 16 bits of even and of odd
  static __m512 add_cut(__m512 sums, __m512 even, __m512 odd) {
    const __m512i ones = _mm512_set1_epi32(0x3f803f80);
    return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(alternate(even, odd)),
                            reinterpret_cast<__m512bh>(ones));
  }

 private:
  template <int kColumns, bool kAdd>
  __attribute__((noinline)) static void rows(const Bf16* a, int64_t a_step, const Operand& operand,
                                             int64_t steps, float* c) {
    const Bf16* b[2] = {operand.at, operand.at + operand.other};
    __m512 sums[kRows][kColumns];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kColumns; ++j)
        sums[i][j] = kAdd ? _mm512_loadu_ps(c + i * 16 + j * 256) : _mm512_setzero_ps();
    for (int64_t k = 0; k < steps; ++k) {
#pragma GCC unroll 16
      for (int pair = 0; pair < 16; ++pair) {
        __m512bh right[kColumns];
#pragma GCC unroll 2
        for (int j = 0; j < kColumns; ++j)
          right[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b[j] + 32 * pair));
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          const __m512bh left = reinterpret_cast<__m512bh>(
              _mm512_set1_epi32(reinterpret_cast<const int*>(a + 32 * i)[pair]));
#pragma GCC unroll 2
          for (int j = 0; j < kColumns; ++j)
            sums[i][j] = _mm512_dpbf16_ps(sums[i][j], left, right[j]);
        }
      }
      a += a_step;
#pragma GCC unroll 2
      for (int j = 0; j < kColumns; ++j) b[j] += operand.step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kColumns; ++j) _mm512_storeu_ps(c + i * 16 + j * 256, sums[i][j]);
  }
};

}  // namespace
