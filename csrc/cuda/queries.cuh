// A tile of queries and the tiles of keys that it sees: what forward and dq have in common.
#pragma once

#include <new>

#include "copies.cuh"
#include "scores.cuh"
#include "shapes.h"

namespace clinattn {

// Tiles of keys from k_begin on: those of the prefix, then those of the interval. All queries see
// all keys of the tiles before prefix_full and of those in [full_begin, full_end).
struct KeyTiles {
  int prefix_end, first, end, prefix_full, full_begin, full_end;

  CLINATTN_DEVICE KeyTiles(const Sequence& seq, const View& view, int keys) {
    const auto tile = [&](int64_t key) { return static_cast<int>((key - seq.k_begin) / keys); };
    const auto tile_after = [&](int64_t key) { return tile(key + keys - 1); };
    prefix_end = tile_after(view.prefix);
    prefix_full = tile(view.prefix);
    first = tile(view.some.lo);
    if (first < prefix_end) first = prefix_end;
    end = view.some.empty() ? prefix_end : tile_after(view.some.hi);
    if (end < prefix_end) end = prefix_end;
    full_begin = tile_after(view.all.lo);
    full_end = view.all.empty() ? 0 : tile(view.all.hi);
  }
  CLINATTN_DEVICE int begin() const { return prefix_end > 0 ? 0 : first; }
  CLINATTN_DEVICE int after(int tile) const {
    ++tile;
    return tile < prefix_end || tile > first ? tile : first;
  }
  CLINATTN_DEVICE bool is_full(int tile) const {
    return tile < prefix_full || (tile >= full_begin && tile < full_end);
  }
};

// A tile of queries in shared memory, for all threads of a block: registers are for sums.
template <class T>
struct QueryTile {
  Sequence seq;
  int64_t head, i0;
  View view;
  Rows<T> k, v;
  Scores scores;
  KeyTiles tiles;

  CLINATTN_DEVICE QueryTile(const AttentionParams& p, const Sequence& seq, int64_t head, int64_t i0,
                            int64_t i1, int keys)
      : seq(seq),
        head(head),
        i0(i0),
        view(seq.view(i0, i1)),
        k(p.k, p.k_strides, batch(p), head / (p.heads / p.kv_heads), seq.k_row0, p.head_dim),
        v(p.v, p.v_strides, batch(p), head / (p.heads / p.kv_heads), seq.k_row0, p.value_dim),
        scores(p, seq, head),
        tiles(seq, view, keys) {}

  // The batch index in tensors; packed tensors have one batch
  CLINATTN_DEVICE int64_t batch(const AttentionParams& p) const {
    return p.cu_seqlens_q ? 0 : seq.index;
  }
  CLINATTN_DEVICE int64_t first_key(int tile, int keys) const {
    return seq.k_begin + static_cast<int64_t>(tile) * keys;
  }
  // Keys that no query of the tile sees are padding: they become 0.
  template <bool kPairs, class Keys>
  CLINATTN_DEVICE void fetch(const AttentionParams& p, Keys& to, int i, int tile) const {
    const int64_t k0 = first_key(tile, Keys::kRows);
    int lo = 0, hi = Keys::kRows;
    if (!tiles.is_full(tile)) {
      const Span some = view.seen(k0, min64(k0 + Keys::kRows, seq.k_end));
      lo = static_cast<int>(some.lo - k0), hi = static_cast<int>(some.hi - k0);
    }
    to.fetch(i, k, v, k0, [&](int row) {
      return row >= lo && row < hi && !(kPairs && scores.hides_key(p, k0 + row));
    });
  }
};

CLINATTN_SHARED inline Schedule query_schedule(const AttentionParams& p, int rows) {
  return {p.num_seqs, p.heads, p.cu_seqlens_q, p.max_q, p.total_q, rows, p.window_right >= 0};
}

// Runs a block on its tile of queries: some(sequence, head, i0, i1) where queries [i0, i1) may see
// keys, else nothing(batch, head, first, last), in rows of the tensor.
template <int kRows, class Some, class Nothing>
CLINATTN_DEVICE void with_queries(const AttentionParams& p, const Some& some,
                                  const Nothing& nothing) {
  const Work work = query_schedule(p, kRows).at(block_index());
  if (work.tile < 0) return;
  const int64_t i0 = work.tile * kRows;
  if (p.cu_seqlens_q && work.sequence == p.num_seqs) {
    const int64_t first = clamp(p.cu_seqlens_q[p.num_seqs], 0, p.total_q) + i0;
    return nothing(0, work.head, first, min64(first + kRows, p.total_q));
  }
  const Sequence seq(p, work.sequence);
  const int64_t i1 = min64(i0 + kRows, seq.q_end);
  if (i0 < i1) return some(seq, work.head, i0, i1);
  nothing(p.cu_seqlens_q ? 0 : seq.index, work.head, seq.q_row0 + i0,
          seq.q_row0 + min64(i0 + kRows, seq.rows_q));
}

// The least byte that dropout keeps, for the queries of a warp
template <int kWarpRows>
CLINATTN_DEVICE void draw_least(const AttentionParams& p, const Sequence& seq, int64_t head,
                                int64_t first_query, uint16_t* least) {
  const Dropout dropout(p, seq.index, head);
  for (int row = lane_index(); row < kWarpRows; row += kWarp)
    least[row] = static_cast<uint16_t>(dropout.least(static_cast<uint32_t>(first_query + row)));
}

// Flags, by warp and key, of the keys of a tile that some query of a block sees, where only the
// scores tell. Keys that no query sees may hold anything, so their rows are then filled with 0.
template <int kKeys, int kThreads>
struct SeenKeys {
  static constexpr int kWarps = kThreads / kWarp, kBytes = kWarps * kKeys;
  uint8_t* flags;

  template <int kM, int kN>
  CLINATTN_DEVICE void note(const Sums<kM, kN>& scores) {
    const int lane = lane_index();
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        int seen = 0;
#pragma unroll
        for (int m = 0; m < kM; ++m)
          seen |= scores.x[m][n][side] != -kInfinity || scores.x[m][n][2 + side] != -kInfinity;
        for (int lanes = 4; lanes < kWarp; lanes *= 2) seen |= shuffle_xor(seen, lanes);
        if (lane < 4)
          flags[warp_index() * kKeys + 8 * n + fragment_column(lane, side)] =
              static_cast<uint8_t>(seen);
      }
  }
  template <class T, int kDim>
  CLINATTN_DEVICE void blank(const Tile<T, kDim>& rows) {
    using Place = Tile<T, kDim>;
    sync_block();
    for (int at = thread_index(); at < kKeys * Place::kChunks; at += kThreads) {
      const int row = at / Place::kChunks;
      bool seen = false;
      for (int warp = 0; warp < kWarps; ++warp) seen |= flags[warp * kKeys + row] != 0;
      if (!seen) *reinterpret_cast<Chunk*>(rows.at(row, at % Place::kChunks * Place::kVector)) = {};
    }
    sync_block();
  }
};

// Hides the columns from k0 on that a mask of keys hides, of which there are `count`.
template <int kM, int kN, class... More>
CLINATTN_DEVICE void hide_keys(const AttentionParams& p, const Scores& scores, int64_t k0,
                               int64_t count, Sums<kM, kN>& s, More&... gradients) {
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int column = 8 * n + fragment_column(lane_index(), side);
      if (column >= count || !scores.hides_key(p, k0 + column)) continue;
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        s.x[m][n][side] = s.x[m][n][2 + side] = -kInfinity;
        ((gradients.x[m][n][side] = gradients.x[m][n][2 + side] = 0), ...);
      }
    }
}

// Hides the pairs, of queries from first_query on and keys from k0 on, that intervals hide.
template <int kM, int kN>
CLINATTN_DEVICE void hide_unseen(const Sequence& seq, int64_t first_query, int64_t k0,
                                 Sums<kM, kN>& s) {
  Visible visible[2 * kM];
#pragma unroll
  for (int r = 0; r < 2 * kM; ++r)
    visible[r] = Visible::of(seq, first_query + r / 2 * 16 + fragment_row(lane_index(), r % 2 * 2),
                             k0, 8 * kN);
  s.each([&](float& x, int r, int, int column) {
    if (!visible[r].sees(column)) x = -kInfinity;
  });
}

// From products to scores, of queries from first_query on; edge: whether some query does not see
// some key
template <bool kPairs, class T, int kM, int kN>
CLINATTN_DEVICE void complete_scores(const AttentionParams& p, const QueryTile<T>& tile,
                                     int64_t first_query, int64_t k0, bool edge, Sums<kM, kN>& s) {
  if constexpr (kPairs) {
    if (tile.scores.by_pair)
      s.each([&](float& x, int, int row, int column) {
        float gain;
        x = tile.scores(p, tile.seq, x, first_query + row, k0 + column, gain);
      });
    else if (tile.scores.mask)
      hide_keys(p, tile.scores, k0, tile.seq.k_end - k0, s);
  }
  if (edge) hide_unseen(tile.seq, first_query, k0, s);
}

// The sums of a warp, times a factor for each row of a lane, rounded, to its rows of a tile.
template <class T, int kM, int kN>
CLINATTN_DEVICE void put_sums(Sums<kM, kN>& sums, const float (&factor)[2 * kM],
                              const Tile<T, 8 * kN>& to, int first) {
  const int lane = lane_index();
  sync_warp();
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T* at =
            to.at(first + 16 * m + fragment_row(lane, 2 * half), 8 * n + fragment_column(lane, 0));
        at[0] = from_float<T>(sums.x[m][n][2 * half] * factor[2 * m + half]);
        at[1] = from_float<T>(sums.x[m][n][2 * half + 1] * factor[2 * m + half]);
      }
  sync_warp();
}

// 0 to rows [first, last) of a head, by all threads of a block
template <class T, int kThreads>
CLINATTN_DEVICE void zero_rows(void* tensor, const Strides& strides, int64_t sequence, int64_t head,
                               int64_t first, int64_t last, int64_t head_dim) {
  T* base = static_cast<T*>(tensor) + sequence * strides.batch + head * strides.head;
  for (int64_t at = thread_index(); at < (last - first) * head_dim; at += kThreads)
    base[(first + at / head_dim) * strides.row + at % head_dim] = from_float<T>(0);
}

// Where lse and its like have a row
CLINATTN_DEVICE int64_t stat_at(const AttentionParams& p, int64_t sequence, int64_t head,
                                int64_t row0, int64_t row) {
  return p.cu_seqlens_q ? head * p.total_q + row0 + row
                        : (sequence * p.heads + head) * p.max_q + row;
}

CLINATTN_DEVICE bool has_natural_normaliser(const AttentionParams& p, int64_t at) {
  return Scores::are_by_pair(p) || is_large_normaliser(static_cast<const float*>(p.lse)[at]);
}
// The normaliser of a row for its weights, in base 2 or, where scores are natural ones, natural;
// +inf where the query sees no key
CLINATTN_DEVICE TwoPart normaliser_at(const AttentionParams& p, int64_t at) {
  const float lse = static_cast<const float*>(p.lse)[at];
  if (lse == -kInfinity) return {kInfinity, 0};
  const float low = p.lse_low ? static_cast<const float*>(p.lse_low)[at] : 0;
  return has_natural_normaliser(p, at) ? TwoPart{lse, low} : base2(lse, low);
}

}  // namespace clinattn
