// Products on AMX tiles of numbers that are sums of bf16 parts.
#pragma once

#include "amx.h"

namespace {

// Of two numbers as sums of parts, a = a1 + a2 + a3, the products that count, in passes over all
// steps of k. Dropped are a2 b2 of two parts, below 2^-16 of the result, and a2 b3, a3 b2 and a3 b3
// of three, below 2^-24. Of three parts the small products come first: added to a large sum they
// would lose what they are there for. Neighbours share a part, which stays in its tiles.
template <int kParts>
struct Products;
template <>
struct Products<1> {
  static constexpr int kCount = 1, kPasses = 1, kEnd[] = {1}, kA[] = {0}, kB[] = {0};
};
template <>
struct Products<2> {
  static constexpr int kCount = 3, kPasses = 1, kEnd[] = {3}, kA[] = {1, 0, 0}, kB[] = {0, 0, 1};
};
template <>
struct Products<3> {
  static constexpr int kCount = 6, kPasses = 2, kEnd[] = {5, 6}, kA[] = {2, 1, 1, 0, 0, 0},
                       kB[] = {0, 0, 1, 1, 2, 0};
};

// All products: scores of fp16 are as exact as sums in fp32.
template <int kParts>
struct AllProducts : Products<kParts> {};
template <>
struct AllProducts<2> {
  static constexpr int kCount = 4, kPasses = 1, kEnd[] = {4}, kA[] = {1, 1, 0, 0},
                       kB[] = {1, 0, 0, 1};
};

// Two neighbouring tiles of an operand, `other` elements apart, and the elements from one part and
// one step of k to the next. two: whether the second tile is needed.
struct Operand {
  const Bf16* at;
  int64_t other, part, step;
  bool two = true;
};

// Rows of so many numbers, a multiple of 32, in tiles: operands, or sums in blocks of 2 x 2 tiles
template <class Element>
struct Tiled {
  Element* at;
  int64_t width;
};

// Row and column of a block of 2 x 2 tiles of sums
inline int64_t in_block(int64_t row, int64_t column) {
  return row / 16 * 512 + column / 16 * 256 + row % 16 * 16 + column % 16;
}

// sums (2 x 2 tiles) <- products, of numbers in place of parts, of 32 keys and 32 queries, from
// whose tiles on these lie: all of them, for numbers too small for their parts, or those that are
// NaN. Parts of a number differ in sign, and their products with infinity would be NaN.
template <int kParts>
__attribute__((noinline)) void mend(float* sums, const Bf16* keys, const Bf16* queries,
                                    int64_t width, bool all) {
  const int64_t steps = width / 32;
  const auto number = [&](const Bf16* tiles, int64_t row, int64_t d, int64_t at) {
    float x = 0;
    for (int64_t part = 0; part < kParts; ++part)
      x += widen(BFloat16{tiles[((row / 16 * steps + d / 32) * kParts + part) * kTile + at]});
    return x;
  };
  for (int64_t key = 0; key < 32; ++key)
    for (int64_t row = 0; row < 32; ++row) {
      float& sum = sums[in_block(key, row)];
      if (!all && sum == sum) continue;
      sum = 0;
      for (int64_t d = 0; d < width; ++d)
        sum += number(keys, key, d, key % 16 * 32 + d % 32) *
               number(queries, row, d, d % 32 / 2 * 32 + row % 16 * 2 + d % 2);
    }
}

struct NoWork {
  void operator()() const {}
};

// Products of two tiles of A with two of B, one block after another. The four sums of a block are
// stored between the first products of the next: a store that waits for its sum would keep later
// instructions from starting. A comes from L2, past L1 where kStream; B should be in L1. work() is
// called with every four products, for vector instructions to run beside them: of more parts than
// one before them, while their operands are on the way, which is faster by some percent.
template <int kParts>
struct TileProducts {
  float* late = nullptr;         // where the finished sums go,
  bool late_rows, late_columns;  // and whether there are two tiles of them each way

  ~TileProducts() { finish(); }

  // c (four tiles: 00, 01, 10, 11) <- (a0; a1) (b0 b1), or c + that where kAdd; where an operand
  // has one tile, only what that gives
  template <bool kAdd = false, bool kStream = (kParts > 1), class P = Products<kParts>,
            class Work = NoWork>
  void multiply(const Operand& a, const Operand& b, int64_t steps, float* c, Work&& work = {}) {
    if (a.two && b.two) {
      all_steps<P, true, kAdd, kStream>(a, b, steps, c, work);
    } else {
      few_steps<P, kAdd, kStream>(a, b, steps, c, work);
    }
  }

  // Returns how often multiply calls work.
  template <class P = Products<kParts>>
  static int64_t calls(int64_t steps) {
    return P::kCount * steps;
  }

  void finish() {
    if (!late) return;
    _tile_stored(0, late, 64);
    if (late_columns) _tile_stored(1, late + 256, 64);
    if (late_rows) _tile_stored(2, late + 512, 64);
    if (late_rows && late_columns) _tile_stored(3, late + 768, 64);
    late = nullptr;
  }

 private:
  // Where kTwo, both operands have two tiles, so that no branch is needed in between.
  template <class P, bool kTwo, bool kAdd, bool kStream, class Work>
  __attribute__((always_inline)) void all_steps(const Operand& a, const Operand& b, int64_t steps,
                                                float* c, Work& work) {
    asm volatile("" ::: "memory");  // the intrinsics do not say that a tile's load reads memory
    step<P, 0, P::kEnd[0], true, kTwo, kAdd, kStream>(a, b, 0, c, work);
    for (int64_t k = 1; k < steps; ++k)
      step<P, 0, P::kEnd[0], false, kTwo, kAdd, kStream>(a, b, k, c, work);
    if constexpr (P::kPasses == 2)
      for (int64_t k = 0; k < steps; ++k)
        step<P, P::kEnd[0], P::kCount, false, kTwo, kAdd, kStream>(a, b, k, c, work);
    late = c, late_rows = kTwo || a.two, late_columns = kTwo || b.two;
  }
  template <class P, bool kAdd, bool kStream, class Work>
  __attribute__((noinline)) void few_steps(const Operand& a, const Operand& b, int64_t steps,
                                           float* c, Work& work) {
    all_steps<P, false, kAdd, kStream>(a, b, steps, c, work);
  }

  // Products [kBegin, kEnd) of the parts, of step k; where kFirst, the first ones of the block
  template <class P, int kBegin, int kEnd, bool kFirst, bool kTwo, bool kAdd, bool kStream,
            class Work>
  __attribute__((always_inline)) void step(const Operand& a, const Operand& b, int64_t k,
                                           const float* c, Work& work) {
    const bool two_rows = kTwo || a.two, two_columns = kTwo || b.two;
#pragma GCC unroll 5
    for (int i = kBegin; i < kEnd; ++i) {
      const Bf16* left = a.at + P::kA[i] * a.part + k * a.step;
      const Bf16* right = b.at + P::kB[i] * b.part + k * b.step;
      const bool new_a = i == kBegin || P::kA[i] != P::kA[i - 1];
      if (new_a) load_a0<kStream>(left);
      if (i == kBegin || P::kB[i] != P::kB[i - 1]) {
        _tile_loadd(6, right, 64);
        if (two_columns) _tile_loadd(7, right + b.other, 64);
      }
      if (new_a && two_rows) load_a1<kStream>(left + a.other);
      if (kParts > 1) work();
      if (kFirst && i == kBegin) {
        first_products<kAdd>(two_rows, two_columns, c);
      } else {
        _tile_dpbf16ps(0, 4, 6);
        if (two_columns) _tile_dpbf16ps(1, 4, 7);
        if (two_rows) _tile_dpbf16ps(2, 5, 6);
        if (two_rows && two_columns) _tile_dpbf16ps(3, 5, 7);
      }
      if (kParts == 1) work();
    }
  }

  template <bool kStream>
  static void load_a0(const Bf16* at) {
    if constexpr (kStream) {
      _tile_stream_loadd(4, at, 64);
    } else {
      _tile_loadd(4, at, 64);
    }
  }
  template <bool kStream>
  static void load_a1(const Bf16* at) {
    if constexpr (kStream) {
      _tile_stream_loadd(5, at, 64);
    } else {
      _tile_loadd(5, at, 64);
    }
  }

  // The first products of a block of so many tiles, and the stores of the block before
  template <bool kAdd>
  __attribute__((always_inline)) void first_products(bool two_rows, bool two_columns,
                                                     const float* c) {
    if (late) _tile_stored(0, late, 64);
    if constexpr (kAdd) {
      _tile_loadd(0, c, 64);
    } else {
      _tile_zero(0);
    }
    _tile_dpbf16ps(0, 4, 6);
    if (late && late_columns) _tile_stored(1, late + 256, 64);
    if (two_columns) {
      if constexpr (kAdd) {
        _tile_loadd(1, c + 256, 64);
      } else {
        _tile_zero(1);
      }
      _tile_dpbf16ps(1, 4, 7);
    }
    if (late && late_rows) _tile_stored(2, late + 512, 64);
    if (two_rows) {
      if constexpr (kAdd) {
        _tile_loadd(2, c + 512, 64);
      } else {
        _tile_zero(2);
      }
      _tile_dpbf16ps(2, 5, 6);
    }
    if (late && late_rows && late_columns) _tile_stored(3, late + 768, 64);
    if (two_rows && two_columns) {
      if constexpr (kAdd) {
        _tile_loadd(3, c + 768, 64);
      } else {
        _tile_zero(3);
      }
      _tile_dpbf16ps(3, 5, 7);
    }
  }
};

}  // namespace
