// Entries of a table of relative biases: one for each distance of a key ahead of its query, and one
// at either end for all beyond the table's reach.
#pragma once

#include "interval.h"

namespace {

inline int64_t relative_entry(const AttentionParams& p, int64_t ahead) {
  return clamp(ahead, -p.relative_reach, p.relative_reach) + p.relative_reach;
}

// The entries that pairs of a sequence can have
inline Span relative_entries(const AttentionParams& p, const Sequence& seq) {
  if (seq.q_end == 0 || seq.k_end == 0) return {0, 0};
  return {relative_entry(p, -(seq.q_end - 1) - seq.offset),
          relative_entry(p, seq.k_end - 1 - seq.offset) + 1};
}

}  // namespace
