// The cuts of a sequence in both passes and in summaries: blocks of queries, rows of keys, and the
// steps of a panel of keys that a tile of queries sees.
#pragma once

#include "forward_step.h"
#include "terms.h"

namespace {

// Blocks of kRows queries are cut where the first key is, so that a left-padded sequence is cut as
// it is alone.
template <int64_t kRows>
struct QueryBlocks {
  static int64_t start(const Sequence& seq, int64_t block) {
    return (block - 1) * kRows + seq.k_begin % kRows;
  }
  static int64_t of(const Sequence& seq, int64_t row) {
    return (row - seq.k_begin % kRows + kRows) / kRows;
  }
};

// Rows of k and v from a key on, as engines pack them; null past `keys` of them, and for a key that
// no head of the group sees.
template <int64_t kBlock>
struct KeyRows {
  const void *k[kBlock], *v[kBlock];

  KeyRows(const AttentionParams& p, const Sequence& seq, int64_t kv_head, int64_t key,
          int64_t keys) {
    for (int64_t j = 0; j < kBlock; ++j) {
      const int64_t at = seq.k_row0 + key + j;
      const bool visible = j < keys && seen_by_group(p, seq, kv_head, key + j);
      k[j] = visible ? row_at(p.k, p.dtype, p.k_strides, seq.index, kv_head, at) : nullptr;
      v[j] = visible ? row_at(p.v, p.dtype, p.v_strides, seq.index, kv_head, at) : nullptr;
    }
  }
};

// Fills steps with what queries [i0, i0 + n) see of keys [k0, k0 + keys) in tiles of engine E;
// returns how many there are. by_mask: what the mask leaves of each tile.
template <class E>
int64_t visible_steps(const AttentionParams& p, const Sequence& seq, int64_t i0, int64_t n,
                      int64_t k0, int64_t keys, const Sight* by_mask, Step* steps) {
  const View view = seq.view(i0, i0 + n);
  const int64_t first = k0 < seq.k_prefix ? 0 : max64(0, view.some.lo - k0);
  const int64_t end = max64(view.some.hi, seq.k_prefix) - k0;
  const int64_t index = (k0 - seq.k_begin) / E::kKeys;
  const bool shaped = has_terms(p);
  int64_t count = 0;
  for (int64_t at = first / E::kKeys * E::kKeys; at < min64(keys, end); at += E::kKeys) {
    const int64_t step_keys = min64(E::kKeys, keys - at), key = k0 + at;
    const Span seen = view.seen(key, key + step_keys);
    const Sight mask = by_mask[at / E::kKeys];
    if (seen.empty() || mask == Sight::kNone) continue;
    const bool masked = mask == Sight::kEdge;
    // columns that some row sees, rounded out to where the engine can begin and end
    const int64_t begin = (seen.lo - key) / E::kBegin * E::kBegin;
    const int64_t column_end = round_up(seen.hi - key, E::kEnd);
    steps[count++] = {
        index + at / E::kKeys,
        at,
        step_keys,
        begin,
        column_end,
        masked || shaped || column_end > step_keys || !view.all_see(key, key + step_keys),
        masked};
  }
  return count;
}

}  // namespace
