// Gradients of what is added to scores: sums of d = p (do v^T - delta) over pairs, of a mask by its
// tiles and of relative biases by distance. Each sum belongs to one block, so that it has an order.
#pragma once

#include "dq.cuh"
#include "launch.cuh"
#include "queries.cuh"

namespace clinattn {

// Square tiles, of one query or key after another. Only two of their four operands lie in shared
// memory at a time, 32 KB at most.
template <class T, int kDim, bool kTuring>
struct ScoreGradients {
  static constexpr int kRows = sizeof(T) == 2 && kDim <= 128 ? 32 : 16, kThreads = 2 * kRows;
  static constexpr int kN = kRows / 8;
  using Product = Products<T, sizeof(T) == 2 && !(kTuring && is_bfloat16<T>)>;
  using Draws = Kept<16, kRows>;
  using Place = Tile<T, kDim>;

  static constexpr int kRightAt = Place::bytes(kRows);
  static constexpr int kLeastAt = 2 * kRightAt;
  static constexpr int kKeptAt = kLeastAt + 2 * kRows;
  static constexpr int kTableAt = kKeptAt + kRows / 16 * Draws::kBytes;
  static constexpr int kShared = kTableAt + kRows * kRows * 4;
  static_assert(kTableAt % 4 == 0 && kShared <= kTuringShared);

  // sums <- sums + d, of queries from i0 and keys from k0; no pair that is not there is read.
  static CLINATTN_DEVICE void add(const AttentionParams& p, const CudaScratch& scratch,
                                  const Sequence& seq, int64_t head, int64_t i0, int64_t k0,
                                  Sums<1, kN>& sums) {
    const int64_t first = max64(i0, 0), last = min64(i0 + kRows, seq.q_end);
    if (first >= last) return;
    const Span some =
        seq.view(first, last).seen(max64(k0, seq.k_begin), min64(k0 + kRows, seq.k_end));
    if (some.empty()) return;
    char* memory = shared_memory();
    const int64_t batch = p.cu_seqlens_q ? 0 : seq.index, kv_head = head / (p.heads / p.kv_heads);
    const int64_t at = stat_at(p, batch, head, seq.q_row0, i0);
    const int warp_row = warp_index() * 16, lane = lane_index();
    const Place left{reinterpret_cast<T*>(memory)}, right{reinterpret_cast<T*>(memory + kRightAt)};
    auto* least = reinterpret_cast<uint16_t*>(memory + kLeastAt) + warp_row;
    Draws draws{reinterpret_cast<uint16_t*>(memory + kKeptAt + warp_index() * Draws::kBytes), 0};
    const Scores scores(p, seq, head);
    const auto alive = [&](int row) {
      return i0 + row >= first && i0 + row < last && scratch.lse2[at + row] != kInfinity;
    };
    const auto seen = [&](int row) {
      return k0 + row >= some.lo && k0 + row < some.hi && !scores.hides_key(p, k0 + row);
    };
    const auto product = [&](const void* a, const Strides& a_strides, const void* b,
                             const Strides& b_strides, int64_t dim, Sums<1, kN>& to) {
      sync_block();
      load_tile<T, kRows, kDim, kThreads>(left, Rows<T>(a, a_strides, batch, head, seq.q_row0, dim),
                                          i0, alive);
      load_tile<T, kRows, kDim, kThreads>(
          right, Rows<T>(b, b_strides, batch, kv_head, seq.k_row0, dim), k0, seen);
      sync_block();
      to.clear();
      Product::rows_by_rows(to, left, warp_row, right);
    };
    Sums<1, kN> s, dp;
    product(p.q, p.q_strides, p.k, p.k_strides, p.head_dim, s);
    product(p.dout, p.do_strides, p.v, p.v_strides, p.value_dim, dp);
    if (p.dropout_threshold) {
      const Dropout dropout(p, seq.index, head);
      if (lane < 16)
        least[lane] =
            static_cast<uint16_t>(dropout.least(static_cast<uint32_t>(i0 + warp_row + lane)));
      draws.draw(dropout, i0 + warp_row, least, k0);
    }
    const float kept = kept_scale(p);
    Visible visible[2];
    float lse[2], lse_low[2], delta[2];
    for (int r = 0; r < 2; ++r) {
      const int row = warp_row + fragment_row(lane, 2 * r);
      const bool live = i0 + row >= first && i0 + row < last;
      visible[r] = Visible::of(seq, i0 + row, k0, kRows);
      lse[r] = live ? scratch.lse2[at + row] : kInfinity;
      lse_low[r] = live ? scratch.lse2_low[at + row] : 0;
      delta[r] = live ? scratch.delta[at + row] : 0;
    }
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = e / 2, row = fragment_row(lane, e), column = 8 * n + fragment_column(lane, e);
        float gain;
        const float x = scores(p, seq, s.x[0][n][e], i0 + warp_row + row, k0 + column, gain);
        float y = dp.x[0][n][e];
        if (p.dropout_threshold) y = draws.at(row, column) ? y * kept : 0;
        if (x == -kInfinity || !visible[r].sees(column)) continue;
        sums.x[0][n][e] += exp2_fast(less_normaliser(x, lse[r], lse_low[r])) * (y - delta[r]);
      }
  }

  // The sums of a block as a table (kRows, kRows)
  static CLINATTN_DEVICE const float* table(Sums<1, kN>& sums) {
    auto* to = reinterpret_cast<float*>(shared_memory() + kTableAt);
    sync_block();
    sums.each([&](float& x, int, int row, int column) {
      to[(warp_index() * 16 + row) * kRows + column] = x;
    });
    sync_block();
    return to;
  }
};

// dmask: a block has one tile of the gradient and goes through all pairs that share its elements.
template <class T, int kDim, bool kTuring>
struct MaskGradient {
  using Base = ScoreGradients<T, kDim, kTuring>;
  static constexpr int kRows = Base::kRows, kThreads = Base::kThreads;

  // The number of tiles of a side of the mask; 1 where pairs of all tiles share the side
  CLINATTN_SHARED static int64_t tiles(int64_t size) { return ceil_div(size, kRows); }
  CLINATTN_SHARED static int64_t blocks(const CudaScratch& to) {
    return to.mask_batch * to.mask_heads * tiles(to.mask_queries) * tiles(to.mask_keys);
  }

  // The range of a side that a block goes through: its own part, or all n where the side is shared
  struct Range {
    int64_t begin, end;
    CLINATTN_DEVICE Range(int64_t own, int64_t size, int64_t n)
        : begin(size > 1 ? own : 0), end(size > 1 ? own + 1 : n) {}
  };

  static CLINATTN_DEVICE void run(const AttentionParams& p, const CudaScratch& to) {
    int64_t rest = block_index();
    const int64_t key_tile = rest % tiles(to.mask_keys);
    rest /= tiles(to.mask_keys);
    const int64_t query_tile = rest % tiles(to.mask_queries);
    rest /= tiles(to.mask_queries);
    const Range batches(rest / to.mask_heads, to.mask_batch, p.num_seqs),
        heads(rest % to.mask_heads, to.mask_heads, p.heads),
        query_tiles(query_tile, to.mask_queries, tiles(p.max_q)),
        key_tiles(key_tile, to.mask_keys, tiles(p.max_k));
    Sums<1, Base::kN> sums;
    sums.clear();
    for (int64_t b = batches.begin; b < batches.end; ++b) {
      const Sequence seq(p, b);
      for (int64_t h = heads.begin; h < heads.end; ++h)
        for (int64_t i = query_tiles.begin; i < query_tiles.end; ++i)
          for (int64_t j = key_tiles.begin; j < key_tiles.end; ++j)
            Base::add(p, to, seq, h, i * kRows, j * kRows, sums);
    }
    const float* table = Base::table(sums);
    const int rows = to.mask_queries > 1 ? kRows : 1, columns = to.mask_keys > 1 ? kRows : 1;
    for (int at = thread_index(); at < rows * columns; at += kThreads) {
      const int row = at / columns, column = at % columns;
      const int64_t i = query_tile * kRows + row, j = key_tile * kRows + column;
      if (i >= to.mask_queries || j >= to.mask_keys) continue;
      float sum = 0;
      for (int r = row; r < (rows > 1 ? row + 1 : kRows); ++r)
        for (int c = column; c < (columns > 1 ? column + 1 : kRows); ++c)
          sum += table[r * kRows + c];
      to.dmask[(rest * to.mask_queries + i) * to.mask_keys + j] = sum;
    }
  }
};

// Relative biases: near pairs by their distance, in a block for each diagonal of tiles; far ones,
// which share the first or the last entry, in a block for each tile of queries.
template <class T, int kDim, bool kTuring>
struct RelativeGradient {
  using Base = ScoreGradients<T, kDim, kTuring>;
  static constexpr int kRows = Base::kRows, kThreads = Base::kThreads, kShared = Base::kShared;

  // Tiles whose diagonal is further away have only far pairs, or none.
  CLINATTN_SHARED static int64_t reach(const AttentionParams& p) {
    return ceil_div(min64(p.relative_reach, max64(p.max_q, p.max_k)), kRows);
  }
  CLINATTN_SHARED static int64_t diagonals(const AttentionParams& p) { return 2 * reach(p) + 1; }
  // The copies of the table, at most 16, that sequences add to by turns
  CLINATTN_SHARED static int64_t shares(const AttentionParams& p) { return min64(p.num_seqs, 16); }
  CLINATTN_SHARED static int64_t near_blocks(const AttentionParams& p) {
    return shares(p) * p.heads * diagonals(p);
  }
  CLINATTN_SHARED static Schedule far_schedule(const AttentionParams& p) {
    return {p.num_seqs, p.heads, p.cu_seqlens_q, p.max_q, p.total_q, kRows, false};
  }
  static CLINATTN_DEVICE int64_t floor_div(int64_t a, int64_t b) {
    return a >= 0 ? a / b : -ceil_div(-a, b);
  }

  // near_sums (shares, heads, diagonals, 2 kRows): sums of keys that are kRows x diagonal + t -
  // kRows + 1 ahead, for t < 2 kRows - 1, over every shares-th sequence.
  static CLINATTN_DEVICE void run_near(const AttentionParams& p, const CudaScratch& scratch) {
    const int64_t block = block_index(), diagonal = block % diagonals(p) - reach(p),
                  head = block / diagonals(p) % p.heads;
    Sums<1, Base::kN> sums;
    sums.clear();
    for (int64_t b = block / diagonals(p) / p.heads; b < p.num_seqs; b += shares(p)) {
      const Sequence seq(p, b);
      for (int64_t i0 = 0; i0 < seq.q_end; i0 += kRows) {
        const int64_t k0 = i0 + diagonal * kRows + seq.offset;
        if (k0 + kRows > seq.k_begin && k0 < seq.k_end)
          Base::add(p, scratch, seq, head, i0, k0, sums);
      }
    }
    const float* table = Base::table(sums);
    const int t = thread_index();
    float sum = 0;
    for (int row = 0; row < kRows; ++row) {
      const int column = row + t - (kRows - 1);
      if (column >= 0 && column < kRows) sum += table[row * kRows + column];
    }
    scratch.near_sums[block * 2 * kRows + t] = sum;
  }

  // far_sums (heads of sequences or of the packed batch, tiles, 2): keys far behind and far ahead
  static CLINATTN_DEVICE void run_far(const AttentionParams& p, const CudaScratch& scratch) {
    const Work work = far_schedule(p).at(block_index());
    float behind = 0, ahead = 0;
    if (work.sequence < p.num_seqs && work.tile >= 0) {
      const Sequence seq(p, work.sequence);
      const int64_t i0 = work.tile * kRows;
      const int64_t first = floor_div(seq.k_begin - seq.offset, kRows),
                    last = floor_div(seq.k_end - 1 - seq.offset, kRows);
      if (i0 < seq.q_end) {
        behind = far_sum(p, scratch, seq, work.head, i0, first, work.tile - reach(p) - 1);
        ahead = far_sum(p, scratch, seq, work.head, i0, work.tile + reach(p) + 1, last);
      }
    }
    if (thread_index() == 0)
      scratch.far_sums[2 * block_index()] = behind, scratch.far_sums[2 * block_index() + 1] = ahead;
  }
  // Of tiles first to last of keys; right in thread 0
  static CLINATTN_DEVICE float far_sum(const AttentionParams& p, const CudaScratch& scratch,
                                       const Sequence& seq, int64_t head, int64_t i0, int64_t first,
                                       int64_t last) {
    Sums<1, Base::kN> sums;
    sums.clear();
    const int64_t nearest = floor_div(seq.k_begin - seq.offset, kRows);
    for (int64_t tile = max64(first, nearest); tile <= last; ++tile)
      Base::add(p, scratch, seq, head, i0, tile * kRows + seq.offset, sums);
    const float* table = Base::table(sums);
    double sum = 0;
    if (thread_index() == 0)
      for (int at = 0; at < kRows * kRows; ++at) sum += table[at];
    return static_cast<float>(sum);
  }
};

enum class AddedGradient { kMask, kNear, kFar };

template <class T, int kDim, bool kTuring, AddedGradient kWhat>
CLINATTN_KERNEL((ScoreGradients<T, kDim, kTuring>::kThreads), 1)
added_kernel(CLINATTN_CONSTANT AttentionParams p, CLINATTN_CONSTANT CudaScratch scratch) {
  if constexpr (!is_compiled(kTuring))
    refuse_card();
  else if constexpr (kWhat == AddedGradient::kMask)
    MaskGradient<T, kDim, kTuring>::run(p, scratch);
  else if constexpr (kWhat == AddedGradient::kNear)
    RelativeGradient<T, kDim, kTuring>::run_near(p, scratch);
  else
    RelativeGradient<T, kDim, kTuring>::run_far(p, scratch);
}

template <class T>
CudaSizes sizes(const AttentionParams& p, int capability) {
  CudaSizes sizes;
  choose(p, capability, [&](auto dim, auto pairs, auto turing) {
    using Relative = RelativeGradient<T, dim.value, turing.value>;
    const int rows = Dq<T, dim.value, pairs.value, turing.value>::kRows;
    sizes = {rows,
             query_schedule(p, rows).blocks(),
             Relative::kRows,
             Relative::diagonals(p),
             Relative::shares(p),
             Relative::far_schedule(p).blocks()};
    return 0;
  });
  return sizes;
}

template <class T>
int launch_added(const AttentionParams& p, const CudaScratch& scratch, int capability,
                 void* stream) {
  return choose(p, capability, [&](auto dim, auto, auto turing) {
    using Base = ScoreGradients<T, dim.value, turing.value>;
    using Mask = MaskGradient<T, dim.value, turing.value>;
    using Relative = RelativeGradient<T, dim.value, turing.value>;
    const auto run = [&](auto kernel, int64_t blocks) {
      return launch(kernel, blocks, Base::kThreads, Base::kShared, stream, p, scratch);
    };
    int error = 0;
    if (scratch.dmask)
      error = run(added_kernel<T, dim.value, turing.value, AddedGradient::kMask>,
                  Mask::blocks(scratch));
    if (!error && scratch.near_sums)
      error = run(added_kernel<T, dim.value, turing.value, AddedGradient::kNear>,
                  Relative::near_blocks(p));
    if (!error && scratch.near_sums)
      error = run(added_kernel<T, dim.value, turing.value, AddedGradient::kFar>,
                  Relative::far_schedule(p).blocks());
    return error;
  });
}

}  // namespace clinattn
