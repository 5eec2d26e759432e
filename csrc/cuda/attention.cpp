// The two passes and summaries on a CUDA device: checks that wait for no device, allocation,
// launches.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "../call.h"
#include "added_gradients.h"
#include "kernels.h"
#ifdef CLINATTN_EMULATED
#include "emulated_scope.h"
#else
#include "device_scope.h"
#endif

namespace clinattn {

namespace {

void check_launch(int error, const char* what) {
  CLINATTN_CHECK(error == 0, "the CUDA kernels of the ", what, ": ", cuda_error(error));
}

// Kernels take a scale above 0; a negative one belongs to q.
AttentionParams check(Arguments& a) {
  // Scores are -inf where hidden, and 0 * -inf is not.
  constexpr double kSmallestScale = std::numeric_limits<float>::min();
  if (a.scalars.scale < 0) a.q = call_torch("aten::neg", "", a.q);
  AttentionParams p = check_shapes(a);
  CLINATTN_CHECK(p.dtype != DType::kFloat64, "q is double; expected float, bfloat16 or half");
  p.scale = std::max(std::abs(p.scale), kSmallestScale);
  return p;
}

bool has_no_pairs(const Arguments& a, const AttentionParams& p) {
  return a.q.numel() == 0 || a.k.numel() == 0 || p.num_seqs == 0;
}

void attention_forward(StableIValue* values, uint64_t count, uint64_t) {
  Stack stack(values, count);
  Arguments a = stack.pop_arguments();
  const DeviceScope scope(a.q);
  AttentionParams p = check(a);
  const auto stat_sizes = stat_shape(p);
  const Tensor o = empty(output_shape(p, a.q), a.q.scalar_type(), a.q),
               lse = empty(stat_sizes, ScalarType::Float, a.q),
               lse_low = empty(stat_sizes, ScalarType::Float, a.q);
  if (has_no_pairs(a, p)) {
    zero(o);
    fill(lse, -std::numeric_limits<double>::infinity());
    zero(lse_low);
  } else {
    p.o = o.mutable_data_ptr();
    p.o_strides = strides_of(o);
    p.lse = lse.mutable_data_ptr();
    p.lse_low = lse_low.mutable_data_ptr();
    check_launch(cuda_forward(p, scope.capability(), scope.stream()), "forward pass");
  }
  stack.push({o, lse, lse_low});
}

// Gradients where there is no pair of a query and a key
void push_zeros(Stack& stack, const BackwardArguments& b) {
  const auto zeros_like = [](const Tensor& x) { return zeros(x.sizes(), x.scalar_type(), x); };
  const auto wanted = [&](int64_t bit, const OptionalTensor& x) {
    return b.needs & bit ? zeros_like(*x) : empty({0}, b.call.q.scalar_type(), b.call.q);
  };
  stack.push({zeros_like(b.call.q), zeros_like(b.call.k), zeros_like(b.call.v),
              wanted(kNeedMask, b.call.mask), wanted(kNeedDecay, b.call.decay),
              wanted(kNeedSlopes, b.call.slopes), wanted(kNeedRelative, b.call.relative)});
}

void attention_backward(StableIValue* values, uint64_t count, uint64_t) {
  Stack stack(values, count);
  BackwardArguments b = stack.pop_backward();
  const DeviceScope scope(b.call.q);
  AttentionParams p = check(b.call);
  check_needs(b.call, b.needs);
  const BackwardInputs inputs(p, b);
  if (has_no_pairs(b.call, p)) return push_zeros(stack, b);
  const auto [dq, dk, dv] = allocate_gradients(p, b.call);
  const auto stat = [&] { return empty(stat_shape(p), ScalarType::Float, b.call.q); };
  const Tensor lse2 = stat(), lse2_low = stat(), delta = stat();
  CudaScratch scratch = {static_cast<float*>(lse2.mutable_data_ptr()),
                         static_cast<float*>(lse2_low.mutable_data_ptr()),
                         static_cast<float*>(delta.mutable_data_ptr())};
  const AddedGradients added(b, p, cuda_sizes(p, scope.capability()), scratch);
  check_launch(cuda_backward(p, scratch, scope.capability(), scope.stream()), "backward pass");
  if (b.call.scalars.scale < 0) call_torch("aten::neg_", "", dq);
  if (b.call.scalars.scale == 0)
    zero(dq), zero(dk);  // what stands in for it leaves denormal numbers
  stack.push({dq, dk, dv, added.mask(), added.decay(), added.slopes(), added.relative()});
}

void attention_summary(StableIValue* values, uint64_t count, uint64_t) {
  Stack stack(values, count);
  SummaryArguments a = stack.pop_summary();
  const DeviceScope scope(a.call.q);
  AttentionParams p = check(a.call);
  SummaryParams s{};
  const SummaryInputs inputs(p, s, a);
  const auto [found, places] = allocate_summary(p, s, a.call.q);
  if (has_no_pairs(a.call, p)) return stack.push({found, places});
  CudaScratch scratch{};
  OptionalTensor lse2, lse2_low;
  if (s.by_key()) {
    const auto stat = [&](OptionalTensor& x) {
      x = empty(stat_shape(p), ScalarType::Float, a.call.q);
      return static_cast<float*>(x->mutable_data_ptr());
    };
    scratch.lse2 = stat(lse2);
    scratch.lse2_low = stat(lse2_low);
  }
  check_launch(cuda_summary(p, s, scratch, scope.capability(), scope.stream()), "summary");
  stack.push({found, places});
}

}  // namespace

}  // namespace clinattn

STABLE_TORCH_LIBRARY_IMPL(clinattn, CLINATTN_DISPATCH_KEY, m) {
  m.impl("cuda_forward", clinattn::attention_forward);
  m.impl("cuda_backward", clinattn::attention_backward);
  m.impl("cuda_summary", clinattn::attention_summary);
}
