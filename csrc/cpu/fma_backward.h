// The backward pass's products and gradients of scores by fused multiply-adds, for any vector type.
#pragma once

#include "concepts.h"
#include "cover.h"
#include "gemm.h"
#include "normaliser.h"
#include "philox.h"

namespace {

template <FmaVector Lanes>
struct FmaBackward {
  using V = Lanes;
  using T = typename V::T;
  struct Session {};  // nothing to set up for a task
  using Cover = RowCover<FmaBackward>;
  static constexpr bool kDelayed = false;             // differentiate leaves nothing for later
  static constexpr int64_t kRows = V::kBackwardRows;  // queries of a block
  static constexpr int64_t kKeys = V::kBackwardKeys;  // keys of a tile
  static constexpr int64_t kBlock = V::kWidth;        // keys packed at a time
  static constexpr int64_t kBegin = V::kStrip, kEnd = V::kWidth;  // where columns may begin and end

  const int64_t head_dim, value_dim;
  const int64_t width, v_width;   // these two padded to the vector
  T *kt, *vt, *k;                 // K^T and V^T in strips, K (kKeys, width): 32 KB each at D 64
  T *dk, *dv;                     // (kKeys, width), (kKeys, v_width): 32 KB each
  T *q, *dout;                    // (kRows, width), (kRows, v_width): 12 KB each
  T *s, *dp;                      // (kRows, kKeys): 24 KB each; p and ds after gradients()
  T *lse2, *lse2_low, *delta;     // (kRows)
  bool* large;                    // (kRows): whether lse2 is a natural one
  T* gains;                       // (kRows, kKeys): gains of the scores
  RowKept<V, kRows, kKeys> kept;  // by dropout
  int64_t keys;                   // of the tile
  int64_t first_column, columns;  // of the block at hand, those of keys
  bool keys_are_finite, rows_are_finite, skip_hidden_keys;
  bool finite_keys() const { return keys_are_finite; }
  bool finite_rows() const { return rows_are_finite; }

  FmaBackward(Arena& a, int64_t head_dim, int64_t value_dim)
      : head_dim(head_dim),
        value_dim(value_dim),
        width(round_up(head_dim, V::kWidth)),
        v_width(round_up(value_dim, V::kWidth)) {
    kt = a.take<T>(kKeys * width);
    vt = a.take<T>(kKeys * v_width);
    k = a.take<T>(kKeys * width);
    dk = a.take<T>(kKeys * width);
    dv = a.take<T>(kKeys * v_width);
    q = a.take<T>(kRows * width);
    dout = a.take<T>(kRows * v_width);
    s = a.take<T>(kRows * kKeys);
    dp = a.take<T>(kRows * kKeys);
    lse2 = a.take<T>(kRows);
    lse2_low = a.take<T>(kRows);
    delta = a.take<T>(kRows);
    large = a.take<bool>(kRows);
    gains = a.take<T>(kRows * kKeys);
  }

  // kWidth scores of one row
  T* segment(int64_t row, int64_t key) { return s + row * kKeys + key; }
  T* gain_at(int64_t row, int64_t key) { return gains + row * kKeys + key; }

  // Rows are packed as they are.
  static constexpr bool kRaises = false;
  static constexpr bool outgrown() { return false; }
  static void lower() {}

  void begin_tile(int64_t) {
    keys_are_finite = true;
    keys = 0;
  }

  // n keys from j0 of the tile, at most kBlock; a null row is hidden from all and packed as zeros.
  // k^T and v^T are zeros past n too, in columns of scores that are hidden.
  void put_keys(int64_t j0, int64_t n, const void* const* k_rows, const void* const* v_rows,
                DType dtype) {
    const T *rows_of_k[kBlock], *rows_of_v[kBlock];
    for (int64_t j = 0; j < n; ++j) {
      rows_of_k[j] = k + (j0 + j) * width;
      load_row_or_zeros<V>(k + (j0 + j) * width, k_rows[j], dtype, head_dim);
      rows_of_v[j] = row_or_copy<V>(v_rows[j], dtype, value_dim, s + j * v_width);
    }
    for (int64_t j = n; j < kBlock; ++j) rows_of_k[j] = rows_of_v[j] = kZeroRow<T>;
    const int64_t strip = j0 / V::kStrip * V::kStrip, at = j0 % V::kStrip;
    for (int64_t d = 0; d < width; d += V::kWidth)
      V::transpose_rows(rows_of_k, d, n, kt + strip * width + at + d * V::kStrip, V::kStrip);
    for (int64_t d = 0; d < v_width; d += V::kWidth)
      V::transpose_rows(rows_of_v, d, n, vt + strip * v_width + at + d * V::kStrip, V::kStrip);
    for (int64_t j = j0 * width; j < (j0 + n) * width; j += V::kWidth) V::store(dk + j, V::zero());
    for (int64_t j = j0 * v_width; j < (j0 + n) * v_width; j += V::kWidth)
      V::store(dv + j, V::zero());
    keys = j0 + n;
    keys_are_finite = keys_are_finite && all_finite<V>(k + j0 * width, n * width);
  }

  void begin_block() {}

  void put_row(int64_t i, const void* q_row, const void* do_row, DType dtype, bool negate,
               T row_lse2, T row_low, bool is_large, T row_delta) {
    load_row_or_zeros<V>(q + i * width, q_row, dtype, head_dim);
    load_row_or_zeros<V>(dout + i * v_width, do_row, dtype, value_dim);
    if (negate) negate_row<V>(q + i * width, width);
    lse2[i] = row_lse2;
    lse2_low[i] = row_low;
    large[i] = is_large;
    delta[i] = row_delta;
  }

  void end_block(int64_t n) {
    rows_are_finite = all_finite<V>(q, n * width) && all_finite<V>(dout, n * v_width);
  }

  // p and ds of n queries with columns [begin, end), and what they add to dk and dv. is_edge(i,
  // rows, j, last) says whether some of rows queries from i does not see some key of [j, last);
  // hide gives -inf there and says whether it has made the scores natural.
  template <class IsEdge, class Hide, class Complete, class Prefetch, class Extras>
  void differentiate(int64_t n, int64_t begin, int64_t end, Units<T> units, const IsEdge& is_edge,
                     const Hide& hide, bool /*edge*/, bool skip_rows, bool skip_keys,
                     const Complete&, const Prefetch&, const Extras& extras) {
    first_column = begin;
    columns = min64(end, keys) - begin;
    skip_hidden_keys = skip_keys;
    scores(n, begin, end);
    const bool edge = is_edge(0, n, begin, end);
    if (edge && hide(0, n, begin, end)) units = Units<T>::of_natural();
    if constexpr (Extras::kAny) {
      if (extras.dropout) extras.draw(0, n, begin, end);
    }
    if (extras.dropout) {
      gradients<true, true>(n, begin, end, units, extras.kept_scale);
    } else if (edge) {
      gradients<true, false>(n, begin, end, units);
    } else {
      gradients<false, false>(n, begin, end, units);
    }
    if constexpr (Extras::kAny) {
      if (extras.added) extras.add(0, n, begin, end, dp + begin, kKeys);
      if (extras.gains) multiply_gains(n, begin, end);
    }
    accumulate(n, skip_rows);
  }

  template <class Complete>
  void finish(const Complete&) {}

  // s <- q k^T, dp <- do v^T
  void scores(int64_t n, int64_t begin, int64_t end) {
    const int64_t strip = begin / V::kStrip * V::kStrip;
    gemm<V, false, Update::kSet>(n, end - begin, width, q, width, kt + strip * width, V::kStrip,
                                 V::kStrip * width, s + begin, kKeys);
    gemm<V, false, Update::kSet>(n, end - begin, v_width, dout, v_width, vt + strip * v_width,
                                 V::kStrip, V::kStrip * v_width, dp + begin, kKeys);
  }

  // s <- p, dp <- ds; 0 where kEdge has given a score -inf. Where kDropout, s <- what is kept of p.
  template <bool kEdge, bool kDropout>
  void gradients(int64_t n, int64_t begin, int64_t end, Units<T> units, T kept_scale = 1) {
    for (int64_t i = 0; i < n; ++i) {
      if (large[i]) take_off_normaliser(i, begin, end, units.natural);
      const auto scale = V::set1(large[i] ? static_cast<T>(kLog2e) : units.base2);
      const auto shift = V::set1(large[i] ? 0 : -lse2[i]);
      const auto low = V::set1(lse2_low[i]), d = V::set1(delta[i]);
      for (int64_t j = begin; j < end; j += V::kWidth) {
        T *x = s + i * kKeys + j, *dx = dp + i * kKeys + j;
        const auto score = V::load(x);
        const auto p = V::exp2(V::sub(V::fma(score, scale, shift), low));
        if constexpr (kDropout) {
          const uint32_t bits = kept.at(i, j);
          const auto a = V::zero_where_dropped(V::mul(V::load(dx), V::set1(kept_scale)), bits);
          const auto ds = V::mul(p, V::sub(a, d));
          V::store(x, V::zero_where_dropped(V::zero_where_hidden(p, score), bits));
          V::store(dx, V::zero_where_hidden(ds, score));
        } else {
          const auto ds = V::mul(p, V::sub(V::load(dx), d));
          V::store(x, kEdge ? V::zero_where_hidden(p, score) : p);
          V::store(dx, kEdge ? V::zero_where_hidden(ds, score) : ds);
        }
      }
    }
  }

  // s <- natural scores less the normaliser, for query i
  void take_off_normaliser(int64_t i, int64_t begin, int64_t end, T natural) {
    for (int64_t j = begin; j < end; j += V::kWidth) {
      T* x = s + i * kKeys + j;
      V::store(x, V::sub(V::mul(V::load(x), V::set1(natural)), V::set1(lse2[i])));
    }
  }

  void multiply_gains(int64_t n, int64_t begin, int64_t end) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = begin; j < end; j += V::kWidth) {
        T* ds = dp + i * kKeys + j;
        V::store(ds, V::mul(V::load(ds), V::load(gain_at(i, j))));
      }
  }

  // dv <- dv + p^T do, dk <- dk + ds^T q; skip_zeros keeps what is not finite in rows of q and do
  // from keys that they do not see
  void accumulate(int64_t n, bool skip_zeros) {
    const int64_t cols = columns;
    T *dk_at = dk + first_column * width, *dv_at = dv + first_column * v_width;
    const T *p = s + first_column, *ds = dp + first_column;
    if (skip_zeros) {
      gemm_skip_zeros<V, true, Update::kAdd>(cols, v_width, n, p, kKeys, dout, v_width, dv_at,
                                             v_width);
      gemm_skip_zeros<V, true, Update::kAdd>(cols, width, n, ds, kKeys, q, width, dk_at, width);
    } else {
      gemm<V, true, Update::kAdd>(cols, v_width, n, p, kKeys, dout, v_width, V::kStrip, dv_at,
                                  v_width);
      gemm<V, true, Update::kAdd>(cols, width, n, ds, kKeys, q, width, V::kStrip, dk_at, width);
    }
  }

  // acc <- ds k where set, else acc + ds k; rows of acc are ld apart
  void fold(int64_t n, T* acc, int64_t ld, bool set) {
    const T *ds = dp + first_column, *rows = k + first_column * width;
    const int64_t cols = columns;
    const bool skip_zeros = skip_hidden_keys;
    if (skip_zeros && set) {
      gemm_skip_zeros<V, false, Update::kSet>(n, width, cols, ds, kKeys, rows, width, acc, ld);
    } else if (skip_zeros) {
      gemm_skip_zeros<V, false, Update::kAdd>(n, width, cols, ds, kKeys, rows, width, acc, ld);
    } else if (set) {
      gemm<V, false, Update::kSet>(n, width, cols, ds, kKeys, rows, width, V::kStrip, acc, ld);
    } else {
      gemm<V, false, Update::kAdd>(n, width, cols, ds, kKeys, rows, width, V::kStrip, acc, ld);
    }
  }
  const T* dk_row(int64_t j) { return dk + j * width; }
  const T* dv_row(int64_t j) { return dv + j * v_width; }
};

}  // namespace
