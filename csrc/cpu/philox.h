// The pairs that dropout keeps: Philox4x32 with 7 rounds (Salmon et al., Parallel random numbers:
// as easy as 1, 2, 3, 2011), for a vector of queries and 16 keys at a time. A pair's fate depends
// on (seed, sequence, head, query, key) alone.
//
// The counter is (key / 16, query, head, sequence). Its first two rounds multiply words that depend
// on the query or on the keys alone: those products are formed once for a row or a column of
// blocks.
#pragma once

#include "rows.h"

namespace {

constexpr uint32_t kPhilox0 = 0xD2511F53, kPhilox1 = 0xCD9E8D57;
constexpr int kPhiloxRounds = 7;
constexpr int64_t kDrawn = 16;  // keys that share a counter

inline uint32_t high_word(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}

// The words of queries [i, i + n), which all blocks of keys share: both halves of the second
// round's product, four copies of the least byte that is kept, and the mask of bytes before they
// are compared. The least byte 256, which no byte reaches, is stored as 255, and its mask clears
// the lowest bit.
struct DrawRows {
  uint32_t *high, *low, *least, *mask;
  DrawRows at(int64_t i) const { return {high + i, low + i, least + i, mask + i}; }
};

// The words of 16 keys, which all queries share
struct DrawColumn {
  uint32_t c2, c0, next2, next3;
};

// The draws of one head of one sequence
struct Dropout {
  uint32_t key0[kPhiloxRounds], key1[kPhiloxRounds];
  uint32_t head, sequence, threshold;

  Dropout(const AttentionParams& p, int64_t seq, int64_t head)
      : Dropout(p.seed, p.dropout_threshold, seq, head) {}

  Dropout(uint64_t seed, uint32_t threshold, int64_t seq, int64_t head)
      : head(static_cast<uint32_t>(head)),
        sequence(static_cast<uint32_t>(seq)),
        threshold(threshold) {
    for (uint32_t i = 0; i < kPhiloxRounds; ++i) {
      key0[i] = static_cast<uint32_t>(seed) + i * 0x9E3779B9;
      key1[i] = static_cast<uint32_t>(seed >> 32) + i * 0xBB67AE85;
    }
  }

  // Rows for queries from i; n is rounded up to vectors.
  template <class V>
  void rows(int64_t i, int64_t n, const DrawRows& to) const {
    const uint32_t head_high = high_word(kPhilox1, head), whole = threshold >> 16,
                   fraction = threshold & 0xffff;
    for (int64_t r = 0; r < n; r += V::kWidth) {
      uint32_t query[V::kWidth], word[V::kWidth];
      for (int64_t x = 0; x < V::kWidth; ++x) query[x] = static_cast<uint32_t>(i + r + x);
      const auto queries = V::load_words(query);
      typename V::Words high, low;
      V::multiply_words(V::xor3(queries, V::set_words(head_high), V::set_words(key0[0])), kPhilox0,
                        high, low);
      V::store_words(to.high + r, high);
      V::store_words(to.low + r, low);
      typename V::Words c[4] = {V::set_words(0xffffffff), queries, V::set_words(head),
                                V::set_words(sequence)};
      rounds<V>(c, 0);
      V::store_words(word, c[0]);
      for (int64_t x = 0; x < V::kWidth; ++x) {
        const uint32_t least = whole + ((word[x] & 0xffff) < fraction ? 1 : 0);
        to.least[r + x] = (least < 256 ? least : 255) * 0x01010101u;
        to.mask[r + x] = least < 256 ? 0xffffffff : 0xfefefefe;
      }
    }
  }

  DrawColumn column(int64_t block) const {
    const uint32_t c0 = static_cast<uint32_t>(block);
    const uint32_t c2 = high_word(kPhilox0, c0) ^ sequence ^ key1[0], c3 = kPhilox0 * c0;
    const uint32_t second0 = high_word(kPhilox1, c2) ^ (kPhilox1 * head) ^ key0[1];
    return {c3 ^ key1[1], (kPhilox1 * c2) ^ key0[2], high_word(kPhilox0, second0) ^ key1[2],
            kPhilox0 * second0};
  }

  // Four words, or 16 bytes, for each of a vector of rows
  template <class V>
  void draw(const DrawRows& rows, const DrawColumn& column, typename V::Words (&c)[4]) const {
    const auto none = V::set_words(0);
    typename V::Words high, low;
    V::multiply_words(V::xor3(V::load_words(rows.high), V::set_words(column.c2), none), kPhilox1,
                      high, low);
    c[0] = V::xor3(high, V::set_words(column.c0), none);
    c[1] = low;
    c[2] = V::xor3(V::load_words(rows.low), V::set_words(column.next2), none);
    c[3] = V::set_words(column.next3);
    this->rounds<V>(c, 3);
  }

  template <class V>
  void rounds(typename V::Words (&c)[4], int first) const {
    for (int i = first; i < kPhiloxRounds; ++i) {
      typename V::Words high0, low0, high1, low1;
      V::multiply_words(c[0], kPhilox0, high0, low0);
      V::multiply_words(c[2], kPhilox1, high1, low1);
      c[0] = V::xor3(high1, c[1], V::set_words(key0[i]));
      c[1] = low1;
      c[2] = V::xor3(high0, c[3], V::set_words(key1[i]));
      c[3] = low0;
    }
  }
};

// Returns the factor on pairs that are kept; 0 where none is.
inline double kept_scale(uint32_t threshold) {
  const double kept = 1 - threshold / 0x1p24;
  return kept > 0 ? 1 / kept : 0;
}
inline double kept_scale(const AttentionParams& p) { return kept_scale(p.dropout_threshold); }

// The pairs of a tile that are kept, a bit each, row by row: 48 x 128 bits are 1 KB.
template <class V, int64_t kRows, int64_t kKeys>
struct RowKept {
  static constexpr int64_t kBlocks = kKeys / kDrawn + 2;
  uint16_t bits[kRows][kBlocks];
  int64_t shift;  // of the keys from the first block drawn

  // n rows, and columns [begin, end) of the keys from k0
  void draw(const Dropout& dropout, const DrawRows& rows, int64_t n, int64_t k0, int64_t begin,
            int64_t end) {
    const int64_t first = (k0 + begin) / kDrawn;
    shift = k0 - first * kDrawn;
    for (int64_t block = first; block <= (k0 + end - 1) / kDrawn; ++block) {
      const DrawColumn column = dropout.column(block);
      for (int64_t i = 0; i < n; i += V::kWidth) {
        typename V::Words bytes[4];
        dropout.draw<V>(rows.at(i), column, bytes);
        V::kept_rows(bytes, rows.least + i, rows.mask + i, &bits[i][block - first], kBlocks);
      }
    }
  }
  // kWidth columns from one on, of one row
  uint32_t at(int64_t row, int64_t column) const {
    const uint64_t key = static_cast<uint64_t>(column + shift);
    const uint16_t* from = &bits[row][key / kDrawn];
    return (from[0] | static_cast<uint32_t>(from[1]) << 16) >> key % kDrawn;
  }
};

// The same of 32 queries and 32 keys, key by key: a bit for each of 16 queries.
template <class V>
struct ColumnKept {
  alignas(64) uint16_t bits[2][3 * kDrawn];
  int64_t offset = 0;  // of the first key

  void draw(const Dropout& dropout, const DrawRows& rows, int64_t n, int64_t k0, int64_t begin,
            int64_t end) {
    const int64_t first = (k0 + begin) / kDrawn;
    offset = k0 + begin - first * kDrawn;
    for (int64_t block = first; block <= (k0 + end - 1) / kDrawn; ++block) {
      const DrawColumn column = dropout.column(block);
      for (int64_t i = 0; i < n; i += V::kWidth) {
        typename V::Words bytes[4];
        dropout.draw<V>(rows.at(i), column, bytes);
        V::kept_columns(bytes, rows.least + i, rows.mask + i,
                        bits[i / V::kWidth] + (block - first) * kDrawn);
      }
    }
  }
  // For 16 queries from half 0 or 1, their bits for keys from the first on
  const uint16_t* of(int64_t half) const { return bits[half] + offset; }
};

}  // namespace
