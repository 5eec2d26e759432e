// Gradients of one tile of keys, for each tile of queries that sees it, of all heads of its group:
//   p <- 2^(s - lse);  ds <- p (do v^T - delta);  dv <- dv + p^T do;  dk <- dk + ds^T q
// Keys are the rows of all products here, so that p^T and ds^T are operands as they come.
#pragma once

#include "keys.cuh"
#include "launch.cuh"

namespace clinattn {

// kDk, kDv: which of the two it computes. Head dims beyond 128 have registers for one at a time.
template <class T, int kDim, bool kPairs, bool kTuring, bool kDk, bool kDv>
struct Dkdv {
  static constexpr Shape kShape = shape(Pass::kDkdv, sizeof(T), kDim, kPairs, kTuring);
  static constexpr int kThreads = kShape.threads(), kRows = kShape.rows();
  static constexpr int kWarpRows = kShape.warp_rows(), kQueries = kShape.streamed;
  static constexpr int kM = kShape.tiles, kN = kQueries / 8, kDims = kDim / 8;
  using Product = Products<T, sizeof(T) == 2 && !(kTuring && is_bfloat16<T>)>;
  using Queries = Stream<T, kQueries, kDim, kThreads, copies(sizeof(T), kDim, kTuring)>;
  using Draws = Kept<kQueries, kWarpRows>;

  // The values of a tile of queries, besides q and do
  struct Stats {
    float lse[kQueries], lse_low[kQueries], delta[kQueries];
    SeenByQueries<kQueries> seen;
    uint16_t least[kQueries];
    Apart apart[kQueries];
    Scores scores;  // of the head
  };

  // A tile of keys in shared memory, for all threads
  struct KeyTile {
    Sequence seq;
    int64_t kv_head, head, k0;  // head: the first of the group
    QueryTiles tiles;           // of a head
    int total;                  // of its group
    float scale2, kept;         // of scores in base 2, and of weights that dropout keeps

    CLINATTN_DEVICE KeyTile(const AttentionParams& p, const Sequence& seq, int64_t kv_head,
                            int64_t k0, int64_t k1)
        : seq(seq),
          kv_head(kv_head),
          head(kv_head * (p.heads / p.kv_heads)),
          k0(k0),
          tiles(seq, k0, k1, kQueries),
          total(tiles.count * static_cast<int>(p.heads / p.kv_heads)),
          scale2(static_cast<float>(p.scale * kLog2e)),
          kept(kPairs ? kept_scale(p) : 1) {}
    // The first query, which may be negative, of the nth tile
    CLINATTN_DEVICE int64_t query(int nth) const {
      return tiles.query(nth % tiles.count, kQueries);
    }
    CLINATTN_DEVICE int64_t head_of(int nth) const { return head + nth / tiles.count; }
    // The index in lse and delta of the first query of the nth tile
    CLINATTN_DEVICE int64_t stat(const AttentionParams& p, int nth) const {
      const int64_t batch = p.cu_seqlens_q ? 0 : seq.index;
      return stat_at(p, batch, head_of(nth), seq.q_row0, query(nth));
    }
  };

  static constexpr int kVAt = Tile<T, kDim>::bytes(kRows);
  static constexpr int kStreamAt = 2 * kVAt;
  static constexpr int kStatsAt = kStreamAt + Queries::kBytes;
  static constexpr int kTileAt = kStatsAt + 2 * static_cast<int>(sizeof(Stats));
  static constexpr int kKeptAt = kTileAt + static_cast<int>(sizeof(KeyTile));
  static constexpr int kShared = kKeptAt + (kPairs ? kShape.warps * Draws::kBytes : 0);
  static_assert(kShared <= (kTuring ? kTuringShared : kAmpereShared));

  static CLINATTN_DEVICE void run(const AttentionParams& p, const CudaScratch& scratch) {
    with_keys<kRows>(
        p, p.kv_heads,
        [&](const Sequence& seq, int64_t kv_head, int64_t k0, int64_t k1) {
          differentiate(p, scratch, seq, kv_head, k0, k1);
        },
        [&](int64_t batch, int64_t head, int64_t first, int64_t last) {
          if (kDk) zero_rows<T, kThreads>(p.dk, p.dk_strides, batch, head, first, last, p.head_dim);
          if (kDv)
            zero_rows<T, kThreads>(p.dv, p.dv_strides, batch, head, first, last, p.value_dim);
        });
  }

  static CLINATTN_DEVICE void fetch(const AttentionParams& p, const CudaScratch& scratch,
                                    Queries& queries, Stats& to, const KeyTile& tile, int nth) {
    const Sequence& seq = tile.seq;
    const int64_t batch = p.cu_seqlens_q ? 0 : seq.index, head = tile.head_of(nth), k0 = tile.k0,
                  i0 = tile.query(nth), at = tile.stat(p, nth);
    const int begin = static_cast<int>(max64(-i0, 0)),
              end = static_cast<int>(min64(seq.q_end - i0, kQueries));
    queries.fetch(
        nth % 2, Rows<T>(p.q, p.q_strides, batch, head, seq.q_row0, p.head_dim),
        Rows<T>(p.dout, p.do_strides, batch, head, seq.q_row0, p.value_dim), i0,
        [&](int row) { return row >= begin && row < end && scratch.lse2[at + row] != kInfinity; });
    const bool edge =
        kPairs || !seq.view(i0 + begin, i0 + end).all_see(k0, min64(k0 + kRows, seq.k_end));
    for (int row = thread_index(); row < kQueries; row += kThreads) {
      const bool live = row >= begin && row < end;
      to.lse[row] = live ? scratch.lse2[at + row] : kInfinity;
      to.lse_low[row] = live ? scratch.lse2_low[at + row] : 0;
      to.apart[row] = live && !(kPairs && Scores::are_by_pair(p))
                          ? is_apart<T>(static_cast<const float*>(p.lse)[at + row])
                          : Apart::kNo;
      if (to.apart[row] != Apart::kNo) to.lse[row] = to.lse_low[row] = 0;
      to.delta[row] = live ? scratch.delta[at + row] : 0;
      if (edge) to.seen.set(row, Visible::of(seq, i0 + row, k0, kRows));
      if (kPairs && p.dropout_threshold)
        to.least[row] = static_cast<uint16_t>(
            Dropout(p, seq.index, head).least(static_cast<uint32_t>(i0 + row)));
    }
    if (thread_index() == 0) {
      to.seen.edge = edge;
      if (kPairs) new (&to.scores) Scores(p, seq, head);
    }
  }

  // The first row of the warp. Beyond head dim 128 it is computed where it is needed: there is no
  // register to keep it.
  static CLINATTN_DEVICE int first_row() {
    return (kDim > 128 ? opaque(thread_index()) : thread_index()) / kWarp * kWarpRows;
  }

  static CLINATTN_DEVICE void differentiate(const AttentionParams& p, const CudaScratch& scratch,
                                            const Sequence& seq, int64_t kv_head, int64_t k0,
                                            int64_t k1) {
    char* memory = shared_memory();
    const Tile<T, kDim> keys{reinterpret_cast<T*>(memory)},
        values{reinterpret_cast<T*>(memory + kVAt)};
    Queries queries(memory + kStreamAt);
    auto* stats = reinterpret_cast<Stats*>(memory + kStatsAt);
    auto* tile = reinterpret_cast<KeyTile*>(memory + kTileAt);
    Draws draws{reinterpret_cast<uint16_t*>(memory + kKeptAt + warp_index() * Draws::kBytes), 0};

    if (thread_index() == 0) new (tile) KeyTile(p, seq, kv_head, k0, k1);
    const int64_t batch = p.cu_seqlens_q ? 0 : seq.index;
    const auto alive = [&](int row) { return k0 + row >= seq.k_begin && k0 + row < k1; };
    load_tile<T, kRows, kDim, kThreads>(
        keys, Rows<T>(p.k, p.k_strides, batch, kv_head, seq.k_row0, p.head_dim), k0, alive);
    load_tile<T, kRows, kDim, kThreads>(
        values, Rows<T>(p.v, p.v_strides, batch, kv_head, seq.k_row0, p.value_dim), k0, alive);
    sync_block();
    if (tile->total > 0) fetch(p, scratch, queries, stats[0], *tile, 0);

    Sums<kM, kDk ? kDims : 1> dk;
    Sums<kM, kDv ? kDims : 1> dv;
    dk.clear();
    dv.clear();
    for (int nth = 0; nth < tile->total; ++nth) {
      const int i = nth % 2;
      queries.arrive(nth);
      const auto fetch_next = [&] {
        if (nth + 1 < tile->total) fetch(p, scratch, queries, stats[1 - i], *tile, nth + 1);
      };
      if constexpr (Queries::kEarly) fetch_next();

      Sums<kM, kN> s, dp;
      s.clear();
      dp.clear();
      Product::rows_by_rows(s, keys, first_row(), queries.first(i));
      if constexpr (kDk) Product::rows_by_rows(dp, values, first_row(), queries.second(i));
      // Not before the products, where they would take registers
      const Stats& of = stats[opaque(nth) % 2];
      const int warp_row = first_row();
      bool by_pair = false;
      if constexpr (kPairs) {
        if (p.dropout_threshold) {
          draws.draw(Dropout(p, tile->seq.index, tile->head_of(nth)), tile->query(nth), of.least,
                     tile->k0 + warp_row);
          dp.each([&](float& y, int, int row, int column) {
            y = draws.at(column, row) ? y * tile->kept : 0;
          });
        }
        by_pair = of.scores.by_pair;
        if (by_pair)
          differentiate_pairs(p, tile->seq, of, s, dp, tile->query(nth), tile->k0, warp_row);
        else if (of.scores.mask)
          hide_rows(p, of.scores, tile->seq, tile->k0 + warp_row, s, dp);
      }
      if (!by_pair) {
        take_off(p, scratch, *tile, nth, of, s);
        if (of.seen.edge) of.seen.hide(warp_row, s, dp);
        const int lane = opaque(lane_index());
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int column = 8 * n + fragment_column(lane, e);
              float x = fmaf(s.x[m][n][e], tile->scale2, -of.lse[column]);
              if constexpr (sizeof(T) == 4) x -= of.lse_low[column];
              s.x[m][n][e] = exp2_fast(x);
              dp.x[m][n][e] = s.x[m][n][e] * (dp.x[m][n][e] - of.delta[column]);
            }
      }
      if constexpr (kPairs && kDv)
        if (p.dropout_threshold)
          s.each([&](float& x, int, int row, int column) {
            x = draws.at(column, row) ? x * tile->kept : 0;
          });
      if constexpr (kDv) Product::weights_by_rows(dv, s, queries.second(i));
      if constexpr (kDk) Product::weights_by_rows(dk, dp, queries.first(i));
      if constexpr (!Queries::kEarly) fetch_next();
    }
    if constexpr (kDk)
      write(p, tile->seq, tile->kv_head, tile->k0, p.dk, p.dk_strides, p.head_dim,
            static_cast<float>(p.scale), dk, keys);
    if constexpr (kDv)
      write(p, tile->seq, tile->kv_head, tile->k0, p.dv, p.dv_strides, p.value_dim, 1, dv, values);
  }

  // Takes the normaliser off the queries of the nth tile that are apart.
  static CLINATTN_DEVICE void take_off(const AttentionParams& p, const CudaScratch& scratch,
                                       const KeyTile& tile, int nth, const Stats& of,
                                       Sums<kM, kN>& s) {
    bool any = false;
    for (int row = lane_index(); row < kQueries; row += kWarp) any |= of.apart[row] != Apart::kNo;
    if (!any_in_warp(any)) return;
    const int64_t at = tile.stat(p, nth);
    const float scale = static_cast<float>(p.scale), scale2 = static_cast<float>(p.scale * kLog2e);
    const int lane = opaque(lane_index());  // takes no register where no query is apart
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int column = 8 * n + fragment_column(lane, side);
        const Apart apart = of.apart[column];
        if (apart == Apart::kNo) continue;
        const float lse = scratch.lse2[at + column], low = scratch.lse2_low[at + column];
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& x = s.x[m][n][2 * half + side];
            x = less_apart<T>(x, apart, scale, scale2, lse, low);
          }
      }
  }

  // s <- p and dp <- ds where scores are more than q.k
  static CLINATTN_DEVICE void differentiate_pairs(const AttentionParams& p, const Sequence& seq,
                                                  const Stats& of, Sums<kM, kN>& s,
                                                  Sums<kM, kN>& dp, int64_t i0, int64_t k0,
                                                  int warp_row) {
    const int lane = lane_index();
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int key = warp_row + 16 * m + fragment_row(lane, e),
                    column = 8 * n + fragment_column(lane, e);
          float gain, &x = s.x[m][n][e], &y = dp.x[m][n][e];
          x = of.scores(p, seq, x, i0 + column, k0 + key, gain);
          if (!of.seen.of(column).sees(key)) x = -kInfinity;
          const bool hidden = x == -kInfinity;
          x = exp2_fast(less_normaliser(x, of.lse[column], of.lse_low[column]));
          y = hidden ? 0 : x * (y - of.delta[column]) * gain;
        }
  }

  // Keys that are padding have gradient 0.
  static CLINATTN_DEVICE void write(const AttentionParams& p, const Sequence& seq, int64_t kv_head,
                                    int64_t k0, void* tensor, const Strides& strides, int64_t dim,
                                    float scale, Sums<kM, kDims>& sums, const Tile<T, kDim>& tile) {
    const int warp_row = first_row(), lane = opaque(lane_index());
    const int64_t batch = p.cu_seqlens_k ? 0 : seq.index, warp_k0 = k0 + warp_row;
    float factor[2 * kM];
#pragma unroll
    for (int r = 0; r < 2 * kM; ++r) {
      factor[r] = scale;
      const int64_t j = warp_k0 + r / 2 * 16 + fragment_row(lane, r % 2 * 2);
      if (j < seq.k_begin || j >= seq.k_end)
        for (int n = 0; n < kDims; ++n)
          sums.x[r / 2][n][r % 2 * 2] = sums.x[r / 2][n][r % 2 * 2 + 1] = 0;
    }
    put_sums<T>(sums, factor, tile, warp_row);
    T* to = static_cast<T*>(tensor) + batch * strides.batch + kv_head * strides.head +
            (seq.k_row0 + warp_k0) * strides.row;
    store_rows<T, kWarpRows, kDim>(
        tile, warp_row, to, strides.row,
        static_cast<int>(clamp(min64(k0 + kRows, seq.rows_k) - warp_k0, 0, kWarpRows)),
        static_cast<int>(dim));
  }
};

template <class T, int kDim, bool kPairs, bool kTuring, bool kDk, bool kDv>
CLINATTN_KERNEL((Dkdv<T, kDim, kPairs, kTuring, kDk, kDv>::kThreads), 1)
dkdv_kernel(CLINATTN_CONSTANT AttentionParams p, CLINATTN_CONSTANT CudaScratch scratch) {
  if constexpr (is_compiled(kTuring))
    Dkdv<T, kDim, kPairs, kTuring, kDk, kDv>::run(p, scratch);
  else
    refuse_card();
}

template <class T, int kDim, bool kPairs, bool kTuring, bool kDk, bool kDv>
int launch_dkdv(const AttentionParams& p, const CudaScratch& scratch, void* stream) {
  using Kernel = Dkdv<T, kDim, kPairs, kTuring, kDk, kDv>;
  return launch(dkdv_kernel<T, kDim, kPairs, kTuring, kDk, kDv>,
                key_schedule(p, p.kv_heads, Kernel::kRows).blocks(), Kernel::kThreads,
                Kernel::kShared, stream, p, scratch);
}

template <class T>
int launch_dkdv(const AttentionParams& p, const CudaScratch& scratch, int capability,
                void* stream) {
  return choose(p, capability, [&](auto dim, auto pairs, auto turing) {
    if constexpr (dim.value <= 128) {
      return launch_dkdv<T, dim.value, pairs.value, turing.value, true, true>(p, scratch, stream);
    } else {
      const int error =
          launch_dkdv<T, dim.value, pairs.value, turing.value, false, true>(p, scratch, stream);
      if (error) return error;
      return launch_dkdv<T, dim.value, pairs.value, turing.value, true, false>(p, scratch, stream);
    }
  });
}

}  // namespace clinattn
