// Gradients of what is added to scores: sums of ds over blocks of queries and keys. A tile of keys
// sums on its own, block after block, and joins its head's sums after the tiles before it, so that
// the order of additions does not depend on threads.
#pragma once

#include <atomic>

#include "isa.h"
#include "terms.h"

namespace {

using clinattn::AddedSums;

inline void pause_thread() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_ia32_pause();
#endif
}

inline void wait_for(const std::atomic<int32_t>& turn, int64_t value) {
  for (int spins = 0; turn.load(std::memory_order_acquire) < value; ++spins)
    spins < 4096 ? pause_thread() : clinattn::yield_thread();
}

template <class E>
struct AddedGradients {
  using V = typename E::V;
  using T = typename V::T;
  static constexpr int64_t kRows = E::kRows, kKeys = E::kKeys;

  const AttentionParams& p;
  const AddedSums& to;
  double *sums, *column_sums;  // of the tile and head at hand: (length), (kKeys)
  Span entries{};              // of a table of relative biases, that the sequence at hand has
  int64_t length = 0;
  T *diagonals, *columns;  // of the block at hand

  AddedGradients(Arena& a, const AttentionParams& p, const AddedSums& to) : p(p), to(to) {
    if (!to.wanted) return;
    sums = a.take<double>(to.length);
    column_sums = a.take<double>(kKeys);
    diagonals = a.take<T>(kRows + kKeys + 2 * V::kWidth);
    columns = a.take<T>(kKeys);
  }

  void begin_head(const Sequence& seq) {
    length = (to.starts[seq.index + 1] - to.starts[seq.index]) / p.heads;
    if (to.relative >= 0) entries = relative_entries(p, seq);
    for (int64_t x = 0; x < length; ++x) sums[x] = 0;
    for (int64_t j = 0; j < kKeys; ++j) column_sums[j] = 0;
  }

  // ds (n, end - begin), rows ld apart, of queries from i0 and keys [k0 + begin, k0 + end)
  void add(const Sequence& seq, int64_t head, int64_t i0, int64_t n, int64_t k0, int64_t begin,
           int64_t end, const T* ds, int64_t ld) {
    const Distances<V, true, kRows, kKeys> distances(p, seq, i0, n, k0, begin, end);
    const int64_t width = end - begin;
    if (to.relative >= 0)
      for (int64_t x = 0; x < distances.diagonals(); ++x) diagonals[x] = 0;
    if (to.columns)
      for (int64_t j = 0; j < width; ++j) columns[j] = 0;
    for (int64_t i = 0; i < n; ++i) {
      const T* row = ds + i * ld;
      auto slope = V::zero(), decay = slope, total = slope;
      for (int64_t j = 0; j < width; j += V::kWidth) {
        const auto x = V::load(row + j);
        if (to.slope >= 0) slope = V::fma(x, distances.positions(i, begin + j), slope);
        if (to.decay >= 0) decay = V::fma(x, distances.times(i, begin + j), decay);
        if (to.rows >= 0) total = V::add(total, x);
        if (to.columns) V::store(columns + j, V::add(V::load(columns + j), x));
        if (to.relative >= 0) {
          T* at = diagonals + distances.diagonal(i, begin + j);
          V::store(at, V::add(V::load(at), x));
        }
      }
      if (to.slope >= 0) sums[to.slope] -= V::hsum(slope);
      if (to.decay >= 0) sums[to.decay] -= V::hsum(decay);
      if (to.rows >= 0) sums[to.rows + (to.row_stride ? i0 + i : 0)] += V::hsum(total);
      if (to.mask)
        add_to_mask(seq, head, i0 + i, k0 + begin, min64(width, seq.k_end - k0 - begin), row);
    }
    if (to.columns)
      for (int64_t j = 0; j < width; ++j) column_sums[begin + j] += columns[j];
    if (to.relative >= 0)
      for (int64_t x = 0; x < n + width - 1; ++x) {
        // columns past the last key have a ds of 0
        const int64_t entry = min64(relative_entry(p, distances.ahead_of(x)), entries.hi - 1);
        sums[to.relative + entry - entries.lo] += diagonals[x];
      }
  }

  void add_to_mask(const Sequence& seq, int64_t head, int64_t i, int64_t key, int64_t n,
                   const T* row) {
    T* at = static_cast<T*>(to.mask) + seq.index * to.mask_strides.batch +
            head * to.mask_strides.head + i * to.mask_strides.row + key;
    for (int64_t j = 0; j < n; ++j) at[j] += row[j];
  }

  // Adds the sums of a tile of keys to those of its head.
  void end_head(const Sequence& seq, int64_t head, int64_t tile, int64_t k0, int64_t keys) {
    const int64_t at = seq.index * p.heads + head;
    if (to.columns)
      for (int64_t j = 0; j < keys; ++j) to.columns[at * p.max_k + k0 + j] = column_sums[j];
    if (length == 0) return;
    wait_for(to.turns[at], tile);
    double* of_head = to.heads + to.starts[seq.index] + head * length;
    for (int64_t x = 0; x < length; ++x) of_head[x] += sums[x];
    to.turns[at].store(static_cast<int32_t>(tile + 1), std::memory_order_release);
  }
};

}  // namespace
