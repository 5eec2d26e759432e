// The backward pass's gradients of scores, on AVX-512: p <- 2^(s - lse) and ds <- p (dp - delta),
// as operands of products. As in the forward pass a vector of scores belongs to one key and 16
// queries.
#pragma once

#include <initializer_list>

#include "bf16_products.h"

namespace {

// n queries and keys [j0, j1) of those from at, with their p and ds, which are 0 from columns_end
// on. Where skip_rows or skip_keys, q and do or k are multiplied one by one and, where edge, only
// where they are seen.
struct Slice {
  int64_t at, j0, j1, columns_end, n;
  bool first, last;  // of those of the block of queries
  bool skip_rows, skip_keys, edge;
  Bf16 *p, *ds, *ds_pairs;
  Tiled<Bf16> q_pairs, dout_pairs;
};

// p and ds of 32 queries from row and 32 keys from key, in 16 units of two keys, an equal share
// beside each of calls products; 0 for those that are not there. Where kEdge, some scores are
// hidden. Gradients of what is added to
// scores need ds as it is: it is left in place of dp.
template <class E, bool kEdge, class Extras>
struct Bf16Gradients {
  using V = Avx512;
  static constexpr int kParts = E::kParts;

  E& e;
  const Slice& slice;
  const int64_t row, key;  // key: of the slice
  const bool two_queries;  // whether the second 16 are there
  const int64_t there;     // units
  const float scale2;
  Shares shares;
  const Extras extras;
  int64_t done = 0;

  Bf16Gradients(E& e, const Slice& slice, int64_t row, int64_t key, int64_t last, float scale2,
                int64_t calls, const Extras& extras)
      : e(e),
        slice(slice),
        row(row),
        key(key - slice.at),
        two_queries(slice.n - row > 16),
        there((last - key) / 2),
        scale2(scale2),
        shares(there, calls),
        extras(extras) {
    if (there < 16) clear();
  }

  void operator()() { units(shares.next()); }
  void finish() { units(there); }

  // Keys that are not there: to the end of their tile of p and ds, whose next one is not
  // multiplied, and of all pairs of ds.
  void clear() {
    const __m512i zero = _mm512_setzero_si512();
    const int64_t first = 2 * there;
    for (int64_t part = 0; part < kParts; ++part) {
      for (Bf16* base : {slice.p, slice.ds}) {
        Bf16* tile = E::weight_tile(base, part, key + first, row);
        for (int64_t j = first % 16; j % 16; ++j) _mm512_storeu_si512(tile + j * 32, zero);
      }
      for (int64_t half = 0; half <= two_queries; ++half) {
        Bf16* pairs = E::ds_pair_tile(slice.ds_pairs, part, key, row + 16 * half);
        for (int64_t pair = there; pair < 16; ++pair) _mm512_storeu_si512(pairs + pair * 32, zero);
      }
    }
  }

  void units(int64_t until) {
    __m512 scale[2], factor[2], delta[2], offset[2];
    __mmask16 seeing[2];  // a row that sees nothing may meet a v that is not finite
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) {
      factor[t] = V::load(e.fraction + row + 16 * t);
      delta[t] = V::load(e.delta + row + 16 * t);
      seeing[t] = _mm512_cmp_ps_mask(factor[t], V::zero(), _CMP_NEQ_UQ);
      offset[t] = V::load(e.offset + row + 16 * t);
      scale[t] = _mm512_mask_mov_ps(V::set1(scale2), e.large_rows(row + 16 * t),
                                    V::set1(static_cast<float>(kLog2e)));
    }
    for (; done < until; ++done) {
      const uint64_t unit = done, j = key + 2 * done;
      const uint64_t at = unit / 8 * 512 + unit % 8 * 32;
      __m512 p[2][2], g[2][2];  // [16 queries][key]
#pragma GCC unroll 2
      for (int t = 0; t < 2; ++t)
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          if (t == 1 && !two_queries) {
            p[t][h] = g[t][h] = V::zero();
            continue;
          }
          const __m512 x = V::load(e.s + at + 256 * t + 16 * h);
          __m512 dp = V::load(e.dp + at + 256 * t + 16 * h);
          const __mmask16 kept = extras.dropout ? e.kept.of(t)[2 * unit + h] : 0xffff;
          if (extras.dropout) dp = _mm512_maskz_mul_ps(kept, dp, V::set1(extras.kept_scale));
          p[t][h] = V::mul(exponential<kParts>(x, scale[t], offset[t], seeing[t]), factor[t]);
          g[t][h] = _mm512_maskz_mul_ps(seeing[t], p[t][h], V::sub(dp, delta[t]));
          if (kEdge) {  // the factor of a row with NaN is NaN
            p[t][h] = V::zero_where_hidden(p[t][h], x);
            g[t][h] = V::zero_where_hidden(g[t][h], x);
          }
          if (extras.dropout) p[t][h] = _mm512_maskz_mov_ps(kept, p[t][h]);
          if (extras.added) V::store(e.dp + at + 256 * t + 16 * h, g[t][h]);
          if (extras.gains)
            g[t][h] =
                _mm512_maskz_mul_ps(seeing[t], g[t][h], V::load(e.gains + at + 256 * t + 16 * h));
        }
      Bf16 *p_line = E::weight_tile(slice.p, 0, j, row) + j % 16 * 32,
           *ds_line = E::weight_tile(slice.ds, 0, j, row) + j % 16 * 32,
           *pair_line = E::ds_pair_tile(slice.ds_pairs, 0, j, row) + j % 32 * 16;
#pragma GCC unroll 3
      for (int part = 0; part < kParts; ++part) {
        __m512 rp[2][2], rg[2][2];
#pragma GCC unroll 4
        for (int x = 0; x < 4; ++x) {
          rp[x / 2][x % 2] = take_part<kParts>(p[x / 2][x % 2], part);
          rg[x / 2][x % 2] = take_part<kParts>(g[x / 2][x % 2], part);
        }
        const int64_t next = part * kTile;
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          _mm512_storeu_si512(p_line + next + 32 * h, alternate(rp[0][h], rp[1][h]));
          _mm512_storeu_si512(ds_line + next + 32 * h, alternate(rg[0][h], rg[1][h]));
          _mm512_storeu_si512(pair_line + next + h * (E::kSlice / 32 * kParts * kTile),
                              alternate(rg[h][0], rg[h][1]));
        }
      }
    }
  }
};

}  // namespace
