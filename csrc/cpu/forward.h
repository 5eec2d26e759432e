// Forward pass of one task, over the vector type V:
//   for each panel of keys: pack K^T and V once; for each tile of queries:
//     s <- q k^T;  m' <- max(m, rowmax s);  p <- 2^(s - m');  l <- l 2^(m - m') + rowsum p
//     o <- o 2^(m - m') + p v
#pragma once

#include "gemm.h"
#include "isa.h"
#include "rows.h"

namespace {

using clinattn::ForwardTask;

template <class V>
struct Forward {
  using T = typename V::T;
  static constexpr int64_t kRows = V::kForwardRows;  // queries of a tile
  static constexpr int64_t kKeys = V::kForwardKeys;  // keys of a panel
  static constexpr T kInf = static_cast<T>(__builtin_inf());

  const AttentionParams& p;
  const int64_t group, width;  // query heads of a kv head; head_dim padded to the vector
  T *q, *o, *m, *l;            // (group, chunk rows): (.., width) or scalars
  T *kt, *v;                   // the panel: K^T in strips, V (kKeys, width)
  T *s, *alpha, *mask_row;     // the tile's scores, its rescale factors, one row of the mask
  T* lanes;                    // (kWidth, kWidth): one vector for each of kWidth rows
  int64_t head_rows;           // rows that a query head's state takes, a multiple of the vector
  bool finite;                 // of the V panel

  // Rows are chosen so that the packing of K (a transpose, about 0.3 cycles an element) is small
  // beside the products (4 * rows / FLOP-per-cycle cycles an element), and q and o fit in L2.
  static int64_t chunk(const AttentionParams& p) {
    int64_t group = p.heads / p.kv_heads, rows = p.head_dim > 128 ? 192 : 384;
    return max64(kRows, rows / group / kRows * kRows);
  }

  Forward(const AttentionParams& p, void* scratch, size_t* bytes = nullptr)
      : p(p), group(p.heads / p.kv_heads), width(round_up(p.head_dim, V::kWidth)) {
    Arena a{static_cast<char*>(scratch)};
    int64_t rows = group * chunk(p);
    q = a.take<T>(rows * width);  // 384 x 64 x 4 bytes = 96 KB in L2, o alike
    o = a.take<T>(rows * width);
    m = a.take<T>(rows);
    l = a.take<T>(rows);
    kt = a.take<T>(kKeys * width);  // 128 x 64 x 4 bytes = 32 KB in L2, v alike
    v = a.take<T>(kKeys * width);
    s = a.take<T>(kRows * kKeys);  // 48 x 128 x 4 bytes = 24 KB in L1
    alpha = a.take<T>(kRows);
    mask_row = a.take<T>(kKeys);
    lanes = a.take<T>(V::kWidth * V::kWidth);
    if (bytes) *bytes = a.used;
  }

  static size_t scratch(const AttentionParams& p) {
    size_t bytes;
    Forward(p, nullptr, &bytes);
    return bytes;
  }

  void run(const ForwardTask& task) {
    const Sequence seq(p, task.seq);
    const int64_t row1 = min64(task.row1, max64(task.row0, seq.q_end)), rows = row1 - task.row0;
    write_empty(seq, task, row1);
    if (rows == 0) return;
    head_rows = round_up(rows, V::kWidth);
    load_queries(seq, task, rows);
    const int64_t lo = seq.lo(task.row0), hi = seq.hi(row1 - 1);
    if (lo < hi) {
      for (int64_t k0 = seq.k_begin + (lo - seq.k_begin) / kKeys * kKeys; k0 < hi; k0 += kKeys)
        panel(seq, task, rows, k0, min64(kKeys, seq.k_end - k0));
    }
    write(seq, task, rows);
  }

  void load_queries(const Sequence& seq, const ForwardTask& task, int64_t rows) {
    const auto sign = V::set1(p.scale < 0 ? -1 : 1);
    for (int64_t g = 0; g < group; ++g) {
      for (int64_t i = 0; i < rows; ++i) {
        T* dst = q + (g * head_rows + i) * width;
        load_row<V>(dst,
                    row_at(p.q, p.dtype, p.q_strides, seq.index, task.kv_head * group + g,
                           seq.q_row0 + task.row0 + i),
                    p.dtype, p.head_dim);
        if (p.scale < 0)
          for (int64_t d = 0; d < width; d += V::kWidth)
            V::store(dst + d, V::mul(V::load(dst + d), sign));
      }
    }
    for (int64_t i = 0; i < group * head_rows; ++i) m[i] = -kInf, l[i] = 0;
    for (int64_t i = 0; i < group * head_rows * width; i += V::kWidth) V::store(o + i, V::zero());
  }

  void pack(const Sequence& seq, const ForwardTask& task, int64_t k0, int64_t keys) {
    T* rows = s;  // k rows on their way to being transposed, kWidth at a time
    for (int64_t j0 = 0; j0 < keys; j0 += V::kWidth) {
      for (int64_t j = j0; j < j0 + V::kWidth; ++j) {
        bool visible = j < keys && seen_by_group(p, seq, task.kv_head, k0 + j);
        T *k_row = rows + (j - j0) * width, *v_row = v + j * width;
        if (visible) {
          const int64_t row = seq.k_row0 + k0 + j;
          load_row<V>(k_row, row_at(p.k, p.dtype, p.k_strides, seq.index, task.kv_head, row),
                      p.dtype, p.head_dim);
          load_row<V>(v_row, row_at(p.v, p.dtype, p.v_strides, seq.index, task.kv_head, row),
                      p.dtype, p.head_dim);
        } else {
          for (int64_t d = 0; d < width; d += V::kWidth) {
            V::store(k_row + d, V::zero());
            V::store(v_row + d, V::zero());
          }
        }
      }
      T* strip = kt + j0 / V::kStrip * (V::kStrip * width) + j0 % V::kStrip;
      for (int64_t d = 0; d < width; d += V::kWidth)
        V::transpose(rows + d, width, strip + d * V::kStrip, V::kStrip);
    }
    finite = all_finite<V>(v, round_up(keys, V::kWidth) * width);
  }

  void panel(const Sequence& seq, const ForwardTask& task, int64_t rows, int64_t k0, int64_t keys) {
    bool packed = false;
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = task.kv_head * group + g;
      const Sight by_mask = mask_sight(p, seq, head, k0, keys, mask_row);
      if (by_mask == Sight::kNone) continue;
      for (int64_t i = 0; i < rows; i += kRows) {
        const int64_t n = min64(kRows, rows - i), i0 = task.row0 + i;
        Sight by_interval = sight(seq, i0, i0 + n, k0, k0 + keys);
        if (by_interval == Sight::kNone) continue;
        if (!packed) pack(seq, task, k0, keys), packed = true;
        bool masked = by_mask == Sight::kEdge;
        bool edge = masked || by_interval == Sight::kEdge || keys % V::kWidth;
        tile(seq, head, i0, n, k0, keys, g * head_rows + i, edge, masked);
      }
    }
  }

  // Folds keys [k0, k0 + keys) into queries [i0, i0 + n), whose state starts at row r.
  void tile(const Sequence& seq, int64_t head, int64_t i0, int64_t n, int64_t k0, int64_t keys,
            int64_t r, bool edge, bool masked) {
    // columns that some row sees, rounded out to whole vectors on the right and strips on the left
    const int64_t end =
        min64(round_up(seq.hi(i0 + n - 1) - k0, V::kWidth), round_up(keys, V::kWidth));
    const int64_t begin = max64(0, seq.lo(i0) - k0) / V::kStrip * V::kStrip;
    gemm<V, false, Update::kSet>(n, end - begin, width, q + r * width, width,
                                 kt + begin / V::kStrip * (V::kStrip * width), V::kStrip,
                                 V::kStrip * width, s + begin, kKeys);
    const T scale2 = static_cast<T>(__builtin_fabs(p.scale) * kLog2e);
    const bool scaled = masked || scale2 == 0;  // 0 * -inf would be NaN
    for (int64_t i = 0; edge && i < n; ++i) {
      T* x = s + i * kKeys;
      if (scaled) add_mask(seq, head, i0 + i, k0, begin, end, keys, x, scale2, masked);
      hide(seq, i0 + i, k0, begin, end, x);
    }
    for (int64_t i = 0; i < n; i += V::kWidth)
      softmax(i, min64(V::kWidth, n - i), begin, end, scaled && edge ? 1 : scale2, r + i);
    if (edge && !finite) {
      gemm_skip_zeros<V, false, Update::kScaleAdd>(n, width, end - begin, s + begin, kKeys,
                                                   v + begin * width, width, o + r * width, width,
                                                   alpha);
    } else {
      gemm<V, false, Update::kScaleAdd>(n, width, end - begin, s + begin, kKeys, v + begin * width,
                                        width, V::kStrip, o + r * width, width, alpha);
    }
  }

  // x <- scale2 * x + mask
  void add_mask(const Sequence& seq, int64_t head, int64_t i, int64_t k0, int64_t begin,
                int64_t end, int64_t keys, T* x, T scale2, bool masked) {
    for (int64_t j = begin; j < end; j += V::kWidth)
      V::store(x + j, V::mul(V::load(x + j), V::set1(scale2)));
    if (!masked) return;
    const int64_t last = min64(end, keys);
    load_mask(mask_row + begin, p.mask, seq.index, head, i, k0 + begin, last - begin, kLog2e);
    for (int64_t j = begin; j < last; ++j) x[j] = mask_row[j] == -kInf ? -kInf : x[j] + mask_row[j];
  }

  // x <- -inf at keys that query i does not see
  void hide(const Sequence& seq, int64_t i, int64_t k0, int64_t begin, int64_t end, T* x) {
    const int64_t lo = clamp(seq.lo(i) - k0, begin, end), hi = clamp(seq.hi(i) - k0, lo, end);
    for (int64_t j = begin; j < lo; ++j) x[j] = -kInf;
    for (int64_t j = hi; j < end; ++j) x[j] = -kInf;
  }

  // Rows [i, i + n) of the tile, at most a vector of them, so that the reductions along rows are
  // done for all at once and no row waits for another.
  void softmax(int64_t i, int64_t n, int64_t begin, int64_t end, T scale2, int64_t r) {
    T* x = s + i * kKeys;
    for (int64_t row = 0; row < n; ++row) {
      auto top = V::load(x + row * kKeys + begin);
      for (int64_t j = begin + V::kWidth; j < end; j += V::kWidth)
        top = V::max(top, V::load(x + row * kKeys + j));
      V::store(lanes + row * V::kWidth, top);
    }
    const auto m_old = V::load(m + r);
    const auto m_new = V::max(V::mul(V::max_rows(lanes), V::set1(scale2)), m_old);
    // a row that has seen nothing would give inf - inf
    const auto m_safe = V::zero_where_hidden(m_new, m_new);
    const auto rescale = V::exp2(V::sub(m_old, m_safe));
    V::store(m + r, m_new);
    V::store(alpha + i, rescale);
    alignas(64) T shift[V::kWidth];
    V::store(shift, V::sub(V::zero(), m_safe));
    const auto scale = V::set1(scale2);
    for (int64_t row = 0; row < n; ++row) {
      const auto row_shift = V::set1(shift[row]);
      auto sum = V::zero();
      for (int64_t j = begin; j < end; j += V::kWidth) {
        T* at = x + row * kKeys + j;
        const auto e = V::exp2(V::fma(V::load(at), scale, row_shift));
        V::store(at, e);
        sum = V::add(sum, e);
      }
      V::store(lanes + row * V::kWidth, sum);
    }
    V::store(l + r, V::fma(V::load(l + r), rescale, V::sum_rows(lanes)));
  }

  T* lse_at(const Sequence& seq, int64_t head, int64_t row) {
    int64_t at = p.cu_seqlens_q ? head * p.total_q + seq.q_row0 + row
                                : (seq.index * p.heads + head) * p.max_q + row;
    return static_cast<T*>(p.lse) + at;
  }

  void* o_at(const Sequence& seq, int64_t head, int64_t row) {
    return row_at(p.o, p.dtype, p.o_strides, seq.index, head, seq.q_row0 + row);
  }

  // o = 0 and lse = -inf for the rows of the task past the sequence's end
  void write_empty(const Sequence& seq, const ForwardTask& task, int64_t row1) {
    for (int64_t g = 0; g < group; ++g)
      for (int64_t i = row1; i < task.row1; ++i) {
        const int64_t head = task.kv_head * group + g;
        memset(o_at(seq, head, i), 0, p.head_dim * dtype_size(p.dtype));
        *lse_at(seq, head, i) = -kInf;
      }
  }

  void write(const Sequence& seq, const ForwardTask& task, int64_t rows) {
    for (int64_t g = 0; g < group; ++g)
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t head = task.kv_head * group + g, r = g * head_rows + i;
        const bool empty = l[r] == 0;
        const auto norm = V::set1(empty ? 1 : l[r]);
        store_row<V>(o_at(seq, head, task.row0 + i), o + r * width, p.dtype, p.head_dim,
                     [&](auto x) { return V::div(x, norm); });
        *lse_at(seq, head, task.row0 + i) = empty ? -kInf : log_normaliser(m[r], l[r]);
      }
  }

  static T log_normaliser(T m, T l) {
    constexpr T kLowest =
        sizeof(T) == 8 ? static_cast<T>(-__DBL_MAX__) : static_cast<T>(-__FLT_MAX__);
    return m == kLowest ? kLowest : static_cast<T>(m * kLn2 + __builtin_log(l));
  }
};

}  // namespace
