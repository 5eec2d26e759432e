// Forward pass of one task, over an engine E that multiplies and exponentiates:
//   for each panel of keys: pack K and V once; for each tile of queries, and kKeys keys at a time:
//     s <- q k^T;  m' <- max(m, rowmax s);  p <- 2^(s - m');  l <- l 2^(m - m') + rowsum p
//     o <- o 2^(m - m') + p v
#pragma once

#include <string.h>

#include <initializer_list>

#include "concepts.h"
#include "cover.h"
#include "forward_step.h"
#include "isa.h"
#include "normaliser.h"
#include "philox.h"
#include "steps.h"

namespace {

using clinattn::ForwardTask;

template <ForwardEngine E>
struct Forward {
  using V = typename E::V;
  using T = typename V::T;
  static constexpr int64_t kRows = E::kRows, kKeys = E::kKeys;
  static constexpr T kInf = static_cast<T>(__builtin_inf());

  const AttentionParams& p;
  const int64_t group;  // query heads of a kv head
  Arena arena;
  E engine;
  T *o, *m, *l;       // (group, chunk rows): (.., o_width) or scalars
  T* top;             // (group, chunk rows): the natural maximum of a large row
  T* mask_row;        // (kKeys)
  Sight* by_mask;     // what the mask leaves of each kKeys keys of the panel
  Step* steps;        // those of a tile of queries
  DrawRows draws{};   // of dropout, laid out as m and l
  int64_t head_rows;  // rows that a query head's state takes, a multiple of the vector

  // Queries of a task for each head of the group. Many make the packing of keys, which every task
  // does anew, small beside the products; the state of all of them should stay in L2.
  static int64_t chunk(const AttentionParams& p) {
    const int64_t rows = max64(p.head_dim, p.value_dim) > 128 ? E::kChunk / 2 : E::kChunk;
    return max64(kRows, rows / (p.heads / p.kv_heads) / kRows * kRows);
  }

  Forward(const AttentionParams& p, void* scratch)
      : p(p),
        group(p.heads / p.kv_heads),
        arena{static_cast<char*>(scratch)},
        engine(arena, p.head_dim, p.value_dim, group * chunk(p)) {
    const int64_t rows = group * chunk(p);
    o = arena.take<T>(rows * engine.o_width);
    m = arena.take<T>(rows);
    l = arena.take<T>(rows);
    top = arena.take<T>(rows);
    mask_row = arena.take<T>(kKeys);
    by_mask = arena.take<Sight>(engine.panel / kKeys);
    steps = arena.take<Step>(engine.panel / kKeys);
    if (p.dropout_threshold)
      for (uint32_t** x : {&draws.high, &draws.low, &draws.least, &draws.mask})
        *x = arena.take<uint32_t>(rows);
  }

  static size_t scratch(const AttentionParams& p) { return Forward(p, nullptr).arena.used; }

  void run(const ForwardTask& task) {
    const Sequence seq(p, task.seq);
    const int64_t row1 = min64(task.row1, max64(task.row0, seq.q_end)), rows = row1 - task.row0;
    write_empty(seq, task, row1);
    if (rows == 0) return;
    head_rows = round_up(rows, kRows);
    engine.begin_task();
    load_queries(seq, task, rows);
    const Span some = seq.view(task.row0, row1).some;
    // where keys are cut does not depend on the task
    const int64_t first = (some.lo - seq.k_begin) / E::kAligned * E::kAligned,
                  prefix = round_up(seq.k_prefix - seq.k_begin, E::kAligned);
    panels(seq, task, rows, seq.k_begin, min64(seq.k_begin + prefix, seq.k_end));
    if (!some.empty()) panels(seq, task, rows, seq.k_begin + max64(first, prefix), some.hi);
    write(seq, task, rows);
  }

  void panels(const Sequence& seq, const ForwardTask& task, int64_t rows, int64_t k0, int64_t k1) {
    for (; k0 < k1; k0 += engine.panel) {
      const int64_t keys = min64(engine.panel, k1 - k0);
      if (p.dropout_threshold) {
        panel<true>(seq, task, rows, k0, keys);
      } else {
        panel<false>(seq, task, rows, k0, keys);
      }
    }
  }

  void load_queries(const Sequence& seq, const ForwardTask& task, int64_t rows) {
    for (int64_t g = 0; g < group; ++g)
      for (int64_t i0 = 0; i0 < rows; i0 += kRows) {
        const void* q_rows[kRows];
        const int64_t n = min64(kRows, rows - i0);
        for (int64_t i = 0; i < n; ++i)
          q_rows[i] = row_at(p.q, p.dtype, p.q_strides, seq.index, task.kv_head * group + g,
                             seq.q_row0 + task.row0 + i0 + i);
        engine.put_queries(g * head_rows + i0, n, q_rows, p.dtype, p.scale < 0);
        if (p.dropout_threshold)
          Dropout(p, seq.index, task.kv_head * group + g)
              .rows<V>(task.row0 + i0, kRows, draws.at(g * head_rows + i0));
      }
    for (int64_t i = 0; i < group * head_rows; ++i) m[i] = -kInf, l[i] = 0;
    const int64_t touched = round_up(rows, kRowsTouched<E>) * engine.o_width;
    for (int64_t g = 0; g < group; ++g)
      for (int64_t i = 0; i < touched; i += V::kWidth)
        V::store(o + g * head_rows * engine.o_width + i, V::zero());
  }

  void pack(const Sequence& seq, const ForwardTask& task, int64_t k0, int64_t keys) {
    engine.begin_panel();
    const int64_t size = dtype_size(p.dtype);
    for (int64_t j0 = 0; j0 < keys; j0 += E::kBlock) {
      for (int64_t j = j0 + E::kBlock; j < min64(j0 + 2 * E::kBlock, keys); ++j) {
        const int64_t row = seq.k_row0 + k0 + j;
        prefetch_row(row_at(p.k, p.dtype, p.k_strides, seq.index, task.kv_head, row),
                     p.head_dim * size);
        prefetch_row(row_at(p.v, p.dtype, p.v_strides, seq.index, task.kv_head, row),
                     p.value_dim * size);
      }
      const KeyRows<E::kBlock> rows(p, seq, task.kv_head, k0 + j0, keys - j0);
      engine.put_keys(j0, min64(E::kBlock, keys - j0), rows.k, rows.v, p.dtype);
    }
  }

  // Keys [k0, k0 + keys): packed once, then folded into all tiles of queries that see some of them.
  template <bool kDropout>
  void panel(const Sequence& seq, const ForwardTask& task, int64_t rows, int64_t k0, int64_t keys) {
    bool packed = false;
    typename E::template Fold<Hide, kDropout> fold(engine, units());
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = task.kv_head * group + g;
      for (int64_t at = 0; at < keys; at += kKeys)
        by_mask[at / kKeys] = mask_sight(p, seq, head, k0 + at, min64(kKeys, keys - at), mask_row);
      for (int64_t i = 0; i < rows; i += kRows) {
        const int64_t n = min64(kRows, rows - i), i0 = task.row0 + i, r = g * head_rows + i;
        const int64_t count = visible_steps<E>(p, seq, i0, n, k0, keys, by_mask, steps);
        if (count == 0) continue;
        if (!packed) {
          pack(seq, task, k0, keys);
          if (engine.outgrown()) {
            engine.lower(o, group * head_rows);
            pack(seq, task, k0, keys);
          }
          packed = true;
        }
        fold.fold(r, n, steps, count, Hide{this, &seq, head, i0, n, k0, r},
                  {m + r, top + r, l + r, o + r * engine.o_width});
      }
    }
    fold.finish();
  }

  // Gives -inf to what n queries from i0 do not see of a step in the panel from k0.
  struct Hide {
    Forward* f;
    const Sequence* seq;
    int64_t head, i0, n, k0, row;
    // Also puts terms and the mask in; returns whether the scores are natural ones now.
    bool operator()(const Step& step) const {
      const typename E::Cover cover{f->p, *seq, f->engine,    f->mask_row, head,
                                    i0,   n,    k0 + step.at, step.begin,  step.end};
      return cover.hide(step.keys, f->units().natural, step.masked);
    }
    // Draws the pairs of a step that dropout keeps.
    void draw(const Step& step) const {
      f->engine.kept.draw(Dropout(f->p, seq->index, head), f->draws.at(row), n, k0 + step.at,
                          step.begin, step.end);
    }
  };

  Units<T> units() const { return Units<T>::of(p); }

  void put_lse(const Sequence& seq, int64_t head, int64_t row, TwoPart<T> lse) {
    const int64_t at = p.cu_seqlens_q ? head * p.total_q + seq.q_row0 + row
                                      : (seq.index * p.heads + head) * p.max_q + row;
    static_cast<T*>(p.lse)[at] = lse.high;
    static_cast<T*>(p.lse_low)[at] = lse.low;
  }

  void* o_at(const Sequence& seq, int64_t head, int64_t row) {
    return row_at(p.o, p.dtype, p.o_strides, seq.index, head, seq.q_row0 + row);
  }

  // o = 0 and lse = -inf for the rows of the task past the sequence's end
  void write_empty(const Sequence& seq, const ForwardTask& task, int64_t row1) {
    for (int64_t g = 0; g < group; ++g)
      for (int64_t i = row1; i < task.row1; ++i) {
        const int64_t head = task.kv_head * group + g;
        memset(o_at(seq, head, i), 0, p.value_dim * dtype_size(p.dtype));
        if (p.lse) put_lse(seq, head, i, {-kInf, 0});
      }
  }

  void write(const Sequence& seq, const ForwardTask& task, int64_t rows) {
    for (int64_t g = 0; g < group; ++g)
      for (int64_t i0 = 0; i0 < rows; i0 += V::kWidth) {
        const int64_t head = task.kv_head * group + g, r0 = g * head_rows + i0;
        const int64_t row0 = task.row0 + i0, n = min64(V::kWidth, rows - i0);
        for (int64_t i = 0; i < n; ++i) write_row(r0 + i, o_at(seq, head, row0 + i));
        if (p.lse) write_lse(seq, head, row0, r0, n);
      }
  }

  void write_row(int64_t r, void* to) {
    const T norm = l[r] == 0 ? 1 : engine.normaliser(o, r, l[r]);
    const T* from = engine.output(o, r);
    const T kept = static_cast<T>(kept_scale(p));
    if (dtype_size(p.dtype) == 2) {  // a reciprocal's error is far below that of 16 bits
      const auto factor = V::set1(kept / norm);
      store_row<V>(to, from, p.dtype, p.value_dim, [&](auto x) { return V::mul(x, factor); });
    } else {
      const auto divisor = V::set1(norm), factor = V::set1(kept);
      store_row<V>(to, from, p.dtype, p.value_dim,
                   [&](auto x) { return V::mul(V::div(x, divisor), factor); });
    }
  }

  // lse of n queries from row0, at most a vector of them, whose state lies from r0 on
  void write_lse(const Sequence& seq, int64_t head, int64_t row0, int64_t r0, int64_t n) {
    double logs[V::kWidth];
    for (int64_t i = 0; i < V::kWidth; ++i) logs[i] = log_of(l[r0 + i]);
    for (int64_t i = 0; i < n; ++i) {
      const T sum = l[r0 + i];
      put_lse(seq, head, row0 + i,
              sum == 0              ? TwoPart<T>{-kInf, 0}
              : is_large(m[r0 + i]) ? natural_of_large(top[r0 + i], sum, logs[i])
                                    : natural(m[r0 + i], sum, logs[i]));
    }
  }
};

}  // namespace
