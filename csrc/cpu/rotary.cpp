// The torch side of rotary positions: checks, allocation, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "../call.h"
#include "dispatch.h"

namespace clinattn {

namespace {

constexpr int64_t kGrain = 32768;  // elements that torch leaves to one thread

RotaryTensor tensor_of(const Tensor& x, const Tensor& y) {
  return {x.const_data_ptr(), y.mutable_data_ptr(), strides_of(x), strides_of(y), x.size(1)};
}

void check_rotary(const Tensor& q, const Tensor& k, const Tensor& positions,
                  const Tensor& frequencies) {
  CLINATTN_CHECK(q.dim() == 3 || q.dim() == 4, "q has rank ", q.dim(), "; expected 3 or 4");
  auto k_sizes = q.sizes().vec();
  k_sizes[1] = k.dim() > 1 ? k.size(1) : 0;
  check_layout(q, "q", q.sizes(), q);
  check_layout(k, "k", k_sizes, q);
  const bool packed = q.dim() == 3;
  const int64_t tokens = q.size(packed ? 0 : 2);
  const ScalarType type = stat_type(q);
  for (const auto& [name, x] : {std::pair{"positions", &positions}, {"frequencies", &frequencies}})
    CLINATTN_CHECK(x->is_cpu() && x->scalar_type() == type && x->is_contiguous(), name, " is ",
                   x->scalar_type(), " on ", x->device(), "; expected contiguous ", type,
                   " on cpu");
  const bool rows = !packed && positions.dim() == 2 && positions.size(0) == q.size(0);
  CLINATTN_CHECK((positions.dim() == 1 || rows) && positions.size(-1) == tokens,
                 "positions has shape ", positions.sizes(), "; expected one for each token of q, ",
                 q.sizes());
  CLINATTN_CHECK(frequencies.dim() == 1 && 2 * frequencies.size(0) <= q.size(-1),
                 "frequencies has shape ", frequencies.sizes(),
                 "; expected (pairs), at most half of ", q.size(-1));
}

std::tuple<Tensor, Tensor> cpu_rotary(const Tensor& q, const Tensor& k, const Tensor& positions,
                                      const Tensor& frequencies, bool interleaved, bool inverse) {
  check_rotary(q, k, positions, frequencies);
  const bool packed = q.dim() == 3;
  const Tensor q_out = torch::stable::empty_like(q), k_out = torch::stable::empty_like(k);
  RotaryParams p{};
  p.dtype = dtype_of(q, "q");
  p.batch = packed ? 1 : q.size(0);
  p.tokens = q.size(packed ? 0 : 2);
  p.head_dim = q.size(-1);
  p.pairs = frequencies.size(0);
  p.positions = positions.const_data_ptr();
  p.positions_batch = positions.dim() == 2 ? p.tokens : 0;
  p.frequencies = frequencies.const_data_ptr();
  p.interleaved = interleaved;
  p.inverse = inverse;
  p.q = tensor_of(q, q_out);
  p.k = tensor_of(k, k_out);
  const CpuKernels& kernels = cpu_kernels(p.dtype);
  const int64_t blocks = (p.tokens + kRotaryTokens - 1) / kRotaryTokens;
  const int64_t elements = kRotaryTokens * p.head_dim * (p.q.heads + p.k.heads);
  const int64_t grain = std::max<int64_t>(1, kGrain / (elements + 1));
  torch::stable::parallel_for(0, p.batch * blocks, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(RotaryParams::scratch(p.pairs));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = i % blocks * kRotaryTokens;
      kernels.rotary(p, i / blocks, token, std::min(token + kRotaryTokens, p.tokens),
                     scratch.data());
    }
  });
  return {q_out, k_out};
}

}  // namespace

}  // namespace clinattn

STABLE_TORCH_LIBRARY_IMPL(clinattn, CPU, m) {
  m.impl("cpu_rotary", TORCH_BOX(&clinattn::cpu_rotary));
}
