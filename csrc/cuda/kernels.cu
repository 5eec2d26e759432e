// The calls of kernels.h, by type; and what comes before gradients and sums by key.
#include "kernels.h"
#include "launch.cuh"
#include "prepare.cuh"

namespace clinattn {

int cuda_forward(const AttentionParams& p, int capability, void* stream) {
  switch (p.dtype) {
    case DType::kFloat32:
      return forward_float32(p, capability, stream);
    case DType::kBFloat16:
      return forward_bfloat16(p, capability, stream);
    default:
      return forward_float16(p, capability, stream);
  }
}

CudaSizes cuda_sizes(const AttentionParams& p, int capability) {
  switch (p.dtype) {
    case DType::kFloat32:
      return sizes_float32(p, capability);
    case DType::kBFloat16:
      return sizes_bfloat16(p, capability);
    default:
      return sizes_float16(p, capability);
  }
}

int cuda_backward(const AttentionParams& p, const CudaScratch& scratch, int capability,
                  void* stream) {
  const auto run = [&](auto prepare, auto... passes) {
    int error = prepare(p, scratch, stream);
    ((error = error ? error : passes(p, scratch, capability, stream)), ...);
    return error;
  };
  switch (p.dtype) {
    case DType::kFloat32:
      return run(launch_prepare<float>, dq_float32, dkdv_float32, added_float32);
    case DType::kBFloat16:
      return run(launch_prepare<bfloat16>, dq_bfloat16, dkdv_bfloat16, added_bfloat16);
    default:
      return run(launch_prepare<half>, dq_float16, dkdv_float16, added_float16);
  }
}

int cuda_summary(const AttentionParams& p, const SummaryParams& s, const CudaScratch& scratch,
                 int capability, void* stream) {
  if (scratch.lse2)
    if (const int error = launch_normalisers(p, s, scratch, stream)) return error;
  switch (p.dtype) {
    case DType::kFloat32:
      return summary_float32(p, s, scratch, capability, stream);
    case DType::kBFloat16:
      return summary_bfloat16(p, s, scratch, capability, stream);
    default:
      return summary_float16(p, s, scratch, capability, stream);
  }
}

const char* cuda_error(int error) { return error_words(error); }

}  // namespace clinattn
