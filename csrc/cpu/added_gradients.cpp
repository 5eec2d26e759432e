#include "added_gradients.h"

#include <algorithm>

#include "../relative.h"

namespace clinattn {

namespace {

// Of a mask (batch, heads, queries, keys): what it does not vary with has size 1.
bool by_sequence(const Tensor& mask) { return mask.size(0) > 1; }
bool by_head(const Tensor& mask) { return mask.size(1) > 1; }

// Sums of a head of a sequence, and where they belong
struct Part {
  const double* sums;
  Span entries;
};

}  // namespace

AddedGradientSums::AddedGradientSums(const Arguments& a, const AttentionParams& p, int64_t needs)
    : a_(a), p_(p), needs_(needs) {
  if (!needs) return;
  const auto take = [&](int64_t n) {
    const int64_t at = sums_.length;
    sums_.length += n;
    return at;
  };
  if (needs & kNeedSlopes) sums_.slope = take(1);
  if (needs & kNeedDecay) sums_.decay = take(1);
  if (needs & kNeedMask) {
    const bool by_query = a.mask->size(2) > 1, by_key = a.mask->size(3) > 1;
    if (by_query && by_key) {
      mask_ = zeros(a.mask->sizes(), stat_type(a.q), a.q);
      sums_.mask = mask_->mutable_data_ptr();
      sums_.mask_strides = {by_sequence(*mask_) ? mask_->stride(0) : 0,
                            by_head(*mask_) ? mask_->stride(1) : 0, mask_->stride(2)};
    } else if (by_key) {
      columns_ = zeros({p.num_seqs, p.heads, p.max_k}, ScalarType::Double, a.q);
      sums_.columns = static_cast<double*>(columns_->mutable_data_ptr());
    } else {
      sums_.rows = take(by_query ? p.max_q : 1);
      sums_.row_stride = by_query;
    }
  }
  if (needs & kNeedRelative) sums_.relative = sums_.length;
  starts_.push_back(0);
  const int64_t shared = sums_.length;
  for (int64_t b = 0; b < p.num_seqs; ++b) {
    const Span entries = relative_entries(p, Sequence(p, b));
    const int64_t length = shared + (needs & kNeedRelative ? entries.hi - entries.lo : 0);
    starts_.push_back(starts_.back() + p.heads * length);
    sums_.length = std::max(sums_.length, length);
  }
  sums_.starts = starts_.data();
  sums_.wanted = sums_.length > 0 || sums_.columns || sums_.mask;
  if (sums_.length == 0) return;
  heads_ = zeros({starts_.back()}, ScalarType::Double, a.q);
  sums_.heads = static_cast<double*>(heads_->mutable_data_ptr());
  turns_ = std::vector<std::atomic<int32_t>>(p.num_seqs * p.heads);
  sums_.turns = turns_.data();
}

template <class PartOf>
Tensor AddedGradientSums::reduced(const PartOf& part, int64_t n, bool each_sequence, bool each_head,
                                  const Tensor& like) const {
  const Tensor total = zeros(like.sizes(), ScalarType::Double, like);
  double* to = static_cast<double*>(total.mutable_data_ptr());
  for (int64_t b = 0; b < p_.num_seqs; ++b)
    for (int64_t h = 0; h < p_.heads; ++h) {
      const auto [x, entries] = part(b, h);
      const int64_t row =
          (each_sequence ? b : 0) * (each_head ? p_.heads : 1) + (each_head ? h : 0);
      double* y = to + row * n;
      for (int64_t i = entries.lo; i < entries.hi; ++i) y[i] += x[i - entries.lo];
    }
  return torch::stable::to(total, like.scalar_type());
}

const double* AddedGradientSums::of_head(int64_t sequence, int64_t head) const {
  const int64_t first = starts_[sequence], length = (starts_[sequence + 1] - first) / p_.heads;
  return sums_.heads + first + head * length;
}

Tensor AddedGradientSums::of_heads(int64_t first, int64_t n, const Tensor& like,
                                   bool each_sequence) const {
  const auto part = [&](int64_t b, int64_t h) {
    const Span all{0, n};
    return Part{of_head(b, h) + first,
                first == sums_.relative ? relative_entries(p_, Sequence(p_, b)) : all};
  };
  return reduced(part, n, each_sequence, true, like);
}

Tensor AddedGradientSums::mask() const {
  if (!(needs_ & kNeedMask)) return none();
  const Tensor& mask = *a_.mask;
  if (mask_) return torch::stable::to(*mask_, mask.scalar_type());
  const int64_t n = columns_ ? p_.max_k : sums_.row_stride ? p_.max_q : 1;
  const auto part = [&](int64_t b, int64_t h) {
    return Part{columns_ ? sums_.columns + (b * p_.heads + h) * n : of_head(b, h) + sums_.rows,
                {0, n}};
  };
  return reduced(part, n, by_sequence(mask), by_head(mask), mask);
}

Tensor AddedGradientSums::decay() const {
  return needs_ & kNeedDecay ? of_heads(sums_.decay, 1, *a_.decay, false) : none();
}

Tensor AddedGradientSums::slopes() const {
  return needs_ & kNeedSlopes ? of_heads(sums_.slope, 1, *a_.slopes, p_.slopes_batch != 0) : none();
}

Tensor AddedGradientSums::relative() const {
  if (!(needs_ & kNeedRelative)) return none();
  return of_heads(sums_.relative, 2 * p_.relative_reach + 1, *a_.relative, false);
}

}  // namespace clinattn
