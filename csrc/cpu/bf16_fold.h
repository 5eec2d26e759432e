// The forward pass over a stream of blocks of keys, of one tile of queries after another. Tiles
// multiply without a stop; beside them vector instructions, spread evenly over the products, turn
// the scores of an earlier block into weights. In time, with b the block that is pushed and g the
// last group whose blocks all have their weights:
//
//   tiles     | s <- q k^T of b       | p v of g, the pieces due  | s of b + 1            | ...
//   vectors   | weights of b - 2,     | the rest of them;         | weights of b - 1,     |
//             |   half of them        |   o <- o + the piece      |   half of them        |
//             |                       |   before                  |                       |
//
// So scores of two or three blocks (e.buffers) and weights of two groups are in flight. A tile's
// sums are stored while the next product runs, and not read before that one ends: scores of b - 1
// lie still while s of b is multiplied. Without p v beside it, s of b takes all the weights of
// b - 2. A group ends with its last block: its l is added up, and its p v begins. Sums that are
// stored at once (not kDelayed) leave one block less in flight.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "bf16_products.h"
#include "bf16_queries.h"
#include "forward_step.h"
#include "normaliser.h"

namespace {

// hide(step) gives -inf to the scores of keys that are not seen, and says whether it has made them
// natural; hide.draw(step) draws what dropout keeps.
template <class E, class Hide, bool kDropout>
class Bf16Fold {
  using V = Avx512;
  static constexpr int kParts = E::kParts;
  static constexpr int64_t kRows = E::kRows, kKeys = E::kKeys, kGroup = E::kGroup;
  // Of one part p v is added to o as it is multiplied; of more, sums that start at 0 are added
  // later, with half the error.
  static constexpr bool kInPlace = kParts == 1;
  // Of one part weights lose half their digits, on the average by a little. o is divided by the sum
  // of what is left of them, and lse is that of the weights themselves.
  static constexpr bool kCut = kParts == 1;
  // With dropout, and where a product with a tile of ones is no cheaper, that sum is formed beside
  // the weights.
  static constexpr bool kCutBeside = kCut && (kDropout || !E::Multiplier::kDelayed);
  static constexpr int64_t kBlocks = 4;  // in flight: one more than have scores
  static constexpr int64_t kUnits = 16;  // 16 queries and E::kEnd keys each, of a full block

  using Queries = Bf16Queries<Hide>;
  struct Block {
    Step step;
    Queries* queries;
  };
  using Group = Bf16Group<Hide>;
  // Blocks in flight, the group that gathers weights and the one that is multiplied have five
  // tiles of queries at most.
  static constexpr int64_t kTiles = 8;

  E& e;
  const Units<float> scales;
  [[maybe_unused]] const std::conditional_t<kParts == 1, FlushDenormals, NoWork> flush;
  typename E::Multiplier products;
  Queries tiles[kTiles];
  Block blocks[kBlocks];
  int64_t tile = 0;
  int64_t asked = 0, stored = 0;      // blocks whose scores are being multiplied; are there
  int64_t at = 0, done = 0;           // the block that is turned into weights, its units so far,
  int64_t row_units, units;           // those of 16 queries, and in all
  __m512 l_before[2], cut_before[2];  // the sums of weights before the block
  bool begun = false, gathering = false;
  Units<float> scale{};    // of the block's scores
  __mmask16 taken_off[2];  // from whose scores the natural maximum has been taken off already
  Group group{};           // of the block
  Group weighed{};         // the group before, multiplied with v in pieces of 32 d
  int64_t piece;           // the next one
  int64_t credit = 0;      // pieces due, in parts of kGroup
  // Sums of pieces on their way to o: what a tile has just stored is not read yet.
  struct Sums {
    float *from = nullptr, *to = nullptr;
  };
  Sums fresh, ripe;
  int64_t pieces = 0;

 public:
  Bf16Fold(E& e, Units<float> scales) : e(e), scales(scales), flush{}, piece(e.o_width) {}

  // Folds blocks of keys into n queries from row r, whose state is at rows.
  void fold(int64_t r, int64_t n, const Step* steps, int64_t count, const Hide& hide,
            const Rows<float>& rows) {
    Queries& q = tiles[tile++ % kTiles];
    q.q = e.q_tile(0, r, 0), q.packing = e.packing_of_queries(r), q.hide = hide;
    q.m_out = rows.m, q.top_out = rows.top, q.l_out = rows.l, q.o = rows.o;
    q.halves = ceil_div(n, 16);
    for (int i = 0; i < 2; ++i) {
      q.there[i] = static_cast<__mmask16>((1u << clamp(n - 16 * i, 0, 16)) - 1);
      q.l[i] = q.cut[i] = V::zero();
      q.top[i] = V::load(rows.top + 16 * i);
      q.refer(i, V::load(rows.m + 16 * i));
    }
    q.fresh = q.unseen(0) == q.there[0] && q.unseen(1) == q.there[1];
    for (int64_t i = 0; i < count; ++i) push(steps[i], &q);
  }

  // Completes all that has been folded.
  void finish() {
    settle();
    for (; at < asked; advance()) {
      advance();
      exponentiate(units);
    }
    if (gathering) close();
    while (piece < e.o_width) multiply_piece();
    settle();
  }

 private:
  void push(const Step& step, Queries* queries) {
    for (advance(); at + e.buffers <= asked; advance()) exponentiate(units);
    blocks[asked % kBlocks] = {step, queries};
    const int64_t next = e.width / 32 * kParts * kTile;
    multiply<false, AllProducts<kParts>>(
        {e.k_tile(0, step.at, 0), next, kTile, kParts * kTile, step.end > 16},
        {queries->q, next, kTile, kParts * kTile, queries->halves > 1}, e.width / 32,
        e.scores(asked), piece < e.o_width ? kUnits / 2 : kUnits);
    stored = asked++ + !E::Multiplier::kDelayed;
    credit += pieces_of(e.o_width);
    for (; piece < e.o_width && credit >= kGroup; credit -= kGroup) {
      advance();
      multiply_piece();
    }
    if (piece >= e.o_width) credit = 0;
  }

  // The work beside products: adds sums of the piece before, and turns scores of the block at hand
  // into weights.
  struct Work {
    Bf16Fold& f;
    const int64_t first;
    Shares units;
    Addition addition;
    void operator()() {
      if (!kInPlace) addition();
      f.exponentiate(first + units.next());
    }
  };

  template <bool kAdd, class P = Products<kParts>>
  void multiply(const Operand& a, const Operand& b, int64_t steps, float* c, int64_t beside) {
    const int64_t behind = (asked - 2 - at) * kUnits - done;
    const int64_t calls = products.template calls<P>(steps);
    const int64_t share = begun ? min64(beside + max64(0, behind), units - done) : 0;
    Work work{*this,
              done,
              {share, calls},
              {ripe.to, ripe.from, ripe.from ? 64 : 0, kInPlace ? 0 : calls}};
    products.template multiply<kAdd, true, P>(a, b, steps, c, work);
    ripe = fresh;
    fresh = {};
  }

  // Between products: where the block at hand is done, goes on to the next one.
  void advance() {
    if (begun && done == units) {
      const Step& step = blocks[at % kBlocks].step;
      Queries& q = *group.queries;
      const __mmask16 lanes[2] = {static_cast<__mmask16>(grown(q, 0) & ~taken_off[0]),
                                  static_cast<__mmask16>(grown(q, 1) & ~taken_off[1])};
      if (lanes[0] | lanes[1]) {
        for (int i = 0; i < 2; ++i) q.l[i] = l_before[i], q.cut[i] = cut_before[i];
        raise(q, step, lanes);
        done = 0;
        exponentiate(units);
      }
      group.last = step.index % kGroup;
      group.edge |= step.edge;
      ++at;
      begun = false;
    }
    if (!begun && at < stored) begin();
  }

  void begin() {
    const Block& block = blocks[at % kBlocks];
    const int64_t index = block.step.index, in_group = index % kGroup;
    if (gathering && (group.queries != block.queries || group.index != index / kGroup)) close();
    if (!gathering) {
      group = {block.queries, index / kGroup, block.step.at - in_group * kKeys,   in_group,
               in_group - 1,  false,          e.weights(group.p != e.weights(1)), false};
      gathering = true;
    }
    Queries& q = *block.queries;
    for (int64_t j = group.last + 1; j < in_group; ++j) clear_weights(j, 0);
    group.edge |= in_group > group.last + 1 || block.step.end < kKeys;
    row_units = block.step.end / E::kEnd;
    units = q.halves * row_units;
    if (block.step.end < kKeys) clear_weights(in_group, row_units * E::kEnd);
    e.s = e.scores(at);
    const Packing keys = e.packing_of_keys(block.step.at);
    e.unit = q.packing.unit * keys.unit;
    if constexpr (kParts > 1) {
      const bool all = e.unit > 1 && (q.packing.small || keys.small);
      if (all || !(q.packing.finite && keys.finite))
        mend<kParts>(e.s, e.k_tile(0, block.step.at, 0), q.q, e.width, all);
    }
    const bool is_natural = block.step.edge && q.hide(block.step);
    scale = is_natural ? Units<float>::of_natural() : scales.times(e.unit);
    if (kDropout) q.hide.draw(block.step);
    taken_off[0] = taken_off[1] = 0;
    const __mmask16 lanes[2] = {static_cast<__mmask16>(q.unseen(0) | q.large(0)),
                                static_cast<__mmask16>(q.unseen(1) | q.large(1))};
    if (lanes[0] | lanes[1]) raise(q, block.step, lanes);
    for (int i = 0; i < 2; ++i) l_before[i] = q.l[i], cut_before[i] = q.cut[i];
    begun = true;
    done = 0;
  }

  // Returns the queries whose weights add up to more than 1024: their scores are past the
  // reference. Such queries are rare, and no sum comes near an overflow.
  static constexpr float kUnit = kWeightUnit<kParts>, kGrown = 1024 * kUnit;
  static __mmask16 grown(const Queries& q, int64_t i) {
    return _mm512_mask_cmp_ps_mask(q.there[i], q.l[i], V::set1(kGrown), _CMP_NLE_UQ);
  }

  // Moves the reference points of some queries: m <- ceil(scale max s), and all that was weighed is
  // scaled by 2^(old m - new m). As reference points are integers, that is exact.
  static constexpr int kCeiling = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;

  void raise(Queries& q, const Step& step, const __mmask16 (&lanes)[2]) {
    for (int64_t i = 0; i < 2; ++i) {
      if (!lanes[i]) continue;
      __m512 top = V::load(e.s + i * 256);
      for (int64_t j = 1; j < step.end; ++j)
        top = V::max(top, V::load(e.s + j / 16 * 512 + i * 256 + j % 16 * 16));
      // what overflows is no hidden score
      const __m512 highest = V::hidden_where_hidden(
          V::max(V::mul(top, V::set1(scale.base2)), V::set1(-__FLT_MAX__)), top);
      const __mmask16 higher = _mm512_mask_cmp_ps_mask(lanes[i], highest, q.m[i], _CMP_GT_OQ);
      const __mmask16 large = lanes[i] & q.large(i);
      if (higher | large) raise_lanes(q, i, step, higher, large, highest, top);
    }
  }

  // higher: lanes whose reference points move; large: those of large rows, from whose scores the
  // maximum is taken off whether it moves or not
  __attribute__((noinline)) void raise_lanes(Queries& q, int64_t i, const Step& step,
                                             __mmask16 higher, __mmask16 large, __m512 highest,
                                             __m512 top) {
    const int64_t block = step.index % kGroup;
    const __m512 m = q.m[i];
    const __m512 above = _mm512_roundscale_ps(highest, kCeiling);
    const bool nothing_weighed = ((higher | large) & ~q.unseen(i)) == 0;
    q.refer(i, _mm512_mask_mov_ps(m, higher, above));
    __m512 growth = _mm512_maskz_sub_ps(higher, m, q.m[i]);
    if ((q.large(i) & (higher | large)) | large)
      growth = take_off_large(q, i, step, higher | large, large,
                              V::mul(top, V::set1(scale.natural)), m, growth);
    if (nothing_weighed || !_mm512_cmp_ps_mask(growth, V::zero(), _CMP_NEQ_UQ)) return;
    settle();
    const __m512 factor = _mm512_mask_mov_ps(V::set1(1), higher | large, V::exp2(growth));
    q.l[i] = V::mul(q.l[i], factor);
    q.cut[i] = V::mul(q.cut[i], factor);
    V::store(q.l_out + 16 * i, V::mul(V::load(q.l_out + 16 * i), factor));
    for (int64_t d = 0; d < e.o_width; d += 16)
      for (int64_t x = 0; x < 256; x += 16) {
        float* to = q.o + d * 32 + i * 256 + x;
        V::store(to, V::mul(V::load(to), factor));
      }
    scale_weights(group.p, i, group.first, block, factor);
    if (piece < e.o_width && weighed.queries == &q)
      scale_weights(weighed.p, i, weighed.first, weighed.last + 1, factor);
  }

  // In those lanes that are large rows now: top <- the natural maximum, and scores <- natural ones
  // less top. here: the maximum of the block. Returns the growth of lanes.
  __m512 take_off_large(Queries& q, int64_t i, const Step& step, __mmask16 lanes, __mmask16 was,
                        __m512 here, __m512 m_old, __m512 growth) {
    const __m512 top_old = q.top[i];
    const __mmask16 is = lanes & q.large(i);
    q.top[i] = _mm512_mask_mov_ps(top_old, is, _mm512_mask_max_ps(here, was, here, top_old));
    for (int64_t j = 0; j < step.end; ++j) {
      float* at = e.s + j / 16 * 512 + i * 256 + j % 16 * 16;
      const __m512 x = V::load(at);
      V::store(at, _mm512_mask_sub_ps(x, is, V::mul(x, V::set1(scale.natural)), q.top[i]));
    }
    taken_off[i] |= is;
    alignas(64) float grown[16], olds[4][16];
    V::store(grown, growth);
    V::store(olds[0], m_old), V::store(olds[1], top_old);
    V::store(olds[2], q.m[i]), V::store(olds[3], q.top[i]);
    for (int lane = 0; lane < 16; ++lane)
      if ((was | is) >> lane & 1)
        grown[lane] = ::growth(olds[0][lane], olds[1][lane], olds[2][lane], olds[3][lane]);
    return V::load(grown);
  }

  void scale_weights(Bf16* p, int64_t i, int64_t first, int64_t end, __m512 factor) {
    for (int64_t part = 0; part < kParts; ++part)
      for (int64_t j = first; j < end; ++j)
        for (int64_t x = 0; x < kTile; x += 32) {
          Bf16* to = e.p_tile(p, part, 16 * i, j) + x;
          const __m512i line = _mm512_loadu_si512(to);
          const __m512 odd = V::mul(round_down_to_bf16(_mm512_castsi512_ps(line)), factor);
          const __m512 even = V::mul(_mm512_castsi512_ps(_mm512_slli_epi32(line, 16)), factor);
          _mm512_storeu_si512(to, alternate(even, odd));
        }
  }

  // Clears the weights of keys from `key` on, an even number.
  void clear_weights(int64_t block, int64_t key) {
    for (int64_t part = 0; part < kParts; ++part)
      for (int64_t i = 0; i < group.queries->halves; ++i)
        for (int64_t j = 16 * key; j < kTile; j += 32)
          _mm512_storeu_si512(e.p_tile(group.p, part, 16 * i, block) + j, _mm512_setzero_si512());
  }

  // p <- 2^(scale s - m), or what dropout keeps of it, for units of the block at hand, until so
  // many are done
  void exponentiate(int64_t until) {
    while (done < until) {
      const int64_t i = done >= row_units, first = i * row_units;
      const int64_t end = min64(until, first + row_units);
      exponentiate(i, done - first, end - first);
      done = end;
    }
  }

  // Units [first, last) of 16 queries
  void exponentiate(int64_t i, int64_t first, int64_t last) {
    Queries& q = *group.queries;
    const __m512 offset = q.offset[i],
                 factor = _mm512_mask_mov_ps(V::set1(scale.base2), taken_off[i],
                                             V::set1(static_cast<float>(kLog2e)));
    __m512 total = q.l[i];
    [[maybe_unused]] __m512 cut = q.cut[i];
    [[maybe_unused]] const uint16_t* kept = e.kept.of(i);
    Bf16* p = e.p_tile(group.p, 0, 16 * i, blocks[at % kBlocks].step.index % kGroup);
    for (uint64_t unit = first; unit < static_cast<uint64_t>(last); ++unit) {
      const float* from = e.s + unit / 4 * 512 + i * 256 + unit % 4 * 64;
      Bf16* to = p + unit * 64;
#pragma GCC unroll 2
      for (int x = 0; x < 2; ++x) {
        __m512 even = weight_of<kParts>(V::load(from + 32 * x), factor, offset),
               odd = weight_of<kParts>(V::load(from + 32 * x + 16), factor, offset);
        total = V::add(total, V::add(even, odd));
        if (kCutBeside) cut = E::Multiplier::add_cut(cut, even, odd);
#pragma GCC unroll 3
        for (int part = 0; part < kParts; ++part) {
          const __m512 a = kCut ? even : take_part<kParts>(even, part);
          const __m512 b = kCut ? odd : take_part<kParts>(odd, part);
          const __m512i line =
              kDropout ? alternate_kept(a, b, kept[4 * unit + 2 * x], kept[4 * unit + 2 * x + 1])
                       : alternate(a, b);
          _mm512_storeu_si512(to + part * kTile + 32 * x, line);
        }
      }
    }
    q.l[i] = total;
    q.cut[i] = cut;
  }

  // l <- l + sum p for the group at hand, whose p v is next.
  void close() {
    while (piece < e.o_width) multiply_piece();
    Queries& q = *group.queries;
    for (int64_t i = 0; i < 2; ++i) {
      if (kCutBeside) {
        float* to = q.o + e.v_width * 32 + i * 256;
        V::store(to, V::add(V::load(to), q.cut[i]));
        q.cut[i] = V::zero();
      }
      V::store(q.l_out + 16 * i, V::fma(q.l[i], V::set1(1 / kUnit), V::load(q.l_out + 16 * i)));
      V::store(q.m_out + 16 * i, q.m[i]);
      V::store(q.top_out + 16 * i, q.top[i]);
      q.l[i] = V::zero();
    }
    weighed = group;
    weighed.fresh = q.fresh;
    q.fresh = false;
    piece = 0;
    gathering = false;
    if (e.values.small || (!e.values.finite && (group.edge || kParts > 1))) {
      settle();
      e.multiply_seen(q.o, group.p, group.at, group.first, group.last + 1, group.edge);
      piece = e.v_width;
    }
  }

  // Pieces of 32 d, the last one of 16 where weights are summed as they were cut
  static int64_t pieces_of(int64_t width) { return ceil_div(width, 32); }

  // o <- o + p v for 32 d of the group before. The sums, in two buffers by turns, are added while
  // other tiles multiply. Of one part the last piece is the sum of p.
  void multiply_piece() {
    const Group& g = weighed;
    const int64_t blocks = g.last + 1 - g.first, d = piece;
    piece += 32;
    if (kCutBeside && d == e.v_width) return;
    float* o = g.queries->o + d * 32;
    const bool at_once = kInPlace || g.fresh;
    float* c = at_once ? o : e.sums + pieces++ % 2 * 1024;
    const Operand values = kCut && d == e.v_width
                               ? Operand{e.ones, 0, 0, 0, false}
                               : Operand{e.v_tile(0, g.at + g.first * kKeys, d), kParts * kTile,
                                         kTile, e.v_width / 16 * kParts * kTile};
    multiply<kInPlace>(values,
                       {e.p_tile(g.p, 0, 0, g.first), kParts * kTile, kTile, 2 * kParts * kTile,
                        g.queries->halves > 1},
                       blocks, c, blocks * kUnits / (2 * pieces_of(e.o_width)));
    stored = asked;
    if (!at_once) fresh = {c, o};
  }

  // Stores what has been multiplied and adds what is to be added.
  void settle() {
    products.finish();
    stored = asked;
    for (const Sums& x : {ripe, fresh})
      if (x.from) Addition{x.to, x.from, 64, 1}();
    ripe = fresh = {};
  }
};

}  // namespace
