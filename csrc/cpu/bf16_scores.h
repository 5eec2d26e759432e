// Scores q k^T of a tile as products of bf16 parts by a multiplier M (TileProducts, DotProducts).
// Unlike in the forward pass, a vector of scores belongs to one query and 16 keys: what is read of
// them are rows.
#pragma once

#include "bf16_products.h"
#include "cover.h"

namespace {

// The products of the forward pass in its order, where queries are the first operand and not keys:
// its normaliser belongs to these bits of the scores.
template <int kParts>
struct QueriesFirst {
  using P = AllProducts<kParts>;
  static constexpr int kCount = P::kCount, kPasses = P::kPasses;
  static constexpr auto &kEnd = P::kEnd, &kA = P::kB, &kB = P::kA;
};

template <class M>
struct Bf16Scores {
  static constexpr int kParts = M::kParts;
  using V = Avx512;
  using T = float;
  using Session = typename M::Session;
  using Cover = RowCover<Bf16Scores>;
  static constexpr int64_t kRows = 32, kKeys = 128;  // two tiles of queries, eight of keys
  static constexpr int64_t kBlock = 32;              // keys packed at a time
  static constexpr int64_t kBegin = 32, kEnd = 16;   // where columns may begin and end

  const int64_t head_dim;
  const int64_t width;  // padded to two tiles
  Bf16* q;              // (rows / 16, width / 32, parts, tile)
  Bf16* k;              // k^T (keys / 16, width / 32, parts, tile)
  float* s;             // blocks of 32 keys (2 tiles of queries, 2 of keys, 16, 16): 16 KB in L1
  Bf16* stage;          // (parts, kBlock, width): rows of k on their way into tiles
  Packing *of_queries, *of_keys;  // by kRows and kBlock
  M products;

  Bf16Scores(Arena& a, int64_t head_dim, int64_t rows, int64_t keys)
      : head_dim(head_dim), width(round_up(head_dim, 32)) {
    q = a.take<Bf16>(kParts * round_up(rows, kRows) * width);
    k = a.take<Bf16>(kParts * round_up(keys, kBlock) * width);
    s = a.take<float>(kRows * kKeys);
    stage = a.take<Bf16>(kParts * kBlock * width);
    of_queries = a.take<Packing>(ceil_div(rows, kRows));
    of_keys = a.take<Packing>(ceil_div(keys, kBlock));
  }

  Bf16* tile(Bf16* operand, int64_t part, int64_t row, int64_t d) {
    return operand + ((row / 16 * (width / 32) + d / 32) * kParts + part) * kTile;
  }
  // 16 scores of one row
  float* segment(int64_t row, int64_t key) {
    const auto at = static_cast<uint64_t>(key);  // shifts alone
    return s + at / 32 * 1024 + in_block(row, static_cast<int64_t>(at % 32));
  }
  float* gain_at(int64_t, int64_t) { return nullptr; }  // for the backward pass

  // n queries from row r, at most kRows; a null row is packed as zeros.
  void put_queries(int64_t r, int64_t n, const void* const* rows, DType dtype, bool negate) {
    of_queries[r / kRows] = packed_by_parts<kParts>([&](float factor) {
      Contents found;
      for (int64_t i = 0; i < n; ++i)
        found.add(split_row<kParts>({tile(q, 0, r + i, 0) + i % 16 * 32, kTile, kParts * kTile},
                                    rows[i], dtype, head_dim, width, negate ? -factor : factor));
      return found;
    });
  }

  // n keys from j0, at most kBlock; a null row is hidden from all and packed as zeros, as are those
  // past n.
  void put_keys(int64_t j0, int64_t n, const void* const* rows, DType dtype) {
    of_keys[j0 / kBlock] = packed_by_parts<kParts>([&](float factor) {
      Contents found;
      for (int64_t j = 0; j < kBlock; ++j)
        found.add(split_row<kParts>({stage + j * width, kBlock * width, 32},
                                    j < n ? rows[j] : nullptr, dtype, head_dim, width, factor));
      return found;
    });
    for (int64_t part = 0; part < kParts; ++part)
      for (int64_t j = 0; j < kBlock; j += 16)
        for (int64_t d = 0; d < width; d += 32)
          pack_transposed(tile(k, part, j0 + j, d), stage + (part * kBlock + j) * width + d, width);
  }

  // s <- q k^T for n queries from row r and columns [begin, end) of the keys from `at` on
  void multiply(int64_t r, int64_t n, int64_t at, int64_t begin, int64_t end) {
    const int64_t other = width / 32 * kParts * kTile;
    for (int64_t j = begin; j < end; j += kBlock)
      products.template multiply<false, false, QueriesFirst<kParts>>(
          {tile(q, 0, r, 0), other, kTile, kParts * kTile, n > 16},
          {tile(k, 0, at + j, 0), other, kTile, kParts * kTile, end - j > 16}, width / 32,
          s + j / 32 * 1024);
    products.finish();
    if constexpr (kParts > 1)
      for (int64_t j = begin; j < end; j += kBlock) complete(r, at + j, s + j / 32 * 1024);
  }

 private:
  // block <- the scores themselves of keys from `key` on, which came out in units of both packings
  void complete(int64_t r, int64_t key, float* block) {
    const Packing &queries = of_queries[r / kRows], &keys = of_keys[key / kBlock];
    const float unit = queries.unit * keys.unit;
    const bool all = unit > 1 && (queries.small || keys.small);
    if (all || !(queries.finite && keys.finite))
      mend<kParts>(block, tile(q, 0, r, 0), tile(k, 0, key, 0), width, all);
    for (int64_t x = 0; x < 1024; x += 16)
      V::store(block + x, V::mul(V::load(block + x), V::set1(unit)));
  }
};

}  // namespace
