// What follows the product of a linear layer, row by row while its sums are in cache: bias,
// activation, gate, dropout, residual and norm; and the gradient of the first four.
#pragma once

#include "../linear.h"
#include "activation.h"
#include "philox.h"

namespace {

using clinattn::Activation;
using clinattn::LinearParams;
using clinattn::Norm;
using clinattn::RowsOf;

inline char* line_of(const RowsOf& x, int64_t row, int64_t column) {
  return static_cast<char*>(x.at) + (row * x.stride + column) * dtype_size(x.dtype);
}

template <class Work>
inline void with_activation(Activation activation, const Work& work) {
  switch (activation) {
    case Activation::kGelu:
      return work(Gelu());
    case Activation::kGeluTanh:
      return work(GeluTanh());
    case Activation::kRelu:
      return work(Relu());
    default:
      return work(Identity());
  }
}

// What dropout keeps of kWidth rows and kColumns columns
template <class V, int64_t kColumns>
struct LinearKept {
  static constexpr int64_t kRows = V::kWidth;
  const LinearParams& p;
  const Dropout dropout;
  const typename V::F scale;
  RowKept<V, kRows, kColumns> kept;

  explicit LinearKept(const LinearParams& p)
      : p(p),
        dropout(p.seed, p.dropout_threshold, 0, 0),
        scale(V::set1(static_cast<float>(kept_scale(p.dropout_threshold)))) {}

  // Columns [column, column + n) of `rows` rows from row0
  void draw(int64_t row0, int64_t rows, int64_t column, int64_t n) {
    if (!p.dropout_threshold) return;
    alignas(64) uint32_t high[kRows], low[kRows], least[kRows], mask[kRows];
    const DrawRows words{high, low, least, mask};
    dropout.rows<V>(row0, kRows, words);
    kept.draw(dropout, words, rows, column, 0, n);
  }

  // x, of a row and kWidth columns of those drawn, as dropout leaves it
  typename V::F apply(typename V::F x, int64_t row, int64_t column) const {
    if (!p.dropout_threshold) return x;
    return V::mul(V::zero_where_dropped(x, kept.at(row, column)), scale);
  }
};

// y, or whole where a norm follows, of rows [row0, row0 + rows) and columns [column0,
// column0 + n), from sums (rows, ld), whose columns are padded to vectors. gates: the sums of the
// second half, or null. kMost: the most columns.
template <class V, int64_t kMost>
struct Epilogue {
  static constexpr int64_t kWidth = V::kWidth;
  static_assert(kMost % kWidth == 0);

  const LinearParams& p;
  const int64_t column0, n;
  alignas(64) float bias[kMost] = {}, gate_bias[kMost] = {};

  Epilogue(const LinearParams& p, int64_t column0, int64_t n) : p(p), column0(column0), n(n) {
    if (!p.bias) return;
    load_row<V>(bias, p.bias + column0, DType::kFloat32, n);
    if (p.gated) load_row<V>(gate_bias, p.bias + p.columns() + column0, DType::kFloat32, n);
  }

  void run(int64_t row0, int64_t rows, const float* sums, const float* gates, int64_t ld) const {
    LinearKept<V, kMost> kept(p);
    with_activation(p.activation, [&](auto act) {
      for (int64_t i0 = 0; i0 < rows; i0 += kWidth) {
        const int64_t here = min64(kWidth, rows - i0);
        kept.draw(row0 + i0, here, column0, n);
        for (int64_t i = 0; i < here; ++i) {
          const int64_t at = (i0 + i) * ld;
          row<decltype(act)>(row0 + i0 + i, sums + at, gates ? gates + at : nullptr, kept, i);
        }
      }
    });
  }

 private:
  template <class Act>
  void row(int64_t row, const float* sums, const float* gates, const LinearKept<V, kMost>& kept,
           int64_t index) const {
    alignas(64) float line[kMost];
    const auto as_it_is = [](auto x) { return x; };
    if (p.before.at) {
      store_sums(line_of(p.before, row, column0), sums, bias);
      if (gates) store_sums(line_of(p.before, row, p.columns() + column0), gates, gate_bias);
    }
    if (p.residual.at) load_row<V>(line, line_of(p.residual, row, column0), p.residual.dtype, n);
    for (int64_t j = 0; j < n; j += kWidth) {
      auto y = Act::template value<V>(V::add(V::load(sums + j), V::load(bias + j)));
      if (gates) y = V::mul(y, V::add(V::load(gates + j), V::load(gate_bias + j)));
      y = kept.apply(y, index, j);
      if (p.residual.at) y = V::add(V::load(line + j), y);
      V::store(line + j, y);
    }
    const RowsOf& to = p.norm == Norm::kNone ? p.y : p.whole;
    store_row<V>(line_of(to, row, column0), line, to.dtype, n, as_it_is);
  }

  void store_sums(void* to, const float* sums, const float* more) const {
    alignas(64) float line[kMost];
    for (int64_t j = 0; j < n; j += kWidth)
      V::store(line + j, V::add(V::load(sums + j), V::load(more + j)));
    store_row<V>(to, line, p.before.dtype, n, [](auto x) { return x; });
  }
};

// Rows of y <- (x - mean x) / sqrt(mean (x - mean x)^2 + eps) gamma + beta for x = rows of whole,
// or x / sqrt(mean x^2 + eps) gamma (Ba et al., arXiv 1607.06450; Zhang and Sennrich, 1910.07467)
template <class V>
void normalise_rows(const LinearParams& p, int64_t row0, int64_t row1) {
  constexpr int64_t kWidth = V::kWidth, kLine = 64;
  const int64_t n = p.columns(), vectors = n / kWidth * kWidth;
  for (int64_t row = row0; row < row1; ++row) {
    const auto* x = reinterpret_cast<const float*>(line_of(p.whole, row, 0));
    float mean = 0;
    if (p.norm == Norm::kLayer) {
      auto sum = V::zero();
      for (int64_t j = 0; j < vectors; j += kWidth) sum = V::add(sum, V::load(x + j));
      mean = V::hsum(sum);
      for (int64_t j = vectors; j < n; ++j) mean += x[j];
      mean /= static_cast<float>(n);
    }
    auto squares = V::zero();
    for (int64_t j = 0; j < vectors; j += kWidth) {
      const auto d = V::sub(V::load(x + j), V::set1(mean));
      squares = V::fma(d, d, squares);
    }
    float variance = V::hsum(squares);
    for (int64_t j = vectors; j < n; ++j) variance += (x[j] - mean) * (x[j] - mean);
    variance /= static_cast<float>(n);
    const auto factor = V::set1(1 / __builtin_sqrtf(variance + static_cast<float>(p.eps)));
    for (int64_t j = 0; j < n; j += kLine) {
      alignas(64) float line[kLine], gamma[kLine], beta[kLine];
      const int64_t here = n - j < kLine ? n - j : kLine;
      load_row<V>(line, x + j, DType::kFloat32, here);
      if (p.gamma) load_row<V>(gamma, p.gamma + j, DType::kFloat32, here);
      if (p.beta) load_row<V>(beta, p.beta + j, DType::kFloat32, here);
      for (int64_t i = 0; i < here; i += kWidth) {
        auto y = V::mul(V::sub(V::load(line + i), V::set1(mean)), factor);
        if (p.gamma) y = V::mul(y, V::load(gamma + i));
        if (p.beta) y = V::add(y, V::load(beta + i));
        V::store(line + i, y);
      }
      store_row<V>(line_of(p.y, row, j), line, p.y.dtype, here, [](auto y) { return y; });
    }
  }
}

// du <- dropout(dy) act'(u), or where gated (.. gate act'(u), .. act(u)), for u in p.before, which
// is not read where there is no activation
template <class V>
void differentiate_rows(const LinearParams& p, const RowsOf& dy, const RowsOf& du, int64_t row0,
                        int64_t row1) {
  constexpr int64_t kWidth = V::kWidth, kLine = 64;
  const int64_t columns = p.columns();
  const auto as_it_is = [](auto x) { return x; };
  LinearKept<V, kLine> kept(p);
  with_activation(p.activation, [&](auto act) {
    using Act = decltype(act);
    const auto line = [&](int64_t row, int64_t j, int64_t n, int64_t index) {
      alignas(64) float u[kLine] = {}, gate[kLine], g[kLine];
      if (p.before.at) load_row<V>(u, line_of(p.before, row, j), p.before.dtype, n);
      if (p.gated) load_row<V>(gate, line_of(p.before, row, columns + j), p.before.dtype, n);
      load_row<V>(g, line_of(dy, row, j), dy.dtype, n);
      for (int64_t i = 0; i < n; i += kWidth) {
        const auto x = V::load(u + i), grad = kept.apply(V::load(g + i), index, i);
        auto dx = V::mul(grad, Act::template slope<V>(x));
        if (p.gated) {
          dx = V::mul(dx, V::load(gate + i));
          V::store(gate + i, V::mul(grad, Act::template value<V>(x)));
        }
        V::store(u + i, dx);
      }
      store_row<V>(line_of(du, row, j), u, du.dtype, n, as_it_is);
      if (p.gated) store_row<V>(line_of(du, row, columns + j), gate, du.dtype, n, as_it_is);
    };
    for (int64_t i0 = row0; i0 < row1; i0 += kWidth)
      for (int64_t j = 0; j < columns; j += kLine) {
        const int64_t n = min64(columns - j, kLine), rows = min64(row1 - i0, kWidth);
        kept.draw(i0, rows, j, n);
        for (int64_t i = 0; i < rows; ++i) line(i0 + i, j, n, i);
      }
  });
}

}  // namespace
