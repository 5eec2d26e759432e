#include "added_gradients.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

namespace clinattn {

namespace {

using torch::stable::subtract;
using torch::stable::unsqueeze;

Tensor add(const Tensor& a, const Tensor& b) { return subtract(a, b, -1); }

Tensor summed(const Tensor& x, std::initializer_list<int64_t> dims, bool keep = false) {
  return torch::stable::sum(x, Sizes(dims), keep);
}

Tensor as(const Tensor& x, ScalarType type) { return torch::stable::to(x, type); }

// x[begin:end] of a dimension
Tensor slice(Tensor x, int64_t dim, int64_t begin, int64_t end) {
  return torch::stable::narrow(x, dim, begin, end - begin);
}

Tensor number(double value, const Tensor& like) {
  return torch::stable::full({1}, value, ScalarType::Double, std::nullopt, like.device());
}

// 1, 2, ..., n
Tensor numbers(int64_t n, const Tensor& like) {
  const Tensor ones = torch::stable::full({n}, 1, ScalarType::Double, std::nullopt, like.device());
  return call_torch("aten::cumsum", "", ones, int64_t{0}, std::optional<ScalarType>());
}

}  // namespace

AddedGradients::AddedGradients(const BackwardArguments& b, const AttentionParams& p,
                               const CudaSizes& sizes, CudaScratch& scratch)
    : b_(b), p_(p), sizes_(sizes) {
  // Blocks that have nothing to add leave the 0.
  const auto take = [&](OptionalTensor& sums, Sizes shape) {
    sums = zeros(shape, ScalarType::Float, b.call.q);
    return static_cast<float*>(sums->mutable_data_ptr());
  };
  if (b.needs & kNeedMask) {
    const Tensor& mask = *b.call.mask;
    scratch.dmask = take(mask_, mask.sizes());
    scratch.mask_batch = mask.size(0);
    scratch.mask_heads = mask.size(1);
    scratch.mask_queries = mask.size(2);
    scratch.mask_keys = mask.size(3);
  }
  if (b.needs & kNeedDecay) scratch.decay = take(decay_, {sizes.blocks});
  if (b.needs & kNeedSlopes) scratch.slopes = take(slopes_, {sizes.blocks});
  if (b.needs & kNeedRelative) {
    scratch.near_sums = take(near_, {sizes.shares, p.heads, sizes.diagonals, 2 * sizes.tile});
    scratch.far_sums = take(far_, {sizes.far_blocks, 2});
  }
}

// In double, (sequences, or 1 where packed, heads, tiles, ...)
Tensor AddedGradients::by_tile(const Tensor& sums) const {
  std::vector<int64_t> shape = {p_.cu_seqlens_q ? 1 : p_.num_seqs, p_.heads, -1};
  for (int64_t i = 1; i < sums.dim(); ++i) shape.push_back(sums.size(i));
  return torch::stable::view(as(sums, ScalarType::Double), shape);
}

Tensor AddedGradients::mask() const {
  return mask_ ? as(*mask_, b_.call.mask->scalar_type()) : none();
}

Tensor AddedGradients::decay() const {
  return decay_ ? as(summed(by_tile(*decay_), {0, 2}), ScalarType::Float) : none();
}

Tensor AddedGradients::slopes() const {
  if (!slopes_) return none();
  const Tensor sums = by_tile(*slopes_);
  if (b_.call.slopes->size(0) == 1)
    return as(unsqueeze(summed(sums, {0, 2}), 0), ScalarType::Float);
  return as(p_.cu_seqlens_q ? slopes_of_packed(sums) : summed(sums, {2}), ScalarType::Float);
}

// (sequences, heads) of sums (1, heads, tiles): sequence b has the tiles before
// cu[b + 1] / rows + b + 1, see Schedule.
Tensor AddedGradients::slopes_of_packed(const Tensor& sums) const {
  const Tensor one = number(1, sums), counted = numbers(p_.num_seqs, sums);
  const Tensor last_rows =
      as(slice(*b_.call.cu_seqlens_q, 0, 1, p_.num_seqs + 1), ScalarType::Double);
  const Tensor ends = add(call_torch("aten::floor_divide", "", last_rows,
                                     number(static_cast<double>(sizes_.rows), sums)),
                          counted);
  const Tensor tiles = subtract(numbers(sums.size(2), sums), one);
  const Tensor passed = call_torch("aten::le", "Tensor", unsqueeze(ends, 1), tiles);
  const Tensor owners = summed(as(passed, ScalarType::Double), {0});
  const Tensor owned =
      as(call_torch("aten::eq", "Tensor", owners, unsqueeze(subtract(counted, one), 1)),
         ScalarType::Double);
  const Tensor of_heads = torch::stable::select(sums, 0, 0);
  return torch::stable::matmul(owned, torch::stable::transpose(of_heads, 0, 1));
}

Tensor AddedGradients::relative() const {
  if (!near_) return none();
  const int64_t tile = sizes_.tile, length = sizes_.diagonals * tile,
                reach = std::min(p_.relative_reach, std::max(p_.max_q, p_.max_k));
  const Tensor close = summed(as(*near_, ScalarType::Double), {0});  // (heads, diagonals, 2 tile)
  const Tensor distant = summed(by_tile(*far_), {0, 2});             // (heads, 2)
  // By distance: a diagonal of tiles overlaps with the next one.
  const auto half = [&](int64_t begin) {
    return torch::stable::reshape(slice(close, 2, begin, begin + tile), {p_.heads, length});
  };
  const Tensor all =
      add(torch::stable::pad(half(0), {0, tile}), torch::stable::pad(half(tile), {tile, 0}));
  const int64_t zero = (sizes_.diagonals / 2) * tile + tile - 1;  // where no key is ahead
  if (reach == 0)
    return as(add(summed(all, {1}, true), summed(distant, {1}, true)), ScalarType::Float);
  const Tensor behind =
      add(summed(slice(all, 1, 0, zero - reach + 1), {1}, true), slice(distant, 1, 0, 1));
  const Tensor ahead =
      add(summed(slice(all, 1, zero + reach, length + tile), {1}, true), slice(distant, 1, 1, 2));
  const Tensor between = slice(all, 1, zero - reach + 1, zero + reach);
  const Tensor met =
      call_torch("aten::cat", "", std::vector<Tensor>{behind, between, ahead}, int64_t{1});
  const int64_t beyond = p_.relative_reach - reach;  // of entries that no pair has
  return as(torch::stable::pad(met, {beyond, beyond}), ScalarType::Float);
}

}  // namespace clinattn
