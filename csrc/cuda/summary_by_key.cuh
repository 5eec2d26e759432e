// Sums by key over the queries that see it, of one tile of keys and one query head:
//   p <- 2^(s - lse);  sums <- sums + p w, or + (p o do v^T) w, or + max(p o do v^T, 0) w
// Keys are the rows of the products, so that a lane adds up along its rows.
#pragma once

#include "keys.cuh"
#include "launch.cuh"

namespace clinattn {

// kDp: whether the sums are of p dp, with dp = do v^T
template <class T, int kDim, bool kPairs, bool kTuring, bool kDp>
struct SumByKey {
  static constexpr Pass kPass = kDp ? Pass::kDkdv : Pass::kWeights;
  static constexpr Shape kShape = shape(kPass, sizeof(T), kDim, kPairs, kTuring);
  static constexpr int kThreads = kShape.threads(), kRows = kShape.rows();
  static constexpr int kWarpRows = kShape.warp_rows(), kQueries = kShape.streamed;
  static constexpr int kM = kShape.tiles, kN = kQueries / 8, kTensors = kDp ? 2 : 1;
  using Product = Products<T, sizeof(T) == 2 && !(kTuring && is_bfloat16<T>)>;
  using Queries = Stream<T, kQueries, kDim, kThreads, copies(sizeof(T), kDim, kTuring), kTensors>;
  using Pairs = Sums<kM, kN>;

  // The values of a tile of queries, besides q and do
  struct Stats {
    TwoPart lse[kQueries];
    float weight[kQueries];
    bool natural[kQueries];
    SeenByQueries<kQueries> seen;
  };

  // A tile of keys in shared memory, for all threads
  struct KeyTile {
    Sequence seq;
    int64_t head, k0;
    QueryTiles tiles;
    Scores scores;

    CLINATTN_DEVICE KeyTile(const AttentionParams& p, const Sequence& seq, int64_t head, int64_t k0,
                            int64_t k1)
        : seq(seq), head(head), k0(k0), tiles(seq, k0, k1, kQueries), scores(p, seq, head) {}
  };

  static constexpr int kVAt = Tile<T, kDim>::bytes(kRows);
  static constexpr int kStreamAt = kTensors * kVAt;
  static constexpr int kStatsAt = kStreamAt + Queries::kBytes;
  static constexpr int kTileAt = kStatsAt + 2 * static_cast<int>(sizeof(Stats));
  static constexpr int kShared = kTileAt + static_cast<int>(sizeof(KeyTile));
  static_assert(kTileAt % alignof(KeyTile) == 0);
  static_assert(kShared <= (kTuring ? kTuringShared : kAmpereShared));

  static CLINATTN_DEVICE void run(const AttentionParams& p, const SummaryParams& s,
                                  const CudaScratch& scratch) {
    with_keys<kRows>(
        p, p.heads,
        [&](const Sequence& seq, int64_t head, int64_t k0, int64_t k1) {
          add_up(p, s, scratch, seq, head, k0, k1);
        },
        [](int64_t, int64_t, int64_t, int64_t) {});  // sums are 0 already
  }

  static CLINATTN_DEVICE void fetch(const AttentionParams& p, const SummaryParams& s,
                                    const CudaScratch& scratch, Queries& queries, Stats& to,
                                    const KeyTile& tile, int nth) {
    const Sequence& seq = tile.seq;
    const int64_t batch = p.cu_seqlens_q ? 0 : seq.index, k0 = tile.k0,
                  i0 = tile.tiles.query(nth, kQueries),
                  at = stat_at(p, batch, tile.head, seq.q_row0, i0);
    const int begin = static_cast<int>(max64(-i0, 0)),
              end = static_cast<int>(min64(seq.q_end - i0, kQueries));
    const auto live = [&](int row) {
      return row >= begin && row < end && scratch.lse2[at + row] != kInfinity;
    };
    queries.fetch(nth % 2, Rows<T>(p.q, p.q_strides, batch, tile.head, seq.q_row0, p.head_dim),
                  Rows<T>(p.dout, p.do_strides, batch, tile.head, seq.q_row0, p.value_dim), i0,
                  live);
    const bool edge =
        kPairs || !seq.view(i0 + begin, i0 + end).all_see(k0, min64(k0 + kRows, seq.k_end));
    for (int row = thread_index(); row < kQueries; row += kThreads) {
      const bool read = live(row);
      to.lse[row] = read ? TwoPart{scratch.lse2[at + row], scratch.lse2_low[at + row]}
                         : TwoPart{kInfinity, 0};
      to.natural[row] = read && has_natural_normaliser(p, at + row);
      to.weight[row] = !read ? 0 : s.weights ? static_cast<const float*>(s.weights)[at + row] : 1;
      if (edge) to.seen.set(row, Visible::of(seq, i0 + row, k0, kRows));
    }
    if (thread_index() == 0) to.seen.edge = edge;
  }

  static CLINATTN_DEVICE void add_up(const AttentionParams& p, const SummaryParams& s,
                                     const CudaScratch& scratch, const Sequence& seq, int64_t head,
                                     int64_t k0, int64_t k1) {
    char* memory = shared_memory();
    const Tile<T, kDim> keys{reinterpret_cast<T*>(memory)},
        values{reinterpret_cast<T*>(memory + kVAt)};
    Queries queries(memory + kStreamAt);
    auto* stats = reinterpret_cast<Stats*>(memory + kStatsAt);
    auto* tile = reinterpret_cast<KeyTile*>(memory + kTileAt);
    const int warp_row = warp_index() * kWarpRows;

    if (thread_index() == 0) new (tile) KeyTile(p, seq, head, k0, k1);
    const int64_t batch = p.cu_seqlens_q ? 0 : seq.index, kv_head = head / (p.heads / p.kv_heads);
    const auto alive = [&](int row) { return k0 + row >= seq.k_begin && k0 + row < k1; };
    load_tile<T, kRows, kDim, kThreads>(
        keys, Rows<T>(p.k, p.k_strides, batch, kv_head, seq.k_row0, p.head_dim), k0, alive);
    if constexpr (kDp)
      load_tile<T, kRows, kDim, kThreads>(
          values, Rows<T>(p.v, p.v_strides, batch, kv_head, seq.k_row0, p.value_dim), k0, alive);
    sync_block();
    const int count = tile->tiles.count;
    if (count > 0) fetch(p, s, scratch, queries, stats[0], *tile, 0);
    const float scale2 = tile->scores.base2(p);

    float sums[2 * kM] = {};
    for (int nth = 0; nth < count; ++nth) {
      const Stats& of = stats[nth % 2];
      queries.arrive(nth);
      const auto fetch_next = [&] {
        if (nth + 1 < count) fetch(p, s, scratch, queries, stats[(nth + 1) % 2], *tile, nth + 1);
      };
      if constexpr (Queries::kEarly) fetch_next();

      Pairs x, dp;
      x.clear();
      dp.clear();
      Product::rows_by_rows(x, keys, warp_row, queries.first(nth));
      if constexpr (kDp) Product::rows_by_rows(dp, values, warp_row, queries.second(nth));
      weigh(p, *tile, scale2, of, nth, warp_row, x);
      add(s, of, x, dp, sums);
      if constexpr (!Queries::kEarly) fetch_next();
    }
    write(p, s, *tile, warp_row, sums);
  }

  // x <- p, of products. Pairs are hidden last: a query whose normaliser is NaN has weights of NaN
  // for the keys that it sees, and for no other.
  static CLINATTN_DEVICE void weigh(const AttentionParams& p, const KeyTile& tile, float scale2,
                                    const Stats& of, int nth, int warp_row, Pairs& x) {
    const Scores& scores = tile.scores;
    const int64_t first_key = tile.k0 + warp_row;
    if constexpr (kPairs) {
      if (scores.by_pair) {
        const int64_t i0 = tile.tiles.query(nth, kQueries);
        x.each([&](float& y, int, int row, int column) {
          float gain;
          y = scores(p, tile.seq, y, i0 + column, first_key + row, gain);
        });
      }
    }
    bool any = false;
    for (int row = lane_index(); row < kQueries; row += kWarp) any |= of.natural[row];
    if (any_in_warp(any))
      x.each([&](float& y, int, int, int column) {
        if (y != -kInfinity) y = log2_weight(y, of.lse[column], of.natural[column], scores, scale2);
      });
    else
      x.each([&](float& y, int, int, int column) {
        y = log2_weight(y, of.lse[column], false, scores, scale2);
      });
    if constexpr (kPairs)
      if (scores.mask && !scores.by_pair) hide_rows(p, scores, tile.seq, first_key, x);
    if (of.seen.edge) of.seen.hide(warp_row, x);
    x.each([&](float& y, int, int, int) { y = exp2_fast(y); });
  }

  // Sums of a tile are formed apart: one long chain of sums would have more rounding errors.
  static CLINATTN_DEVICE void add(const SummaryParams& s, const Stats& of, const Pairs& p,
                                  const Pairs& dp, float (&sums)[2 * kM]) {
    const bool positive = s.reduce == Reduce::kRelevance;
    float part[2 * kM] = {};
    const int lane = lane_index();
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const float weight = of.weight[8 * n + fragment_column(lane, side)];
        if (weight == 0) continue;  // what is not read may meet a NaN
#pragma unroll
        for (int r = 0; r < 2 * kM; ++r) {
          float y = p.x[r / 2][n][r % 2 * 2 + side];
          if constexpr (kDp) {
            y = y == 0 ? 0 : y * dp.x[r / 2][n][r % 2 * 2 + side];
            if (positive && y < 0) y = 0;
          }
          part[r] = fmaf(weight, y, part[r]);
        }
      }
#pragma unroll
    for (int r = 0; r < 2 * kM; ++r) sums[r] += part[r];
  }

  static CLINATTN_DEVICE void write(const AttentionParams& p, const SummaryParams& s,
                                    const KeyTile& tile, int warp_row, float (&sums)[2 * kM]) {
    const Sequence& seq = tile.seq;
    float* to = static_cast<float*>(s.values) + (p.cu_seqlens_k
                                                     ? tile.head * p.total_k + seq.k_row0
                                                     : (seq.index * p.heads + tile.head) * p.max_k);
#pragma unroll
    for (int r = 0; r < 2 * kM; ++r) {
      float sum = sums[r] + shuffle_xor(sums[r], 1);
      sum += shuffle_xor(sum, 2);
      const int64_t j = tile.k0 + warp_row + r / 2 * 16 + fragment_row(lane_index(), r % 2 * 2);
      if (lane_index() % 4 == 0 && j >= seq.k_begin && j < seq.k_end) to[j] = sum;
    }
  }
};

template <class T, int kDim, bool kPairs, bool kTuring, bool kDp>
CLINATTN_KERNEL((SumByKey<T, kDim, kPairs, kTuring, kDp>::kThreads), 1)
sum_by_key_kernel(CLINATTN_CONSTANT AttentionParams p, CLINATTN_CONSTANT SummaryParams s,
                  CLINATTN_CONSTANT CudaScratch scratch) {
  if constexpr (is_compiled(kTuring))
    SumByKey<T, kDim, kPairs, kTuring, kDp>::run(p, s, scratch);
  else
    refuse_card();
}

template <class T, bool kDp>
int launch_by_key(const AttentionParams& p, const SummaryParams& s, const CudaScratch& scratch,
                  int capability, void* stream) {
  const int64_t dim = kDp ? max64(p.head_dim, p.value_dim) : p.head_dim;
  return choose(p, dim, capability, [&](auto dim, auto pairs, auto turing) {
    using Kernel = SumByKey<T, dim.value, pairs.value, turing.value, kDp>;
    return launch(sum_by_key_kernel<T, dim.value, pairs.value, turing.value, kDp>,
                  key_schedule(p, p.heads, Kernel::kRows).blocks(), Kernel::kThreads,
                  Kernel::kShared, stream, p, s, scratch);
  });
}

}  // namespace clinattn
