// Visibility as an interval: which keys query i of one sequence sees. See DESIGN: lo and hi never
// decrease. Beside it the keys of a global prefix are seen by all, and its queries see all keys.
#pragma once

#include "attention.h"

namespace {

using clinattn::AttentionParams;

CLINATTN_SHARED inline int64_t clamp(int64_t x, int64_t lo, int64_t hi) {
  return x < lo ? lo : (x > hi ? hi : x);
}
CLINATTN_SHARED inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
CLINATTN_SHARED inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
CLINATTN_SHARED inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
CLINATTN_SHARED inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Span {
  int64_t lo, hi;
  CLINATTN_SHARED bool empty() const { return lo >= hi; }
};

// The first number from lo on for which test, once true, stays true; hi where there is none.
template <class Test>
CLINATTN_SHARED inline int64_t first_where(int64_t lo, int64_t hi, const Test& test) {
  while (lo < hi) {
    const int64_t middle = lo + (hi - lo) / 2;
    test(middle) ? hi = middle : lo = middle + 1;
  }
  return lo;
}

enum class Sight { kNone, kEdge, kFull };

// The keys that a block of queries sees: keys before prefix and keys of `all` are seen by all
// queries, keys that are neither before prefix nor in `some` by none.
struct View {
  Span some, all;
  int64_t prefix;

  // Keys of [k0, k1) from the first to the last that some query sees
  CLINATTN_SHARED Span seen(int64_t k0, int64_t k1) const {
    const int64_t last = some.lo < k1 ? max64(some.hi, prefix) : prefix;
    return {k0 < prefix ? k0 : max64(k0, some.lo), min64(k1, last)};
  }
  CLINATTN_SHARED bool all_see(int64_t k0, int64_t k1) const {
    k0 = max64(k0, min64(k1, prefix));
    return k0 >= k1 || (k0 >= all.lo && k1 <= all.hi);
  }
};

struct Sequence {
  int64_t index;
  int64_t q_row0, k_row0;      // first row in packed tensors, 0 in dense ones
  int64_t rows_q, rows_k;      // rows that exist
  int64_t q_end;               // queries beyond it see nothing
  int64_t k_begin, k_end;      // valid keys; key tiles start at k_begin
  int64_t q_prefix, k_prefix;  // queries before it see all keys; keys before it are seen by all
  int64_t offset, left, right;
  const int32_t *los = nullptr, *his = nullptr;  // bounds of each query, or null

  CLINATTN_SHARED Sequence(const AttentionParams& p, int64_t b)
      : index(b), left(p.window_left), right(p.window_right) {
    // Clamped to the tensors: values on a device have not been read before.
    const auto rows = [&](const int32_t* ends, int64_t total, int64_t dense, int64_t& first) {
      first = ends ? clamp(ends[b], 0, total) : 0;
      return ends ? clamp(ends[b + 1], first, total) - first : dense;
    };
    rows_q = rows(p.cu_seqlens_q, p.total_q, p.max_q, q_row0);
    rows_k = rows(p.cu_seqlens_k, p.total_k, p.max_k, k_row0);
    q_end = p.q_lengths ? clamp(p.q_lengths[b], 0, rows_q) : rows_q;
    k_end = p.kv_end ? clamp(p.kv_end[b], 0, rows_k) : rows_k;
    k_begin = p.kv_start ? clamp(p.kv_start[b], 0, k_end) : 0;
    offset = p.bottom_right ? k_end - q_end : 0;
    k_prefix = min64(k_begin + p.global_prefix, k_end);
    q_prefix = p.global_prefix ? clamp(k_begin + p.global_prefix - offset, 0, q_end) : 0;
    if (p.lo) {
      const int64_t first = p.cu_seqlens_q ? q_row0 : b * p.max_q;
      los = p.lo + first;
      his = p.hi + first;
    }
  }

  // The interval of query i, which may be empty.
  CLINATTN_SHARED int64_t lo(int64_t i) const {
    if (i < q_prefix) return k_begin;
    const int64_t x = left < 0 ? k_begin : clamp(i + offset - left, k_begin, k_end);
    return los ? clamp(los[i], x, k_end) : x;
  }
  CLINATTN_SHARED int64_t hi(int64_t i) const {
    if (i < q_prefix) return k_end;
    const int64_t x = right < 0 ? k_end : clamp(i + offset + right + 1, k_begin, k_end);
    return his ? clamp(his[i], k_begin, x) : x;
  }

  // Columns [lo, hi) of the keys from k0 that each of n queries from i sees, within [begin, end].
  void columns(int64_t i, int64_t n, int64_t k0, int64_t begin, int64_t end, int32_t* los_out,
               int32_t* his_out) const {
    const auto column = [&](int64_t key) {
      return static_cast<int32_t>(clamp(key - k0, begin, end));
    };
    if (los || i < q_prefix) {
      for (int64_t r = 0; r < n; ++r)
        los_out[r] = column(lo(i + r)), his_out[r] = column(hi(i + r));
      return;
    }
    // without branches, for vectors
    constexpr int64_t kFar = int64_t{1} << 30;
    const int32_t least = column(k_begin), most = column(k_end);
    const auto first = static_cast<int32_t>(clamp(i + offset - left - k0, -kFar, kFar)),
               last = static_cast<int32_t>(clamp(i + offset + right + 1 - k0, -kFar, kFar));
    const auto bound = [&](int32_t x) { return x < least ? least : x > most ? most : x; };
    for (int32_t r = 0; r < n; ++r) {
      los_out[r] = left < 0 ? least : bound(first + r);
      his_out[r] = right < 0 ? most : bound(last + r);
    }
  }

  CLINATTN_SHARED View view(int64_t i0, int64_t i1) const {
    const int64_t last = i1 - 1, plain = max64(i0, min64(q_prefix, last));
    return {i0 < q_prefix ? Span{k_begin, k_end} : Span{lo(i0), hi(last)},
            {lo(last), hi(plain)},
            k_prefix};
  }

  // Queries from the prefix on, [first, last), that see some key of [k0, k1).
  CLINATTN_SHARED int64_t first_query(int64_t k0) const {
    if (his) return first_where(q_prefix, q_end, [&](int64_t i) { return hi(i) > k0; });
    return right < 0 ? q_prefix : clamp(k0 - offset - right, q_prefix, q_end);
  }
  CLINATTN_SHARED int64_t last_query(int64_t k1) const {
    if (los) return first_where(q_prefix, q_end, [&](int64_t i) { return lo(i) >= k1; });
    return left < 0 ? q_end : clamp(k1 - offset + left, q_prefix, q_end);
  }
};

}  // namespace
