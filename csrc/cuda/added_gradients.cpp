#include "added_gradients.h"

#include <algorithm>
#include <vector>

namespace clinattn {

AddedGradients::AddedGradients(const AttentionParams& p, const CudaSizes& sizes,
                               const OptionalTensor& mask, const at::TensorOptions& stat,
                               int64_t needs, CudaScratch& scratch)
    : p_(p), sizes_(sizes) {
  // Blocks that have nothing to add leave the 0.
  const auto take = [&](Tensor& sums, at::IntArrayRef shape) {
    sums = at::zeros(shape, stat);
    return sums.mutable_data_ptr<float>();
  };
  if (needs & kNeedMask) {
    scratch.dmask = take(mask_, mask->sizes());
    scratch.mask_batch = mask->size(0);
    scratch.mask_heads = mask->size(1);
    scratch.mask_queries = mask->size(2);
    scratch.mask_keys = mask->size(3);
  }
  if (needs & kNeedDecay) scratch.decay = take(decay_, {sizes.blocks});
  if (needs & kNeedSlopes) scratch.slopes = take(slopes_, {sizes.blocks});
  if (needs & kNeedRelative) {
    scratch.near_sums = take(near_, {sizes.shares, p.heads, sizes.diagonals, 2 * sizes.tile});
    scratch.far_sums = take(far_, {sizes.far_blocks, 2});
  }
}

// In double, (sequences, or 1 where packed, heads, tiles, ...)
Tensor AddedGradients::by_tile(const Tensor& sums) const {
  std::vector<int64_t> shape = {p_.cu_seqlens_q ? 1 : p_.num_seqs, p_.heads, -1};
  for (int64_t i = 1; i < sums.dim(); ++i) shape.push_back(sums.size(i));
  return sums.to(at::kDouble).view(shape);
}

Tensor AddedGradients::decay() const {
  return by_tile(decay_).sum(at::IntArrayRef{0, 2}).to(at::kFloat);
}

Tensor AddedGradients::slopes(bool by_sequence, const OptionalTensor& cu_seqlens) const {
  const Tensor sums = by_tile(slopes_);
  if (!by_sequence) return sums.sum(at::IntArrayRef{0, 2}).unsqueeze(0).to(at::kFloat);
  if (!cu_seqlens) return sums.sum(2).to(at::kFloat);
  // Sequence b has the tiles before cu[b + 1] / rows + b + 1, see Schedule.
  const Tensor sequences = at::arange(p_.num_seqs, cu_seqlens->options().dtype(at::kLong));
  const Tensor ends = cu_seqlens->slice(0, 1).floor_divide(sizes_.rows) + sequences + 1;
  const Tensor tiles = at::arange(sums.size(2), sequences.options());
  const Tensor owners = (ends.unsqueeze(1) <= tiles).sum(0);
  const Tensor owned = (owners == sequences.unsqueeze(1)).to(at::kDouble);  // (sequences, tiles)
  return owned.matmul(sums[0].t()).to(at::kFloat);
}

Tensor AddedGradients::relative() const {
  const int64_t tile = sizes_.tile, length = sizes_.diagonals * tile,
                reach = std::min(p_.relative_reach, std::max(p_.max_q, p_.max_k));
  const Tensor close = near_.to(at::kDouble).sum(0);                // (heads, diagonals, 2 tile)
  const Tensor distant = by_tile(far_).sum(at::IntArrayRef{0, 2});  // (heads, 2)
  // By distance: a diagonal of tiles overlaps with the next one.
  Tensor all = at::zeros({p_.heads, length + tile}, close.options());
  all.slice(1, 0, length) += close.slice(2, 0, tile).reshape({p_.heads, length});
  all.slice(1, tile) += close.slice(2, tile).reshape({p_.heads, length});
  const int64_t zero = (sizes_.diagonals / 2) * tile + tile - 1;  // where no key is ahead
  if (reach == 0) return (all.sum(1, true) + distant.sum(1, true)).to(at::kFloat);
  const Tensor behind = all.slice(1, 0, zero - reach + 1).sum(1, true) + distant.slice(1, 0, 1),
               ahead = all.slice(1, zero + reach).sum(1, true) + distant.slice(1, 1, 2);
  const Tensor met = at::cat({behind, all.slice(1, zero - reach + 1, zero + reach), ahead}, 1);
  const int64_t beyond = p_.relative_reach - reach;  // of entries that no pair has
  return at::constant_pad_nd(met, {beyond, beyond}).to(at::kFloat);
}

}  // namespace clinattn
