// C <- A B, C + A B or C alpha + A B in registers: the one matrix product under every step of fp32
// and fp64 attention.
#pragma once

#include <cstdint>

namespace {

// The update of C by a finished sum: C <- sum, C + sum or C alpha + sum.
enum class Update { kSet, kAdd, kScaleAdd };

template <class V, Update kUpdate>
inline void update(typename V::T* c, typename V::F sum, typename V::T alpha) {
  if constexpr (kUpdate == Update::kAdd) sum = V::add(V::load(c), sum);
  if constexpr (kUpdate == Update::kScaleAdd) sum = V::fma(V::load(c), V::set1(alpha), sum);
  V::store(c, sum);
}

// Each sum is one chain of multiply-adds, rounded once each, in the order of k from 0, whatever the
// blocking of rows and columns, so its bits do not depend on the tile that it falls into.
template <class V, int kM, int kN, bool kTransA, Update kUpdate>
inline void micro(int64_t k, const typename V::T* a, int64_t lda, const typename V::T* b,
                  int64_t ldb, typename V::T* c, int64_t ldc, const typename V::T* alpha) {
  using F = typename V::F;
  typename V::Sum acc[kM][kN];
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < kN; ++j) acc[i][j] = V::no_sum();
#pragma GCC unroll 4
  for (int64_t kk = 0; kk < k; ++kk) {
    F bv[kN];
#pragma GCC unroll 16
    for (int j = 0; j < kN; ++j) bv[j] = V::load(b + kk * ldb + j * V::kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
      F av = V::set1(kTransA ? a[kk * lda + i] : a[i * lda + kk]);
#pragma GCC unroll 16
      for (int j = 0; j < kN; ++j) acc[i][j] = V::add_product(av, bv[j], acc[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < kN; ++j)
      update<V, kUpdate>(c + i * ldc + j * V::kWidth, V::rounded(acc[i][j]),
                         kUpdate == Update::kScaleAdd ? alpha[i] : 0);
}

template <class V, int kM, int kN, bool kTransA, Update kUpdate>
inline void micro_rows(int64_t m, int64_t k, const typename V::T* a, int64_t lda,
                       const typename V::T* b, int64_t ldb, typename V::T* c, int64_t ldc,
                       const typename V::T* alpha) {
  if (m == kM) {
    micro<V, kM, kN, kTransA, kUpdate>(k, a, lda, b, ldb, c, ldc, alpha);
  } else if constexpr (kM > 1) {
    micro_rows<V, kM - 1, kN, kTransA, kUpdate>(m, k, a, lda, b, ldb, c, ldc, alpha);
  }
}

// Rows of a block whose rows are kN vectors: a narrow one takes more of them, so that as many sums
// are under way and none waits for its last addition.
template <class V, int kN>
inline constexpr int kBlockRows = V::kMicroRows * (kN * 2 <= V::kMicroVectors ? 2 : 1);

template <class V, int kN, bool kTransA, Update kUpdate>
inline void strip(int64_t m, int64_t n, int64_t k, const typename V::T* a, int64_t lda,
                  const typename V::T* b, int64_t ldb, typename V::T* c, int64_t ldc,
                  const typename V::T* alpha) {
  if (n == kN * V::kWidth) {
    constexpr int64_t kMost = kBlockRows<V, kN>;
    // blocks of a height, where there are few: a low one takes as long as its additions
    const int64_t blocks = (m + kMost - 1) / kMost, height = blocks ? (m + blocks - 1) / blocks : 0;
    for (int64_t i = 0; i < m; i += height) {
      const int64_t rows = m - i < height ? m - i : height;
      micro_rows<V, kMost, kN, kTransA, kUpdate>(rows, k, a + (kTransA ? i : i * lda), lda, b, ldb,
                                                 c + i * ldc, ldc, alpha + i);
    }
  } else if constexpr (kN > 1) {
    strip<V, kN - 1, kTransA, kUpdate>(m, n, k, a, lda, b, ldb, c, ldc, alpha);
  }
}

// Updates C (m, n) by A (m, k) B (k, n); n is a multiple of the vector width. B lies in strips of
// V::kStrip columns, strip_stride apart, rows ldb apart. kTransA: A is stored (k, m).
template <class V, bool kTransA, Update kUpdate>
void gemm(int64_t m, int64_t n, int64_t k, const typename V::T* a, int64_t lda,
          const typename V::T* b, int64_t ldb, int64_t strip_stride, typename V::T* c, int64_t ldc,
          const typename V::T* alpha = nullptr) {
  for (int64_t j = 0; j < n; j += V::kStrip) {
    int64_t cols = n - j < V::kStrip ? n - j : V::kStrip;
    strip<V, V::kMicroVectors, kTransA, kUpdate>(
        m, cols, k, a, lda, b + j / V::kStrip * strip_stride, ldb, c + j, ldc, alpha);
  }
}

// The same sums without the terms whose A element is 0, for a B with NaN or inf in rows that some
// rows of A do not see: 0 * NaN must not reach them. B is plain (k, n).
template <class V, bool kTransA, Update kUpdate>
void gemm_skip_zeros(int64_t m, int64_t n, int64_t k, const typename V::T* a, int64_t lda,
                     const typename V::T* b, int64_t ldb, typename V::T* c, int64_t ldc,
                     const typename V::T* alpha = nullptr) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; j += V::kWidth) {
      auto acc = V::no_sum();
      for (int64_t kk = 0; kk < k; ++kk) {
        const auto x = kTransA ? a[kk * lda + i] : a[i * lda + kk];
        if (x != 0) acc = V::add_product(V::set1(x), V::load(b + kk * ldb + j), acc);
      }
      update<V, kUpdate>(c + i * ldc + j, V::rounded(acc),
                         kUpdate == Update::kScaleAdd ? alpha[i] : 0);
    }
  }
}

}  // namespace
