// From a call to the kernel that is compiled for it.
#pragma once

#include "kernels.h"
#include "queries.cuh"
#include "scores.cuh"

namespace clinattn {

inline bool differs_by_pair(const AttentionParams& p) {
  return p.mask.ptr || Scores::are_by_pair(p) || p.dropout_threshold;
}

template <int n>
struct Constant {
  static constexpr int value = n;
};

// f(head dim of the kernel, which is `dim` or more, whether pairs differ, whether the card is below
// 8.0), as types
template <class F>
int choose(const AttentionParams& p, int64_t dim, int capability, const F& f) {
  const auto by_card = [&](auto dim, auto pairs) {
    return capability < 80 ? f(dim, pairs, Constant<1>()) : f(dim, pairs, Constant<0>());
  };
  const auto by_pairs = [&](auto dim) {
    return differs_by_pair(p) ? by_card(dim, Constant<1>()) : by_card(dim, Constant<0>());
  };
  if (dim <= 64) return by_pairs(Constant<64>());
  return dim <= 128 ? by_pairs(Constant<128>()) : by_pairs(Constant<256>());
}
// For keys and values
template <class F>
int choose(const AttentionParams& p, int capability, const F& f) {
  return choose(p, max64(p.head_dim, p.value_dim), capability, f);
}

// One function for each pass and type, each compiled in a file of its own
#define CLINATTN_PASSES(name)                                                                      \
  int forward_##name(const AttentionParams& p, int capability, void* stream);                      \
  int dq_##name(const AttentionParams& p, const CudaScratch& scratch, int capability,              \
                void* stream);                                                                     \
  CudaSizes sizes_##name(const AttentionParams& p, int capability);                                \
  int added_##name(const AttentionParams& p, const CudaScratch& scratch, int capability,           \
                   void* stream);                                                                  \
  int dkdv_##name(const AttentionParams& p, const CudaScratch& scratch, int capability,            \
                  void* stream);                                                                   \
  int summary_##name(const AttentionParams& p, const SummaryParams& s, const CudaScratch& scratch, \
                     int capability, void* stream);
CLINATTN_PASSES(float32)
CLINATTN_PASSES(bfloat16)
CLINATTN_PASSES(float16)
#undef CLINATTN_PASSES

}  // namespace clinattn
