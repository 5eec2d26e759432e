// Backward pass of one tile of keys, over an engine E that multiplies and exponentiates:
//   for each block of queries: s <- q k^T; dp <- do v^T; p <- 2^(s - lse); ds <- p (dp - delta)
//     dv <- dv + p^T do;  dk <- dk + ds^T q;  dq <- dq + ds k   (in the order of the key tiles)
#pragma once

#include <string.h>

#include <atomic>
#include <initializer_list>
#include <type_traits>

#include "added.h"
#include "concepts.h"
#include "cover.h"
#include "extras.h"
#include "normaliser.h"
#include "philox.h"
#include "steps.h"

namespace {

using clinattn::BackwardShared;
using clinattn::BackwardTask;

template <BackwardEngine E>
struct Backward {
  using V = typename E::V;
  using T = typename V::T;
  using Blocks = QueryBlocks<E::kRows>;
  static constexpr int64_t kRows = E::kRows, kKeys = E::kKeys;
  static constexpr int64_t kWidth = V::kWidth;  // rows of dq_acc are padded to it
  static constexpr T kInf = static_cast<T>(__builtin_inf());

  const AttentionParams& p;
  const BackwardShared& shared;
  const int64_t group;  // query heads of a kv head
  Arena arena;
  E engine;
  AddedGradients<E> added;
  T* mask_row;       // (kKeys)
  DrawRows draws{};  // of dropout, for the queries of a block
  // The block whose dq the engine has been asked for last
  struct Last {
    int64_t head, tile, index, i0, n;
  } last;

  Backward(const AttentionParams& p, const BackwardShared& shared, void* scratch)
      : p(p),
        shared(shared),
        group(p.heads / p.kv_heads),
        arena{static_cast<char*>(scratch)},
        engine(arena, p.head_dim, p.value_dim),
        added(arena, p, shared.added) {
    mask_row = arena.take<T>(kKeys);
    if (p.dropout_threshold)
      for (uint32_t** x : {&draws.high, &draws.low, &draws.least, &draws.mask})
        *x = arena.take<uint32_t>(kRows);
  }

  static size_t scratch(const AttentionParams& p, const BackwardShared& shared) {
    return Backward(p, shared, nullptr).arena.used;
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

  // The place of a tile among the tiles that queries [i0, i1) see, and the number of these tiles:
  // those of the prefix, then those of the interval.
  struct Turn {
    int64_t index, count;
    Turn(const Sequence& seq, int64_t i0, int64_t i1, int64_t tile) {
      const Span some = seq.view(i0, i1).some;
      const int64_t prefix = ceil_div(seq.k_prefix - seq.k_begin, kKeys);
      const int64_t first = max64(prefix, (some.lo - seq.k_begin) / kKeys);
      const int64_t end = some.empty() ? first : ceil_div(some.hi - seq.k_begin, kKeys);
      index = tile < prefix ? tile : prefix + tile - first;
      count = prefix + max64(0, end - first);
    }
  };

  static T dot(const T* x, const T* y, int64_t n) {
    auto acc = V::zero();
    for (int64_t d = 0; d < n; d += V::kWidth) acc = V::fma(V::load(x + d), V::load(y + d), acc);
    return V::hsum(acc);
  }
  // Rounded once: an error of delta adds up along a row of ds in the gradients of slopes and decay.
  static T exact_dot(const T* x, const T* y, int64_t n) {
    using Wide = std::conditional_t<sizeof(T) == 8, long double, double>;
    Wide sum = 0;
    for (int64_t d = 0; d < n; ++d) sum += static_cast<Wide>(x[d]) * y[d];
    return static_cast<T>(sum);
  }

  // Normaliser and delta of a block of rows; dq = 0 where no key tile will write it.
  static void prepare(const AttentionParams& p, const BackwardShared& shared, int64_t seq_index,
                      int64_t head, int64_t block) {
    const Sequence seq(p, seq_index);
    const int64_t i0 = max64(0, Blocks::start(seq, block)),
                  i1 = min64(Blocks::start(seq, block + 1), seq.rows_q);
    if (i0 >= i1) return;
    const int64_t q1 = min64(i1, seq.q_end);
    const bool visited = i0 < q1 && Turn(seq, i0, q1, 0).count > 0;
    [[maybe_unused]] auto largest_q = V::zero(), largest_do = V::zero();
    alignas(64) T o[256 + V::kWidth], grad[256 + V::kWidth];
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t at = stat_at(p, seq, head, i);
      const T lse = static_cast<const T*>(p.lse)[at];
      T sum = 0;
      const bool empty = i >= q1 || lse == -kInf;
      if (!empty) {
        load_row<V>(o, row_at(p.o, p.dtype, p.o_strides, seq.index, head, seq.q_row0 + i), p.dtype,
                    p.value_dim);
        load_row<V>(grad, row_at(p.dout, p.dtype, p.do_strides, seq.index, head, seq.q_row0 + i),
                    p.dtype, p.value_dim);
        sum = shared.added.wanted ? exact_dot(o, grad, p.value_dim) : dot(o, grad, p.value_dim);
        if (p.dlse) sum -= static_cast<const T*>(p.dlse)[at];
        if constexpr (E::kRaises) {
          load_row<V>(o, row_at(p.q, p.dtype, p.q_strides, seq.index, head, seq.q_row0 + i),
                      p.dtype, p.head_dim);
          // NaN comes first and is passed over
          for (int64_t d = 0; d < p.head_dim; d += V::kWidth)
            largest_q = V::max(V::abs(V::load(o + d)), largest_q);
          for (int64_t d = 0; d < p.value_dim; d += V::kWidth)
            largest_do = V::max(V::abs(V::load(grad + d)), largest_do);
          // ds is of its size, too
          if (p.dlse)
            largest_do = V::max(V::abs(V::set1(static_cast<const T*>(p.dlse)[at])), largest_do);
        }
      }
      const T low = p.lse_low ? static_cast<const T*>(p.lse_low)[at] : 0;
      const TwoPart<T> lse2 = empty                      ? TwoPart<T>{kInf, 0}
                              : is_large_normaliser(lse) ? TwoPart<T>{lse, base2(low, 0).high}
                                                         : base2(lse, low);
      static_cast<T*>(shared.lse2)[at] = lse2.high;
      static_cast<T*>(shared.lse2_low)[at] = lse2.low;
      static_cast<T*>(shared.delta)[at] = sum;
      if (i >= q1 || !visited)
        memset(row_at(p.dq, p.dtype, p.dq_strides, seq.index, head, seq.q_row0 + i), 0,
               p.head_dim * dtype_size(p.dtype));
    }
    if constexpr (E::kRaises) {
      const int64_t at = largest_at(p, seq_index, head / (p.heads / p.kv_heads));
      raise_to(shared.largest[at], largest_q);
      raise_to(shared.largest[at + 1], largest_do);
    }
  }

  static int64_t largest_at(const AttentionParams& p, int64_t seq, int64_t kv_head) {
    return 2 * (seq * p.kv_heads + kv_head);
  }
  // to <- the largest of `to` and all lanes of x >= 0, whose bits are in the order of the numbers
  static void raise_to(std::atomic<uint32_t>& to, typename V::F x) {
    T lanes[V::kWidth];
    V::store(lanes, x);
    for (const T lane : lanes) {
      uint32_t bits, before = to.load(std::memory_order_relaxed);
      memcpy(&bits, &lane, sizeof bits);
      while (bits > before && !to.compare_exchange_weak(before, bits, std::memory_order_relaxed)) {
      }
    }
  }

  void run(const BackwardTask& task) {
    const Sequence seq(p, task.seq);
    if (task.tile == 0) zero_hidden_keys(seq, task.kv_head);
    const int64_t k0 = seq.k_begin + task.tile * kKeys, keys = min64(kKeys, seq.k_end - k0);
    if (keys <= 0) return;
    if constexpr (E::kRaises) {
      const std::atomic<uint32_t>* largest = shared.largest + largest_at(p, task.seq, task.kv_head);
      engine.begin_task(largest[0].load(std::memory_order_relaxed),
                        largest[1].load(std::memory_order_relaxed), group * p.max_q);
    }
    pack(seq, task.kv_head, k0, keys);
    if (engine.outgrown()) {
      engine.lower();
      pack(seq, task.kv_head, k0, keys);
    }
    const Span rows = k0 < seq.k_prefix ? Span{0, seq.q_end}
                                        : Span{seq.first_query(k0), seq.last_query(k0 + keys)};
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = task.kv_head * group + g;
      const Sight by_mask = mask_sight(p, seq, head, k0, keys, mask_row);
      if (shared.added.wanted) added.begin_head(seq);
      int64_t b = Blocks::of(seq, 0);
      for (; Blocks::start(seq, b) < min64(seq.q_prefix, rows.lo); ++b)
        block(seq, head, task.tile, b, k0, keys, by_mask);
      for (b = max64(b, Blocks::of(seq, rows.lo)); Blocks::start(seq, b) < rows.hi; ++b)
        block(seq, head, task.tile, b, k0, keys, by_mask);
      if (shared.added.wanted) added.end_head(seq, head, task.tile, k0, keys);
    }
    engine.finish([&] { fold_last(seq); });
    write(seq, task.kv_head, k0, keys);
  }

  void zero_hidden_keys(const Sequence& seq, int64_t kv_head) {
    for (int64_t j = 0; j < seq.rows_k; ++j) {
      if (j == seq.k_begin) j = seq.k_end;
      if (j >= seq.rows_k) break;
      const size_t size = dtype_size(p.dtype);
      memset(grad_at(p.dk, p.dk_strides, seq, kv_head, seq.k_row0 + j), 0, p.head_dim * size);
      memset(grad_at(p.dv, p.dv_strides, seq, kv_head, seq.k_row0 + j), 0, p.value_dim * size);
    }
  }

  void pack(const Sequence& seq, int64_t kv_head, int64_t k0, int64_t keys) {
    engine.begin_tile(round_up(keys, E::kBlock));
    for (int64_t j0 = 0; j0 < keys; j0 += E::kBlock) {
      const KeyRows<E::kBlock> rows(p, seq, kv_head, k0 + j0, keys - j0);
      engine.put_keys(j0, min64(E::kBlock, keys - j0), rows.k, rows.v, p.dtype);
    }
  }

  // Rows that see nothing become zeros: whatever they hold reaches no gradient.
  void load_block(const Sequence& seq, int64_t head, int64_t i0, int64_t n) {
    const int64_t stat = stat_at(p, seq, head, i0);
    engine.begin_block();
    for (int64_t i = 0; i < n; ++i) {
      const T lse2 = static_cast<const T*>(shared.lse2)[stat + i];
      const T low = static_cast<const T*>(shared.lse2_low)[stat + i];
      const int64_t at = seq.q_row0 + i0 + i;
      const bool seeing = lse2 != kInf;
      engine.put_row(i, seeing ? row_at(p.q, p.dtype, p.q_strides, seq.index, head, at) : nullptr,
                     seeing ? row_at(p.dout, p.dtype, p.do_strides, seq.index, head, at) : nullptr,
                     p.dtype, p.scale < 0, lse2, low,
                     is_large_normaliser(static_cast<const T*>(p.lse)[stat + i]),
                     static_cast<const T*>(shared.delta)[stat + i]);
    }
    engine.end_block(n);
    if (p.dropout_threshold) Dropout(p, seq.index, head).rows<V>(i0, n, draws);
  }

  // The extras of a call that is not plain (see NoExtras)
  struct Extras {
    Backward& b;
    const Sequence& seq;
    const int64_t head, i0, k0;
    const bool dropout = b.p.dropout_threshold != 0, gains = has_gains(b.p),
               added = b.shared.added.wanted;
    const T kept_scale = static_cast<T>(::kept_scale(b.p));

    static constexpr bool kAny = true;
    bool any() const { return dropout || gains || added; }
    // For rows queries from i, columns [j, last)
    void draw(int64_t i, int64_t rows, int64_t j, int64_t last) const {
      b.engine.kept.draw(Dropout(b.p, seq.index, head), b.draws.at(i), rows, k0, j, last);
    }
    void add(int64_t i, int64_t rows, int64_t j, int64_t last, const T* ds, int64_t ld) const {
      b.added.add(seq, head, i0 + i, rows, k0, j, last, ds, ld);
    }
  };

  void block(const Sequence& seq, int64_t head, int64_t tile, int64_t index, int64_t k0,
             int64_t keys, Sight by_mask) {
    const int64_t i0 = max64(0, Blocks::start(seq, index));
    const int64_t n = min64(Blocks::start(seq, index + 1), seq.q_end) - i0;
    if (n <= 0) return;
    const Span seen = seq.view(i0, i0 + n).seen(k0, k0 + keys);
    if (seen.empty()) return;
    if (by_mask == Sight::kNone) return fold_dq(seq, head, tile, index, i0, n, false);
    load_block(seq, head, i0, n);
    wait_for_head_before(seq, head, tile, index, i0, n);
    // columns that some row sees, rounded out to where the engine can begin and end
    const int64_t begin = (seen.lo - k0) / E::kBegin * E::kBegin;
    const int64_t end = round_up(seen.hi - k0, E::kEnd);
    const bool masked = by_mask == Sight::kEdge, shaped = has_terms(p);
    const auto units = Units<T>::of(p);
    // rows queries from i, columns [j, last)
    const auto is_edge = [&](int64_t i, int64_t rows, int64_t j, int64_t last) {
      return masked || shaped || last > keys ||
             !seq.view(i0 + i, i0 + i + rows).all_see(k0 + j, k0 + last);
    };
    const auto hide = [&](int64_t i, int64_t rows, int64_t j, int64_t last) {
      const typename E::Cover cover{p, seq, engine, mask_row, head, i0 + i, rows, k0, j, last};
      return cover.hide(keys, units.natural, masked);
    };
    // All of a block of keys is multiplied, also behind the last that some row sees.
    const bool edge = is_edge(0, n, begin, round_up(end, E::kBlock));
    // Part `at` of `parts` of what is read next: dq of this block, q and do of the one behind it
    const int64_t i1 = i0 + n, next = min64(Blocks::start(seq, index + 2), seq.q_end) - i1;
    const auto prefetch = [&](int64_t at, int64_t parts) {
      const int64_t size = dtype_size(p.dtype);
      for (int64_t i = at * n / parts; i < (at + 1) * n / parts; ++i)
        prefetch_row(dq_acc_at(seq, head, i0 + i), p.head_dim * sizeof(T));
      for (int64_t i = at * next / parts; i < (at + 1) * next / parts; ++i) {
        const int64_t row = seq.q_row0 + i1 + i;
        prefetch_row(row_at(p.q, p.dtype, p.q_strides, seq.index, head, row), p.head_dim * size);
        prefetch_row(row_at(p.dout, p.dtype, p.do_strides, seq.index, head, row),
                     p.value_dim * size);
      }
    };
    const auto differentiate = [&](const auto& extras) {
      engine.differentiate(
          n, begin, end, units, is_edge, hide, edge, edge && !engine.finite_rows(),
          edge && !engine.finite_keys(), [&] { fold_last(seq); }, prefetch, extras);
    };
    const Extras extras{*this, seq, head, i0, k0};
    extras.any() ? differentiate(extras) : differentiate(NoExtras{});
    last = {head, tile, index, i0, n};
    if (!E::kDelayed) fold_last(seq);
  }

  std::atomic<int32_t>& turn_of(const Sequence& seq, int64_t head, int64_t index) {
    const int64_t blocks = ceil_div(seq.rows_q, kRows) + 1;
    return shared.turns[shared.block_offsets[seq.index] + head * blocks + index];
  }

  // Heads that share the gradient of a mask add to it one after another; those of a group do so in
  // the same task.
  void wait_for_head_before(const Sequence& seq, int64_t head, int64_t tile, int64_t index,
                            int64_t i0, int64_t n) {
    if (!shared.added.mask || shared.added.mask_strides.head || head == 0 || head % group) return;
    wait_for(turn_of(seq, head - 1, index), Turn(seq, i0, i0 + n, tile).index + 1);
  }

  void fold_last(const Sequence& seq) {
    fold_dq(seq, last.head, last.tile, last.index, last.i0, last.n, true);
  }

  // dq <- dq + ds k, after the tiles before this one; the last tile scales, rounds and writes.
  void fold_dq(const Sequence& seq, int64_t head, int64_t tile, int64_t index, int64_t i0,
               int64_t n, bool any) {
    std::atomic<int32_t>& turn = turn_of(seq, head, index);
    const Turn mine(seq, i0, i0 + n, tile);
    wait_for(turn, mine.index);

    T* acc = dq_acc_at(seq, head, i0);
    const int64_t ld = shared.dq_acc_strides.row;
    if (any) {
      engine.fold(n, acc, ld, mine.index == 0);
    } else if (mine.index == 0) {
      for (int64_t i = 0; i < n; ++i)
        for (int64_t d = 0; d < round_up(p.head_dim, kWidth); d += kWidth)
          V::store(acc + i * ld + d, V::zero());
    }
    if (mine.index + 1 == mine.count) {
      const auto scale = V::set1(static_cast<T>(p.scale));
      for (int64_t i = 0; i < n; ++i)
        store_row<V>(grad_at(p.dq, p.dq_strides, seq, head, seq.q_row0 + i0 + i), acc + i * ld,
                     p.dtype, p.head_dim, [&](auto x) { return V::mul(x, scale); });
    }
    turn.store(static_cast<int32_t>(mine.index + 1), std::memory_order_release);
  }

  void write(const Sequence& seq, int64_t kv_head, int64_t k0, int64_t keys) {
    // q was packed with the sign of the scale
    const auto scale = V::set1(static_cast<T>(__builtin_fabs(p.scale)));
    const auto kept = V::set1(static_cast<T>(kept_scale(p)));
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t at = seq.k_row0 + k0 + j;
      store_row<V>(grad_at(p.dk, p.dk_strides, seq, kv_head, at), engine.dk_row(j), p.dtype,
                   p.head_dim, [&](auto x) { return V::mul(x, scale); });
      store_row<V>(grad_at(p.dv, p.dv_strides, seq, kv_head, at), engine.dv_row(j), p.dtype,
                   p.value_dim, [&](auto x) { return V::mul(x, kept); });
    }
  }
};

}  // namespace
