// Where things are: elements in the registers of a warp, rows in shared memory, tiles in a grid.
#pragma once

#include "../interval.h"

namespace clinattn {

constexpr int kWarp = 32;

// A (16, 8) accumulator gives each lane four elements: two neighbours in each of two rows. The same
// lanes hold the same rows and columns of the operands of a product:
//   a (16, 16): registers 0, 1 are rows g, g + 8 of columns 0-7, registers 2, 3 of columns 8-15
//   b (16, 8):  registers 0, 1 are rows 0-7, 8-15 of column g, two neighbours each
// so that two accumulators side by side, rounded, are the operand a of the next product.
CLINATTN_SHARED constexpr int fragment_row(int lane, int element) {
  return lane / 4 + 8 * (element / 2);
}
CLINATTN_SHARED constexpr int fragment_column(int lane, int element) {
  return 2 * (lane % 4) + element % 2;
}

// The row and the first column that a lane names when four 8x8 matrices are loaded.
struct Place {
  int row, column;
};
// The place for an operand a: a (16, 16) block of rows of the left factor
CLINATTN_SHARED constexpr Place left_operand(int lane) { return {lane % 16, lane / 16 * 8}; }
// The place for two operands b, of 16 columns: a (16, 16) block of rows of the right factor,
// transposed
CLINATTN_SHARED constexpr Place right_operand(int lane) {
  return {lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8};
}
// The same for a right factor as it is, for load_transposed
CLINATTN_SHARED constexpr Place right_operand_transposed(int lane) {
  return {lane % 16, lane / 16 * 8};
}

// A tile of rows in shared memory, in chunks of 16 bytes. Eight neighbouring rows keep a chunk in
// eight different places, so that a column of chunks is read without bank conflicts.
template <class T, int kColumns>
struct Tile {
  static constexpr int kVector = 16 / sizeof(T), kChunks = kColumns / kVector;
  static_assert(kChunks % 8 == 0);

  T* base;

  // Columns k further on, k even chunks and no carry, are at offset ^ k; rows 8 n further on at
  // offset + 8 n kColumns.
  CLINATTN_SHARED static constexpr int offset(int row, int column) {
    return row * kColumns + ((column / kVector) ^ (row & 7)) * kVector + column % kVector;
  }
  CLINATTN_SHARED T* at(int row, int column) const { return base + offset(row, column); }
  CLINATTN_SHARED static constexpr int bytes(int rows) {
    return rows * kColumns * static_cast<int>(sizeof(T));
  }
};

// The work of a block of the grid. Sequence num_seqs stands for the rows behind the last sequence.
// A tile below 0 comes of cu_seqlens that fall, and has no work.
struct Work {
  int64_t sequence, head, tile;
};

// Tiles of kRows rows. Dense: the tiles of a head are neighbours. Packed: sequence b has the slots
// from cu[b] / rows + b on, at least as many as it needs.
struct Schedule {
  int64_t num_seqs, heads, rows, slots;
  const int32_t* cu_seqlens;  // or null
  bool last_first;            // where the last tiles of a head cost most

  CLINATTN_SHARED Schedule(int64_t num_seqs, int64_t heads, const int32_t* cu_seqlens,
                           int64_t longest, int64_t total, int64_t rows, bool last_first)
      : num_seqs(num_seqs),
        heads(heads),
        rows(rows),
        slots(cu_seqlens ? total / rows + num_seqs + 1 : ceil_div(longest, rows)),
        cu_seqlens(cu_seqlens),
        last_first(last_first) {}

  CLINATTN_SHARED int64_t blocks() const { return slots * heads * (cu_seqlens ? 1 : num_seqs); }

  // The place of a block among heads and their slots in rising order
  CLINATTN_SHARED int64_t place(int64_t block) const {
    return last_first ? block / slots * slots + slots - 1 - block % slots : block;
  }
  CLINATTN_SHARED Work at(int64_t block) const {
    const int64_t head = block / slots, slot = place(block) % slots;
    if (!cu_seqlens) return {head / heads, head % heads, slot};
    const int64_t sequence = first_where(
        0, num_seqs, [&](int64_t b) { return cu_seqlens[b + 1] / rows + b + 1 > slot; });
    return {sequence, head, slot - cu_seqlens[sequence] / rows - sequence};
  }
};

}  // namespace clinattn
