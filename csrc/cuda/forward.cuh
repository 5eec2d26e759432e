// Forward pass of one tile of queries, for each tile of keys that it sees:
//   m' <- max(m, rowmax s);  p <- 2^(s - m');  l <- l 2^(m - m') + rowsum p;  o <- o 2^(m - m') + p
//   v
#pragma once

#include "launch.cuh"
#include "queries.cuh"

namespace clinattn {

template <class T, int kDim, bool kPairs, bool kTuring>
struct Forward {
  static constexpr Shape kShape = shape(Pass::kForward, sizeof(T), kDim, kPairs, kTuring);
  static constexpr int kThreads = kShape.threads(), kRows = kShape.rows();
  static constexpr int kWarpRows = kShape.warp_rows(), kKeys = kShape.streamed;
  static constexpr int kM = kShape.tiles, kN = kKeys / 8, kDims = kDim / 8;
  using Product = Products<T, sizeof(T) == 2 && !(kTuring && is_bfloat16<T>)>;
  using Keys = Stream<T, kKeys, kDim, kThreads, copies(sizeof(T), kDim, kTuring)>;
  using Seen = SeenKeys<kKeys, kThreads>;
  using Draws = Kept<kWarpRows, kKeys>;

  static constexpr int kStreamAt = Tile<T, kDim>::bytes(kRows);
  static constexpr int kFixedAt = kStreamAt + Keys::kBytes;
  static constexpr int kLeastAt = kFixedAt + static_cast<int>(sizeof(QueryTile<T>));
  static constexpr int kSeenAt = kLeastAt + 2 * kRows;
  static constexpr int kKeptAt = kSeenAt + Seen::kBytes;
  static constexpr int kShared = kPairs ? kKeptAt + kShape.warps * Draws::kBytes : kLeastAt;
  static_assert(kShared <= (kTuring ? kTuringShared : kAmpereShared));

  static CLINATTN_DEVICE void run(const AttentionParams& p) {
    with_queries<kRows>(
        p,
        [&](const Sequence& seq, int64_t head, int64_t i0, int64_t i1) {
          attend(p, seq, head, i0, i1);
        },
        [&](int64_t batch, int64_t head, int64_t first, int64_t last) {
          zero_rows<T, kThreads>(p.o, p.o_strides, batch, head, first, last, p.value_dim);
          for (int64_t i = first + thread_index(); i < last; i += kThreads) {
            const int64_t at = stat_at(p, batch, head, 0, i);
            static_cast<float*>(p.lse)[at] = -kInfinity;
            static_cast<float*>(p.lse_low)[at] = 0;
          }
        });
  }

  static CLINATTN_DEVICE void attend(const AttentionParams& p, const Sequence& seq, int64_t head,
                                     int64_t i0, int64_t i1) {
    char* memory = shared_memory();
    const int warp_row = warp_index() * kWarpRows;
    const int64_t warp_i0 = i0 + warp_row;
    const Tile<T, kDim> queries{reinterpret_cast<T*>(memory)};
    Keys keys(memory + kStreamAt);
    auto* fixed = reinterpret_cast<QueryTile<T>*>(memory + kFixedAt);
    auto* least = reinterpret_cast<uint16_t*>(memory + kLeastAt) + warp_row;
    Seen seen{reinterpret_cast<uint8_t*>(memory + kSeenAt)};
    Draws draws{reinterpret_cast<uint16_t*>(memory + kKeptAt + warp_index() * Draws::kBytes), 0};

    if (thread_index() == 0) new (fixed) QueryTile<T>(p, seq, head, i0, i1, kKeys);
    const Rows<T> q(p.q, p.q_strides, p.cu_seqlens_q ? 0 : seq.index, head, seq.q_row0, p.head_dim);
    load_tile<T, kRows, kDim, kThreads>(queries, q, i0, [&](int row) { return i0 + row < i1; });
    if constexpr (kPairs)
      if (p.dropout_threshold) draw_least<kWarpRows>(p, seq, head, warp_i0, least);
    sync_block();
    int tile = fixed->tiles.begin();
    if (tile < fixed->tiles.end) fixed->template fetch<kPairs>(p, keys, 0, tile);
    const float scale2 = fixed->scores.base2(p);

    Sums<kM, kDims> o;
    o.clear();
    float m[2 * kM], l[2 * kM];
    for (int r = 0; r < 2 * kM; ++r) m[r] = -kInfinity, l[r] = 0;
    for (int i = 0; tile < fixed->tiles.end; ++i) {
      keys.arrive(i);
      const int64_t k0 = fixed->first_key(tile, kKeys);
      const bool edge = !fixed->tiles.is_full(tile);
      tile = fixed->tiles.after(tile);
      const auto fetch_next = [&] {
        if (tile < fixed->tiles.end) fixed->template fetch<kPairs>(p, keys, i + 1, tile);
      };
      if constexpr (Keys::kEarly) fetch_next();

      Sums<kM, kN> s;
      s.clear();
      Product::rows_by_rows(s, queries, warp_row, keys.first(i));
      complete_scores<kPairs>(p, *fixed, fixed->i0 + warp_row, k0, edge, s);
      if constexpr (kPairs)
        if (fixed->scores.hides_pairs(p)) {
          seen.note(s);
          seen.blank(keys.second(i));
        }

      float rescale[2 * kM], shift[2 * kM];
      bool any_large = false;
#pragma unroll
      for (int r = 0; r < 2 * kM; ++r) {
        float most = -kInfinity;
#pragma unroll
        for (int n = 0; n < kN; ++n)
          most = fmaxf(most, fmaxf(s.x[r / 2][n][r % 2 * 2], s.x[r / 2][n][r % 2 * 2 + 1]));
        most = fmaxf(most, shuffle_xor(most, 1));
        most = fmaxf(most, shuffle_xor(most, 2));
        const float m_new = fmaxf(m[r], most);
        shift[r] = m_new == -kInfinity ? 0 : m_new * scale2;
        rescale[r] = m[r] == -kInfinity ? 0 : m[r] * scale2;
        const bool large =
            (kPairs && fixed->scores.by_pair) || is_large(shift[r]) || is_large(rescale[r]);
        rescale[r] = m[r] == -kInfinity ? 0 : exp2_fast(rescale[r] - shift[r]);
        if (large) rescale[r] = exp2_fast(growth(fixed->scores, scale2, m[r], m_new));
        any_large |= large;
        m[r] = m_new;
        l[r] *= rescale[r];
      }
      bool grows = false;  // rarely, after the first tiles
#pragma unroll
      for (int r = 0; r < 2 * kM; ++r) grows |= rescale[r] != 1;
      if (any_in_warp(grows)) o.each([&](float& x, int r, int, int) { x *= rescale[r]; });
      if (any_in_warp(any_large)) take_off(fixed->scores, m, shift, s);
      s.each([&](float& x, int r, int, int) {
        x = exp2_fast(fmaf(x, scale2, -shift[r]));
        l[r] += x;
      });
      if constexpr (kPairs)
        if (p.dropout_threshold) {
          draws.draw(Dropout(p, fixed->seq.index, fixed->head), fixed->i0 + warp_row, least, k0);
          s.each([&](float& x, int, int row, int column) {
            if (!draws.at(row, column)) x = 0;
          });
        }
      Product::weights_by_rows(o, s, keys.second(i));
      if constexpr (!Keys::kEarly) fetch_next();
    }
    finish(p, *fixed, queries, opaque(warp_row), o, m, l);
  }

  // Takes the maximum off the scores of rows that are whole, but keeps their unit.
  static CLINATTN_DEVICE void take_off(const Scores& scores, const float (&m)[2 * kM],
                                       float (&shift)[2 * kM], Sums<kM, kN>& s) {
    const float natural = scores.natural();
    bool whole[2 * kM];
#pragma unroll
    for (int r = 0; r < 2 * kM; ++r) whole[r] = m[r] != -kInfinity && are_whole(scores, shift[r]);
    if (scores.by_pair)
      s.each([&](float& x, int r, int, int) { x = whole[r] ? x - m[r] : x; });
    else
      s.each([&](float& x, int r, int, int) {
        if (whole[r]) x = (product(x, natural) - product(m[r], natural)) / natural;
      });
#pragma unroll
    for (int r = 0; r < 2 * kM; ++r)
      if (whole[r]) shift[r] = 0;
  }

  static CLINATTN_DEVICE void finish(const AttentionParams& p, const QueryTile<T>& fixed,
                                     const Tile<T, kDim>& tile, int warp_row, Sums<kM, kDims>& o,
                                     const float (&m)[2 * kM], float (&l)[2 * kM]) {
    const Sequence& seq = fixed.seq;
    const Scores& scores = fixed.scores;
    const int64_t head = fixed.head, i0 = fixed.i0;
    const int64_t batch = p.cu_seqlens_q ? 0 : seq.index, end = min64(i0 + kRows, seq.rows_q);
    float factor[2 * kM];
#pragma unroll
    for (int r = 0; r < 2 * kM; ++r) {
      l[r] += shuffle_xor(l[r], 1);
      l[r] += shuffle_xor(l[r], 2);
      const int64_t i = i0 + warp_row + r / 2 * 16 + fragment_row(lane_index(), r % 2 * 2);
      const bool empty = l[r] == 0 || i >= seq.q_end;
      factor[r] = empty ? 0 : (kPairs ? kept_scale(p) : 1.0f) / l[r];
      if (lane_index() % 4 == 0 && i < end) {
        const TwoPart lse =
            empty ? TwoPart{-kInfinity, 0} : normaliser(scores, scores.base2(p), m[r], l[r]);
        const int64_t at = stat_at(p, batch, head, seq.q_row0, i);
        static_cast<float*>(p.lse)[at] = lse.high;
        static_cast<float*>(p.lse_low)[at] = lse.low;
      }
    }
    put_sums<T>(o, factor, tile, warp_row);
    const int64_t first = i0 + warp_row;
    T* to = static_cast<T*>(p.o) + batch * p.o_strides.batch + head * p.o_strides.head +
            (seq.q_row0 + first) * p.o_strides.row;
    store_rows<T, kWarpRows, kDim>(tile, warp_row, to, p.o_strides.row,
                                   static_cast<int>(clamp(end - first, 0, kWarpRows)),
                                   static_cast<int>(p.value_dim));
  }
};

template <class T, int kDim, bool kPairs, bool kTuring>
CLINATTN_KERNEL((Forward<T, kDim, kPairs, kTuring>::kThreads), 1)
forward_kernel(CLINATTN_CONSTANT AttentionParams p) {
  if constexpr (is_compiled(kTuring))
    Forward<T, kDim, kPairs, kTuring>::run(p);
  else
    refuse_card();
}

template <class T>
int launch_forward(const AttentionParams& p, int capability, void* stream) {
  return choose(p, capability, [&](auto dim, auto pairs, auto turing) {
    using Kernel = Forward<T, dim.value, pairs.value, turing.value>;
    return launch(forward_kernel<T, dim.value, pairs.value, turing.value>,
                  query_schedule(p, Kernel::kRows).blocks(), Kernel::kThreads, Kernel::kShared,
                  stream, p);
  });
}

}  // namespace clinattn
