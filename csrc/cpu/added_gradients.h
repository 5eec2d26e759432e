// The memory in which a backward call sums gradients of what was added to scores, and the tensors
// that come of it. The order of all additions is fixed.
#pragma once

#include <atomic>
#include <vector>

#include "call.h"
#include "isa.h"

namespace clinattn {

class AddedGradientSums {
 public:
  // needs: bits of Needs
  AddedGradientSums(const Arguments& a, const AttentionParams& p, int64_t needs);

  const AddedSums& sums() const { return sums_; }
  // True where sequences add to the same mask gradient, and so must not run side by side.
  bool one_by_one() const { return sums_.mask && sums_.mask_strides.batch == 0; }

  // Gradients in the types and shapes of the arguments; empty where not asked for.
  Tensor mask() const;
  Tensor decay() const;
  Tensor slopes() const;
  Tensor relative() const;

 private:
  // Returns part(sequence, head), each (n), summed in order to (num_seqs or 1, heads or 1, n), in
  // the shape and type of `like`.
  template <class PartOf>
  Tensor reduced(const PartOf& part, int64_t n, bool by_sequence, bool by_head,
                 const Tensor& like) const;
  Tensor of_heads(int64_t first, int64_t n, const Tensor& like, bool by_sequence) const;
  const double* of_head(int64_t sequence, int64_t head) const;
  Tensor none() const { return empty({0}, a_.q.scalar_type(), a_.q); }

  const Arguments& a_;
  const AttentionParams& p_;
  const int64_t needs_;
  AddedSums sums_;
  OptionalTensor heads_, columns_, mask_;
  std::vector<int64_t> starts_;
  std::vector<std::atomic<int32_t>> turns_;
};

}  // namespace clinattn
