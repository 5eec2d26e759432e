// The forward pass's products on AMX tiles, its softmax on AVX-512. Everything is transposed: a
// vector belongs to one key and 16 queries, so that nothing is ever reduced along a vector.
#pragma once

#include "amx.h"
#include "cover.h"

namespace {

template <int kParts>
struct AmxForward {
  using V = Avx512;
  using T = float;
  using Session = TileSession;
  using Cover = ColumnCover<AmxForward>;
  static constexpr int64_t kRows = 32, kKeys = 32;  // two tiles of queries, two of keys
  static constexpr int64_t kBlock = 32, kBegin = 32;
  // blocks of keys whose weights are multiplied with v together: they take 12 to 32 KB
  static constexpr int64_t kGroup = kParts == 1 ? 16 : kParts == 2 ? 4 : 2;
  static constexpr int64_t kAligned = kKeys * kGroup;  // panels begin at multiples of it
  static constexpr int64_t kChunk = 1024;              // queries of a task, all heads of a group

  const int64_t head_dim, width;  // width: head_dim padded to two tiles
  const int64_t rows;
  const int64_t panel;  // keys packed together: k and v of them take 512 KB of L2
  Contents values;      // what the panel's rows of v hold
  // Every operand and result lies tile by tile: 16 rows with other lines between them take a tile's
  // load or store up to three times as long.
  Bf16* q;       // q^T (parts, rows / 16, width / 32, tile): 1024 x 64 x 2 bytes = 128 KB a part
  Bf16* k;       // (parts, panel / 16, width / 32, tile)
  Bf16* v;       // v^T (parts, width / 16, panel / 32, tile)
  float* s_all;  // s^T, two buffers of (2 tiles of keys, 2 of queries, 16, 16): 4 KB each
  Bf16* p;       // p^T (parts, 2, kGroup, tile): 2 KB a part and block
  float* sums;   // (p v)^T before it joins o, two buffers of (2 tiles of d, 2 of queries, 16, 16)
  Bf16 *stage, *pairs;  // (parts, kBlock, width): rows on their way into tiles; one tile
  float* out;           // (16, width): rows of o on their way out
  float* s;             // the buffer at hand

  AmxForward(Arena& a, int64_t head_dim, int64_t rows)
      : head_dim(head_dim),
        width(round_up(head_dim, 32)),
        rows(round_up(rows, kRows)),
        panel(131072 / (kParts * width * kAligned) * kAligned) {
    q = a.take<Bf16>(kParts * this->rows * width);
    k = a.take<Bf16>(kParts * panel * width);
    v = a.take<Bf16>(kParts * panel * width);
    s_all = a.take<float>(2 * kRows * kKeys);
    p = a.take<Bf16>(kParts * kRows * kKeys * kGroup);
    sums = a.take<float>(2 * kRows * 32);
    stage = a.take<Bf16>(kParts * kBlock * width);
    pairs = a.take<Bf16>(kTile);
    out = a.take<float>(16 * width);
  }

  Bf16* q_tile(int64_t part, int64_t r, int64_t d) {
    return q + ((part * rows + r) / 16 * (width / 32) + d / 32) * kTile;
  }
  Bf16* k_tile(int64_t part, int64_t key, int64_t d) {
    return k + ((part * panel + key) / 16 * (width / 32) + d / 32) * kTile;
  }
  Bf16* v_tile(int64_t part, int64_t key, int64_t d) {
    return v + ((part * width + d) / 16 * (panel / 32) + key / 32) * kTile;
  }
  Bf16* p_tile(int64_t part, int64_t row, int64_t block) {
    return p + ((part * 2 + row / 16) * kGroup + block) * kTile;
  }
  // The scores of 16 queries with one key of the block
  float* column(int64_t row, int64_t key) {
    return s + key / 16 * 512 + row / 16 * 256 + key % 16 * 16;
  }

  // kRows queries from row r; a null row becomes zeros.
  void put_queries(int64_t r, const void* const* rows_of_q, DType dtype, bool negate) {
    for (int64_t i = 0; i < kRows; ++i)
      split_row<kParts>(stage + i * width, kBlock * width, rows_of_q[i], dtype, head_dim, width,
                        negate);
    for (int64_t part = 0; part < kParts; ++part)
      for (int64_t i = 0; i < kRows; i += 16)
        for (int64_t d = 0; d < width; d += 32)
          pack_transposed(q_tile(part, r + i, d), stage + (part * kBlock + i) * width + d, width);
  }

  void begin_panel() { values = {}; }

  void put_keys(int64_t j0, const void* const* k_rows, const void* const* v_rows, DType dtype) {
    for (int64_t j = 0; j < kBlock; ++j)
      split_row<kParts>(stage + j * width, kBlock * width, k_rows[j], dtype, head_dim, width,
                        false);
    for (int64_t part = 0; part < kParts; ++part)
      for (int64_t j = 0; j < kBlock; ++j)
        for (int64_t d = 0; d < width; d += 32)
          copy_line(k_tile(part, j0 + j, d) + j % 16 * 32, stage + (part * kBlock + j) * width + d);
    for (int64_t j = 0; j < kBlock; ++j)
      values.add(split_row<kParts>(stage + j * width, kBlock * width, v_rows[j], dtype, head_dim,
                                   width, false));
    for (int64_t part = 0; part < kParts; ++part)
      for (int64_t d = 0; d < width; d += 16) {
        pack_paired<false>(pairs, stage + part * kBlock * width + d, width);
        pack_transposed(v_tile(part, j0, d), pairs, 32);
      }
  }

  // What the queries of a tile know: their reference points, and of the group of blocks at hand the
  // sums of weights, the blocks that have some, and whether an edge runs through one.
  struct State {
    __m512 m[2], offset[2], l[2];  // offset: -m, or 0 for a query that has seen nothing
    float *l_out, *o;
    float scale = 0;
    int64_t first = -1, last = -1;
    bool edge = false;
    bool small;            // v is too small for tiles
    bool pending = false;  // the last sums are still to be added to o

    State(const float* m_in, float* l_out, float* o, bool small)
        : l_out(l_out), o(o), small(small) {
      for (int i = 0; i < 2; ++i) {
        l[i] = V::zero();
        refer(i, V::load(m_in + 16 * i));
      }
    }
    void refer(int64_t i, __m512 reference) {
      m[i] = reference;
      offset[i] = V::sub(V::zero(), V::zero_where_hidden(reference, reference));
    }
  };

  // Folds blocks of keys into the queries from row r. hide(step) gives -inf to what is not seen,
  // and says whether it has scaled the scores. While the scores of a block are exponentiated, tiles
  // multiply those of the next.
  template <class Step, class Hide>
  void fold(int64_t r, int64_t /*n*/, const Step* steps, int64_t count, float scale2,
            const Hide& hide, float* m, float* l, float* o) {
    const int64_t next = width / 32 * kTile;
    const Operand b{q_tile(0, r, 0), next, rows * width, kTile};
    const auto a = [&](const Step& step) {
      return Operand{k_tile(0, step.at, 0), next, panel * width, kTile};
    };
    State state(m, l, o, too_small(values.size()));
    const auto scores = [&](int64_t i) { return s_all + i % 2 * (kRows * kKeys); };
    TileProducts<kParts> products;
    products.multiply(a(steps[0]), b, width / 32, scores(0));
    if (count > 1) {
      products.multiply(a(steps[1]), b, width / 32, scores(1));
    } else {
      products.finish();
    }
    for (int64_t i = 0; i < count; ++i) {
      const Step& step = steps[i];
      const int64_t block = step.index % kGroup;
      s = scores(i);
      const auto begin = [&] {
        state.scale = step.edge && hide(step) ? 1 : scale2;
        raise(state, block);
      };
      Exponents<decltype(begin)> exponents(*this, state, block, begin);
      if (i + 2 < count) {
        products.multiply(a(steps[i + 2]), b, width / 32, scores(i), exponents);
      } else {
        products.finish();
      }
      exponents.finish();
      state.edge |= step.edge;
      state.last = block;
      if (i + 1 == count || steps[i + 1].index / kGroup != step.index / kGroup)
        weigh(products, state, step.at - block * kKeys);
    }
    products.finish();
    add_sums(state);
    V::store(m, state.m[0]);
    V::store(m + 16, state.m[1]);
  }

  // Moves the reference points of queries whose scores have grown past them: m <- ceil(scale max s)
  // + kSlack, so that it seldom happens, and all that was weighed is scaled by 2^(old m - new m).
  // As reference points are integers, that is exact.
  static constexpr float kSlack = 10;
  static constexpr int kCeiling = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;

  void raise(State& state, int64_t block) {
    if (state.first < 0) state.first = block;
    for (int64_t j = state.last + 1; state.last >= 0 && j < block; ++j) clear_weights(j);
    for (int64_t i = 0; i < 2; ++i) {
      const float* x = s + i * 256;
      __m512 top[4] = {V::load(x), V::load(x + 16), V::load(x + 32), V::load(x + 48)};
      for (int half = 0; half < 2; ++half)
        for (int j = 0; j < 256; j += 64)
#pragma GCC unroll 4
          for (int lane = 0; lane < 4; ++lane)
            top[lane] = V::max(top[lane], V::load(x + 512 * half + j + 16 * lane));
      const __m512 highest =
          V::mul(V::max(V::max(top[0], top[1]), V::max(top[2], top[3])), V::set1(state.scale));
      const __mmask16 grown = _mm512_cmp_ps_mask(highest, state.m[i], _CMP_GT_OQ);
      if (grown) raise_lanes(state, i, block, grown, highest);
    }
  }

  __attribute__((noinline)) void raise_lanes(State& state, int64_t i, int64_t block,
                                             __mmask16 grown, __m512 highest) {
    add_sums(state);
    const __m512 m = state.m[i];
    const __m512 above = V::add(_mm512_roundscale_ps(highest, kCeiling), V::set1(kSlack));
    state.refer(i, _mm512_mask_mov_ps(m, grown, above));
    const __m512 ones = V::set1(1);
    const __m512 factor = _mm512_mask_mov_ps(ones, grown, V::exp2(V::sub(m, state.m[i])));
    state.l[i] = V::mul(state.l[i], factor);
    V::store(state.l_out + 16 * i, V::mul(V::load(state.l_out + 16 * i), factor));
    for (int64_t d = 0; d < width; d += 16)
      for (int64_t e = 0; e < 256; e += 16) {
        float* at = state.o + d * 32 + i * 256 + e;
        V::store(at, V::mul(V::load(at), factor));
      }
    for (int64_t part = 0; part < kParts; ++part)
      for (int64_t j = state.first; j < block; ++j)
        for (int64_t e = 0; e < kTile; e += 32) {
          Bf16* at = p_tile(part, 16 * i, j) + e;
          const __m512i line = _mm512_loadu_si512(at);
          const __m512 odd = V::mul(round_down_to_bf16(_mm512_castsi512_ps(line)), factor);
          const __m512 even = V::mul(_mm512_castsi512_ps(_mm512_slli_epi32(line, 16)), factor);
          _mm512_storeu_si512(at, alternate(even, odd));
        }
  }

  void clear_weights(int64_t block) {
    for (int64_t part = 0; part < kParts; ++part)
      for (int64_t i = 0; i < kRows; i += 16)
        memset(p_tile(part, i, block), 0, kTile * sizeof(Bf16));
  }

  // p <- 2^(scale s - m) for a block, in 16 units of 16 queries and 4 keys
  template <class Begin>
  struct Exponents {
    AmxForward& e;
    State& state;
    const int64_t block, calls;
    const Begin& begin;
    int64_t called = 0, done = 0;

    Exponents(AmxForward& e, State& state, int64_t block, const Begin& begin)
        : e(e),
          state(state),
          block(block),
          calls(TileProducts<kParts>::calls(e.width / 32)),
          begin(begin) {}

    // An equal share of the work in each of calls calls; the first one finds the scores stored.
    void operator()() {
      if (called++ == 0) begin();
      units(called * 16 / calls);
      if (called == calls) e.add_sums(state);
    }

    void finish() {
      if (called == 0) begin(), called = 1;
      units(16);
    }

    void units(int64_t until) {
      while (done < until) {
        const int64_t i = done / 8, end = min64(until, 8 * i + 8);
        exponentiate(i, done % 8, end - 8 * i);
        done = end;
      }
    }

    // Units [first, last) of 16 queries
    void exponentiate(int64_t i, int64_t first, int64_t last) {
      const __m512 scale = V::set1(state.scale), offset = state.offset[i];
      __m512 total = state.l[i];
      for (int64_t at = first; at < last; ++at) {
        const float* from = e.s + at / 4 * 512 + i * 256 + at % 4 * 64;
        Bf16* to = e.p_tile(0, 16 * i, block) + at * 64;
#pragma GCC unroll 2
        for (int x = 0; x < 2; ++x) {
          __m512 even = exponential<kParts>(V::load(from + 32 * x), scale, offset),
                 odd = exponential<kParts>(V::load(from + 32 * x + 16), scale, offset);
          if (kParts > 1) total = V::add(total, V::add(even, odd));
#pragma GCC unroll 3
          for (int part = 0; part < kParts; ++part) {
            const __m512 a = take_part<kParts>(even, part), b = take_part<kParts>(odd, part);
            const __m512i line = alternate(a, b);
            _mm512_storeu_si512(to + part * (2 * kGroup * kTile) + 32 * x, line);
            // the sum of what is multiplied with v, not of what it was rounded from
            if (kParts == 1) total = add_pairs(total, line);
          }
        }
      }
      state.l[i] = total;
    }
  };

  // sums <- p v and l <- l + sum p for the blocks of a group, whose keys start at at. Of the sums,
  // in two buffers by turns, the last two are left to be added to o while other tiles multiply.
  void weigh(TileProducts<kParts>& products, State& state, int64_t at) {
    const int64_t first = state.first, blocks = state.last + 1 - first;
    add_sums(state);
    if ((state.edge && !values.finite) || state.small) {
      multiply_seen(state.o, at, first, state.last + 1);
    } else {
      const Operand b{p_tile(0, 0, first), kGroup * kTile, 2 * kGroup * kTile, kTile};
      for (int64_t d = 0; d < width; d += 32) {
        const Operand a{v_tile(0, at + first * kKeys, d), panel / 32 * kTile, panel * width, kTile};
        Addition addition{state.o + (d - 64) * 32, sums + d / 32 % 2 * 1024, d < 64 ? 0 : 64,
                          products.calls(blocks)};
        products.template multiply<false, true>(a, b, blocks, sums + d / 32 % 2 * 1024, addition);
      }
      state.pending = true;
    }
    for (int64_t i = 0; i < 2; ++i) {
      V::store(state.l_out + 16 * i, V::add(V::load(state.l_out + 16 * i), state.l[i]));
      state.l[i] = V::zero();
    }
    state.first = state.last = -1;
    state.edge = false;
  }

  void add_sums(State& state) {
    if (!state.pending) return;
    for (int64_t d = max64(0, width - 64); d < width; d += 32)
      Addition{state.o + d * 32, sums + d / 32 % 2 * 1024, 64, 1}();
    state.pending = false;
  }

  // The slow way for a v with NaN or inf that some rows do not see, where only what they see is
  // multiplied, and for a v too small for tiles.
  void multiply_seen(float* o, int64_t at, int64_t first, int64_t end) {
    for (int64_t row = 0; row < kRows; ++row)
      for (int64_t d = 0; d < width; ++d) {
        float total = 0;
        for (int64_t j = first * kKeys; j < end * kKeys; ++j) {
          float weight = 0, value = 0;
          for (int64_t i = 0; i < kParts; ++i) {
            weight +=
                widen(BFloat16{p_tile(i, row, j / 32)[j % 32 / 2 * 32 + row % 16 * 2 + j % 2]});
            value += widen(BFloat16{v_tile(i, at + j, d)[d % 16 * 32 + j % 32]});
          }
          if (weight != 0) total += weight * value;
        }
        o[d / 16 * 512 + row / 16 * 256 + d % 16 * 16 + row % 16] += total;
      }
  }

  // Row r of o; rows come in order, and 16 are turned at once.
  const float* output(const float* o, int64_t r) {
    if (r % 16 == 0) {
      const float* tiles = o + r / kRows * kRows * width + r % kRows / 16 * 256;
      for (int64_t d = 0; d < width; d += 16) V::transpose(tiles + d * 32, 16, out + d, width);
    }
    return out + r % 16 * width;
  }
};

}  // namespace
