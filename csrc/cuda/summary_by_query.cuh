// Numbers by query of its weights, of one tile of queries, for each tile of keys that it sees:
//   p <- 2^(s - lse);  entropy <- entropy - rowsum p ln p, or the largest few p
#pragma once

#include "launch.cuh"
#include "queries.cuh"
#include "top.cuh"

namespace clinattn {

// kTop: whether the numbers are the largest few
template <class T, int kDim, bool kPairs, bool kTuring, bool kTop>
struct ReduceByQuery {
  static constexpr Shape kShape = shape(Pass::kWeights, sizeof(T), kDim, kPairs, kTuring);
  static constexpr int kThreads = kShape.threads(), kRows = kShape.rows();
  static constexpr int kWarpRows = kShape.warp_rows(), kKeys = kShape.streamed;
  static constexpr int kM = kShape.tiles, kN = kKeys / 8;
  using Product = Products<T, sizeof(T) == 2 && !(kTuring && is_bfloat16<T>)>;
  using Keys = Stream<T, kKeys, kDim, kThreads, copies(sizeof(T), kDim, kTuring), 1>;
  using Pairs = Sums<kM, kN>;

  static constexpr int kStreamAt = Tile<T, kDim>::bytes(kRows);
  static constexpr int kFixedAt = kStreamAt + Keys::kBytes;
  static constexpr int kShared = kFixedAt + static_cast<int>(sizeof(QueryTile<T>));
  static_assert(kShared <= (kTuring ? kTuringShared : kAmpereShared));

  // The normalisers of the rows of a lane
  struct Normalisers {
    TwoPart lse[2 * kM];
    bool natural[2 * kM], any_natural;  // any: in the warp
  };
  struct Numbers {
    float x[2 * kM];  // the entropy over the columns of the lane, or the least of top
    Top top[kTop ? 2 * kM : 1];
  };

  static CLINATTN_DEVICE void run(const AttentionParams& p, const SummaryParams& s) {
    with_queries<kRows>(
        p,
        [&](const Sequence& seq, int64_t head, int64_t i0, int64_t i1) {
          summarise(p, s, seq, head, i0, i1);
        },
        [](int64_t, int64_t, int64_t, int64_t) {});  // numbers are 0, and places -1, already
  }

  static CLINATTN_DEVICE void summarise(const AttentionParams& p, const SummaryParams& s,
                                        const Sequence& seq, int64_t head, int64_t i0, int64_t i1) {
    char* memory = shared_memory();
    const int64_t batch = p.cu_seqlens_q ? 0 : seq.index;
    const int warp_row = warp_index() * kWarpRows;
    const Tile<T, kDim> queries{reinterpret_cast<T*>(memory)};
    Keys keys(memory + kStreamAt);
    auto* fixed = reinterpret_cast<QueryTile<T>*>(memory + kFixedAt);

    if (thread_index() == 0) new (fixed) QueryTile<T>(p, seq, head, i0, i1, kKeys);
    const int64_t first_at = stat_at(p, batch, head, seq.q_row0, i0);
    load_tile<T, kRows, kDim, kThreads>(
        queries, Rows<T>(p.q, p.q_strides, batch, head, seq.q_row0, p.head_dim), i0, [&](int row) {
          return i0 + row < i1 && static_cast<const float*>(p.lse)[first_at + row] != -kInfinity;
        });
    const Normalisers of = normalisers(p, first_at + warp_row, i1 - i0 - warp_row);
    sync_block();
    int tile = fixed->tiles.begin();
    if (tile < fixed->tiles.end) fixed->template fetch<kPairs>(p, keys, 0, tile);
    const float scale2 = fixed->scores.base2(p);

    Numbers numbers;
#pragma unroll
    for (int r = 0; r < 2 * kM; ++r) {
      numbers.x[r] = 0;
      const float lse = of.lse[r].high;
      if constexpr (kTop) numbers.top[r].clear(static_cast<int>(s.top), lse == lse ? 0 : lse);
    }
    for (int i = 0; tile < fixed->tiles.end; ++i) {
      keys.arrive(i);
      const int64_t k0 = fixed->first_key(tile, kKeys);
      const bool edge = !fixed->tiles.is_full(tile);
      tile = fixed->tiles.after(tile);
      const auto fetch_next = [&] {
        if (tile < fixed->tiles.end) fixed->template fetch<kPairs>(p, keys, i + 1, tile);
      };
      if constexpr (Keys::kEarly) fetch_next();

      Pairs x;
      x.clear();
      Product::rows_by_rows(x, queries, warp_row, keys.first(i));
      complete_scores<kPairs>(p, *fixed, fixed->i0 + warp_row, k0, edge, x);
      if (of.any_natural)
        x.each([&](float& y, int r, int, int) {
          y = log2_weight(y, of.lse[r], of.natural[r], fixed->scores, scale2);
        });
      else
        x.each([&](float& y, int r, int, int) {
          y = log2_weight(y, of.lse[r], false, fixed->scores, scale2);
        });
      take(static_cast<int>(k0), x, numbers);
      if constexpr (!Keys::kEarly) fetch_next();
    }
    write(p, s, *fixed, warp_row, numbers);
  }

  // Returns the normalisers of a warp's rows, of which `count` exist; the first is at `at` of lse.
  static CLINATTN_DEVICE Normalisers normalisers(const AttentionParams& p, int64_t at,
                                                 int64_t count) {
    Normalisers of;
    of.any_natural = false;
#pragma unroll
    for (int r = 0; r < 2 * kM; ++r) {
      const int row = r / 2 * 16 + fragment_row(lane_index(), r % 2 * 2);
      of.lse[r] = row < count ? normaliser_at(p, at + row) : TwoPart{kInfinity, 0};
      of.natural[r] = row < count && has_natural_normaliser(p, at + row);
      of.any_natural |= of.natural[r];
    }
    of.any_natural = any_in_warp(of.any_natural);
    return of;
  }

  // Takes the weights 2^x of a tile of keys from k0 on into the numbers.
  static CLINATTN_DEVICE void take(int k0, Pairs& x, Numbers& numbers) {
    if constexpr (kTop) {
      x.each([&](float& y, int, int, int) { y = exp2_fast(y); });
#pragma unroll
      for (int r = 0; r < 2 * kM; ++r) take_largest(x, r, k0, numbers.top[r], numbers.x[r]);
    } else {
      // Sums of a tile are formed apart: one long chain of sums would have more rounding errors.
      float part[2 * kM] = {};
      x.each([&](float& y, int r, int, int) {
        const float p = exp2_fast(y);
        if (p != 0) part[r] = fmaf(-p, y, part[r]);
      });
#pragma unroll
      for (int r = 0; r < 2 * kM; ++r) numbers.x[r] += part[r];
    }
  }

  static CLINATTN_DEVICE void write(const AttentionParams& p, const SummaryParams& s,
                                    const QueryTile<T>& tile, int warp_row, Numbers& numbers) {
    const Sequence& seq = tile.seq;
    const int lane = lane_index();
#pragma unroll
    for (int r = 0; r < 2 * kM; ++r) {
      float x = numbers.x[r];
      if constexpr (!kTop) {
        x += shuffle_xor(x, 1);
        x += shuffle_xor(x, 2);
      }
      const int64_t i = tile.i0 + warp_row + r / 2 * 16 + fragment_row(lane, r % 2 * 2);
      if (i >= seq.q_end) continue;
      const int64_t at = stat_at(p, tile.batch(p), tile.head, seq.q_row0, i);
      if constexpr (kTop)
        numbers.top[r].write(s, at);
      else if (lane % 4 == 0)
        static_cast<float*>(s.values)[at] = x * static_cast<float>(kLn2);
    }
  }
};

template <class T, int kDim, bool kPairs, bool kTuring, bool kTop>
CLINATTN_KERNEL((ReduceByQuery<T, kDim, kPairs, kTuring, kTop>::kThreads), 1)
reduce_by_query_kernel(CLINATTN_CONSTANT AttentionParams p, CLINATTN_CONSTANT SummaryParams s) {
  if constexpr (is_compiled(kTuring))
    ReduceByQuery<T, kDim, kPairs, kTuring, kTop>::run(p, s);
  else
    refuse_card();
}

template <class T, bool kTop>
int launch_by_query(const AttentionParams& p, const SummaryParams& s, int capability,
                    void* stream) {
  return choose(p, p.head_dim, capability, [&](auto dim, auto pairs, auto turing) {
    using Kernel = ReduceByQuery<T, dim.value, pairs.value, turing.value, kTop>;
    return launch(reduce_by_query_kernel<T, dim.value, pairs.value, turing.value, kTop>,
                  query_schedule(p, Kernel::kRows).blocks(), Kernel::kThreads, Kernel::kShared,
                  stream, p, s);
  });
}

}  // namespace clinattn
