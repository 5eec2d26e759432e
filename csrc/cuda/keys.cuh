// A tile of keys and the tiles of queries that see it: what dkdv and sums by key have in common.
#pragma once

#include "queries.cuh"

namespace clinattn {

// Tiles of queries that see some key of [k0, k1), cut where the first key is, so that a left-padded
// sequence is cut as it is alone: those of the prefix, then those of the interval.
struct QueryTiles {
  int64_t origin;
  int prefix, first, count;  // tiles: of the prefix, the next one, all

  CLINATTN_DEVICE QueryTiles(const Sequence& seq, int64_t k0, int64_t k1, int queries) {
    const bool all = k0 < seq.k_prefix;
    const int64_t lo = all ? 0 : seq.first_query(k0), hi = all ? seq.q_end : seq.last_query(k1);
    const int64_t before = min64(seq.q_prefix, lo), phase = seq.k_begin % queries;
    origin = phase ? phase - queries : 0;
    prefix = before > 0 ? static_cast<int>(ceil_div(before - origin, queries)) : 0;
    first = static_cast<int>(max64(prefix, (lo - origin) / queries));
    count = hi > lo ? static_cast<int>(max64(first, ceil_div(hi - origin, queries))) : first;
    count += prefix - first;
  }
  // The first query, which may be negative, of a tile
  CLINATTN_DEVICE int64_t query(int tile, int queries) const {
    return origin + static_cast<int64_t>(tile < prefix ? tile : first + tile - prefix) * queries;
  }
};

// The keys that each query of a tile sees, written where some query does not see some key
template <int kQueries>
struct SeenByQueries {
  int lo[kQueries], hi[kQueries], prefix[kQueries];
  bool edge;

  CLINATTN_DEVICE void set(int row, const Visible& visible) {
    lo[row] = visible.lo, hi[row] = visible.hi, prefix[row] = visible.prefix;
  }
  CLINATTN_DEVICE Visible of(int row) const { return {lo[row], hi[row], prefix[row]}; }

  // Hides the pairs, whose rows are keys from `first` of the tile on. Their weight is 0, whatever
  // their keys and queries hold.
  template <int kM, int kN, class... More>
  CLINATTN_DEVICE void hide(int first, Sums<kM, kN>& s, More&... gradients) const {
    const int lane = opaque(lane_index());  // no register of other tiles
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const Visible visible = of(8 * n + fragment_column(lane, side));
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            if (!visible.sees(first + 16 * m + fragment_row(lane, 2 * half))) {
              s.x[m][n][2 * half + side] = -kInfinity;
              ((gradients.x[m][n][2 * half + side] = 0), ...);
            }
      }
  }
};

// Hides the rows, of keys from first_key on, that a mask of keys hides.
template <int kM, int kN, class... More>
CLINATTN_DEVICE void hide_rows(const AttentionParams& p, const Scores& scores, const Sequence& seq,
                               int64_t first_key, Sums<kM, kN>& s, More&... gradients) {
  bool hidden[2 * kM];
#pragma unroll
  for (int r = 0; r < 2 * kM; ++r) {
    const int64_t j = first_key + r / 2 * 16 + fragment_row(lane_index(), r % 2 * 2);
    hidden[r] = j >= seq.k_end || scores.hides_key(p, j);
  }
  s.each([&](float& x, int r, int, int) { x = hidden[r] ? -kInfinity : x; });
  (gradients.each([&](float& y, int r, int, int) { y = hidden[r] ? 0 : y; }), ...);
}

CLINATTN_SHARED inline Schedule key_schedule(const AttentionParams& p, int64_t heads, int rows) {
  return {p.num_seqs, heads, p.cu_seqlens_k, p.max_k, p.total_k, rows, false};
}

// Runs a block on its tile of keys: some(sequence, head, k0, k1) where keys [k0, k1) may be seen,
// else nothing(batch, head, first, last), in rows of the tensor.
template <int kRows, class Some, class Nothing>
CLINATTN_DEVICE void with_keys(const AttentionParams& p, int64_t heads, const Some& some,
                               const Nothing& nothing) {
  const Work work = key_schedule(p, heads, kRows).at(block_index());
  if (work.tile < 0) return;
  const int64_t k0 = work.tile * kRows;
  if (p.cu_seqlens_k && work.sequence == p.num_seqs) {
    const int64_t first = clamp(p.cu_seqlens_k[p.num_seqs], 0, p.total_k) + k0;
    return nothing(0, work.head, first, min64(first + kRows, p.total_k));
  }
  const Sequence seq(p, work.sequence);
  const int64_t k1 = min64(k0 + kRows, seq.k_end);
  if (k0 >= seq.rows_k) return;
  if (k1 > seq.k_begin && k0 < k1) return some(seq, work.head, k0, k1);
  nothing(p.cu_seqlens_k ? 0 : seq.index, work.head, seq.k_row0 + k0,
          seq.k_row0 + min64(k0 + kRows, seq.rows_k));
}

}  // namespace clinattn
