// The values of each query for the kernels that form weights again: its normaliser, and for the
// backward pass delta = o.do - dlse.
#pragma once

#include "kernels.h"
#include "queries.cuh"

namespace clinattn {

constexpr int kPrepareThreads = 128;

CLINATTN_SHARED inline int64_t stat_rows(const AttentionParams& p) {
  return p.cu_seqlens_q ? p.total_q : p.max_q;
}
CLINATTN_SHARED inline int64_t stat_count(const AttentionParams& p) {
  return (p.cu_seqlens_q ? 1 : p.num_seqs) * p.heads * stat_rows(p);
}

// A warp takes a row.
template <class T>
CLINATTN_KERNEL(kPrepareThreads, 1)
prepare_kernel(CLINATTN_CONSTANT AttentionParams p, CLINATTN_CONSTANT CudaScratch scratch) {
  const int64_t at = block_index() * (kPrepareThreads / kWarp) + warp_index();
  const int64_t rows = stat_rows(p), heads = at / rows, row = at % rows;
  const int64_t batch = heads / p.heads, head = heads % p.heads;
  if (batch >= (p.cu_seqlens_q ? 1 : p.num_seqs)) return;
  const float lse = static_cast<const float*>(p.lse)[at];
  if (lse == -kInfinity) {
    if (lane_index() == 0)
      scratch.lse2[at] = kInfinity, scratch.lse2_low[at] = 0, scratch.delta[at] = 0;
    return;
  }
  const auto row_of = [&](const void* tensor, const Strides& s) {
    return static_cast<const T*>(tensor) + batch * s.batch + head * s.head + row * s.row;
  };
  const T *o = row_of(p.o, p.o_strides), *dout = row_of(p.dout, p.do_strides);
  // Rounded once where an error would add up along a row, in the gradients of decay and the like
  const auto dot = [&](auto sum) {
    for (int d = lane_index(); d < p.value_dim; d += kWarp)
      sum += static_cast<decltype(sum)>(to_float(o[d])) * to_float(dout[d]);
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
    return static_cast<float>(sum);
  };
  const bool exact = scratch.decay || scratch.slopes || scratch.dmask || scratch.near_sums;
  const float delta = exact ? dot(0.0) : dot(0.0f);
  if (lane_index() != 0) return;
  const TwoPart lse2 = normaliser_at(p, at);
  scratch.lse2[at] = lse2.high;
  scratch.lse2_low[at] = lse2.low;
  scratch.delta[at] = delta - (p.dlse ? static_cast<const float*>(p.dlse)[at] : 0);
}

// The normalisers alone, one thread a row. A query of weight 0 counts as one that sees no key.
static CLINATTN_KERNEL(kPrepareThreads, 1)
    normalisers_kernel(CLINATTN_CONSTANT AttentionParams p, CLINATTN_CONSTANT SummaryParams s,
                       CLINATTN_CONSTANT CudaScratch scratch) {
  const int64_t at = block_index() * kPrepareThreads + thread_index();
  if (at >= stat_count(p)) return;
  const bool unread = s.weights && static_cast<const float*>(s.weights)[at] == 0;
  const TwoPart lse2 = unread ? TwoPart{kInfinity, 0} : normaliser_at(p, at);
  scratch.lse2[at] = lse2.high;
  scratch.lse2_low[at] = lse2.low;
}

template <class T>
int launch_prepare(const AttentionParams& p, const CudaScratch& scratch, void* stream) {
  return launch(prepare_kernel<T>, ceil_div(stat_count(p), kPrepareThreads / kWarp),
                kPrepareThreads, 0, stream, p, scratch);
}

inline int launch_normalisers(const AttentionParams& p, const SummaryParams& s,
                              const CudaScratch& scratch, void* stream) {
  return launch(normalisers_kernel, ceil_div(stat_count(p), kPrepareThreads), kPrepareThreads, 0,
                stream, p, s, scratch);
}

}  // namespace clinattn
