// Gradient of one tile of queries, for each tile of keys that it sees:
//   p <- 2^(s - lse);  ds <- p (do v^T - delta);  dq <- dq + ds k
#pragma once

#include "launch.cuh"
#include "queries.cuh"

namespace clinattn {

template <class T, int kDim, bool kPairs, bool kTuring>
struct Dq {
  static constexpr Shape kShape = shape(Pass::kDq, sizeof(T), kDim, kPairs, kTuring);
  static constexpr int kThreads = kShape.threads(), kRows = kShape.rows();
  static constexpr int kWarpRows = kShape.warp_rows(), kKeys = kShape.streamed;
  static constexpr int kM = kShape.tiles, kN = kKeys / 8, kDims = kDim / 8;
  using Product = Products<T, sizeof(T) == 2 && !(kTuring && is_bfloat16<T>)>;
  using Keys = Stream<T, kKeys, kDim, kThreads, copies(sizeof(T), kDim, kTuring)>;
  using Seen = SeenKeys<kKeys, kThreads>;
  using Draws = Kept<kWarpRows, kKeys>;

  static constexpr int kDoAt = Tile<T, kDim>::bytes(kRows);
  static constexpr int kStreamAt = 2 * kDoAt;
  static constexpr int kFixedAt = kStreamAt + Keys::kBytes;
  static constexpr int kLeastAt = kFixedAt + static_cast<int>(sizeof(QueryTile<T>));
  static constexpr int kSeenAt = kLeastAt + 2 * kRows;
  static constexpr int kKeptAt = kSeenAt + Seen::kBytes;
  static constexpr int kShared = kPairs ? kKeptAt + kShape.warps * Draws::kBytes : kLeastAt;
  static_assert(kShared <= (kTuring ? kTuringShared : kAmpereShared));

  static CLINATTN_DEVICE void run(const AttentionParams& p, const CudaScratch& scratch) {
    with_queries<kRows>(
        p,
        [&](const Sequence& seq, int64_t head, int64_t i0, int64_t i1) {
          differentiate(p, scratch, seq, head, i0, i1);
        },
        [&](int64_t batch, int64_t head, int64_t first, int64_t last) {
          zero_rows<T, kThreads>(p.dq, p.dq_strides, batch, head, first, last, p.head_dim);
        });
  }

  static CLINATTN_DEVICE void differentiate(const AttentionParams& p, const CudaScratch& scratch,
                                            const Sequence& seq, int64_t head, int64_t i0,
                                            int64_t i1) {
    char* memory = shared_memory();
    const int64_t batch = p.cu_seqlens_q ? 0 : seq.index;
    const int warp_row = warp_index() * kWarpRows, lane = lane_index();
    const int64_t warp_i0 = i0 + warp_row;
    const Tile<T, kDim> queries{reinterpret_cast<T*>(memory)},
        gradients{reinterpret_cast<T*>(memory + kDoAt)};
    Keys keys(memory + kStreamAt);
    auto* fixed = reinterpret_cast<QueryTile<T>*>(memory + kFixedAt);
    auto* least = reinterpret_cast<uint16_t*>(memory + kLeastAt) + warp_row;
    Seen seen{reinterpret_cast<uint8_t*>(memory + kSeenAt)};
    Draws draws{reinterpret_cast<uint16_t*>(memory + kKeptAt + warp_index() * Draws::kBytes), 0};

    if (thread_index() == 0) new (fixed) QueryTile<T>(p, seq, head, i0, i1, kKeys);
    const auto alive = [&](int row) {
      return i0 + row < i1 &&
             scratch.lse2[stat_at(p, batch, head, seq.q_row0, i0 + row)] != kInfinity;
    };
    load_tile<T, kRows, kDim, kThreads>(
        queries, Rows<T>(p.q, p.q_strides, batch, head, seq.q_row0, p.head_dim), i0, alive);
    load_tile<T, kRows, kDim, kThreads>(
        gradients, Rows<T>(p.dout, p.do_strides, batch, head, seq.q_row0, p.value_dim), i0, alive);
    float lse[2 * kM], lse_low[2 * kM], delta[2 * kM];
    bool any_apart = false;
#pragma unroll
    for (int r = 0; r < 2 * kM; ++r) {
      const int64_t i = warp_i0 + r / 2 * 16 + fragment_row(lane, r % 2 * 2);
      const int64_t at = stat_at(p, batch, head, seq.q_row0, i);
      lse[r] = i < i1 ? scratch.lse2[at] : kInfinity;
      lse_low[r] = i < i1 ? scratch.lse2_low[at] : 0;
      delta[r] = i < i1 ? scratch.delta[at] : 0;
      if (i < i1 && !Scores::are_by_pair(p) && apart_at(p, at) != Apart::kNo) {
        lse[r] = lse_low[r] = 0;
        any_apart = true;
      }
    }
    any_apart = any_in_warp(any_apart);
    if constexpr (kPairs)
      if (p.dropout_threshold) draw_least<kWarpRows>(p, seq, head, warp_i0, least);
    sync_block();
    int tile = fixed->tiles.begin();
    if (tile < fixed->tiles.end) fixed->template fetch<kPairs>(p, keys, 0, tile);
    const float scale2 = static_cast<float>(p.scale * kLog2e), kept = kPairs ? kept_scale(p) : 1;

    Sums<kM, kDims> dq;
    dq.clear();
    float of_decay = 0, of_slopes = 0;
    for (int i = 0; tile < fixed->tiles.end; ++i) {
      keys.arrive(i);
      const int64_t k0 = fixed->first_key(tile, kKeys);
      const bool edge = !fixed->tiles.is_full(tile);
      tile = fixed->tiles.after(tile);
      const auto fetch_next = [&] {
        if (tile < fixed->tiles.end) fixed->template fetch<kPairs>(p, keys, i + 1, tile);
      };
      if constexpr (Keys::kEarly) fetch_next();

      Sums<kM, kN> s, dp;
      s.clear();
      dp.clear();
      Product::rows_by_rows(s, queries, warp_row, keys.first(i));
      Product::rows_by_rows(dp, gradients, warp_row, keys.second(i));
      if constexpr (kPairs) {
        if (p.dropout_threshold) {
          draws.draw(Dropout(p, fixed->seq.index, head), warp_i0, least, k0);
          dp.each([&](float& y, int, int row, int column) {
            y = draws.at(row, column) ? y * kept : 0;
          });
        }
        if (!fixed->scores.by_pair && fixed->scores.mask)
          hide_keys(p, fixed->scores, k0, fixed->seq.k_end - k0, s, dp);
      }
      if (kPairs && fixed->scores.by_pair) {
        differentiate_pairs(p, *fixed, s, dp, warp_i0, k0, lse, lse_low, delta, of_decay,
                            of_slopes);
        if (fixed->scores.hides_pairs(p)) {
          seen.note(s);
          seen.blank(keys.first(i));
        }
      } else {
        if (any_apart)
          take_off(p, scratch, stat_at(p, batch, head, fixed->seq.q_row0, warp_i0), i1 - warp_i0,
                   s);
        if (edge) hide(s, dp, fixed->seq, warp_i0, k0);
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int r = 2 * m + e / 2;
              float x = fmaf(s.x[m][n][e], scale2, -lse[r]);
              if constexpr (sizeof(T) == 4) x -= lse_low[r];
              dp.x[m][n][e] = exp2_fast(x) * (dp.x[m][n][e] - delta[r]);
            }
      }
      Product::weights_by_rows(dq, dp, keys.first(i));
      if constexpr (!Keys::kEarly) fetch_next();
    }
    if constexpr (kPairs) {
      if (scratch.decay) write_sum(p, memory, of_decay, scratch.decay);
      if (scratch.slopes) write_sum(p, memory, of_slopes, scratch.slopes);
    }
    float factor[2 * kM];
    for (int r = 0; r < 2 * kM; ++r) factor[r] = static_cast<float>(p.scale);
    put_sums<T>(dq, factor, queries, warp_row);
    T* to = static_cast<T*>(p.dq) + batch * p.dq_strides.batch + head * p.dq_strides.head +
            (fixed->seq.q_row0 + warp_i0) * p.dq_strides.row;
    const int64_t end = min64(i0 + kRows, fixed->seq.rows_q);
    store_rows<T, kWarpRows, kDim>(queries, warp_row, to, p.dq_strides.row,
                                   static_cast<int>(clamp(end - warp_i0, 0, kWarpRows)),
                                   static_cast<int>(p.head_dim));
  }

  static CLINATTN_DEVICE Apart apart_at(const AttentionParams& p, int64_t at) {
    return is_apart<T>(static_cast<const float*>(p.lse)[at]);
  }

  // Takes the normaliser off the rows that are apart, of those whose numbers begin at `at`.
  static CLINATTN_DEVICE void take_off(const AttentionParams& p, const CudaScratch& scratch,
                                       int64_t at, int64_t rows, Sums<kM, kN>& s) {
    const float scale = static_cast<float>(p.scale), scale2 = static_cast<float>(p.scale * kLog2e);
    s.each([&](float& x, int, int row, int) {
      if (row >= rows) return;
      const Apart apart = apart_at(p, at + row);
      if (apart != Apart::kNo)
        x = less_apart<T>(x, apart, scale, scale2, scratch.lse2[at + row],
                          scratch.lse2_low[at + row]);
    });
  }

  // dp <- ds, and the parts of decay and slopes, where scores are more than q.k
  static CLINATTN_DEVICE void differentiate_pairs(
      const AttentionParams& p, const QueryTile<T>& tile, Sums<kM, kN>& s, Sums<kM, kN>& dp,
      int64_t warp_i0, int64_t k0, const float (&lse)[2 * kM], const float (&lse_low)[2 * kM],
      const float (&delta)[2 * kM], float& of_decay, float& of_slopes) {
    const int lane = lane_index();
    Visible visible[2 * kM];
#pragma unroll
    for (int r = 0; r < 2 * kM; ++r)
      visible[r] =
          Visible::of(tile.seq, warp_i0 + r / 2 * 16 + fragment_row(lane, r % 2 * 2), k0, kKeys);
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = 2 * m + e / 2, row = 16 * m + fragment_row(lane, e),
                    column = 8 * n + fragment_column(lane, e);
          float gain, &x = s.x[m][n][e], &y = dp.x[m][n][e];
          x = tile.scores(p, tile.seq, x, warp_i0 + row, k0 + column, gain);
          if (!visible[r].sees(column)) x = -kInfinity;
          y = x == -kInfinity ? 0
                              : exp2_fast(less_normaliser(x, lse[r], lse_low[r])) * (y - delta[r]);
          if (y == 0) continue;  // hidden pairs need not exist
          tile.scores.add_distances(tile.seq, y, warp_i0 + row, k0 + column, of_decay, of_slopes);
          y *= gain;
        }
  }

  // The sum over all threads, in the same order every time
  static CLINATTN_DEVICE void write_sum(const AttentionParams& p, char* memory, float x,
                                        float* to) {
    auto* sums = reinterpret_cast<float*>(memory + kStreamAt);
    for (int lanes = 1; lanes < kWarp; lanes *= 2) x += shuffle_xor(x, lanes);
    sync_block();
    if (lane_index() == 0) sums[warp_index()] = x;
    sync_block();
    if (thread_index() != 0) return;
    for (int warp = 1; warp < kShape.warps; ++warp) x += sums[warp];
    to[query_schedule(p, kRows).place(block_index())] = x;
  }

  // Hidden pairs have weight 0, whatever their keys hold.
  static CLINATTN_DEVICE void hide(Sums<kM, kN>& s, Sums<kM, kN>& dp, const Sequence& seq,
                                   int64_t warp_i0, int64_t k0) {
    const int lane = lane_index();
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Visible visible =
            Visible::of(seq, warp_i0 + 16 * m + fragment_row(lane, 2 * half), k0, kKeys);
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e)
            if (!visible.sees(8 * n + fragment_column(lane, e)))
              s.x[m][n][e] = -kInfinity, dp.x[m][n][e] = 0;
      }
  }
};

template <class T, int kDim, bool kPairs, bool kTuring>
CLINATTN_KERNEL((Dq<T, kDim, kPairs, kTuring>::kThreads), 1)
dq_kernel(CLINATTN_CONSTANT AttentionParams p, CLINATTN_CONSTANT CudaScratch scratch) {
  if constexpr (is_compiled(kTuring))
    Dq<T, kDim, kPairs, kTuring>::run(p, scratch);
  else
    refuse_card();
}

template <class T>
int launch_dq(const AttentionParams& p, const CudaScratch& scratch, int capability, void* stream) {
  return choose(p, capability, [&](auto dim, auto pairs, auto turing) {
    using Kernel = Dq<T, dim.value, pairs.value, turing.value>;
    return launch(dq_kernel<T, dim.value, pairs.value, turing.value>,
                  query_schedule(p, Kernel::kRows).blocks(), Kernel::kThreads, Kernel::kShared,
                  stream, p, scratch);
  });
}

}  // namespace clinattn
