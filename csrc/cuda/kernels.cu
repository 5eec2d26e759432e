// The calls of kernels.h, by type; and what comes before the gradients.
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

namespace {

template <class T, class Gradients>
int backward(const AttentionParams& p, const CudaScratch& scratch, int capability, void* stream,
             Gradients dq, Gradients dkdv) {
  int error = launch_prepare<T>(p, scratch, stream);
  if (!error) error = dq(p, scratch, capability, stream);
  if (!error) error = dkdv(p, scratch, capability, stream);
  return error;
}

}  // namespace

int cuda_backward(const AttentionParams& p, const CudaScratch& scratch, int capability,
                  void* stream) {
  switch (p.dtype) {
    case DType::kFloat32:
      return backward<float>(p, scratch, capability, stream, dq_float32, dkdv_float32);
    case DType::kBFloat16:
      return backward<bfloat16>(p, scratch, capability, stream, dq_bfloat16, dkdv_bfloat16);
    default:
      return backward<half>(p, scratch, capability, stream, dq_float16, dkdv_float16);
  }
}

const char* cuda_error(int error) { return error_words(error); }

}  // namespace clinattn
