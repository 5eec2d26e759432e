// The requirements of the algorithm on a vector type, and on an engine: products and exponentials
// of one pass, with tiles of its own size.
#pragma once

#include <stdint.h>

#include <concepts>

#include "../attention.h"
#include "extras.h"
#include "forward_step.h"
#include "normaliser.h"
#include "rows.h"

namespace {

// kWidth numbers T in an F. Comparisons with NaN are false.
template <class V>
concept Vector = requires(typename V::F x, typename V::T t, typename V::T* to,
                          const typename V::T* from, int64_t stride, uint32_t bits) {
  requires V::kWidth >= 4;
  { V::load(from) } -> std::same_as<typename V::F>;
  { V::set1(t) } -> std::same_as<typename V::F>;
  { V::zero() } -> std::same_as<typename V::F>;
  V::store(to, x);
  { V::add(x, x) } -> std::same_as<typename V::F>;
  { V::sub(x, x) } -> std::same_as<typename V::F>;
  { V::mul(x, x) } -> std::same_as<typename V::F>;
  { V::div(x, x) } -> std::same_as<typename V::F>;
  { V::fma(x, x, x) } -> std::same_as<typename V::F>;  // a b + c
  { V::max(x, x) } -> std::same_as<typename V::F>;     // the second where the first is NaN
  { V::abs(x) } -> std::same_as<typename V::F>;
  { V::exp2(x) } -> std::same_as<typename V::F>;
  { V::hsum(x) } -> std::same_as<typename V::T>;
  { V::reaching(x, t) } -> std::same_as<uint32_t>;
  // by a mask that is -inf where it hides
  { V::hidden_where_hidden(x, x) } -> std::same_as<typename V::F>;
  { V::zero_where_hidden(x, x) } -> std::same_as<typename V::F>;
  { V::load_as(static_cast<const BFloat16*>(nullptr)) } -> std::same_as<typename V::F>;
  { V::load_as(static_cast<const Float16*>(nullptr)) } -> std::same_as<typename V::F>;
  V::store_as(static_cast<BFloat16*>(nullptr), x);
  V::store_as(static_cast<Float16*>(nullptr), x);
  V::transpose(from, stride, to, stride);  // kWidth x kWidth
  // the numbers that dropout draws: kWidth words of 32 bits
  { V::set_words(bits) } -> std::same_as<typename V::Words>;
};

// A vector for products without tiles, in blocks of kMicroRows x kMicroVectors accumulators
template <class V>
concept FmaVector =
    Vector<V> && requires(typename V::F x, typename V::Sum sum, const typename V::T* from,
                          typename V::T* to, int64_t stride, uint32_t bits) {
      requires V::kMicroRows > 0 && V::kStrip == V::kMicroVectors* V::kWidth;
      requires V::kForwardRows % V::kWidth == 0 && V::kForwardKeys % V::kStrip == 0;
      requires V::kBackwardRows % V::kWidth == 0 && V::kBackwardKeys % V::kStrip == 0;
      { V::no_sum() } -> std::same_as<typename V::Sum>;
      { V::add_product(x, x, sum) } -> std::same_as<typename V::Sum>;
      { V::rounded(sum) } -> std::same_as<typename V::F>;
      { V::max_rows(from) } -> std::same_as<typename V::F>;  // of kWidth x kWidth
      { V::sum_rows(from) } -> std::same_as<typename V::F>;
      { V::zero_where_dropped(x, bits) } -> std::same_as<typename V::F>;
      { V::hidden_but(x, stride, stride) } -> std::same_as<typename V::F>;  // -inf but in a range
      V::transpose_rows(&from, stride, stride, to, stride);  // of kWidth rows, the last ones zeros
    };

// Both passes: kRows queries by kKeys keys of a tile, kBlock keys packed at a time, columns that
// begin at multiples of kBegin and end at multiples of kEnd. A Session lives as long as a batch of
// tasks; a Cover hides scores and adds terms to them.
template <class E>
concept Engine = Vector<typename E::V> && std::same_as<typename E::T, typename E::V::T> &&
                 requires(E e, int64_t i, const void* const* rows, clinattn::DType type) {
                   typename E::Session;
                   typename E::Cover;
                   requires E::kRows > 0 && E::kKeys % E::kBlock == 0;
                   requires E::kBegin > 0 && E::kEnd > 0 && E::kBegin % E::kEnd == 0;
                   e.put_keys(i, i, rows, rows, type);
                   {
                     e.outgrown()
                   } -> std::same_as<bool>;  // keys are to be packed once more, after lower()
                   { e.gain_at(i, i) } -> std::same_as<typename E::T*>;
                   e.kept;
                 };

// Scores alone: kRows queries by kKeys keys of a tile, kBlock keys packed at a time, columns that
// begin at multiples of kBegin and end at multiples of kEnd. A vector of scores belongs to one row.
template <class E>
concept ScoreEngine = Vector<typename E::V> && std::same_as<typename E::T, typename E::V::T> &&
                      requires(E e, int64_t i, const void* const* rows, clinattn::DType type) {
                        typename E::Session;
                        typename E::Cover;
                        requires E::kRows > 0 && E::kKeys % E::kBlock == 0;
                        requires E::kBegin > 0 && E::kEnd > 0 && E::kBegin % E::kEnd == 0;
                        e.put_queries(i, i, rows, type, true);
                        e.put_keys(i, i, rows, type);
                        e.multiply(i, i, i, i, i);
                        { e.segment(i, i) } -> std::same_as<typename E::T*>;
                      };

template <class E>
concept ForwardEngine =
    Engine<E> && requires(E e, int64_t i, const void* const* rows, clinattn::DType type,
                          typename E::T t, typename E::T* o) {
      requires E::kAligned % E::kKeys == 0 && E::kChunk > 0;
      { e.panel } -> std::convertible_to<int64_t>;    // keys packed together
      { e.o_width } -> std::convertible_to<int64_t>;  // of a row of o
      e.begin_task();
      e.put_queries(i, i, rows, type, true);
      e.begin_panel();
      e.lower(o, i);
      { e.output(o, i) } -> std::convertible_to<const typename E::T*>;
      { e.normaliser(o, i, t) } -> std::same_as<typename E::T>;
    };

template <class E>
concept BackwardEngine =
    Engine<E> && requires(E e, int64_t i, const void* row, clinattn::DType type, typename E::T t,
                          typename E::T* acc, Units<typename E::T> units,
                          bool (*asked)(int64_t, int64_t, int64_t, int64_t), void (*complete)(),
                          void (*prefetch)(int64_t, int64_t)) {
      { E::kRaises } -> std::convertible_to<bool>;   // packs by factors of the largest rows
      { E::kDelayed } -> std::convertible_to<bool>;  // calls complete later than differentiate
      e.begin_tile(i);
      e.lower();
      e.begin_block();
      e.put_row(i, row, row, type, true, t, t, true, t);
      e.end_block(i);
      e.differentiate(i, i, i, units, asked, asked, true, true, true, complete, prefetch,
                      NoExtras{});
      e.finish(complete);
      e.fold(i, acc, i, true);
      { e.dk_row(i) } -> std::same_as<const typename E::T*>;
      { e.dv_row(i) } -> std::same_as<const typename E::T*>;
      { e.finite_keys() } -> std::same_as<bool>;
      { e.finite_rows() } -> std::same_as<bool>;
    };

}  // namespace
