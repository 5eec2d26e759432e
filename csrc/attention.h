// One attention call as plain data: pointers, strides, sizes, visibility. No torch.
#pragma once

#include <cstdint>

#include "arguments.h"

// Functions that kernels on a device call too
#ifdef __CUDACC__
#define CLINATTN_SHARED __host__ __device__
#else
#define CLINATTN_SHARED
#endif

namespace clinattn {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64, kBool };

// Element strides of a (batch, head, row, head_dim) view whose last stride is 1.
// Packed (row, head, head_dim) tensors have batch stride 0 and start rows from cu_seqlens.
struct Strides {
  int64_t batch = 0, head = 0, row = 0;
};

// Additive or boolean mask that broadcasts to (batch, head, query, key); a broadcast side has
// stride 0.
struct Mask {
  const void* ptr = nullptr;
  DType dtype = DType::kBool;
  int64_t batch = 0, head = 0, row = 0, key = 0;
};

// The scalars of the call: windows are at most 2^40, and -1 without a bound; softcap, global_prefix
// and dropout_p are 0 for none. All queries see the first global_prefix keys from kv_start on, and
// as many queries see all keys.
struct AttentionParams : Scalars {
  DType dtype;
  int64_t num_seqs, heads, kv_heads;
  int64_t head_dim, value_dim;  // of q and k; of v and o
  int64_t max_q, max_k;         // dense: rows of q and k; packed: the longest sequence
  int64_t total_q, total_k;     // packed: rows in all

  const void *q, *k, *v;
  Strides q_strides, k_strides, v_strides;
  void* o;  // forward writes, backward reads
  // Natural log of the normaliser, and what rounding took from it: float, or double for kFloat64,
  // (batch, head, row) or (head, total_q). Both may be null in a forward pass on the CPU, lse_low
  // in a backward pass.
  void *lse, *lse_low;
  Strides o_strides;

  // Backward only. dq, dk and dv are contiguous.
  const void *dout = nullptr, *dlse = nullptr;
  Strides do_strides;
  void *dq = nullptr, *dk = nullptr, *dv = nullptr;
  Strides dq_strides, dk_strides, dv_strides;

  Mask mask;

  // Added to the scores, in float, or double for kFloat64; null for none.
  const void* slopes = nullptr;    // (1 or num_seqs, heads)
  int64_t slopes_batch = 0;        // stride of a sequence: 0 or heads
  const void* decay = nullptr;     // (heads)
  const void* times = nullptr;     // (num_seqs, max_q) or packed (total_q), only with decay
  const void* relative = nullptr;  // (heads, 2 relative_reach + 1)
  int64_t relative_reach = 0;      // distances beyond it share an entry

  // Visibility: query i sees keys [lo, hi) as interval.h computes them.
  const int32_t *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;  // (num_seqs + 1), packed only
  const int32_t *q_lengths = nullptr, *kv_start = nullptr, *kv_end = nullptr;  // (num_seqs), dense
  // Query i sees only keys [lo_i, hi_i) of its sequence; (num_seqs, max_q) or packed (total_q).
  const int32_t *lo = nullptr, *hi = nullptr;

  // Dropout: a pair is dropped with probability dropout_threshold / 2^24.
  uint32_t dropout_threshold = 0;
  uint64_t seed = 0;
  const uint64_t* seed_at = nullptr;  // where it is instead, on a device
};

// Reductions of the weights p: clinattn/backends/call.py describes each
enum class Reduce : int64_t { kReceived, kGradient, kRelevance, kEntropy, kMax, kTopK };

// Beside the call, whose lse, lse_low and dout are read: the weights of queries, laid out as lse,
// null for ones, and the results. Sums over queries: values (num_seqs, heads, max_k) or (heads,
// total_k). Numbers by query: values as lse, for kTopK with `top` of them, and int64 places.
constexpr int64_t kMostTop = 16;

struct SummaryParams {
  Reduce reduce;
  int64_t top;
  const void* weights = nullptr;
  void* values = nullptr;
  int64_t* places = nullptr;

  CLINATTN_SHARED bool by_key() const { return reduce < Reduce::kEntropy; }
  CLINATTN_SHARED bool needs_dp() const {
    return reduce == Reduce::kGradient || reduce == Reduce::kRelevance;
  }
};

}  // namespace clinattn
