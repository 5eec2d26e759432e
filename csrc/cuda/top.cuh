// The largest weights of a row, with the places of their keys, in the registers of the four lanes
// that share the row.
#pragma once

#include "products.cuh"
#include "scores.cuh"

namespace clinattn {

// Descending; lane l of the four has slots 4 l to 4 l + 3. The last `size` slots are used: infinity
// fills the others.
struct Top {
  static constexpr int kSlots = 4;
  static_assert(4 * kSlots == kMostTop);

  float value[kSlots];
  int place[kSlots];

  // The slot of the lane's first number among those that are used, negative before them
  static CLINATTN_DEVICE int first_slot(int size) {
    return lane_index() % 4 * kSlots + size - static_cast<int>(kMostTop);
  }
  // free: what slots without a key have, 0 or NaN; nothing takes the place of NaN.
  CLINATTN_DEVICE void clear(int size, float free) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      value[i] = first_slot(size) + i < 0 ? kInfinity : free;
      place[i] = -1;
    }
  }
  // Inserts behind all that are as large. A weight of 0 has no place.
  CLINATTN_DEVICE void insert(float x, int at) {
    const int lane = lane_index();
    const float before = shuffle(value[kSlots - 1], lane - 1);
    const int before_place = shuffle(place[kSlots - 1], lane - 1);
#pragma unroll
    for (int i = kSlots - 1; i >= 0; --i) {
      const float left = i > 0 ? value[i - 1] : before;
      const int left_place = i > 0 ? place[i - 1] : before_place;
      const bool is_first = i == 0 && lane % 4 == 0;
      if (!(x > value[i])) continue;
      const bool moves = !is_first && x > left;
      value[i] = moves ? left : x;
      place[i] = moves ? left_place : at;
    }
  }
  // The last weight, for all four lanes
  CLINATTN_DEVICE float least() const { return shuffle(value[kSlots - 1], lane_index() | 3); }
  // Writes the list to the results of the row that lse has at `at`.
  CLINATTN_DEVICE void write(const SummaryParams& s, int64_t at) const {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int slot = first_slot(static_cast<int>(s.top)) + i;
      if (slot < 0) continue;
      static_cast<float*>(s.values)[at * s.top + slot] = value[i];
      if (s.places) s.places[at * s.top + slot] = place[i];
    }
  }
};

// Takes row r of the weights of a tile, whose keys start at k0, into the largest; least is the last
// of them. A weight that is taken becomes 0.
template <int kM, int kN>
CLINATTN_DEVICE void take_largest(Sums<kM, kN>& weights, int r, int k0, Top& top, float& least) {
  const int lane = lane_index();
  // f(weight, column) for those of the lane
  const auto each = [&](const auto& f) {
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int side = 0; side < 2; ++side)
        f(weights.x[r / 2][n][r % 2 * 2 + side], 8 * n + fragment_column(lane, side));
  };
  for (;;) {
    bool more = false;
    each([&](float& x, int) { more |= x > least; });
    if (!any_in_warp(more)) return;
    float best = 0;
    int column = 8 * kN;
    each([&](float& x, int at) {
      if (x > best) best = x, column = at;
    });
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      const float other = shuffle_xor(best, lanes);
      const int other_column = shuffle_xor(column, lanes);
      if (other > best || (other == best && other_column < column))
        best = other, column = other_column;
    }
    if (!(best > least)) best = 0;
    top.insert(best, k0 + column);
    least = top.least();
    each([&](float& x, int at) {
      if (at == column) x = 0;
    });
  }
}

}  // namespace clinattn
