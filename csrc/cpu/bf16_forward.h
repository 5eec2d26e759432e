// The forward pass's products of bf16 parts by a multiplier M (TileProducts, DotProducts), its
// softmax on AVX-512. Everything is transposed: a vector belongs to one key and 16 queries, so that
// nothing is ever reduced along a vector.
#pragma once

#include "bf16_fold.h"
#include "cover.h"
#include "philox.h"

namespace {

template <class M>
struct Bf16Forward {
  using Multiplier = M;
  static constexpr int kParts = M::kParts;
  using V = Avx512;
  using T = float;
  using Session = typename M::Session;
  using Cover = ColumnCover<Bf16Forward>;
  template <class Hide, bool kDropout>
  using Fold = Bf16Fold<Bf16Forward, Hide, kDropout>;
  static constexpr int64_t kRows = 32, kKeys = 32;  // two tiles of queries, two of keys
  static constexpr int64_t kBlock = 32;             // keys packed at a time
  static constexpr int64_t kBegin = 32, kEnd = 4;   // where columns of a step may begin and end
  // blocks of keys whose weights are multiplied with v together
  static constexpr int64_t kGroup = 4;
  static constexpr int64_t kAligned = kKeys * kGroup;  // panels begin at multiples of it
  // v is packed so that its products with weights are not small either, where they count; a large
  // one so that sums of a thousand do not overflow.
  static constexpr float kRaisedValues = 0x1p40f, kLoweredValues = 0x1p-11f;
  static constexpr int64_t kChunk = 1024;  // queries of a task, all heads of a group

  const int64_t head_dim, value_dim;
  const int64_t width, v_width;  // these two padded to two tiles
  const int64_t o_width;         // with a tile for the sums of cut weights, which one part has
  const int64_t rows;
  const int64_t buffers;  // of scores
  const int64_t panel;    // keys packed together: k and v of them take 512 KB of L2
  Contents values;        // what the panel's rows of v hold
  // Every operand and result lies tile by tile: 16 rows with other lines between them take a tile's
  // load or store up to three times as long.
  // So do the parts of a tile, whatever the panel: at strides of pages they would share few lines
  // of L1, and a short sequence does not fill the pages.
  Bf16* q;       // q^T (rows / 16, width / 32, parts, tile): 1024 x 64 x 2 bytes = 128 KB a part
  Bf16* k;       // (panel / 16, width / 32, parts, tile)
  Bf16* v;       // v^T (panel / 32, v_width / 16, parts, tile)
  float* s_all;  // s^T, buffers of (2 tiles of keys, 2 of queries, 16, 16): 4 KB each
  Bf16* p;       // p^T of two groups, (kGroup, 2, parts, tile) each: 2 KB a part and block
  float* sums;   // (p v)^T before it joins o, two buffers of (2 tiles of d, 2 of queries, 16, 16)
  // (parts, kBlock, width or v_width): rows on their way into tiles; one tile
  Bf16 *stage, *pairs;
  float* out;                     // (16, v_width): rows of o on their way out
  Bf16* ones;                     // one tile
  Packing *of_queries, *of_keys;  // by kRows and kKeys
  float* s;                       // the buffer at hand
  float unit;                     // what its scores are multiples of
  float raised;                   // the factor of v
  ColumnKept<V> kept;             // by dropout, of that

  Bf16Forward(Arena& a, int64_t head_dim, int64_t value_dim, int64_t rows)
      : head_dim(head_dim),
        value_dim(value_dim),
        width(round_up(head_dim, 32)),
        v_width(round_up(value_dim, 32)),
        o_width(v_width + (kParts == 1 ? 16 : 0)),
        rows(round_up(rows, kRows)),
        buffers(M::kDelayed && max64(width, v_width) <= 64 ? 3 : 2),
        panel(262144 / (kParts * (width + v_width) * kAligned) * kAligned) {
    q = a.take<Bf16>(kParts * this->rows * width);
    k = a.take<Bf16>(kParts * panel * width);
    v = a.take<Bf16>(kParts * panel * v_width);
    s_all = a.take<float>(buffers * kRows * kKeys);
    p = a.take<Bf16>(2 * 2 * kGroup * kParts * kTile);
    sums = a.take<float>(2 * kRows * 32);
    stage = a.take<Bf16>(kParts * kBlock * max64(width, v_width));
    pairs = a.take<Bf16>(kTile);
    out = a.take<float>(16 * v_width);
    ones = a.take<Bf16>(kTile);
    of_queries = a.take<Packing>(this->rows / kRows);
    of_keys = a.take<Packing>(panel / kKeys);
  }

  Bf16* q_tile(int64_t part, int64_t r, int64_t d) {
    return q + ((r / 16 * (width / 32) + d / 32) * kParts + part) * kTile;
  }
  Bf16* k_tile(int64_t part, int64_t key, int64_t d) {
    return k + ((key / 16 * (width / 32) + d / 32) * kParts + part) * kTile;
  }
  Bf16* v_tile(int64_t part, int64_t key, int64_t d) {
    return v + ((key / 32 * (v_width / 16) + d / 16) * kParts + part) * kTile;
  }
  Bf16* weights(int64_t group) { return p + group * (2 * kGroup * kParts * kTile); }
  static Bf16* p_tile(Bf16* weights, int64_t part, int64_t row, int64_t block) {
    return weights + ((block * 2 + row / 16) * kParts + part) * kTile;
  }
  float* scores(int64_t block) {
    return s_all + (buffers == 2 ? block % 2 : block % 3) * (kRows * kKeys);
  }
  // The scores of 16 queries with one key of the block
  float* column(int64_t row, int64_t key) {
    return s + key / 16 * 512 + row / 16 * 256 + key % 16 * 16;
  }
  float* gain_at(int64_t, int64_t) { return nullptr; }  // for the backward pass

  void begin_task() {
    raised = kParts == 1 ? 1 : kRaisedValues;
    if (kParts == 1)
      for (int64_t i = 0; i < kTile; ++i) ones[i] = 0x3f80;
  }

  // n queries from row r, at most kRows
  void put_queries(int64_t r, int64_t n, const void* const* rows_of_q, DType dtype, bool negate) {
    of_queries[r / kRows] = packed_by_parts<kParts>([&](float factor) {
      Contents found;
      for (int64_t i = 0; i < n; ++i)
        found.add(split_row<kParts>(staged(i, width), rows_of_q[i], dtype, head_dim, width,
                                    negate ? -factor : factor));
      return found;
    });
    for (int64_t part = 0; part < kParts; ++part)
      for (int64_t i = 0; i < n; i += 16)
        for (int64_t d = 0; d < width; d += 32)
          pack_transposed(q_tile(part, r + i, d), stage + (part * kBlock + i) * width + d, width);
  }

  void begin_panel() { values = {}; }

  // n keys from j0 of the panel, at most kBlock; a null row is hidden from all and packed as zeros.
  // Past n only v needs them, whose products with weights of 0 count.
  void put_keys(int64_t j0, int64_t n, const void* const* k_rows, const void* const* v_rows,
                DType dtype) {
    of_keys[j0 / kKeys] = packed_by_parts<kParts>([&](float factor) {
      Contents found;
      for (int64_t j = 0; j < n; ++j)
        found.add(split_row<kParts>({k_tile(0, j0 + j, 0) + j % 16 * 32, kTile, kParts * kTile},
                                    k_rows[j], dtype, head_dim, width, factor));
      return found;
    });
    for (int64_t j = 0; j < kBlock; ++j)
      values.add(
          split_row<kParts>(staged(j, v_width), v_rows[j], dtype, value_dim, v_width, raised));
    for (int64_t part = 0; part < kParts; ++part)
      for (int64_t d = 0; d < v_width; d += 16) {
        pack_paired<false>(pairs, stage + part * kBlock * v_width + d, v_width);
        pack_transposed(v_tile(part, j0, d), pairs, 32);
      }
  }
  Lines staged(int64_t i, int64_t width) { return {stage + i * width, kBlock * width, 32}; }

  const Packing& packing_of_queries(int64_t r) const { return of_queries[r / kRows]; }
  const Packing& packing_of_keys(int64_t j) const { return of_keys[j / kKeys]; }

  // Returns whether v, as it is packed, could overflow in the sums of a long row.
  bool outgrown() const { return raised == kRaisedValues && !(values.size() < 0x1p56f); }
  // Packs v as a large one from here on. o: the sums of `rows` queries so far, which are scaled.
  void lower(float* o, int64_t rows) {
    for (int64_t i = 0; i < rows * o_width; i += 16)
      V::store(o + i, V::mul(V::load(o + i), V::set1(kLoweredValues / raised)));
    raised = kLoweredValues;
  }

  // The slow way for a v with NaN or inf, where only what rows see is multiplied, and for a v with
  // numbers too small for their parts.
  void multiply_seen(float* o, Bf16* weights, int64_t at, int64_t first, int64_t end, bool edge) {
    for (int64_t row = 0; row < kRows; ++row)
      for (int64_t d = 0; d < v_width; ++d) {
        float total = 0;
        for (int64_t j = first * kKeys; j < end * kKeys; ++j) {
          float weight = 0, value = 0;
          for (int64_t i = 0; i < kParts; ++i) {
            weight += widen(
                BFloat16{p_tile(weights, i, row, j / 32)[j % 32 / 2 * 32 + row % 16 * 2 + j % 2]});
            value += widen(BFloat16{v_tile(i, at + j, d)[d % 16 * 32 + j % 32]});
          }
          if (weight != 0 || !edge) total += weight * value;
        }
        o[d / 16 * 512 + row / 16 * 256 + d % 16 * 16 + row % 16] += total;
      }
  }

  // Row r of o; rows come in order, and 16 are turned at once.
  const float* output(const float* o, int64_t r) {
    if (r % 16 == 0) {
      const float* tiles = o + r / kRows * kRows * o_width + r % kRows / 16 * 256;
      for (int64_t d = 0; d < v_width; d += 16) V::transpose(tiles + d * 32, 16, out + d, v_width);
    }
    return out + r % 16 * v_width;
  }
  // Returns the divisor of o in row r, whose weights sum to l.
  float normaliser(const float* o, int64_t r, float l) const {
    if (kParts > 1) return l * raised;
    return o[r / kRows * kRows * o_width + v_width * 32 + r % kRows / 16 * 256 + r % 16];
  }
};

}  // namespace
