// The torch side of linear layers: checks, allocation, and the order of what threads do.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "../interval.h"
#include "../tensor.h"
#include "dispatch.h"

namespace clinattn {

namespace {

constexpr int64_t kPackBytes = 24 << 20;  // what the C library hands out again: below its 32 MiB
constexpr int64_t kLeastRows = 48;        // of a panel that reads all strips

DType dtype_of(const Tensor& x, const char* name) {
  const ScalarType type = x.scalar_type();
  CLINATTN_CHECK(x.is_cpu() && (type == ScalarType::Float || type == ScalarType::BFloat16), name,
                 " is ", type, " on ", x.device(), "; expected Float or BFloat16 on cpu");
  return type == ScalarType::Float ? DType::kFloat32 : DType::kBFloat16;
}

Matrix matrix_of(const Tensor& x, const char* name) {
  CLINATTN_CHECK(x.dim() == 2 && (x.stride(1) == 1 || x.stride(0) == 1), name, " has shape ",
                 x.sizes(), " and strides ", x.strides(),
                 "; expected a matrix, with one of its strides 1");
  return {x.const_data_ptr(), dtype_of(x, name), x.size(0), x.stride(0), x.stride(1)};
}

RowsOf rows_of(const Tensor& x, const char* name, int64_t rows, int64_t columns) {
  CLINATTN_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == columns &&
                     (x.stride(1) == 1 || columns == 1),
                 name, " has shape ", x.sizes(), " and strides ", x.strides(), "; expected (", rows,
                 ", ", columns, ") with rows of consecutive numbers");
  return {const_cast<void*>(x.const_data_ptr()), dtype_of(x, name), x.stride(0)};
}

const float* vector_of(const OptionalTensor& x, const char* name, int64_t size) {
  if (!x) return nullptr;
  CLINATTN_CHECK(x->is_cpu() && x->scalar_type() == ScalarType::Float && x->dim() == 1 &&
                     x->is_contiguous() && x->size(0) == size,
                 name, " is ", x->scalar_type(), " of shape ", x->sizes(),
                 "; expected a contiguous (", size, ") of Float");
  return static_cast<const float*>(x->const_data_ptr());
}

const LinearKernels& kernels_for(bool in_bfloat16) {
  const LinearKernels* kernels =
      cpu_kernels(in_bfloat16 ? DType::kBFloat16 : DType::kFloat32).linear;
  CLINATTN_CHECK(kernels, "the instruction set in force, ", instruction_set(),
                 ", has no linear layers in ", in_bfloat16 ? "bfloat16" : "float32");
  return *kernels;
}

// A product on all threads
class Product {
 public:
  Product(const LinearParams& p, const LinearKernels& kernels, const Tensor& like)
      : p_(p),
        kernels_(kernels),
        like_(like),
        threads_(torch::stable::get_num_threads()),
        depth_(kernels.depth ? std::min(p.depth, kernels.depth) : p.depth),
        strips_(ceil_div(p.columns(), kernels.strip(p))) {
    const int64_t most = kernels.panel(depth_), micro = kernels.micro_rows;
    const int64_t rounds = ceil_div(p.a.rows, most * threads_);
    rows_ = round_up(ceil_div(p.a.rows, rounds * threads_), micro);
    by_rows_ = p.a.rows > most && rows_ >= kLeastRows;
    if (!by_rows_) rows_ = std::min(most, round_up(p.a.rows, micro));
  }

  void run() const {
    for (int64_t k = 0; k < p_.depth; k += depth_) {
      const int64_t k1 = std::min(k + depth_, p_.depth);
      if (by_rows_) {
        by_rows(k, k1);
      } else {
        by_strips(k, k1);
      }
    }
  }

 private:
  // Panels of rows, alike for all threads, with strips that all of them share
  void by_rows(int64_t k0, int64_t k1) const {
    const auto bytes = static_cast<int64_t>(kernels_.strips_size(1, k1 - k0));
    const int64_t most = std::min(strips_, std::max<int64_t>(kPackBytes / bytes, 1));
    const Tensor packed = room(kernels_.strips_size(most, k1 - k0));
    char* strips = static_cast<char*>(packed.mutable_data_ptr());
    for (int64_t s0 = 0; s0 < strips_; s0 += most) {
      const int64_t s1 = std::min(s0 + most, strips_);
      torch::stable::parallel_for(s0, s1, 1, [&](int64_t begin, int64_t end) {
        kernels_.pack_strips(p_, {0, 0, begin, end, k0, k1}, strips + (begin - s0) * bytes);
      });
      torch::stable::parallel_for(0, panels(), 1, [&](int64_t begin, int64_t end) {
        const Tensor rows = room(kernels_.rows_size(rows_, k1 - k0));
        for (int64_t i = begin; i < end; ++i) {
          const LinearTask task{i * rows_, std::min((i + 1) * rows_, p_.a.rows), s0, s1, k0, k1};
          kernels_.pack_rows(p_, task, rows.mutable_data_ptr());
          kernels_.multiply(p_, task, strips, rows.mutable_data_ptr());
          if (s1 == strips_ && k1 == p_.depth) finish(task.row0, task.row1);
        }
      });
    }
  }

  // For few rows: each task packs the strips that it multiplies.
  void by_strips(int64_t k0, int64_t k1) const {
    const int64_t shares = std::min(strips_, ceil_div(threads_, panels()));
    torch::stable::parallel_for(0, panels() * shares, 1, [&](int64_t begin, int64_t end) {
      const Tensor rows = room(kernels_.rows_size(rows_, k1 - k0));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / shares * rows_, share = i % shares;
        const LinearTask task{row,
                              std::min(row + rows_, p_.a.rows),
                              strips_ * share / shares,
                              strips_ * (share + 1) / shares,
                              k0,
                              k1};
        kernels_.pack_rows(p_, task, rows.mutable_data_ptr());
        kernels_.multiply(p_, task, nullptr, rows.mutable_data_ptr());
      }
    });
    if (k1 == p_.depth && p_.whole.at)
      torch::stable::parallel_for(0, p_.a.rows, 16,
                                  [&](int64_t begin, int64_t end) { finish(begin, end); });
  }

  void finish(int64_t row0, int64_t row1) const {
    if (p_.whole.at) kernels_.finish(p_, row0, row1);
  }
  int64_t panels() const { return ceil_div(p_.a.rows, rows_); }
  Tensor room(size_t bytes) const {
    return empty({static_cast<int64_t>(bytes)}, ScalarType::Byte, like_);
  }

  const LinearParams& p_;
  const LinearKernels& kernels_;
  const Tensor& like_;
  int64_t threads_, depth_, strips_, rows_;
  bool by_rows_;
};

void put_dropout(LinearParams& p, double dropout_p, int64_t seed) {
  CLINATTN_CHECK(dropout_p >= 0 && dropout_p <= 1, "dropout_p is ", dropout_p,
                 "; expected 0 <= dropout_p <= 1");
  p.dropout_threshold = static_cast<uint32_t>(std::nearbyint(dropout_p * 0x1p24));
  p.seed = static_cast<uint64_t>(seed);
}

// u = x weight^T + bias; y = norm(residual + dropout(act(u))), as csrc/linear.h says; in_bfloat16:
// products of bf16 numbers. Returns y, and u where `before` names its type, else an empty tensor.
std::tuple<Tensor, Tensor> cpu_linear(const Tensor& x, const Tensor& weight,
                                      const OptionalTensor& bias, int64_t activation, bool gated,
                                      double dropout_p, int64_t seed,
                                      const OptionalTensor& residual, int64_t norm,
                                      const OptionalTensor& gamma, const OptionalTensor& beta,
                                      double eps, bool in_bfloat16, ScalarType dtype,
                                      std::optional<ScalarType> before) {
  LinearParams p{};
  p.a = matrix_of(x, "x");
  p.b = matrix_of(weight, "weight");
  p.depth = x.size(1);
  CLINATTN_CHECK(weight.size(1) == p.depth, "weight has shape ", weight.sizes(), "; expected (*, ",
                 p.depth, ") for x ", x.sizes());
  CLINATTN_CHECK(in_bfloat16 || (p.a.dtype == DType::kFloat32 && p.b.dtype == DType::kFloat32),
                 "x is ", x.scalar_type(), " and weight ", weight.scalar_type(),
                 "; expected Float for products in float32");
  CLINATTN_CHECK(!gated || p.b.rows % 2 == 0, "weight has ", p.b.rows,
                 " rows; expected an even number for a gate");
  p.gated = gated;
  p.activation = static_cast<Activation>(activation);
  put_dropout(p, dropout_p, seed);
  p.norm = static_cast<Norm>(norm);
  p.bias = vector_of(bias, "bias", p.b.rows);
  p.gamma = vector_of(gamma, "gamma", p.columns());
  p.beta = vector_of(beta, "beta", p.columns());
  p.eps = eps;
  if (residual) p.residual = rows_of(*residual, "residual", p.a.rows, p.columns());
  const LinearKernels& kernels = kernels_for(in_bfloat16);
  const Tensor y = empty({p.a.rows, p.columns()}, dtype, x);
  const Tensor u = empty({before ? p.a.rows : 0, p.b.rows}, before.value_or(ScalarType::Float), x);
  p.y = rows_of(y, "y", p.a.rows, p.columns());
  if (before) p.before = rows_of(u, "before", p.a.rows, p.b.rows);
  if (y.numel() == 0) return {y, u};
  if (p.depth == 0)
    return cpu_linear(zeros({p.a.rows, 1}, ScalarType::Float, x),
                      zeros({p.b.rows, 1}, ScalarType::Float, x), bias, activation, gated,
                      dropout_p, seed, residual, norm, gamma, beta, eps, in_bfloat16, dtype,
                      before);
  Tensor whole = y;
  if (kernels.needs_whole || p.completes()) {
    const int64_t width = kernels.needs_whole ? p.b.rows : p.columns();
    if (dtype != ScalarType::Float || width != p.columns())
      whole = empty({p.a.rows, width}, ScalarType::Float, x);
    p.whole = rows_of(whole, "whole", p.a.rows, width);
  }
  Product(p, kernels, x).run();
  return {y, u};
}

// The gradient of u from that of dropout(act(u)), gated or not; u may be left out where there is no
// activation.
Tensor cpu_linear_activation_backward(const Tensor& dy, const OptionalTensor& u, int64_t activation,
                                      bool gated, double dropout_p, int64_t seed,
                                      ScalarType dtype) {
  LinearParams p{};
  const int64_t rows = dy.size(0), columns = dy.size(1);
  p.gated = gated;
  p.b.rows = gated ? 2 * columns : columns;
  p.activation = static_cast<Activation>(activation);
  put_dropout(p, dropout_p, seed);
  CLINATTN_CHECK(u || (!gated && p.activation == Activation::kNone),
                 "u is left out; expected it for an activation");
  if (u) p.before = rows_of(*u, "u", rows, p.b.rows);
  const RowsOf grad = rows_of(dy, "dy", rows, columns);
  const Tensor du = empty({rows, p.b.rows}, dtype, dy);
  const RowsOf to = rows_of(du, "du", rows, p.b.rows);
  const LinearKernels& kernels = kernels_for(false);
  torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    kernels.differentiate(p, grad, to, begin, end);
  });
  return du;
}

// Rows of x (M, N), fp32, normalised as a linear layer's are
Tensor cpu_norm(const Tensor& x, int64_t norm, const OptionalTensor& gamma,
                const OptionalTensor& beta, double eps, ScalarType dtype) {
  LinearParams p{};
  const int64_t rows = x.size(0), columns = x.size(1);
  p.b.rows = columns;
  p.whole = rows_of(x, "x", rows, columns);
  CLINATTN_CHECK(p.whole.dtype == DType::kFloat32, "x is ", x.scalar_type(), "; expected Float");
  p.norm = static_cast<Norm>(norm);
  p.gamma = vector_of(gamma, "gamma", columns);
  p.beta = vector_of(beta, "beta", columns);
  p.eps = eps;
  const Tensor y = empty({rows, columns}, dtype, x);
  p.y = rows_of(y, "y", rows, columns);
  const LinearKernels& kernels = kernels_for(true);
  torch::stable::parallel_for(0, rows, 16,
                              [&](int64_t begin, int64_t end) { kernels.finish(p, begin, end); });
  return y;
}

}  // namespace

}  // namespace clinattn

STABLE_TORCH_LIBRARY_IMPL(clinattn, CPU, m) {
  m.impl("cpu_linear", TORCH_BOX(&clinattn::cpu_linear));
  m.impl("cpu_norm", TORCH_BOX(&clinattn::cpu_norm));
  m.impl("cpu_linear_activation_backward", TORCH_BOX(&clinattn::cpu_linear_activation_backward));
}
