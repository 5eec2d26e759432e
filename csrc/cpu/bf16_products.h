// Products of numbers that are sums of bf16 parts: the products of parts that count, and the layout
// of operands and sums.
#pragma once

#include "bf16_parts.h"

namespace {

// The products that count of two numbers as sums of parts, a = a1 + a2 + a3, in passes over all
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
  const auto i = static_cast<uint64_t>(row), j = static_cast<uint64_t>(column);  // shifts alone
  return static_cast<int64_t>(i / 16 * 512 + j / 16 * 256 + i % 16 * 16 + j % 16);
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

}  // namespace
