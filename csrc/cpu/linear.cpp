// The torch side of products of fp32 matrices: checks, allocation, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../interval.h"
#include "../tensor.h"
#include "dispatch.h"

namespace clinattn {

namespace {

constexpr int64_t kPackBytes = 24 << 20;  // what the C library hands out again: below its 32 MiB

Matrix matrix_of(const Tensor& x, const char* name) {
  CLINATTN_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.dim() == 2, name, " is ",
                 x.scalar_type(), " of shape ", x.sizes(), " on ", x.device(),
                 "; expected a matrix of Float on cpu");
  CLINATTN_CHECK(x.stride(1) == 1 || x.stride(0) == 1, name, " has strides ", x.strides(),
                 "; expected one of them to be 1");
  return {static_cast<const float*>(x.const_data_ptr()), x.size(0), x.stride(0), x.stride(1)};
}

Tensor cpu_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  LinearParams p{matrix_of(x, "x"), matrix_of(weight, "weight"), x.size(1), nullptr, nullptr};
  CLINATTN_CHECK(weight.size(1) == p.depth, "weight has shape ", weight.sizes(), "; expected (*, ",
                 p.depth, ") for x ", x.sizes());
  if (bias) {
    CLINATTN_CHECK(bias->scalar_type() == ScalarType::Float && bias->dim() == 1 &&
                       bias->is_contiguous() && bias->size(0) == p.b.rows,
                   "bias has shape ", bias->sizes(), "; expected a contiguous (", p.b.rows,
                   ") of Float");
    p.bias = static_cast<const float*>(bias->const_data_ptr());
  }
  const LinearKernels* kernels = cpu_kernels(DType::kFloat32).linear;
  CLINATTN_CHECK(kernels, "the instruction set in force is ", instruction_set(), "; expected amx");
  Tensor y = empty({p.a.rows, p.b.rows}, ScalarType::Float, x);
  p.y = static_cast<float*>(y.mutable_data_ptr());
  if (y.numel() == 0 || p.depth == 0) {
    if (bias) return torch::stable::copy_(y, *bias);
    zero(y);
    return y;
  }
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t depth = std::min(p.depth, kernels->depth);
  const int64_t most = std::max<int64_t>(kPackBytes / kernels->packed_size(32, depth), 1) * 32;
  const int64_t columns = std::min(p.b.rows, most);
  // Panels of rows, alike for all threads; where there are fewer than threads, split by columns.
  const int64_t rounds = ceil_div(p.a.rows, kernels->rows * threads);
  const int64_t rows = ceil_div(ceil_div(p.a.rows, rounds * threads), 32) * 32;
  const int64_t panels = ceil_div(p.a.rows, rows), splits = ceil_div(threads, panels);
  const auto room = [&](int64_t of_rows, int64_t of_depth) {
    const auto bytes = static_cast<int64_t>(kernels->packed_size(of_rows, of_depth));
    return empty({bytes}, ScalarType::Byte, x);
  };
  const Tensor packed = room(columns, depth);
  LinearShared shared{packed.mutable_data_ptr(), 0};
  for (int64_t k = 0; k < p.depth; k += depth) {
    const int64_t k1 = std::min(k + depth, p.depth);
    for (int64_t c = 0; c < p.b.rows; c += columns) {
      const int64_t c1 = std::min(c + columns, p.b.rows);
      shared.column0 = c;
      torch::stable::parallel_for(0, ceil_div(c1 - c, 32), 1, [&](int64_t begin, int64_t end) {
        kernels->pack(p, shared, {0, 0, c + 32 * begin, std::min(c + 32 * end, c1), k, k1});
      });
      const int64_t width = ceil_div(ceil_div(c1 - c, splits), 32) * 32;
      torch::stable::parallel_for(0, panels * splits, 1, [&](int64_t begin, int64_t end) {
        const Tensor scratch = room(rows, k1 - k);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t row = i / splits * rows, column = c + i % splits * width;
          if (column < c1)
            kernels->multiply(
                p, shared,
                {row, std::min(row + rows, p.a.rows), column, std::min(column + width, c1), k, k1},
                scratch.mutable_data_ptr());
        }
      });
    }
  }
  return y;
}

}  // namespace

}  // namespace clinattn

STABLE_TORCH_LIBRARY_IMPL(clinattn, CPU, m) {
  m.impl("cpu_linear", TORCH_BOX(&clinattn::cpu_linear));
}
