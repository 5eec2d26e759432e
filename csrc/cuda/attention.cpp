// The torch side of the CUDA kernels: checks that wait for no device, allocation, launches.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "../arguments.h"
#include "added_gradients.h"
#include "kernels.h"
#ifdef CLINATTN_EMULATED
#include "emulated_scope.h"
#else
#include "device_scope.h"
#endif

namespace clinattn {

namespace {

void check_launch(int error, const char* pass) {
  TORCH_CHECK(error == 0, "the CUDA kernels of the ", pass, " pass: ", cuda_error(error));
}

// Kernels take a scale above 0; a negative one belongs to q.
Tensor with_sign(const Tensor& q, double scale) { return scale < 0 ? q.neg() : q; }

AttentionParams check(const Arguments& a) {
  // Scores are -inf where hidden, and 0 * -inf is not.
  constexpr double kSmallestScale = std::numeric_limits<float>::min();
  AttentionParams p = check_shapes(a);
  TORCH_CHECK(p.dtype != DType::kFloat64, "q is double; expected float, bfloat16 or half");
  p.scale = std::max(std::abs(a.scale), kSmallestScale);
  return p;
}

std::tuple<Tensor, Tensor, Tensor> attention_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& q_lengths, const OptionalTensor& kv_start, const OptionalTensor& kv_end,
    const OptionalTensor& lo, const OptionalTensor& hi, const OptionalTensor& times,
    const OptionalTensor& decay, const OptionalTensor& slopes, const OptionalTensor& relative,
    const OptionalTensor& seed, double scale, int64_t window_left, int64_t window_right,
    bool bottom_right, int64_t /*max_seqlen_q*/, int64_t /*max_seqlen_k*/, double softcap,
    int64_t global_prefix, double dropout_p) {
  const DeviceScope scope(q);
  const Tensor signed_q = with_sign(q, scale);
  AttentionParams p =
      check({signed_q,      k,        v,     mask,        cu_seqlens_q, cu_seqlens_k, q_lengths,
             kv_start,      kv_end,   lo,    hi,          times,        decay,        slopes,
             relative,      seed,     scale, window_left, window_right, bottom_right, softcap,
             global_prefix, dropout_p});
  const auto stat = q.options().dtype(at::kFloat);
  const auto stat_sizes = stat_shape(p);
  Tensor o = allocate(q.sizes(), q.options());
  Tensor lse = allocate(stat_sizes, stat), lse_low = allocate(stat_sizes, stat);
  if (q.numel() == 0 || k.numel() == 0 || p.num_seqs == 0)
    return {o.zero_(), lse.fill_(-std::numeric_limits<float>::infinity()), lse_low.zero_()};
  p.o = o.mutable_data_ptr();
  p.o_strides = strides_of(o);
  p.lse = lse.mutable_data_ptr();
  p.lse_low = lse_low.mutable_data_ptr();
  check_launch(cuda_forward(p, scope.capability(), scope.stream()), "forward");
  return {o, lse, lse_low};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients attention_backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& o,
                             const Tensor& lse, const OptionalTensor& lse_low, const Tensor& q,
                             const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                             const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                             const OptionalTensor& q_lengths, const OptionalTensor& kv_start,
                             const OptionalTensor& kv_end, const OptionalTensor& lo,
                             const OptionalTensor& hi, const OptionalTensor& times,
                             const OptionalTensor& decay, const OptionalTensor& slopes,
                             const OptionalTensor& relative, const OptionalTensor& seed,
                             double scale, int64_t window_left, int64_t window_right,
                             bool bottom_right, int64_t max_seqlen_q, int64_t max_seqlen_k,
                             double softcap, int64_t global_prefix, double dropout_p,
                             int64_t needs) {
  const DeviceScope scope(q);
  const Tensor signed_q = with_sign(q, scale);
  const Arguments arguments{
      signed_q,      k,        v,     mask,        cu_seqlens_q, cu_seqlens_k, q_lengths,
      kv_start,      kv_end,   lo,    hi,          times,        decay,        slopes,
      relative,      seed,     scale, window_left, window_right, bottom_right, softcap,
      global_prefix, dropout_p};
  AttentionParams p = check(arguments);
  check_needs(arguments, needs);
  const BackwardInputs inputs(p, q, dout, dlse, o, lse, lse_low);
  const auto [dq, dk, dv] = allocate_gradients(p, q, k);
  const Tensor none = at::empty({0}, q.options());
  if (q.numel() == 0 || k.numel() == 0 || p.num_seqs == 0)
    return {dq.zero_(),
            dk.zero_(),
            dv.zero_(),
            needs & kNeedMask ? at::zeros_like(*mask, at::MemoryFormat::Contiguous) : none,
            needs & kNeedDecay ? at::zeros_like(*decay) : none,
            needs & kNeedSlopes ? at::zeros_like(*slopes) : none,
            needs & kNeedRelative ? at::zeros_like(*relative) : none};
  const auto stat = q.options().dtype(at::kFloat);
  const auto stat_sizes = stat_shape(p);
  const Tensor lse2 = allocate(stat_sizes, stat), lse2_low = allocate(stat_sizes, stat),
               delta = allocate(stat_sizes, stat);
  CudaScratch scratch = {lse2.mutable_data_ptr<float>(), lse2_low.mutable_data_ptr<float>(),
                         delta.mutable_data_ptr<float>()};
  const AddedGradients added(p, cuda_sizes(p, scope.capability()), mask, stat, needs, scratch);
  check_launch(cuda_backward(p, scratch, scope.capability(), scope.stream()), "backward");
  if (scale < 0) dq.neg_();
  if (scale == 0) dq.zero_(), dk.zero_();  // what stands in for it leaves denormal numbers
  return {dq,
          dk,
          dv,
          needs & kNeedMask ? added.mask().to(mask->scalar_type()) : none,
          needs & kNeedDecay ? added.decay() : none,
          needs & kNeedSlopes ? added.slopes(slopes->size(0) > 1, cu_seqlens_q) : none,
          needs & kNeedRelative ? added.relative() : none};
}

}  // namespace

}  // namespace clinattn

TORCH_LIBRARY_IMPL(clinattn, CLINATTN_DISPATCH_KEY, m) {
  m.impl("cuda_forward", clinattn::attention_forward);
  m.impl("cuda_backward", clinattn::attention_backward);
}
