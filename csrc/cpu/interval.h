// Visibility as an interval: which keys query i of one sequence sees. See DESIGN: lo and hi never
// decrease.
#pragma once

#include "../attention.h"

namespace {

using clinattn::AttentionParams;

inline int64_t clamp(int64_t x, int64_t lo, int64_t hi) { return x < lo ? lo : (x > hi ? hi : x); }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Sequence {
  int64_t index;
  int64_t q_row0, k_row0;  // first row in packed tensors, 0 in dense ones
  int64_t rows_q, rows_k;  // rows that exist
  int64_t q_end;           // queries beyond it see nothing
  int64_t k_begin, k_end;  // valid keys; key tiles start at k_begin
  int64_t offset, left, right;

  Sequence(const AttentionParams& p, int64_t b)
      : index(b), left(p.window_left), right(p.window_right) {
    q_row0 = p.cu_seqlens_q ? p.cu_seqlens_q[b] : 0;
    k_row0 = p.cu_seqlens_k ? p.cu_seqlens_k[b] : 0;
    rows_q = p.cu_seqlens_q ? p.cu_seqlens_q[b + 1] - q_row0 : p.max_q;
    rows_k = p.cu_seqlens_k ? p.cu_seqlens_k[b + 1] - k_row0 : p.max_k;
    q_end = p.q_lengths ? clamp(p.q_lengths[b], 0, rows_q) : rows_q;
    k_end = p.kv_end ? clamp(p.kv_end[b], 0, rows_k) : rows_k;
    k_begin = p.kv_start ? clamp(p.kv_start[b], 0, k_end) : 0;
    offset = p.bottom_right ? k_end - q_end : 0;
  }

  int64_t lo(int64_t i) const {
    return left < 0 ? k_begin : clamp(i + offset - left, k_begin, k_end);
  }
  int64_t hi(int64_t i) const {
    return right < 0 ? k_end : clamp(i + offset + right + 1, k_begin, k_end);
  }

  // Queries [first, last) that see some key of [k0, k1), as lo and hi never decrease.
  int64_t first_query(int64_t k0) const {
    return right < 0 ? 0 : clamp(k0 - offset - right, 0, q_end);
  }
  int64_t last_query(int64_t k1) const {
    return left < 0 ? q_end : clamp(k1 - offset + left, 0, q_end);
  }
};

// How a block of queries [i0, i1) sees the keys [k0, k1).
enum class Sight { kNone, kEdge, kFull };

inline Sight sight(const Sequence& s, int64_t i0, int64_t i1, int64_t k0, int64_t k1) {
  if (k1 <= s.lo(i0) || k0 >= s.hi(i1 - 1)) return Sight::kNone;
  if (k0 >= s.lo(i1 - 1) && k1 <= s.hi(i0)) return Sight::kFull;
  return Sight::kEdge;
}

}  // namespace
