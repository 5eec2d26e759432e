// The functions of the .cu files: one attention call on a stream of the current device. No torch.
#pragma once

#include "../attention.h"

namespace clinattn {

// Memory of the backward pass, fp32; null for sums that are not asked for. Sums by key of a summary
// have lse2 and lse2_low, and no more.
struct CudaScratch {
  float *lse2, *lse2_low, *delta;             // laid out like lse; prepare.cuh says what they are
  float *decay = nullptr, *slopes = nullptr;  // partial sums, by head and tile of dq
  float* dmask = nullptr;  // contiguous, of the shape that follows; a side that is shared has 1
  int64_t mask_batch = 0, mask_heads = 0, mask_queries = 0, mask_keys = 0;
  float *near_sums = nullptr, *far_sums = nullptr;  // partial sums of relative biases
};

// The sizes of the partial sums. A tile of dq has `rows` queries; tiles of a head are neighbours.
// near_sums: (shares, heads, diagonals, 2 tile); far_sums: (far_blocks, 2). added.cuh says what
// near_sums and far_sums hold.
struct CudaSizes {
  int64_t rows, blocks, tile, diagonals, shares, far_blocks;
};
CudaSizes cuda_sizes(const AttentionParams& p, int capability);

// All pointers of p, and the seed, are on the device; p.scale is positive. capability: 75, 80, ...
// Each returns a cudaError_t, 0 for success; cuda_error says it in words.
int cuda_forward(const AttentionParams& p, int capability, void* stream);
int cuda_backward(const AttentionParams& p, const CudaScratch& scratch, int capability,
                  void* stream);
int cuda_summary(const AttentionParams& p, const SummaryParams& s, const CudaScratch& scratch,
                 int capability, void* stream);
const char* cuda_error(int error);

}  // namespace clinattn
