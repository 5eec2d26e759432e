// Steps after the product of a linear layer, row by row while its sums are in cache: bias,
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

// The numbers that dropout keeps, of kWidth rows and kColumns columns
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

// dropout(act(u)), in y, or in whole where more follows, of rows [row0, row0 + rows) and columns
// [column0, column0 + n), from sums (rows, ld), whose columns are padded to vectors. gates: the
// sums of the second half, or null. kMost: the most columns.
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
      V::store(line + j, kept.apply(y, index, j));
    }
    const RowsOf& to = p.completes() ? p.whole : p.y;
    store_row<V>(line_of(to, row, column0), line, to.dtype, n, as_it_is);
  }

  void store_sums(void* to, const float* sums, const float* more) const {
    alignas(64) float line[kMost];
    for (int64_t j = 0; j < n; j += kWidth)
      V::store(line + j, V::add(V::load(sums + j), V::load(more + j)));
    store_row<V>(to, line, p.before.dtype, n, [](auto x) { return x; });
  }
};

// Rows of y <- norm(residual + x) for x = rows of whole: (x - mean x) / sqrt(mean (x - mean x)^2 +
// eps) gamma + beta, or x / sqrt(mean x^2 + eps) gamma (Ba et al., arXiv 1607.06450; Zhang and
// Sennrich, 1910.07467)
template <class V>
class Completion {
  using F = typename V::F;
  static constexpr int64_t kWidth = V::kWidth, kSums = 4;  // chains of additions

  const LinearParams& p;
  const int64_t n, whole_vectors;

 public:
  explicit Completion(const LinearParams& p)
      : p(p), n(p.columns()), whole_vectors(n / kWidth * kWidth) {}

  void run(int64_t row0, int64_t row1) const {
    if (p.y.dtype == DType::kFloat32) return rows<float>(row0, row1);
    rows<BFloat16>(row0, row1);
  }

 private:
  template <class Y>
  void rows(int64_t row0, int64_t row1) const {
    for (int64_t row = row0; row < row1; ++row) {
      float* x = reinterpret_cast<float*>(line_of(p.whole, row, 0));
      if (p.residual.at) {
        const char* residual = line_of(p.residual, row, 0);
        if (p.residual.dtype == DType::kFloat32) {
          add(x, reinterpret_cast<const float*>(residual));
        } else {
          add(x, reinterpret_cast<const BFloat16*>(residual));
        }
      }
      put(x, reinterpret_cast<Y*>(line_of(p.y, row, 0)));
    }
  }

  // Calls work(j) for vectors of a row, in turns of kSums, and then rest(j) for single numbers.
  template <class Work, class Rest>
  void each(const Work& work, const Rest& rest) const {
    int64_t j = 0;
    for (; j + kSums * kWidth <= n; j += kSums * kWidth)
#pragma GCC unroll 4
      for (int64_t i = 0; i < kSums; ++i) work(j + i * kWidth, i);
    for (; j < whole_vectors; j += kWidth) work(j, 0);
    for (; j < n; ++j) rest(j);
  }

  template <class R>
  void add(float* x, const R* residual) const {
    each([&](int64_t j,
             int64_t) { V::store(x + j, V::add(V::load_as(residual + j), V::load(x + j))); },
         [&](int64_t j) { x[j] = one(residual[j]) + x[j]; });
  }

  static float one(float x) { return x; }
  static float one(BFloat16 x) { return widen(x); }

  template <class Y>
  void put(const float* x, Y* y) const {
    if (p.norm == Norm::kNone) {
      if (static_cast<const void*>(x) != y) store(x, y, [](F a, F, F) { return a; });
      return;
    }
    const float mean = p.norm == Norm::kLayer ? sum(x) / static_cast<float>(n) : 0;
    const float variance = squares(x, mean) / static_cast<float>(n);
    const float factor = 1 / __builtin_sqrtf(variance + static_cast<float>(p.eps));
    store(x, y, [&](F a, F gamma, F beta) {
      return V::add(V::mul(V::mul(V::sub(a, V::set1(mean)), V::set1(factor)), gamma), beta);
    });
  }

  // y (n) <- op(x, gamma, beta). x ends where its row does: its last numbers are read one by one.
  template <class Y, class Op>
  void store(const float* x, Y* y, const Op& op) const {
    const auto part = [](const float* a, int64_t j, float other) {
      return a ? V::load(a + j) : V::set1(other);
    };
    for (int64_t j = 0; j < whole_vectors; j += kWidth)
      V::store_as(y + j, op(V::load(x + j), part(p.gamma, j, 1), part(p.beta, j, 0)));
    if (whole_vectors == n) return;
    alignas(64) float last[3][kWidth] = {};
    const int64_t j = whole_vectors, rest = n - j;
    load_row<V>(last[0], x + j, DType::kFloat32, rest);
    if (p.gamma) load_row<V>(last[1], p.gamma + j, DType::kFloat32, rest);
    if (p.beta) load_row<V>(last[2], p.beta + j, DType::kFloat32, rest);
    const F gamma = part(p.gamma ? last[1] : nullptr, 0, 1), beta = V::load(last[2]);
    store_elements<V>(y + j, last[0], rest, [&](F a) { return op(a, gamma, beta); });
  }

  float sum(const float* x) const {
    F sums[kSums] = {V::zero(), V::zero(), V::zero(), V::zero()};
    float rest = 0;
    each([&](int64_t j, int64_t i) { sums[i] = V::add(sums[i], V::load(x + j)); },
         [&](int64_t j) { rest += x[j]; });
    return total(sums) + rest;
  }

  float squares(const float* x, float mean) const {
    F sums[kSums] = {V::zero(), V::zero(), V::zero(), V::zero()};
    float rest = 0;
    each(
        [&](int64_t j, int64_t i) {
          const F d = V::sub(V::load(x + j), V::set1(mean));
          sums[i] = V::fma(d, d, sums[i]);
        },
        [&](int64_t j) { rest += (x[j] - mean) * (x[j] - mean); });
    return total(sums) + rest;
  }

  static float total(const F (&sums)[kSums]) {
    return V::hsum(V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3])));
  }
};

// Completes rows that wait for a residual or a norm.
template <class V>
void complete_rows(const LinearParams& p, int64_t row0, int64_t row1) {
  if (p.completes()) Completion<V>(p).run(row0, row1);
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
