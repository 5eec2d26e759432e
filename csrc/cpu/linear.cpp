// The torch side of products of fp32 matrices: checks, allocation, threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "arguments.h"
#include "dispatch.h"

namespace clinattn {

namespace {

constexpr int64_t kPackBytes = 24 << 20;  // what the C library hands out again: below its 32 MiB

Matrix matrix_of(const Tensor& x, const char* name) {
  TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == at::kFloat && x.dim() == 2, name, " is ",
              x.scalar_type(), " of shape ", x.sizes(), " on ", x.device(),
              "; expected a matrix of Float on cpu");
  TORCH_CHECK(x.stride(1) == 1 || x.stride(0) == 1, name, " has strides ", x.strides(),
              "; expected one of them to be 1");
  return {x.const_data_ptr<float>(), x.size(0), x.stride(0), x.stride(1)};
}

Tensor cpu_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  LinearParams p{matrix_of(x, "x"), matrix_of(weight, "weight"), x.size(1), nullptr, nullptr};
  TORCH_CHECK(weight.size(1) == p.depth, "weight has shape ", weight.sizes(), "; expected (*, ",
              p.depth, ") for x ", x.sizes());
  if (bias) {
    TORCH_CHECK(bias->scalar_type() == at::kFloat && bias->dim() == 1 && bias->is_contiguous() &&
                    bias->size(0) == p.b.rows,
                "bias has shape ", bias->sizes(), "; expected a contiguous (", p.b.rows,
                ") of Float");
    p.bias = bias->const_data_ptr<float>();
  }
  const LinearKernels* kernels = cpu_kernels(DType::kFloat32).linear;
  TORCH_CHECK(kernels, "the instruction set in force is ", instruction_set(), "; expected amx");
  Tensor y = at::empty({p.a.rows, p.b.rows}, x.options());
  p.y = y.mutable_data_ptr<float>();
  if (y.numel() == 0 || p.depth == 0) return bias ? y.copy_(*bias) : y.zero_();
  const int64_t threads = at::get_num_threads();
  const int64_t depth = std::min(p.depth, kernels->depth);
  const int64_t most = std::max<int64_t>(kPackBytes / kernels->packed_size(32, depth), 1) * 32;
  const int64_t columns = std::min(p.b.rows, most);
  // Panels of rows, alike for all threads; where there are fewer than threads, split by columns.
  const int64_t rounds = at::divup(p.a.rows, kernels->rows * threads);
  const int64_t rows = at::divup(at::divup(p.a.rows, rounds * threads), 32) * 32;
  const int64_t panels = at::divup(p.a.rows, rows), splits = at::divup(threads, panels);
  const auto bytes = x.options().dtype(at::kByte);
  Tensor packed = at::empty({static_cast<int64_t>(kernels->packed_size(columns, depth))}, bytes);
  LinearShared shared{packed.mutable_data_ptr(), 0};
  for (int64_t k = 0; k < p.depth; k += depth) {
    const int64_t k1 = std::min(k + depth, p.depth);
    for (int64_t c = 0; c < p.b.rows; c += columns) {
      const int64_t c1 = std::min(c + columns, p.b.rows);
      shared.column0 = c;
      at::parallel_for(0, at::divup(c1 - c, 32), 1, [&](int64_t begin, int64_t end) {
        kernels->pack(p, shared, {0, 0, c + 32 * begin, std::min(c + 32 * end, c1), k, k1});
      });
      const int64_t width = at::divup(at::divup(c1 - c, splits), 32) * 32;
      at::parallel_for(0, panels * splits, 1, [&](int64_t begin, int64_t end) {
        Tensor scratch =
            at::empty({static_cast<int64_t>(kernels->packed_size(rows, k1 - k))}, bytes);
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

TORCH_LIBRARY_IMPL(clinattn, CPU, m) { m.impl("cpu_linear", clinattn::cpu_linear); }
