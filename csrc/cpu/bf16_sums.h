// The backward pass's sums over slices of p and ds, of bf16 parts: dv <- dv + p^T do,
// dk <- dk + ds^T q and dq^T <- dq^T + k^T ds^T. They are multiplied one block of 32 x 32 after
// another, when there is something to do beside them.
#pragma once

#include <initializer_list>

#include "bf16_gradients.h"

namespace {

template <class E>
class Bf16Sums {
  using V = Avx512;
  static constexpr int kParts = E::kParts;
  // Of one part the sums of dk and dv go on where they stand; of more, sums that start at 0 are
  // added later, with half the error.
  static constexpr bool kInPlace = kParts == 1;
  static constexpr int64_t kNext = kParts * kTile;  // from a tile, all its parts, to the next

  E& e;
  Slice summed{};                  // the slice at hand,
  int64_t sum = 0, sum_count = 0;  // its next block and how many there are
  int64_t key, query, d;           // where that is
  struct Waiting {
    float *from = nullptr, *to = nullptr;
    int64_t vectors = 0;
  };
  Waiting fresh, ripe;  // on their way to dk and dv: what a tile has just stored is not read yet

 public:
  typename E::Multiplier products;

  explicit Bf16Sums(E& e) : e(e) {}

  // Blocks of the slice at hand, those that are left, and how often the one after ahead others
  // calls work.
  int64_t count() const { return sum_count; }
  int64_t left() const { return sum_count - sum; }
  int64_t calls(int64_t ahead) const { return products.calls(steps(sum + ahead)); }

  // The slice's dk, dv and dq are summed next, after those of the one before. complete() is called
  // when these were the last of a block of queries.
  template <class Complete>
  void next(const Slice& slice, const Complete& complete) {
    NoWork none;
    while (sum < sum_count) multiply_next(none);
    if (summed.last) {
      settle();
      complete();
    }
    summed = slice;
    sum = query = d = 0;
    key = slice.j0;
    sum_count = key_sums() + round_up(slice.n, 32) / 32 * (e.width / 32);
    if (slice.skip_rows || slice.skip_keys) sum_seen();
    if (!E::kBeside)
      while (sum < sum_count) multiply_next(none);
  }

  // The next block: first those of dv, then of dk, then of dq.
  template <class Work>
  void multiply_next(Work& work) {
    const int64_t steps = this->steps(sum);
    if (sum < key_sums()) {
      const bool of_v = sum < value_sums();
      const Tiled<float>& gradient = of_v ? e.dv : e.dk;
      float* to = e.gradient_block(gradient, key, d);
      float* c = kInPlace ? to : e.sums + sum % 3 * 1024;
      const bool two = summed.columns_end - key > 16;
      multiply<kInPlace>({e.weight_tile(of_v ? summed.p : summed.ds, 0, key - summed.at, 0),
                          E::kRows / 32 * kNext, kTile, kNext, two},
                         {e.query_pair_tile(of_v ? summed.dout_pairs : summed.q_pairs, 0, 0, d),
                          kNext, kTile, gradient.width / 16 * kNext},
                         steps, c, work);
      if (!kInPlace) fresh = {c, to, two ? 64 : 32};
      if ((key += 32) == summed.j1) key = summed.j0, d += 32;
      if (d == gradient.width) d = 0;
    } else {
      const Operand left{e.kt_tile(0, summed.j0, d), kNext, kTile, e.width / 16 * kNext};
      const Operand right{e.ds_pair_tile(summed.ds_pairs, 0, summed.j0 - summed.at, query),
                          E::kSlice / 32 * kNext, kTile, kNext, summed.n - query > 16};
      if (summed.first) {
        multiply<false>(left, right, steps, e.dqt_block(query, d), work);
      } else {
        multiply<true>(left, right, steps, e.dqt_block(query, d), work);
      }
      if ((d += 32) == e.width) query += 32, d = 0;
    }
    ++sum;
  }

  // Products, and beside them work and the addition of sums that are ripe.
  template <bool kAdd, bool kStream = (kParts > 1), class P = Products<kParts>, class Work>
  void multiply(const Operand& a, const Operand& b, int64_t steps, float* c, Work& work) {
    if constexpr (kInPlace) {
      products.template multiply<kAdd, kStream, P>(a, b, steps, c, work);
    } else {
      Addition addition{ripe.to, ripe.from, ripe.vectors, products.template calls<P>(steps)};
      const auto both = [&] {
        addition();
        work();
      };
      products.template multiply<kAdd, kStream, P>(a, b, steps, c, both);
      ripe = fresh;
      fresh = {};
    }
  }

 private:
  // Blocks of dv, and of dv and dk
  int64_t value_sums() const { return (summed.j1 - summed.j0) / 32 * (e.v_width / 32); }
  int64_t key_sums() const { return value_sums() + (summed.j1 - summed.j0) / 32 * (e.width / 32); }
  int64_t steps(int64_t index) const {
    return index < key_sums() ? ceil_div(summed.n, 32) : (summed.j1 - summed.j0) / 32;
  }

  // Stores what has been multiplied and adds what is to be added.
  void settle() {
    products.finish();
    for (const Waiting& x : {ripe, fresh})
      if (x.from) Addition{x.to, x.from, x.vectors, 1}();
    ripe = fresh = {};
  }

  // The slow ways, for q, do or k with NaN or inf, where only what is seen is multiplied, and for
  // numbers too small for their parts.
  void sum_seen() {
    settle();
    const Slice& x = summed;
    NoWork none;
    if (x.skip_rows) {
      add_seen(e.dv, x.dout_pairs, x.p);
      add_seen(e.dk, x.q_pairs, x.ds);
      sum = key_sums();
    } else {
      while (sum < key_sums()) multiply_next(none);
    }
    if (x.skip_keys) {
      for (int64_t i = 0; i < x.n; i += 32)
        for (int64_t d = 0; d < e.width; d += 32) multiply_seen(i, d, e.dqt_block(i, d));
      sum = sum_count;
    }
  }

  void add_seen(const Tiled<float>& to, const Tiled<Bf16>& pairs, Bf16* weights) {
    for (int64_t j = summed.j0; j < summed.columns_end; ++j)
      for (int64_t d = 0; d < to.width; ++d) {
        float total = 0;
        for (int64_t i = 0; i < summed.n; ++i) {
          const float weight = weight_of(weights, i, j);
          if (weight == 0 && summed.edge) continue;
          float x = 0;
          for (int part = 0; part < kParts; ++part)
            x += widen(BFloat16{
                e.query_pair_tile(pairs, part, i, d)[i % 16 * 32 + d % 16 * 2 + i % 32 / 16]});
          total += weight * x;
        }
        e.gradient_block(to, j, d)[in_block(j % 32, d % 32)] += total;
      }
  }

  void multiply_seen(int64_t i0, int64_t d0, float* c) {
    for (int64_t i = 0; i < 32; ++i)
      for (int64_t d = 0; d < 32; ++d) {
        float total = 0;
        for (int64_t j = summed.j0; j < summed.columns_end; ++j) {
          const float weight = weight_of(summed.ds, i0 + i, j);
          if (weight == 0 && summed.edge) continue;
          float x = 0;
          for (int part = 0; part < kParts; ++part)
            x += widen(BFloat16{e.kt_tile(part, j, d0 + d)[d % 16 * 32 + j % 32]});
          total += weight * x;
        }
        float& to = c[in_block(d, i)];
        to = summed.first ? total : to + total;
      }
  }

  float weight_of(Bf16* weights, int64_t i, int64_t j) {
    float x = 0;
    for (int part = 0; part < kParts; ++part)
      x += widen(BFloat16{
          e.weight_tile(weights, part, j - summed.at, i)[j % 16 * 32 + i % 16 * 2 + i % 32 / 16]});
    return x;
  }
};

}  // namespace
