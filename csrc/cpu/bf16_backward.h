// The backward pass's products of bf16 parts by a multiplier M (TileProducts, DotProducts), its
// gradients of scores on AVX-512. As in the forward pass a vector of scores belongs to one key and
// 16 queries. In time, with b the block of 32 queries and 32 keys at hand, and slices of kSlice
// keys of all the queries:
//
//   products  | q k^T, do v^T of b + 2 | dv, dk, dq^T of the slice before, as many as are due | ...
//   vectors   | p and ds of b, spread over both                                               |
//
// Two blocks are multiplied before the first (kAhead): scores of three are in flight, p and ds of
// two slices. The last slice of a call waits for the products of the next call, or for finish. Of
// one part (not kBeside) a slice is summed as soon as it has its p and ds, and one is in flight.
#pragma once

#include <string.h>

#include <initializer_list>

#include "bf16_factors.h"
#include "bf16_sums.h"
#include "cover.h"
#include "normaliser.h"
#include "philox.h"

namespace {

template <class M>
struct Bf16Backward {
  using Multiplier = M;
  static constexpr int kParts = M::kParts;
  using V = Avx512;
  using T = float;
  using Session = typename M::Session;
  using Cover = ColumnCover<Bf16Backward>;
  static constexpr bool kRaises = kParts > 1;
  static constexpr bool kDelayed = true;  // what differentiate leaves for later is called complete
  // Queries of a block and keys of a tile. Without tile registers smaller blocks, which fit windows
  // better, cost nothing, and a tile of 768 keys is packed and folded less often.
  static constexpr int64_t kRows = M::kDelayed ? 128 : 64, kKeys = M::kDelayed ? 512 : 768;
  static constexpr int64_t kBlock = 32;                      // keys packed at a time
  static constexpr int64_t kBegin = 32, kEnd = 2;            // where columns may begin and end
  static constexpr int64_t kSlice = kParts == 1 ? 128 : 64;  // keys whose p and ds are kept at once
  static constexpr int64_t kWeights = kParts * kRows * kSlice;  // elements of p or ds
  // Of more than one part a slice is summed beside the next one's gradients. Of one part there are
  // more vector instructions than products for them to stand beside: it is summed at once, while p
  // and ds are in L1.
  static constexpr bool kBeside = kParts > 1;
  static constexpr int64_t kHalves = kBeside ? 2 : 1;  // slices, and blocks of queries, kept

  // Blocks multiplied ahead of the one at hand, and buffers of their scores: what tile registers
  // have just multiplied is not stored yet.
  static constexpr int64_t kAhead = M::kDelayed ? 2 : 1, kScores = kAhead + 1;

  const int64_t head_dim, value_dim;
  const int64_t width, v_width;  // these two padded to two tiles
  // Tile by tile, the parts of a tile side by side; sizes at D 64 and one part. That is 0.7 MB of
  // L2; of three parts 1.5 MB, and more than L2 holds at D 128.
  Tiled<Bf16> k, v, kt;             // K and V (keys, d), K^T (d, keys) as A operands: 64 KB each
  Tiled<Bf16> q, dout;              // Q^T and dO^T (d, queries) as B operands: 16 KB each
  Tiled<Bf16> q_pairs, dout_pairs;  // Q and dO (queries, d) as B operands: 16 KB each, kHalves
  float *s_all, *dp_all;            // 2 x 2 tiles (keys, queries), kScores buffers: 4 KB each
  Bf16 *p, *ds;                     // (keys, queries) of a slice as A operands: 32 KB each, kHalves
  Bf16* ds_pairs;                   // ds (keys, queries) of a slice as B operand: 32 KB, kHalves
  Tiled<float> dk, dv;              // blocks of 32 keys and 32 d: 128 KB each
  float* dqt;                       // dq^T, blocks of 32 d and 32 queries: 32 KB
  float* sums;                      // three blocks that wait to be added to dk or dv
  Bf16 *stage, *stage2, *pair;      // rows of k and q, and of do, on their way into tiles
  float* out;                       // (width + v_width): a row of dk and one of dv on their way out
  float *offset, *fraction, *delta;  // (kRows): p = fraction 2^(s + offset), offset an integer
  float* large;                      // (kRows): the normaliser of a large row, else 0
  float *s, *dp;                     // the buffers at hand
  Bf16Factors factors;               // of rows as they are packed
  float unit = 1;                    // what scores are multiples of
  int64_t step_key;                  // their first key
  float* gains;                      // gains of the scores, laid out as s: 4 KB
  ColumnKept<V> kept;                // by dropout, of those
  Contents keys, values, queries, gradients;  // what rows of k, v, q and do hold

  Bf16Sums<Bf16Backward> summing;
  int64_t slices = 0, blocks = 0;  // slices and blocks of queries so far

  bool finite_keys() const { return keys.finite; }
  bool finite_rows() const { return queries.finite && gradients.finite; }

  Bf16Backward(Arena& a, int64_t head_dim, int64_t value_dim)
      : head_dim(head_dim),
        value_dim(value_dim),
        width(round_up(head_dim, 32)),
        v_width(round_up(value_dim, 32)),
        summing(*this) {
    const auto tiles = [&](int64_t rows, int64_t width) {
      return Tiled<Bf16>{a.take<Bf16>(kParts * rows * width), width};
    };
    k = tiles(kKeys, width);
    v = tiles(kKeys, v_width);
    kt = tiles(kKeys, width);
    q = tiles(kRows, width);
    dout = tiles(kRows, v_width);
    q_pairs = tiles(kHalves * kRows, width);
    dout_pairs = tiles(kHalves * kRows, v_width);
    s_all = a.take<float>(kScores * 32 * 32);
    dp_all = a.take<float>(3 * 32 * 32);
    p = a.take<Bf16>(kHalves * kWeights);
    ds = a.take<Bf16>(kHalves * kWeights);
    ds_pairs = a.take<Bf16>(kHalves * kWeights);
    dk = {a.take<float>(kKeys * width), width};
    dv = {a.take<float>(kKeys * v_width), v_width};
    dqt = a.take<float>(kRows * width);
    sums = a.take<float>(3 * 32 * 32);
    stage = a.take<Bf16>(kParts * kRows * width);
    stage2 = a.take<Bf16>(kParts * kRows * v_width);
    pair = a.take<Bf16>(kTile);
    out = a.take<float>(width + v_width);
    offset = a.take<float>(kRows);
    fraction = a.take<float>(kRows);
    delta = a.take<float>(kRows);
    large = a.take<float>(kRows);
    gains = a.take<float>(32 * 32);
  }

  // 16 keys, 32 d
  static Bf16* key_tile(const Tiled<Bf16>& x, int64_t part, int64_t key, int64_t d) {
    return x.at + ((key / 16 * (x.width / 32) + d / 32) * kParts + part) * kTile;
  }
  // 16 d, 32 keys
  Bf16* kt_tile(int64_t part, int64_t key, int64_t d) {
    return kt.at + ((key / 32 * (width / 16) + d / 16) * kParts + part) * kTile;
  }
  // 32 d, 16 queries
  static Bf16* query_tile(const Tiled<Bf16>& x, int64_t part, int64_t i, int64_t d) {
    return x.at + ((i / 16 * (x.width / 32) + d / 32) * kParts + part) * kTile;
  }
  // 32 queries, 16 d
  static Bf16* query_pair_tile(const Tiled<Bf16>& x, int64_t part, int64_t i, int64_t d) {
    return x.at + ((i / 32 * (x.width / 16) + d / 16) * kParts + part) * kTile;
  }
  // 16 keys of the slice, 32 queries
  static Bf16* weight_tile(Bf16* base, uint64_t part, uint64_t key, uint64_t i) {
    return base + ((key / 16 * (kRows / 32) + i / 32) * kParts + part) * kTile;
  }
  // 32 keys of the slice, 16 queries
  static Bf16* ds_pair_tile(Bf16* base, uint64_t part, uint64_t key, uint64_t i) {
    return base + ((i / 16 * (kSlice / 32) + key / 32) * kParts + part) * kTile;
  }
  // 32 keys, 32 d as 2 x 2 tiles
  static float* gradient_block(const Tiled<float>& x, int64_t key, int64_t d) {
    return x.at + (key / 32 * (x.width / 32) + d / 32) * 1024;
  }
  float* dqt_block(int64_t i, int64_t d) { return dqt + (i / 32 * (width / 32) + d / 32) * 1024; }
  // The scores of 16 queries with one key of the tile, which the buffer at hand holds
  float* column(int64_t row, int64_t key) { return s + in_block(key - step_key, row); }
  float* gain_at(int64_t row, int64_t key) { return gains + in_block(key - step_key, row); }

  // See Bf16Factors.
  void begin_task(uint32_t q_bits, uint32_t do_bits, int64_t count) {
    factors = Bf16Factors::of(q_bits, do_bits, max64(count, kKeys));
    unit = factors.scores();
  }
  bool outgrown() const {
    return factors.outgrown(keys.size(), values.size(), max64(width, v_width));
  }
  // All is packed as it is.
  void lower() {
    factors = {};
    unit = 1;
  }

  void begin_tile(int64_t count) {
    keys = values = {};
    for (const Tiled<float>& x : {dk, dv})
      memset(x.at, 0, round_up(count, 32) * x.width * sizeof(float));
  }

  // n keys from j0 of the tile, at most kBlock; a null row is hidden from all and packed as zeros.
  // Past n only kt needs them, whose products with a ds of 0 count.
  void put_keys(int64_t j0, int64_t n, const void* const* k_rows, const void* const* v_rows,
                DType dtype) {
    for (int64_t j = 0; j < kBlock; ++j)
      keys.add(split_row<kParts>({stage + j * width, kBlock * width, 32}, k_rows[j], dtype,
                                 head_dim, width, factors.raised));
    for (int64_t j = 0; j < n; ++j) {
      const int64_t line = j % 16 * 32;
      values.add(split_row<kParts>({key_tile(v, 0, j0 + j, 0) + line, kTile, kParts * kTile},
                                   v_rows[j], dtype, value_dim, v_width, factors.raised));
      for (int64_t part = 0; part < kParts; ++part)
        for (int64_t d = 0; d < width; d += 32)
          copy_line(key_tile(k, part, j0 + j, d) + line, stage + (part * kBlock + j) * width + d);
    }
    for (int64_t part = 0; part < kParts; ++part) {
      const int64_t at = part * kBlock * width;
      for (int64_t d = 0; d < width; d += 16) {
        pack_paired<false>(pair, stage + at + d, width);
        pack_transposed(kt_tile(part, j0, d), pair, 32);
      }
    }
  }

  void begin_block() { queries = gradients = {}; }

  void put_row(int64_t i, const void* q_row, const void* do_row, DType dtype, bool negate,
               float lse2, float low, bool is_large, float row_delta) {
    queries.add(split_row<kParts>({stage + i * kParts * width, width, 32}, q_row, dtype, head_dim,
                                  width, negate ? -factors.raised : factors.raised));
    gradients.add(split_row<kParts>({stage2 + i * kParts * v_width, v_width, 32}, do_row, dtype,
                                    value_dim, v_width, factors.gradient));
    offset[i] = is_large ? 0 : lse2;
    large[i] = is_large ? lse2 : 0;
    fraction[i] = low;
    delta[i] = row_delta * factors.ds();
  }

  // offset and fraction <- those of the normalisers that put_row has left there; a row that sees
  // nothing has a fraction of 0.
  void split_normalisers(int64_t rows) {
    for (int64_t i = 0; i < rows; i += 16) {
      const __m512 lse2 = V::load(offset + i), low = V::load(fraction + i);
      const __mmask16 seeing = _mm512_cmp_ps_mask(lse2, V::set1(__builtin_inff()), _CMP_NEQ_UQ);
      const __m512 whole =
          _mm512_maskz_roundscale_ps(seeing, lse2, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
      V::store(offset + i, V::sub(V::zero(), whole));
      V::store(fraction + i,
               _mm512_maskz_mov_ps(seeing, V::exp2(V::sub(V::sub(whole, lse2), low))));
    }
  }

  Tiled<Bf16> pairs_of_block(const Tiled<Bf16>& x) const {
    return {x.at + blocks % kHalves * (kParts * kRows * x.width), x.width};
  }

  // Packs the staged rows; those from n to the next pair of tiles become zeros that give nothing.
  void end_block(int64_t n) {
    const int64_t rows = round_up(n, 32);
    for (int64_t i = n; i < rows; ++i)
      put_row(i, nullptr, nullptr, DType::kFloat32, false, __builtin_inff(), 0, false, 0);
    split_normalisers(rows);
    pack_rows(stage, n, q, pairs_of_block(q_pairs));
    pack_rows(stage2, n, dout, pairs_of_block(dout_pairs));
  }

  static void pack_rows(const Bf16* staged, int64_t n, const Tiled<Bf16>& transposed,
                        const Tiled<Bf16>& pairs) {
    const int64_t ld = kParts * pairs.width;
    for (int64_t part = 0; part < kParts; ++part) {
      const Bf16* rows = staged + part * pairs.width;
      for (int64_t i = 0; i < n; i += 16)
        for (int64_t d = 0; d < pairs.width; d += 32)
          pack_transposed(query_tile(transposed, part, i, d), rows + i * ld + d, ld);
      for (int64_t i = 0; i < n; i += 32)
        for (int64_t d = 0; d < pairs.width; d += 16)
          pack_paired<true>(query_pair_tile(pairs, part, i, d), rows + i * ld + d, ld);
    }
  }

  // Goes through blocks of 32 queries and 32 keys of [begin, end): slice by slice, in one by
  // queries, then keys.
  struct Place {
    int64_t begin, columns_end, end, n, rows, at, i, j;
    Place(int64_t n, int64_t begin, int64_t columns_end)
        : begin(begin),
          columns_end(columns_end),
          end(round_up(columns_end, 32)),
          n(n),
          rows(round_up(n, 32)),
          at(begin / kSlice * kSlice),
          i(0),
          j(begin) {}
    int64_t j0() const { return max64(begin, at); }
    int64_t j1() const { return min64(end, at + kSlice); }
    int64_t seen_rows() const { return min64(32, n - i); }
    int64_t columns() const { return min64(32, columns_end - j); }
    int64_t slice_blocks() const { return rows / 32 * ((j1() - j0()) / 32); }
    void next() {
      j += 32;
      if (j < j1()) return;
      i += 32;
      if (i == rows) at += kSlice, i = 0;
      j = j0();
    }
  };

  // dk, dv and dq^T of a block of n queries with columns [begin, end). is_edge(i, rows, j, end)
  // says whether some of rows queries from i does not see some key of [j, end); hide gives -inf
  // there and says whether it has made the scores natural. While tiles multiply, vector
  // instructions turn scores into p and ds; so a slice is summed while the next one's scores are
  // multiplied, and the last is left for the next call or finish. complete() is called when all of
  // the call before has been summed.
  template <class IsEdge, class Hide, class Complete, class Prefetch, class Extras>
  void differentiate(int64_t n, int64_t begin, int64_t end, Units<float> units,
                     const IsEdge& is_edge, const Hide& hide, bool some_edge, bool skip_rows,
                     bool skip_keys, const Complete& complete, const Prefetch& prefetch,
                     const Extras& extras) {
    const double products = static_cast<double>(values.size()) * factors.raised *
                            (static_cast<double>(gradients.size()) * factors.gradient);
    const bool tiny = kRaises && (keys.small || queries.small || values.small || gradients.small ||
                                  (products > 0 && products < kSmall));
    const bool small_scores = (keys.small && !(queries.size() < kOrdinary)) ||
                              (queries.small && !(keys.size() < kOrdinary));
    const bool odd_scores = kRaises && (small_scores || !(keys.finite && queries.finite));
    const bool odd_dp = kRaises && !(values.finite && gradients.finite);
    skip_rows |= tiny || (kRaises && !finite_rows());
    skip_keys |= tiny || (kRaises && !finite_keys());
    if (Extras::kAny) end = round_up(end, 32);
    Place ahead(n, begin, end), here = ahead;
    const int64_t count = ahead.rows / 32 * ((ahead.end - begin) / 32);
    int64_t waiting = -1;  // the block whose dp is not stored yet
    const int64_t products_of_a_block =
        summing.products.template calls<AllProducts<kParts>>(width / 32) +
        summing.products.calls(v_width / 32);
    const auto multiply = [&](int64_t b, auto& work) {
      const int64_t step = kParts * kTile, next = width / 32 * step, v_next = v_width / 32 * step;
      const bool two_keys = ahead.columns() > 16, two_queries = ahead.seen_rows() > 16;
      // scores as the forward pass has them
      summing.template multiply<false, true, AllProducts<kParts>>(
          {key_tile(k, 0, ahead.j, 0), next, kTile, step, two_keys},
          {query_tile(q, 0, ahead.i, 0), next, kTile, step, two_queries}, width / 32,
          s_all + b % kScores * 1024, work);
      summing.template multiply<false, true>(
          {key_tile(v, 0, ahead.j, 0), v_next, kTile, step, two_keys},
          {query_tile(dout, 0, ahead.i, 0), v_next, kTile, step, two_queries}, v_width / 32,
          dp_all + b % (1 + kHalves) * 1024, work);
      waiting = b;
      ahead.next();
    };
    NoWork none;
    for (int64_t b = 0; b < min64(kAhead, count); ++b) multiply(b, none);
    Slice slice = make_slice(here, n, some_edge, skip_rows, skip_keys);
    int64_t credit = 0;
    for (int64_t b = 0; b < count; ++b, here.next()) {
      if (here.at != slice.at) {
        summing.next(slice, complete);
        slice = make_slice(here, n, some_edge, skip_rows, skip_keys);
        credit = 0;
      }
      if (waiting == b) summing.products.finish();
      s = s_all + b % kScores * 1024;
      dp = dp_all + b % (1 + kHalves) * 1024;
      step_key = here.j;
      if (kBeside) prefetch(b, count);
      const int64_t i = here.i, j = here.j, seen = here.seen_rows(), last = j + here.columns();
      if (odd_scores)
        mend<kParts>(s, key_tile(k, 0, j, 0), query_tile(q, 0, i, 0), width, small_scores);
      if (tiny || odd_dp)
        mend<kParts>(dp, key_tile(v, 0, j, 0), query_tile(dout, 0, i, 0), v_width, tiny);
      const bool edge = is_edge(i, seen, j, last);
      const auto scales =
          edge && hide(i, seen, j, last) ? Units<float>::of_natural() : units.times(unit);
      for (int64_t half = 0; half < 32; half += 16)
        if (const __mmask16 lanes = large_rows(i + half))
          take_off_normaliser(i + half, half, last - j, lanes, scales.natural);
      // sums due by now, if those of the slice before are to end with this one
      credit += summing.count();
      int64_t due = 0, calls = b + kAhead < count ? products_of_a_block : 0;
      for (; due < summing.left() && credit >= here.slice_blocks(); ++due) {
        credit -= here.slice_blocks();
        calls += summing.calls(due);
      }
      const auto beside = [&](auto&& work) {
        if (b + kAhead < count) multiply(b + kAhead, work);
        for (; due > 0; --due) {
          summing.multiply_next(work);
          waiting = -1;
        }
        work.finish();
      };
      if constexpr (Extras::kAny) {
        if (extras.dropout) extras.draw(i, 32, j, j + 32);
      }
      if (edge || Extras::kAny) {
        beside(Bf16Gradients<Bf16Backward, true, Extras>(*this, slice, i, j, last, scales.base2,
                                                         calls, extras));
      } else {
        beside(Bf16Gradients<Bf16Backward, false, Extras>(*this, slice, i, j, last, scales.base2,
                                                          calls, extras));
      }
      if constexpr (Extras::kAny) {
        if (extras.added) add_gradients(i, seen, j, extras);
      }
    }
    summing.next(slice, complete);
    ++blocks;
  }

  // Returns which of 16 rows from i are large, a bit each.
  __mmask16 large_rows(int64_t i) const {
    return _mm512_cmp_ps_mask(V::load(large + i), V::zero(), _CMP_NEQ_UQ);
  }

  // s <- natural scores less the normaliser, in `lanes` of 16 rows from i, for the keys of the
  // buffer at hand. The rows begin at `half` there.
  void take_off_normaliser(int64_t i, int64_t half, int64_t keys, __mmask16 lanes, float natural) {
    for (int64_t key = 0; key < keys; ++key) {
      float* at = s + in_block(key, half);
      const __m512 x = V::load(at);
      V::store(at, _mm512_mask_sub_ps(x, lanes, V::mul(x, V::set1(natural)), V::load(large + i)));
    }
  }

  // Sums ds of a block, which lies in place of dp, into the gradients of what is added to scores.
  template <class Extras>
  void add_gradients(int64_t i, int64_t n, int64_t j, const Extras& extras) {
    alignas(64) float rows[32 * 32];
    for (int64_t r = 0; r < 32; r += 16)
      for (int64_t c = 0; c < 32; c += 16)
        V::transpose(dp + in_block(c, r), 16, rows + r * 32 + c, 32);
    if (kRaises)
      for (int64_t at = 0; at < 32 * 32; at += 16)
        V::store(rows + at, V::mul(V::load(rows + at), V::set1(1 / factors.ds())));
    extras.add(i, n, j, j + 32, rows, 32);
  }

  // Sums what is left.
  template <class Complete>
  void finish(const Complete& complete) {
    summing.next({}, complete);
  }

  Slice make_slice(const Place& at, int64_t n, bool edge, bool skip_rows, bool skip_keys) {
    const int64_t half = slices++ % kHalves * (kWeights);
    return {at.at,
            at.j0(),
            at.j1(),
            min64(at.columns_end, at.j1()),
            n,
            at.j0() == at.begin,
            at.j1() == at.end,
            skip_rows,
            skip_keys,
            edge,
            p + half,
            ds + half,
            ds_pairs + half,
            pairs_of_block(q_pairs),
            pairs_of_block(dout_pairs)};
  }

  // acc <- dq where set, else acc + dq; rows of acc are ld apart
  void fold(int64_t n, float* acc, int64_t ld, bool set) {
    const __m512 unit_of_dq = V::set1(1 / factors.dq());
    for (int64_t i = 0; i < n; i += 16)
      for (int64_t d = 0; d < round_up(head_dim, 16); d += 16) {
        alignas(64) float rows[256];
        V::transpose(dqt_block(i, d) + in_block(d % 32, i % 32), 16, rows, 16);
        for (int64_t r = 0; r < min64(16, n - i); ++r) {
          float* to = acc + (i + r) * ld + d;
          const __m512 x = V::mul(V::load(rows + r * 16), unit_of_dq);
          V::store(to, set ? x : V::add(V::load(to), x));
        }
      }
  }

  const float* dk_row(int64_t j) { return gradient_row(dk, out, j, 1 / factors.dq()); }
  const float* dv_row(int64_t j) { return gradient_row(dv, out + width, j, 1 / factors.gradient); }
  static const float* gradient_row(const Tiled<float>& gradient, float* row, int64_t j,
                                   float unit_of_it) {
    for (int64_t d = 0; d < gradient.width; d += 16) {
      const __m512 x = V::load(gradient_block(gradient, j, d) + in_block(j % 32, d % 32));
      V::store(row + d, V::mul(x, V::set1(unit_of_it)));
    }
    return row;
  }
};

}  // namespace
