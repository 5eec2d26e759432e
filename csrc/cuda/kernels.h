// What the .cu files offer: one attention call on a stream of the current device. No torch.
#pragma once

#include "../attention.h"

namespace clinattn {

// Scratch of the backward pass, laid out like lse
struct CudaScratch {
  float *lse2, *lse2_low, *delta;
};

// All pointers of p, and the seed, are on the device; p.scale is positive. capability: 75, 80, ...
// Each returns a cudaError_t, 0 for success; cuda_error says it in words.
int cuda_forward(const AttentionParams& p, int capability, void* stream);
int cuda_backward(const AttentionParams& p, const CudaScratch& scratch, int capability,
                  void* stream);
const char* cuda_error(int error);

}  // namespace clinattn
