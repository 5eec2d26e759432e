// Backward pass of one tile of keys, over the vector type V:
//   for each block of queries: s <- q k^T; dp <- do v^T; p <- 2^(s - lse); ds <- p (dp - delta)
//     dv <- dv + p^T do;  dk <- dk + ds^T q;  dq <- dq + ds k   (in the order of the key tiles)
#pragma once

#include "gemm.h"
#include "isa.h"
#include "normaliser.h"

namespace {

using clinattn::BackwardShared;
using clinattn::BackwardTask;

inline void pause_thread() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_ia32_pause();
#endif
}

template <class V>
struct Backward {
  using T = typename V::T;
  static constexpr int64_t kRows = V::kBackwardRows;  // queries of a block
  static constexpr int64_t kKeys = V::kBackwardKeys;  // keys of a tile
  static constexpr int64_t kWidth = V::kWidth;        // rows of dq_acc are padded to it
  static constexpr T kInf = static_cast<T>(__builtin_inf());

  const AttentionParams& p;
  const BackwardShared& shared;
  const int64_t group, width;
  T *kt, *vt, *k;  // the key tile: K^T and V^T in strips, K (kKeys, width); 32 KB each at D 64
  T *dk, *dv;      // (kKeys, width), 32 KB each
  T *q, *dout;     // the query block (kRows, width), 16 KB each
  T *s, *dp;       // (kRows, kKeys), 32 KB each
  T* mask_row;     // (kKeys)
  T *lse2, *lse2_low, *delta;  // (kRows)
  bool finite_k, finite_q;

  Backward(const AttentionParams& p, const BackwardShared& shared, void* scratch,
           size_t* bytes = nullptr)
      : p(p), shared(shared), group(p.heads / p.kv_heads), width(round_up(p.head_dim, V::kWidth)) {
    Arena a{static_cast<char*>(scratch)};
    kt = a.take<T>(kKeys * width);
    vt = a.take<T>(kKeys * width);
    k = a.take<T>(kKeys * width);
    dk = a.take<T>(kKeys * width);
    dv = a.take<T>(kKeys * width);
    q = a.take<T>(kRows * width);
    dout = a.take<T>(kRows * width);
    s = a.take<T>(kRows * kKeys);
    dp = a.take<T>(kRows * kKeys);
    mask_row = a.take<T>(kKeys);
    lse2 = a.take<T>(kRows);
    lse2_low = a.take<T>(kRows);
    delta = a.take<T>(kRows);
    if (bytes) *bytes = a.used;
  }

  static size_t scratch(const AttentionParams& p) {
    size_t bytes;
    BackwardShared none{};
    Backward(p, none, nullptr, &bytes);
    return bytes;
  }

  static int64_t stat_at(const AttentionParams& p, const Sequence& seq, int64_t head, int64_t row) {
    return p.cu_seqlens_q ? head * p.total_q + seq.q_row0 + row
                          : (seq.index * p.heads + head) * p.max_q + row;
  }

  T* dq_acc_at(const Sequence& seq, int64_t head, int64_t row) {
    const Strides& st = shared.dq_acc_strides;
    return static_cast<T*>(shared.dq_acc) + seq.index * st.batch + head * st.head +
           (seq.q_row0 + row) * st.row;
  }

  void* grad_at(void* base, const Strides& st, const Sequence& seq, int64_t head, int64_t row) {
    return row_at(base, p.dtype, st, seq.index, head, row);
  }

  // Query blocks are cut where the first key is, so that a left-padded sequence is cut as it is
  // alone.
  static int64_t block_start(const Sequence& seq, int64_t block) {
    return (block - 1) * kRows + seq.k_begin % kRows;
  }
  static int64_t block_of(const Sequence& seq, int64_t row) {
    return (row - seq.k_begin % kRows + kRows) / kRows;
  }

  // Normaliser and delta of a block of rows; dq = 0 where no key tile will write it.
  static void prepare(const AttentionParams& p, const BackwardShared& shared, int64_t seq_index,
                      int64_t head, int64_t block) {
    const Sequence seq(p, seq_index);
    const int64_t i0 = max64(0, block_start(seq, block)),
                  i1 = min64(block_start(seq, block + 1), seq.rows_q);
    if (i0 >= i1) return;
    const int64_t q1 = min64(i1, seq.q_end);
    const bool visited = i0 < q1 && seq.lo(i0) < seq.hi(q1 - 1);
    alignas(64) T o[256 + V::kWidth], grad[256 + V::kWidth];
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t at = stat_at(p, seq, head, i);
      const T lse = static_cast<const T*>(p.lse)[at];
      T sum = 0;
      const bool empty = i >= q1 || lse == -kInf;
      if (!empty) {
        load_row<V>(o, row_at(p.o, p.dtype, p.o_strides, seq.index, head, seq.q_row0 + i), p.dtype,
                    p.head_dim);
        load_row<V>(grad, row_at(p.dout, p.dtype, p.do_strides, seq.index, head, seq.q_row0 + i),
                    p.dtype, p.head_dim);
        auto acc = V::zero();
        for (int64_t d = 0; d < p.head_dim; d += V::kWidth)
          acc = V::fma(V::load(o + d), V::load(grad + d), acc);
        sum = V::hsum(acc);
        if (p.dlse) sum -= static_cast<const T*>(p.dlse)[at];
      }
      const T low = p.lse_low ? static_cast<const T*>(p.lse_low)[at] : 0;
      const TwoPart<T> lse2 = empty ? TwoPart<T>{kInf, 0} : base2(lse, low);
      static_cast<T*>(shared.lse2)[at] = lse2.high;
      static_cast<T*>(shared.lse2_low)[at] = lse2.low;
      static_cast<T*>(shared.delta)[at] = sum;
      if (i >= q1 || !visited)
        memset(row_at(p.dq, p.dtype, p.dq_strides, seq.index, head, seq.q_row0 + i), 0,
               p.head_dim * dtype_size(p.dtype));
    }
  }

  void run(const BackwardTask& task) {
    const Sequence seq(p, task.seq);
    if (task.tile == 0) zero_hidden_keys(seq, task.kv_head);
    const int64_t k0 = seq.k_begin + task.tile * kKeys, keys = min64(kKeys, seq.k_end - k0);
    if (keys <= 0) return;
    const int64_t first = block_of(seq, seq.first_query(k0)), rows_end = seq.last_query(k0 + keys);
    pack(seq, task.kv_head, k0, keys);
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = task.kv_head * group + g;
      const Sight by_mask = mask_sight(p, seq, head, k0, keys, mask_row);
      for (int64_t b = first; block_start(seq, b) < rows_end; ++b)
        block(seq, head, task.tile, b, k0, keys, by_mask);
    }
    write(seq, task.kv_head, k0, keys);
  }

  void zero_hidden_keys(const Sequence& seq, int64_t kv_head) {
    for (int64_t j = 0; j < seq.rows_k; ++j) {
      if (j == seq.k_begin) j = seq.k_end;
      if (j >= seq.rows_k) break;
      const size_t bytes = p.head_dim * dtype_size(p.dtype);
      memset(grad_at(p.dk, p.dk_strides, seq, kv_head, seq.k_row0 + j), 0, bytes);
      memset(grad_at(p.dv, p.dv_strides, seq, kv_head, seq.k_row0 + j), 0, bytes);
    }
  }

  void pack(const Sequence& seq, int64_t kv_head, int64_t k0, int64_t keys) {
    T* v_rows = dv;  // until it accumulates
    const int64_t padded = round_up(keys, V::kWidth);
    for (int64_t j = 0; j < padded; ++j) {
      const int64_t row = seq.k_row0 + k0 + j;
      if (j < keys && seen_by_group(p, seq, kv_head, k0 + j)) {
        load_row<V>(k + j * width, row_at(p.k, p.dtype, p.k_strides, seq.index, kv_head, row),
                    p.dtype, p.head_dim);
        load_row<V>(v_rows + j * width, row_at(p.v, p.dtype, p.v_strides, seq.index, kv_head, row),
                    p.dtype, p.head_dim);
      } else {
        for (int64_t d = 0; d < width; d += V::kWidth) {
          V::store(k + j * width + d, V::zero());
          V::store(v_rows + j * width + d, V::zero());
        }
      }
    }
    for (int64_t j = 0; j < padded; j += V::kWidth) {
      const int64_t strip = j / V::kStrip * (V::kStrip * width) + j % V::kStrip;
      for (int64_t d = 0; d < width; d += V::kWidth) {
        V::transpose(k + j * width + d, width, kt + strip + d * V::kStrip, V::kStrip);
        V::transpose(v_rows + j * width + d, width, vt + strip + d * V::kStrip, V::kStrip);
      }
    }
    finite_k = all_finite<V>(k, padded * width);
    for (int64_t j = 0; j < kKeys * width; j += V::kWidth) {
      V::store(dk + j, V::zero());
      V::store(dv + j, V::zero());
    }
  }

  void load_block(const Sequence& seq, int64_t head, int64_t i0, int64_t n) {
    const int64_t at = stat_at(p, seq, head, i0);
    const auto sign = V::set1(p.scale < 0 ? -1 : 1);
    for (int64_t i = 0; i < n; ++i) {
      lse2[i] = static_cast<const T*>(shared.lse2)[at + i];
      lse2_low[i] = static_cast<const T*>(shared.lse2_low)[at + i];
      delta[i] = static_cast<const T*>(shared.delta)[at + i];
      T *q_row = q + i * width, *do_row = dout + i * width;
      if (lse2[i] == kInf) {
        for (int64_t d = 0; d < width; d += V::kWidth) {
          V::store(q_row + d, V::zero());
          V::store(do_row + d, V::zero());
        }
        continue;
      }
      const int64_t row = seq.q_row0 + i0 + i;
      load_row<V>(q_row, row_at(p.q, p.dtype, p.q_strides, seq.index, head, row), p.dtype,
                  p.head_dim);
      load_row<V>(do_row, row_at(p.dout, p.dtype, p.do_strides, seq.index, head, row), p.dtype,
                  p.head_dim);
      if (p.scale < 0)
        for (int64_t d = 0; d < width; d += V::kWidth)
          V::store(q_row + d, V::mul(V::load(q_row + d), sign));
    }
    finite_q = all_finite<V>(q, n * width) && all_finite<V>(dout, n * width);
  }

  void block(const Sequence& seq, int64_t head, int64_t tile, int64_t index, int64_t k0,
             int64_t keys, Sight by_mask) {
    const int64_t i0 = max64(0, block_start(seq, index));
    const int64_t n = min64(block_start(seq, index + 1), seq.q_end) - i0;
    if (n <= 0) return;
    const Sight by_interval = sight(seq, i0, i0 + n, k0, k0 + keys);
    if (by_interval == Sight::kNone) return;
    if (by_mask == Sight::kNone) return fold_dq(seq, head, tile, index, i0, n, 0, 0, false);
    load_block(seq, head, i0, n);
    const int64_t end =
        min64(round_up(seq.hi(i0 + n - 1) - k0, V::kWidth), round_up(keys, V::kWidth));
    const int64_t begin = max64(0, seq.lo(i0) - k0) / V::kStrip * V::kStrip, cols = end - begin;
    const int64_t at = begin / V::kStrip * (V::kStrip * width);
    gemm<V, false, Update::kSet>(n, cols, width, q, width, kt + at, V::kStrip, V::kStrip * width,
                                 s + begin, kKeys);
    gemm<V, false, Update::kSet>(n, cols, width, dout, width, vt + at, V::kStrip, V::kStrip * width,
                                 dp + begin, kKeys);
    const bool masked = by_mask == Sight::kEdge;
    const bool edge = masked || by_interval == Sight::kEdge || keys % V::kWidth;
    for (int64_t i = 0; i < n; ++i)
      score_gradient(seq, head, i0, i, k0, begin, end, keys, edge, masked);

    T *dk_at = dk + begin * width, *dv_at = dv + begin * width, *p_at = s + begin,
      *ds_at = dp + begin;
    if (edge && !finite_q) {
      gemm_skip_zeros<V, true, Update::kAdd>(cols, width, n, p_at, kKeys, dout, width, dv_at,
                                             width);
      gemm_skip_zeros<V, true, Update::kAdd>(cols, width, n, ds_at, kKeys, q, width, dk_at, width);
    } else {
      gemm<V, true, Update::kAdd>(cols, width, n, p_at, kKeys, dout, width, V::kStrip, dv_at,
                                  width);
      gemm<V, true, Update::kAdd>(cols, width, n, ds_at, kKeys, q, width, V::kStrip, dk_at, width);
    }
    fold_dq(seq, head, tile, index, i0, n, begin, end, edge);
  }

  // s <- p, dp <- ds for row i of the block; 0 where the query does not see the key
  void score_gradient(const Sequence& seq, int64_t head, int64_t i0, int64_t i, int64_t k0,
                      int64_t begin, int64_t end, int64_t keys, bool edge, bool masked) {
    T *x = s + i * kKeys, *dx = dp + i * kKeys;
    const auto shift = V::set1(-lse2[i]), low = V::set1(lse2_low[i]), d = V::set1(delta[i]);
    const auto scale = V::set1(static_cast<T>(__builtin_fabs(p.scale) * kLog2e));
    int64_t lo = begin, hi = end;
    if (edge) {
      lo = clamp(seq.lo(i0 + i) - k0, begin, end);
      hi = lse2[i] == kInf ? lo : clamp(seq.hi(i0 + i) - k0, lo, end);
    }
    if (masked) {
      const int64_t last = min64(end, keys);
      load_mask(mask_row + begin, p.mask, seq.index, head, i0 + i, k0 + begin, last - begin);
      for (int64_t j = last; j < end; ++j) mask_row[j] = -kInf;
      for (int64_t j = begin; j < end; j += V::kWidth) {
        auto bias = V::load(mask_row + j);
        auto e = V::exp2(V::sub(V::add(V::add(V::mul(V::load(x + j), scale), bias), shift), low));
        auto de = V::mul(e, V::sub(V::load(dx + j), d));
        V::store(x + j, V::zero_where_hidden(e, bias));
        V::store(dx + j, V::zero_where_hidden(de, bias));
      }
    } else {
      for (int64_t j = begin; j < end; j += V::kWidth) {
        auto e = V::exp2(V::sub(V::fma(V::load(x + j), scale, shift), low));
        V::store(x + j, e);
        V::store(dx + j, V::mul(e, V::sub(V::load(dx + j), d)));
      }
    }
    for (int64_t j = begin; j < lo; ++j) x[j] = dx[j] = 0;
    for (int64_t j = hi; j < end; ++j) x[j] = dx[j] = 0;
  }

  template <Update kUpdate>
  void fold(bool skip_zeros, int64_t n, int64_t cols, const T* ds, const T* keys, T* acc,
            int64_t ld) {
    if (skip_zeros) {
      gemm_skip_zeros<V, false, kUpdate>(n, width, cols, ds, kKeys, keys, width, acc, ld);
    } else {
      gemm<V, false, kUpdate>(n, width, cols, ds, kKeys, keys, width, V::kStrip, acc, ld);
    }
  }

  // dq <- dq + ds k, after the tiles before this one; the last tile scales, rounds and writes.
  void fold_dq(const Sequence& seq, int64_t head, int64_t tile, int64_t index, int64_t i0,
               int64_t n, int64_t begin, int64_t end, bool edge) {
    const int64_t blocks = ceil_div(seq.rows_q, kRows) + 1;
    std::atomic<int32_t>& turn =
        shared.turns[shared.block_offsets[seq.index] + head * blocks + index];
    const int64_t first = (seq.lo(i0) - seq.k_begin) / kKeys;
    const int64_t last = (seq.hi(i0 + n - 1) - 1 - seq.k_begin) / kKeys;
    for (int spins = 0; turn.load(std::memory_order_acquire) != tile - first; ++spins)
      spins < 4096 ? pause_thread() : clinattn::yield_thread();

    T* acc = dq_acc_at(seq, head, i0);
    const int64_t ld = shared.dq_acc_strides.row;
    const T *ds = dp + begin, *keys = k + begin * width;
    const bool skip = edge && !finite_k;
    if (tile == first) {
      fold<Update::kSet>(skip, n, end - begin, ds, keys, acc, ld);
    } else {
      fold<Update::kAdd>(skip, n, end - begin, ds, keys, acc, ld);
    }
    if (tile == last) {
      const auto scale = V::set1(static_cast<T>(p.scale));
      for (int64_t i = 0; i < n; ++i)
        store_row<V>(grad_at(p.dq, p.dq_strides, seq, head, seq.q_row0 + i0 + i), acc + i * ld,
                     p.dtype, p.head_dim, [&](auto x) { return V::mul(x, scale); });
    }
    turn.store(static_cast<int32_t>(tile - first + 1), std::memory_order_release);
  }

  void write(const Sequence& seq, int64_t kv_head, int64_t k0, int64_t keys) {
    // q was packed with the sign of the scale
    const auto scale = V::set1(static_cast<T>(__builtin_fabs(p.scale)));
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t row = seq.k_row0 + k0 + j;
      store_row<V>(grad_at(p.dk, p.dk_strides, seq, kv_head, row), dk + j * width, p.dtype,
                   p.head_dim, [&](auto x) { return V::mul(x, scale); });
      store_row<V>(grad_at(p.dv, p.dv_strides, seq, kv_head, row), dv + j * width, p.dtype,
                   p.head_dim, [](auto x) { return x; });
    }
  }
};

}  // namespace
