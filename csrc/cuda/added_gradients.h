// The sums of blocks of which the gradients of masks, decay, slopes and relative biases are made.
#pragma once

#include <ATen/ATen.h>

#include "../arguments.h"
#include "kernels.h"

namespace clinattn {

class AddedGradients {
 public:
  // Memory for what needs asks for, which scratch gets to know
  AddedGradients(const AttentionParams& p, const CudaSizes& sizes, const OptionalTensor& mask,
                 const at::TensorOptions& stat, int64_t needs, CudaScratch& scratch);

  const Tensor& mask() const { return mask_; }
  Tensor decay() const;  // (heads)
  // (1 or sequences, heads)
  Tensor slopes(bool by_sequence, const OptionalTensor& cu_seqlens) const;
  Tensor relative() const;  // (heads, 2 relative_reach + 1)

 private:
  Tensor by_tile(const Tensor& sums) const;

  const AttentionParams& p_;
  CudaSizes sizes_;
  Tensor mask_, decay_, slopes_, near_, far_;
};

}  // namespace clinattn
