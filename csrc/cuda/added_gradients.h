// The sums of blocks of which the gradients of masks, decay, slopes and relative biases are made.
#pragma once

#include "../call.h"
#include "kernels.h"

namespace clinattn {

class AddedGradients {
 public:
  // Memory for what `needs` asks for, which scratch gets to know
  AddedGradients(const BackwardArguments& b, const AttentionParams& p, const CudaSizes& sizes,
                 CudaScratch& scratch);

  // In the shapes of the arguments; empty where nobody wants them.
  Tensor mask() const;
  Tensor decay() const;
  Tensor slopes() const;
  Tensor relative() const;

 private:
  Tensor none() const { return empty({0}, b_.call.q.scalar_type(), b_.call.q); }
  Tensor by_tile(const Tensor& sums) const;
  Tensor slopes_of_packed(const Tensor& sums) const;

  const BackwardArguments& b_;
  const AttentionParams& p_;
  CudaSizes sizes_;
  OptionalTensor mask_, decay_, slopes_, near_, far_;
};

}  // namespace clinattn
