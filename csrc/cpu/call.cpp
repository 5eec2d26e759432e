#include "call.h"

#include <algorithm>

namespace clinattn {

namespace {

void check_cumulative(const int32_t* c, const char* name, int64_t sequences, int64_t total) {
  CLINATTN_CHECK(c[0] == 0, name, " starts at ", c[0], "; expected 0");
  for (int64_t i = 1; i <= sequences; ++i)
    CLINATTN_CHECK(c[i] >= c[i - 1], name, " decreases at ", i, ": ", c[i - 1], " to ", c[i]);
  CLINATTN_CHECK(c[sequences] <= total, name, " ends at ", c[sequences], "; the tensor has ", total,
                 " rows");
}

int64_t longest(const int32_t* c, int64_t sequences) {
  int64_t n = 0;
  for (int64_t i = 0; i < sequences; ++i) n = std::max<int64_t>(n, c[i + 1] - c[i]);
  return n;
}

// The turns of the backward pass and its search for the queries of a key rely on it.
void check_order(const int32_t* bounds, const char* name, const AttentionParams& p) {
  for (int64_t b = 0; b < p.num_seqs; ++b) {
    const int64_t first = p.cu_seqlens_q ? p.cu_seqlens_q[b] : b * p.max_q;
    const int64_t rows = p.cu_seqlens_q ? p.cu_seqlens_q[b + 1] - first
                         : p.q_lengths  ? std::min<int64_t>(p.q_lengths[b], p.max_q)
                                        : p.max_q;
    const int32_t* x = bounds + first;
    for (int64_t i = 1; i < rows; ++i)
      CLINATTN_CHECK(x[i] >= x[i - 1], name, " of sequence ", b, " decreases at ", i, ": ",
                     x[i - 1], " to ", x[i]);
  }
}

}  // namespace

AttentionParams check(const Arguments& a) {
  CLINATTN_CHECK(a.q.is_cpu(), "q is on ", a.q.device(), "; expected cpu");
  AttentionParams p = check_shapes(a);
  if (p.cu_seqlens_q) {
    check_cumulative(p.cu_seqlens_q, "cu_seqlens_q", p.num_seqs, p.total_q);
    check_cumulative(p.cu_seqlens_k, "cu_seqlens_k", p.num_seqs, p.total_k);
    p.max_q = longest(p.cu_seqlens_q, p.num_seqs);
    p.max_k = longest(p.cu_seqlens_k, p.num_seqs);
  }
  if (p.lo) check_order(p.lo, "lo", p), check_order(p.hi, "hi", p);
  if (p.seed_at) p.seed = *p.seed_at;
  return p;
}

}  // namespace clinattn
