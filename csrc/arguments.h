// The op's arguments as the plain pointers that kernels take, with the checks that read no values:
// on any device, and without waiting for it.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <vector>

#include "attention.h"

namespace clinattn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The arguments that both passes share, as the op's schema orders them.
struct Arguments {
  const Tensor &q, &k, &v;
  const OptionalTensor &mask, &cu_seqlens_q, &cu_seqlens_k, &q_lengths, &kv_start, &kv_end;
  const OptionalTensor &lo, &hi, &times, &decay, &slopes, &relative, &seed;
  double scale;
  int64_t window_left, window_right;
  bool bottom_right;
  double softcap;
  int64_t global_prefix;
  double dropout_p;
};

// Bits of the backward op's `needs`
enum Needs : int64_t { kNeedMask = 1, kNeedDecay = 2, kNeedSlopes = 4, kNeedRelative = 8 };

// Throws c10::Error, which names the argument, what it is and what was expected. max_q and max_k of
// the packed layout are the totals, and the seed stays where it is, in seed_at.
AttentionParams check_shapes(const Arguments& a);
DType dtype_of(const Tensor& t, const char* name);
// That what needs asks for was given.
void check_needs(const Arguments& a, int64_t needs);
void check_layout(const Tensor& t, const char* name, at::IntArrayRef sizes, const Tensor& like);

// Of dense (B, H, N, D) or packed (T, H, D)
Strides strides_of(const Tensor& t);

// lse, and what is laid out like it
std::vector<int64_t> stat_shape(const AttentionParams& p);
at::ScalarType stat_type(const Tensor& q);
// What the backward pass gets besides, checked, and p pointed to it; holds the copies that took.
class BackwardInputs {
 public:
  BackwardInputs(AttentionParams& p, const Tensor& q, const Tensor& dout,
                 const OptionalTensor& dlse, const Tensor& o, const Tensor& lse,
                 const OptionalTensor& lse_low);

 private:
  Tensor lse_, lse_low_, dlse_;
};
// Unwritten and contiguous dq, dk and dv, and p pointed to them.
std::array<Tensor, 3> allocate_gradients(AttentionParams& p, const Tensor& q, const Tensor& k);

// Unwritten; full of NaN where CLINATTN_POISON_OUTPUTS looks for elements that nothing wrote.
Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options);
bool poison();

}  // namespace clinattn
