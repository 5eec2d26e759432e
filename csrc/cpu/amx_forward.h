// The forward pass's products on AMX tiles, its softmax on AVX-512. Everything is transposed: a
// vector belongs to one key and 16 queries, so that nothing is ever reduced along a vector.
#pragma once

#include "amx_fold.h"
#include "cover.h"
#include "philox.h"

namespace {

template <int kNumParts>
struct AmxForward {
  static constexpr int kParts = kNumParts;
  using V = Avx512;
  using T = float;
  using Session = TileSession;
  using Cover = ColumnCover<AmxForward>;
  template <class Hide, bool kDropout>
  using Fold = AmxFold<AmxForward, Hide, kDropout>;
  static constexpr int64_t kRows = 32, kKeys = 32;  // two tiles of queries, two of keys
  static constexpr int64_t kBlock = 32;             // keys packed at a time
  static constexpr int64_t kBegin = 32, kEnd = 4;   // where columns of a step may begin and end
  // blocks of keys whose weights are multiplied with v together
  static constexpr int64_t kGroup = 4;
  static constexpr int64_t kAligned = kKeys * kGroup;  // panels begin at multiples of it
  static constexpr int64_t kChunk = 1024;              // queries of a task, all heads of a group

  const int64_t head_dim, width;  // width: head_dim padded to two tiles
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
  Bf16* v;       // v^T (panel / 32, width / 16, parts, tile)
  float* s_all;  // s^T, buffers of (2 tiles of keys, 2 of queries, 16, 16): 4 KB each
  Bf16* p;       // p^T of two groups, (kGroup, 2, parts, tile) each: 2 KB a part and block
  float* sums;   // (p v)^T before it joins o, two buffers of (2 tiles of d, 2 of queries, 16, 16)
  Bf16 *stage, *pairs;  // (parts, kBlock, width): rows on their way into tiles; one tile
  float* out;           // (16, width): rows of o on their way out
  float* s;             // the buffer at hand
  ColumnKept<V> kept;   // by dropout, of that

  AmxForward(Arena& a, int64_t head_dim, int64_t rows)
      : head_dim(head_dim),
        width(round_up(head_dim, 32)),
        rows(round_up(rows, kRows)),
        buffers(width > 64 ? 2 : 3),
        panel(131072 / (kParts * width * kAligned) * kAligned) {
    q = a.take<Bf16>(kParts * this->rows * width);
    k = a.take<Bf16>(kParts * panel * width);
    v = a.take<Bf16>(kParts * panel * width);
    s_all = a.take<float>(buffers * kRows * kKeys);
    p = a.take<Bf16>(2 * 2 * kGroup * kParts * kTile);
    sums = a.take<float>(2 * kRows * 32);
    stage = a.take<Bf16>(kParts * kBlock * width);
    pairs = a.take<Bf16>(kTile);
    out = a.take<float>(16 * width);
  }

  Bf16* q_tile(int64_t part, int64_t r, int64_t d) {
    return q + ((r / 16 * (width / 32) + d / 32) * kParts + part) * kTile;
  }
  Bf16* k_tile(int64_t part, int64_t key, int64_t d) {
    return k + ((key / 16 * (width / 32) + d / 32) * kParts + part) * kTile;
  }
  Bf16* v_tile(int64_t part, int64_t key, int64_t d) {
    return v + ((key / 32 * (width / 16) + d / 16) * kParts + part) * kTile;
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
  float* cap_slope(int64_t, int64_t) { return nullptr; }  // for the backward pass

  // n queries from row r, at most kRows
  void put_queries(int64_t r, int64_t n, const void* const* rows_of_q, DType dtype, bool negate) {
    for (int64_t i = 0; i < n; ++i)
      split_row<kParts>(staged(i), rows_of_q[i], dtype, head_dim, width, negate ? -1.0f : 1.0f);
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
    for (int64_t j = 0; j < n; ++j)
      split_row<kParts>({k_tile(0, j0 + j, 0) + j % 16 * 32, kTile, kParts * kTile}, k_rows[j],
                        dtype, head_dim, width, 1);
    for (int64_t j = 0; j < kBlock; ++j)
      values.add(split_row<kParts>(staged(j), v_rows[j], dtype, head_dim, width, 1));
    for (int64_t part = 0; part < kParts; ++part)
      for (int64_t d = 0; d < width; d += 16) {
        pack_paired<false>(pairs, stage + part * kBlock * width + d, width);
        pack_transposed(v_tile(part, j0, d), pairs, 32);
      }
  }
  Lines staged(int64_t i) { return {stage + i * width, kBlock * width, 32}; }

  // The slow way for a v with NaN or inf that some rows do not see, where only what they see is
  // multiplied, and for a v too small for tiles.
  void multiply_seen(float* o, Bf16* weights, int64_t at, int64_t first, int64_t end) {
    for (int64_t row = 0; row < kRows; ++row)
      for (int64_t d = 0; d < width; ++d) {
        float total = 0;
        for (int64_t j = first * kKeys; j < end * kKeys; ++j) {
          float weight = 0, value = 0;
          for (int64_t i = 0; i < kParts; ++i) {
            weight += widen(
                BFloat16{p_tile(weights, i, row, j / 32)[j % 32 / 2 * 32 + row % 16 * 2 + j % 2]});
            value += widen(BFloat16{v_tile(i, at + j, d)[d % 16 * 32 + j % 32]});
          }
          if (weight != 0) total += weight * value;
        }
        o[d / 16 * 512 + row / 16 * 256 + d % 16 * 16 + row % 16] += total;
      }
  }

  // Row r of o; rows come in order, and 16 are turned at once.
  const float* output(const float* o, int64_t r) {
    if (r % 16 == 0) {
      const float* tiles = o + r / kRows * kRows * width + r % kRows / 16 * 256;
      for (int64_t d = 0; d < width; d += 16) V::transpose(tiles + d * 32, 16, out + d, width);
    }
    return out + r % 16 * width;
  }
};

}  // namespace
