// The forward pass's products and softmax by fused multiply-adds, for any vector type.
#pragma once

#include "concepts.h"
#include "fma_scores.h"
#include "forward_step.h"
#include "normaliser.h"
#include "philox.h"

namespace {

template <FmaVector Lanes>
struct FmaForward : FmaScores<Lanes> {
  using Scores = FmaScores<Lanes>;
  using V = Lanes;
  using T = typename V::T;
  using Scores::kRows, Scores::kKeys, Scores::kBlock, Scores::s;
  static constexpr int64_t kAligned = kKeys;  // panels begin at multiples of it
  static constexpr int64_t kChunk = 384;      // queries of a task, all heads of a group
  static constexpr T kLargest = static_cast<T>(sizeof(T) == 8 ? __DBL_MAX__ : __FLT_MAX__);

  const int64_t value_dim;
  const int64_t o_width;          // padded to the vector
  T* v;                           // (kKeys, o_width): 128 x 64 x 4 bytes = 32 KB in L2
  T* lanes;                       // (kWidth, kWidth): one vector for each of kWidth rows
  T* alpha;                       // (kRows)
  RowKept<V, kRows, kKeys> kept;  // by dropout
  const int64_t panel = kKeys;    // keys packed together
  bool finite;

  FmaForward(Arena& a, int64_t head_dim, int64_t value_dim, int64_t rows)
      : Scores(a, head_dim, rows, kKeys),
        value_dim(value_dim),
        o_width(round_up(value_dim, V::kWidth)) {
    v = a.take<T>(kKeys * o_width);
    lanes = a.take<T>(V::kWidth * V::kWidth);
    alpha = a.take<T>(kRows);
  }

  void begin_task() {}

  void begin_panel() { finite = true; }

  // n keys from j0 of the panel, at most kBlock, as Scores packs them; v past n is not read.
  void put_keys(int64_t j0, int64_t n, const void* const* k_rows, const void* const* v_rows,
                DType dtype) {
    Scores::put_keys(j0, n, k_rows, dtype);
    for (int64_t j = 0; j < n; ++j)
      load_row_or_zeros<V>(v + (j0 + j) * o_width, v_rows[j], dtype, value_dim);
    finite = finite && all_finite<V>(v + j0 * o_width, n * o_width);
  }

  // Folds steps of the panel into n queries from row r. hide(step) gives -inf to what is not seen,
  // and says whether it has made the scores natural; hide.draw(step) draws what dropout keeps.
  template <class Hide, bool kDropout>
  struct Fold {
    FmaForward& e;
    const Units<T> units;
    Fold(FmaForward& e, Units<T> units) : e(e), units(units) {}
    void fold(int64_t r, int64_t n, const Step* steps, int64_t count, const Hide& hide,
              const Rows<T>& rows) {
      for (int64_t i = 0; i < count; ++i) {
        const Step& step = steps[i];
        e.multiply(r, n, step.at, step.begin, step.end);
        const auto scale = step.edge && hide(step) ? Units<T>::of_natural() : units;
        if (kDropout) hide.draw(step);
        e.softmax<kDropout>(n, step.begin, step.end, scale, rows);
        e.accumulate(n, step.at, step.begin, min64(step.end, step.keys), rows.o,
                     step.edge && !e.finite);
      }
    }
    void finish() {}
  };

  // s <- p, or what dropout keeps of it; alpha <- what o is to be multiplied with
  template <bool kDropout>
  void softmax(int64_t n, int64_t begin, int64_t end, Units<T> units, const Rows<T>& rows) {
    for (int64_t i = 0; i < n; i += V::kWidth)
      softmax_rows<kDropout>(i, min64(V::kWidth, n - i), begin, end, units, rows.m + i,
                             rows.top + i, rows.l + i, alpha + i);
  }

  // At most a vector of rows, so that the reductions along rows are done for all at once and no row
  // waits for another.
  template <bool kDropout>
  void softmax_rows(int64_t first, int64_t n, int64_t begin, int64_t end, Units<T> units, T* m,
                    T* top, T* l, T* alpha) {
    T* x = s + first * kKeys;
    for (int64_t row = 0; row < n; ++row) {
      auto most = V::load(x + row * kKeys + begin);
      for (int64_t j = begin + V::kWidth; j < end; j += V::kWidth)
        most = V::max(most, V::load(x + row * kKeys + j));
      V::store(lanes + row * V::kWidth, most);
    }
    const auto m_old = V::load(m), highest = V::max_rows(lanes);
    // what overflows is no hidden score
    const auto m_here = V::hidden_where_hidden(
        V::max(V::mul(highest, V::set1(units.base2)), V::set1(-kLargest)), highest);
    const auto m_new = V::max(m_here, m_old);
    // a row that has seen nothing would give inf - inf
    const auto m_safe = V::zero_where_hidden(m_new, m_new);
    alignas(64) T shift[V::kWidth], scales[V::kWidth], growth[V::kWidth];
    V::store(shift, V::sub(V::zero(), m_safe));
    V::store(scales, V::set1(units.base2));
    V::store(growth, V::sub(m_old, m_safe));
    const auto before = V::zero_where_hidden(m_old, m_old);
    if (V::reaching(V::max(V::abs(m_safe), V::abs(before)), kLarge<T>)) {
      alignas(64) T most[V::kWidth], m_rows[V::kWidth];
      V::store(most, highest);
      V::store(m_rows, m_new);
      for (int64_t row = 0; row < n; ++row)
        LargeRow{x + row * kKeys, most[row],   m[row],     m_rows[row],
                 top[row],        growth[row], shift[row], scales[row]}
            .take_off(begin, end, units.natural);
    }
    const auto rescale = V::exp2(V::load(growth));
    V::store(m, m_new);
    V::store(alpha, rescale);
    for (int64_t row = 0; row < n; ++row) {
      const auto row_shift = V::set1(shift[row]), scale = V::set1(scales[row]);
      auto sum = V::zero();
      for (int64_t j = begin; j < end; j += V::kWidth) {
        T* at = x + row * kKeys + j;
        const auto e = V::exp2(V::fma(V::load(at), scale, row_shift));
        V::store(at, kDropout ? V::zero_where_dropped(e, kept.at(first + row, j)) : e);
        sum = V::add(sum, e);
      }
      V::store(lanes + row * V::kWidth, sum);
    }
    V::store(l, V::fma(V::load(l), rescale, V::sum_rows(lanes)));
  }

  // A row of scores x with the largest of them, most. Where it is or was a large one, its growth is
  // another; where it is one, so is top, and x <- natural scores less top, to be scaled by log2 e.
  struct LargeRow {
    T *x, most, m_old, m_new;
    T &top, &growth, &shift, &scale;

    __attribute__((noinline)) void take_off(int64_t begin, int64_t end, T natural) {
      if (!is_large(m_old) && !is_large(m_new)) return;
      const T top_old = top, here = most * natural;
      if (is_large(m_new)) {
        top = is_large(m_old) && top_old > here ? top_old : here;
        for (int64_t j = begin; j < end; j += V::kWidth)
          V::store(x + j, V::sub(V::mul(V::load(x + j), V::set1(natural)), V::set1(top)));
        shift = 0;
        scale = static_cast<T>(kLog2e);
      }
      growth = ::growth(m_old, top_old, m_new, top);
    }
  };

  // o <- o alpha + p v for n rows; skip_zeros keeps what is not finite from rows that do not see it
  void accumulate(int64_t n, int64_t at, int64_t begin, int64_t end, T* o, bool skip_zeros) {
    const T *p = s + begin, *values = v + (at + begin) * o_width;
    if (skip_zeros) {
      gemm_skip_zeros<V, false, Update::kScaleAdd>(n, o_width, end - begin, p, kKeys, values,
                                                   o_width, o, o_width, alpha);
    } else {
      gemm<V, false, Update::kScaleAdd>(n, o_width, end - begin, p, kKeys, values, o_width,
                                        V::kStrip, o, o_width, alpha);
    }
  }

  // Every v is packed as it is.
  static constexpr bool outgrown() { return false; }
  static void lower(T*, int64_t) {}

  // row r of o
  const T* output(T* o, int64_t r) { return o + r * o_width; }
  static T normaliser(const T*, int64_t, T l) { return l; }
};

template <FmaVector V>
inline constexpr int64_t kRowsTouched<FmaForward<V>> = 1;

}  // namespace
