// The changes of a block of scores before the softmax: a softcap, and the terms added for distances
// and for times.
#pragma once

#include "../relative.h"
#include "rows.h"

namespace {

inline bool has_terms(const AttentionParams& p) {
  return p.softcap != 0 || p.slopes || p.decay || p.relative;
}

// Returns whether scores have a derivative in s = scale q.k other than 1.
inline bool has_gains(const AttentionParams& p) { return p.softcap != 0; }

// Below 0.625 an odd polynomial (Cephes), else 1 - 2 / (e^2x + 1).
template <class V>
inline typename V::F tanh(typename V::F x) {
  using T = typename V::T;
  if constexpr (sizeof(T) == 8) {
    return V::each([&](int i) { return __builtin_tanh(x.x[i]); });
  } else {
    constexpr T kSmall[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f,
                            1.33314422036e-1f, -3.33332819422e-1f};
    const auto square = V::mul(x, x), size = V::abs(x), one = V::set1(1);
    auto y = V::set1(kSmall[0]);
    for (int i = 1; i < 5; ++i) y = V::fma(y, square, V::set1(kSmall[i]));
    y = V::fma(V::mul(y, square), x, x);
    const auto e = V::exp2(V::mul(size, V::set1(static_cast<T>(2 * kLog2e))));
    const auto large = V::sub(one, V::div(V::set1(2), V::add(e, one)));
    return V::where_below(size, V::set1(0.625f), y, V::with_sign(large, x));
  }
}

// Distances between queries [i0, i0 + n) and keys [k0 + begin, k0 + end). A vector belongs to one
// query and neighbouring keys where kAlongKeys, else to one key and neighbouring queries.
template <class V, bool kAlongKeys, int64_t kRows, int64_t kKeys>
struct Distances {
  using T = typename V::T;
  using F = typename V::F;

  const int64_t n, begin, end;
  const int64_t ahead;  // of query 0, key 0
  alignas(64) T lanes[V::kWidth];
  alignas(64) T times_q[kRows + V::kWidth], times_k[kKeys + V::kWidth];

  __attribute__((always_inline)) Distances(const AttentionParams& p, const Sequence& seq,
                                           int64_t i0, int64_t n, int64_t k0, int64_t begin,
                                           int64_t end)
      : n(n), begin(begin), end(end), ahead(k0 - i0 - seq.offset) {
    for (int i = 0; i < V::kWidth; ++i) lanes[i] = static_cast<T>(kAlongKeys ? -i : i);
    if (!p.times) return;
    const T* times =
        static_cast<const T*>(p.times) + (p.cu_seqlens_q ? seq.q_row0 : seq.index * p.max_q);
    const int64_t keys = min64(end, seq.k_end - k0);
    for (int64_t i = 0; i < round_up(n, V::kWidth); ++i) times_q[i] = i < n ? times[i0 + i] : 0;
    for (int64_t j = begin; j < end; ++j) times_k[j - begin] = j < keys ? times[k0 + j] : 0;
  }

  // |i - j| from query i and key j on
  F positions(int64_t i, int64_t j) const {
    return V::abs(V::add(V::set1(static_cast<T>(i - j - ahead)), V::load(lanes)));
  }
  // |t_i - t_j|
  F times(int64_t i, int64_t j) const {
    j -= begin;
    return V::abs(kAlongKeys ? V::sub(V::set1(times_q[i]), V::load(times_k + j))
                             : V::sub(V::load(times_q + i), V::set1(times_k[j])));
  }
  // Pairs by how far the key is ahead, so that those of a vector are neighbours.
  int64_t diagonal(int64_t i, int64_t j) const {
    return kAlongKeys ? j - begin + n - 1 - i : i + end - 1 - j;
  }
  int64_t diagonals() const { return n + end - begin + V::kWidth; }
  // Returns how far the key of a diagonal is ahead.
  int64_t ahead_of(int64_t diagonal) const {
    return ahead + (kAlongKeys ? diagonal + begin - (n - 1) : end - 1 - diagonal);
  }
};

template <class V, bool kAlongKeys, int64_t kRows, int64_t kKeys>
struct Terms {
  using T = typename V::T;
  using F = typename V::F;

  Distances<V, kAlongKeys, kRows, kKeys> distances;
  const bool by_position, by_time;
  T decay = 0;
  const T scale, cap, scale_over_cap;
  alignas(64) T bias[kRows + kKeys + 2 * V::kWidth];  // by diagonal

  // Inlined, so that stores of scores are known not to change it.
  __attribute__((always_inline)) Terms(const AttentionParams& p, const Sequence& seq, int64_t head,
                                       int64_t i0, int64_t n, int64_t k0, int64_t begin,
                                       int64_t end)
      : distances(p, seq, i0, n, k0, begin, end),
        by_position(p.slopes || p.relative),
        by_time(p.decay),
        scale(static_cast<T>(__builtin_fabs(p.scale))),
        cap(static_cast<T>(p.softcap)),
        scale_over_cap(p.softcap != 0 ? finite(__builtin_fabs(p.scale) / p.softcap) : 0) {
    if (by_time) decay = -static_cast<const T*>(p.decay)[head];
    if (!by_position) return;
    const T* table = static_cast<const T*>(p.relative) + head * (2 * p.relative_reach + 1);
    const double slope =
        p.slopes ? static_cast<const T*>(p.slopes)[seq.index * p.slopes_batch + head] : 0;
    for (int64_t d = 0; d < distances.diagonals(); ++d) {
      const int64_t ahead = distances.ahead_of(d);
      const double entry = p.relative ? table[relative_entry(p, ahead)] : 0;
      bias[d] = static_cast<T>(entry - slope * (ahead < 0 ? -ahead : ahead));
    }
  }

  static T finite(double x) {
    constexpr double kLargest = sizeof(T) == 8 ? __DBL_MAX__ : __FLT_MAX__;
    return static_cast<T>(x < kLargest ? x : kLargest);
  }

  // The score, of x = q.k, from query i and key j on; gain_at (for the backward pass, or null) gets
  // the derivative in scale q.k, if has_gains.
  __attribute__((always_inline)) F operator()(F x, int64_t i, int64_t j, T* gain_at) const {
    if (cap != 0) {
      const F t = tanh<V>(V::mul(x, V::set1(scale_over_cap))), one = V::set1(1);
      x = V::mul(t, V::set1(cap));
      // 0 in place of the NaN of a key that is hidden: its ds is 0
      if (gain_at) V::store(gain_at, V::max(V::mul(V::sub(one, t), V::add(one, t)), V::zero()));
    } else {
      x = V::mul(x, V::set1(scale));
    }
    if (by_position) x = V::add(x, V::load(bias + distances.diagonal(i, j)));
    if (by_time) x = V::fma(V::set1(decay), distances.times(i, j), x);
    return x;
  }
};

}  // namespace
