// The backward pass's products on AMX tiles, its gradients of scores on AVX-512. As in the forward
// pass a vector of scores belongs to one key and 16 queries.
#pragma once

#include "amx.h"
#include "cover.h"

namespace {

template <int kParts>
struct AmxBackward {
  using V = Avx512;
  using T = float;
  using Session = TileSession;
  using Cover = ColumnCover<AmxBackward>;
  static constexpr int64_t kRows = 128;                      // queries of a block
  static constexpr int64_t kKeys = kParts == 1 ? 512 : 256;  // keys of a tile
  static constexpr int64_t kBlock = 32, kBegin = 32;  // keys packed at a time; columns of a step
  static constexpr int64_t kSlice = kParts == 1 ? 128 : 64;  // keys whose p and ds are kept at once

  const int64_t head_dim, width;  // width: head_dim padded to two tiles
  // Tile by tile, parts outermost; sizes at D 64 and one part. All stays in L2.
  Bf16 *k, *v, *kt;                  // K and V (keys, d), K^T (d, keys) as A operands: 64 KB each
  Bf16 *q, *dout;                    // Q^T and dO^T (d, queries) as B operands: 16 KB each
  Bf16 *q_pairs, *dout_pairs;        // Q and dO (queries, d) as B operands: 16 KB each
  float *s_all, *dp_all;             // 2 x 2 tiles (keys, queries), three and two buffers: 20 KB
  Bf16 *p, *ds;                      // (keys, queries) of a slice as A operands: 32 KB each
  Bf16* ds_pairs;                    // ds (keys, queries) of a slice as B operand: 32 KB
  float *dk, *dv;                    // blocks of 32 keys and 32 d: 128 KB each
  float* dqt;                        // dq^T, blocks of 32 d and 32 queries: 32 KB
  float* sums;                       // two blocks that wait to be added to dk or dv
  Bf16 *stage, *stage2, *pair;       // rows on their way into tiles
  float* out;                        // (2, 16, width): rows of dk and dv on their way out
  float *offset, *fraction, *delta;  // (kRows): p = fraction 2^(s + offset), offset an integer
  float *s, *dp;                     // the buffers at hand
  int64_t slice, step_key;           // first keys of the slice and of the buffers at hand
  Contents keys, values, queries, gradients;  // what rows of k, v, q and do hold
  bool finite_keys() const { return keys.finite; }
  bool finite_rows() const { return queries.finite && gradients.finite; }

  AmxBackward(Arena& a, int64_t head_dim) : head_dim(head_dim), width(round_up(head_dim, 32)) {
    k = a.take<Bf16>(kParts * kKeys * width);
    v = a.take<Bf16>(kParts * kKeys * width);
    kt = a.take<Bf16>(kParts * kKeys * width);
    q = a.take<Bf16>(kParts * kRows * width);
    dout = a.take<Bf16>(kParts * kRows * width);
    q_pairs = a.take<Bf16>(kParts * kRows * width);
    dout_pairs = a.take<Bf16>(kParts * kRows * width);
    s_all = a.take<float>(3 * 32 * 32);
    dp_all = a.take<float>(2 * 32 * 32);
    p = a.take<Bf16>(kParts * kRows * kSlice);
    ds = a.take<Bf16>(kParts * kRows * kSlice);
    ds_pairs = a.take<Bf16>(kParts * kRows * kSlice);
    dk = a.take<float>(kKeys * width);
    dv = a.take<float>(kKeys * width);
    dqt = a.take<float>(kRows * width);
    sums = a.take<float>(2 * 32 * 32);
    stage = a.take<Bf16>(kParts * kRows * width);
    stage2 = a.take<Bf16>(kParts * kRows * width);
    pair = a.take<Bf16>(kTile);
    out = a.take<float>(2 * 16 * width);
    offset = a.take<float>(kRows);
    fraction = a.take<float>(kRows);
    delta = a.take<float>(kRows);
  }

  // 16 keys, 32 d
  Bf16* key_tile(Bf16* base, int64_t part, int64_t key, int64_t d) {
    return base + ((part * kKeys + key) / 16 * (width / 32) + d / 32) * kTile;
  }
  // 16 d, 32 keys
  Bf16* kt_tile(int64_t part, int64_t key, int64_t d) {
    return kt + ((part * width + d) / 16 * (kKeys / 32) + key / 32) * kTile;
  }
  // 32 d, 16 queries
  Bf16* query_tile(Bf16* base, int64_t part, int64_t i, int64_t d) {
    return base + ((part * kRows + i) / 16 * (width / 32) + d / 32) * kTile;
  }
  // 32 queries, 16 d
  Bf16* query_pair_tile(Bf16* base, int64_t part, int64_t i, int64_t d) {
    return base + ((part * kRows + i) / 32 * (width / 16) + d / 16) * kTile;
  }
  // 16 keys of the slice, 32 queries
  Bf16* weight_tile(Bf16* base, int64_t part, int64_t key, int64_t i) {
    return base + ((part * kSlice + key) / 16 * (kRows / 32) + i / 32) * kTile;
  }
  // 32 keys of the slice, 16 queries
  Bf16* ds_pair_tile(int64_t part, int64_t key, int64_t i) {
    return ds_pairs + ((part * kRows + i) / 16 * (kSlice / 32) + key / 32) * kTile;
  }
  // 32 keys, 32 d as 2 x 2 tiles
  float* gradient_block(float* base, int64_t key, int64_t d) {
    return base + (key / 32 * (width / 32) + d / 32) * 1024;
  }
  float* dqt_block(int64_t i, int64_t d) { return dqt + (i / 32 * (width / 32) + d / 32) * 1024; }
  // Row and column of a block of 2 x 2 tiles
  static int64_t in_block(int64_t row, int64_t column) {
    return row / 16 * 512 + column / 16 * 256 + row % 16 * 16 + column % 16;
  }
  // The scores of 16 queries with one key of the tile, which the buffer at hand holds
  float* column(int64_t row, int64_t key) { return s + in_block(key - step_key, row); }

  void begin_tile(int64_t count) {
    keys = values = {};
    memset(dk, 0, round_up(count, 32) * width * sizeof(float));
    memset(dv, 0, round_up(count, 32) * width * sizeof(float));
  }

  void put_keys(int64_t j0, const void* const* k_rows, const void* const* v_rows, DType dtype) {
    for (int64_t j = 0; j < kBlock; ++j) {
      keys.add(split_row<kParts>(stage + j * width, kBlock * width, k_rows[j], dtype, head_dim,
                                 width, false));
      values.add(split_row<kParts>(stage2 + j * width, kBlock * width, v_rows[j], dtype, head_dim,
                                   width, false));
    }
    for (int64_t part = 0; part < kParts; ++part) {
      const int64_t at = part * kBlock * width;
      for (int64_t j = 0; j < kBlock; ++j)
        for (int64_t d = 0; d < width; d += 32) {
          const int64_t line = j % 16 * 32, from = at + j * width + d;
          copy_line(key_tile(k, part, j0 + j, d) + line, stage + from);
          copy_line(key_tile(v, part, j0 + j, d) + line, stage2 + from);
        }
      for (int64_t d = 0; d < width; d += 16) {
        pack_paired<false>(pair, stage + at + d, width);
        pack_transposed(kt_tile(part, j0, d), pair, 32);
      }
    }
  }

  void begin_block() { queries = gradients = {}; }

  void put_row(int64_t i, const void* q_row, const void* do_row, DType dtype, bool negate,
               float lse2, float low, float row_delta) {
    queries.add(
        split_row<kParts>(stage + i * width, kRows * width, q_row, dtype, head_dim, width, negate));
    gradients.add(split_row<kParts>(stage2 + i * width, kRows * width, do_row, dtype, head_dim,
                                    width, false));
    const bool seeing = lse2 != __builtin_inff();
    const float whole = seeing ? __builtin_ceilf(lse2) : 0;
    offset[i] = -whole;
    fraction[i] = seeing ? __builtin_exp2f((whole - lse2) - low) : 0;
    delta[i] = row_delta;
  }

  // Packs the staged rows; those from n to the next pair of tiles become zeros that give nothing.
  void end_block(int64_t n) {
    const int64_t rows = round_up(n, 32);
    for (int64_t i = n; i < rows; ++i)
      put_row(i, nullptr, nullptr, DType::kFloat32, false, __builtin_inff(), 0, 0);
    for (int64_t part = 0; part < kParts; ++part) {
      const Bf16 *q_rows = stage + part * kRows * width, *do_rows = stage2 + part * kRows * width;
      for (int64_t i = 0; i < rows; i += 16)
        for (int64_t d = 0; d < width; d += 32) {
          pack_transposed(query_tile(q, part, i, d), q_rows + i * width + d, width);
          pack_transposed(query_tile(dout, part, i, d), do_rows + i * width + d, width);
        }
      for (int64_t i = 0; i < rows; i += 32)
        for (int64_t d = 0; d < width; d += 16) {
          pack_paired<true>(query_pair_tile(q_pairs, part, i, d), q_rows + i * width + d, width);
          pack_paired<true>(query_pair_tile(dout_pairs, part, i, d), do_rows + i * width + d,
                            width);
        }
    }
  }

  // dk, dv and dq^T of a block of n queries with columns [begin, end). is_edge(i, rows, j, end)
  // says whether some of rows queries from i does not see some key of [j, end); hide gives -inf
  // there and says whether it has scaled the scores.
  template <class IsEdge, class Hide>
  void differentiate(int64_t n, int64_t begin, int64_t end, float scale2, const IsEdge& is_edge,
                     const Hide& hide, bool skip_rows, bool skip_keys) {
    const bool tiny = too_small(keys.size()) || too_small(queries.size()) ||
                      too_small(values.size()) || too_small(gradients.size()) ||
                      too_small(values.size() * gradients.size());
    skip_rows |= tiny;
    skip_keys |= tiny;
    TileProducts<kParts> products;
    bool first = true;
    for (slice = begin / kSlice * kSlice; slice < end; slice += kSlice) {
      const int64_t j0 = max64(begin, slice), j1 = min64(end, slice + kSlice);
      const int64_t along = (j1 - j0) / 32, blocks = ceil_div(n, 32) * along;
      const auto multiply = [&](int64_t b, auto&& work) {
        const int64_t i = b / along * 32, j = j0 + b % along * 32, next = width / 32 * kTile;
        const int64_t key_part = kKeys * width, query_part = kRows * width;
        products.template multiply<false, true>({key_tile(k, 0, j, 0), next, key_part, kTile},
                                                {query_tile(q, 0, i, 0), next, query_part, kTile},
                                                width / 32, s_all + b % 3 * 1024, work);
        products.template multiply<false, true>(
            {key_tile(v, 0, j, 0), next, key_part, kTile},
            {query_tile(dout, 0, i, 0), next, query_part, kTile}, width / 32, dp_all + b % 2 * 1024,
            work);
      };
      multiply(0, NoWork{});
      if (blocks > 1) multiply(1, NoWork{});
      if (blocks <= 2) products.finish();
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t i = b / along * 32, j = j0 + b % along * 32;
        s = s_all + b % 3 * 1024;
        dp = dp_all + b % 2 * 1024;
        step_key = j;
        if (tiny) multiply_small(i, j);
        const bool edge = is_edge(i, min64(32, n - i), j, j + 32);
        const float scale = edge && hide(i, min64(32, n - i), j, j + 32) ? 1 : scale2;
        const auto beside = [&](auto&& work) {
          if (b + 2 < blocks) {
            multiply(b + 2, work);
          } else if (b + 1 < blocks) {
            products.finish();
          }
          work.finish();
        };
        if (edge) {
          beside(Gradients<true>(*this, i, j - slice, scale));
        } else {
          beside(Gradients<false>(*this, i, j - slice, scale));
        }
      }
      products.finish();
      add_key_gradients(products, n, j0, j1, skip_rows);
      add_query_gradients(products, n, j0, j1, first, skip_keys);
      first = false;
    }
  }

  // p and ds of 32 queries from row and 32 keys from the slice's key, in 16 units of two keys
  template <bool kEdge>
  struct Gradients {
    AmxBackward& e;
    const int64_t row, key, calls;
    const float scale2;
    int64_t called = 0, done = 0;

    Gradients(AmxBackward& e, int64_t row, int64_t key, float scale2)
        : e(e),
          row(row),
          key(key),
          calls(2 * TileProducts<kParts>::calls(e.width / 32)),
          scale2(scale2) {}

    void operator()() { units(++called * 16 / calls); }
    void finish() { units(16); }

    void units(int64_t until) {
      const __m512 scale = V::set1(scale2);
      __m512 factor[2], delta[2], offset[2];
      __mmask16 seeing[2];  // a row that sees nothing may meet a v that is not finite
#pragma GCC unroll 2
      for (int t = 0; t < 2; ++t) {
        factor[t] = V::load(e.fraction + row + 16 * t);
        delta[t] = V::load(e.delta + row + 16 * t);
        seeing[t] = _mm512_cmp_ps_mask(factor[t], V::zero(), _CMP_NEQ_UQ);
        offset[t] = V::load(e.offset + row + 16 * t);
      }
      for (; done < until; ++done) {
        const int64_t at = done / 8 * 512 + done % 8 * 32, j = key + 2 * done;
        __m512 p[2][2], g[2][2];  // [16 queries][key]
#pragma GCC unroll 2
        for (int t = 0; t < 2; ++t)
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) {
            const __m512 x = V::load(e.s + at + 256 * t + 16 * h);
            const __m512 dp = V::load(e.dp + at + 256 * t + 16 * h);
            p[t][h] =
                _mm512_maskz_mul_ps(seeing[t], exponential<kParts>(x, scale, offset[t]), factor[t]);
            g[t][h] = _mm512_maskz_mul_ps(seeing[t], p[t][h], V::sub(dp, delta[t]));
            if (kEdge) g[t][h] = V::zero_where_hidden(g[t][h], x);
          }
        Bf16 *p_line = e.weight_tile(e.p, 0, j, row) + j % 16 * 32,
             *ds_line = e.weight_tile(e.ds, 0, j, row) + j % 16 * 32,
             *pair_line = e.ds_pair_tile(0, j, row) + j % 32 * 16;
#pragma GCC unroll 3
        for (int part = 0; part < kParts; ++part) {
          __m512 rp[2][2], rg[2][2];
#pragma GCC unroll 4
          for (int x = 0; x < 4; ++x) {
            rp[x / 2][x % 2] = take_part<kParts>(p[x / 2][x % 2], part);
            rg[x / 2][x % 2] = take_part<kParts>(g[x / 2][x % 2], part);
          }
          const int64_t next = part * kRows * kSlice;
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) {
            _mm512_storeu_si512(p_line + next + 32 * h, alternate(rp[0][h], rp[1][h]));
            _mm512_storeu_si512(ds_line + next + 32 * h, alternate(rg[0][h], rg[1][h]));
            _mm512_storeu_si512(pair_line + next + h * (kSlice / 32 * kTile),
                                alternate(rg[h][0], rg[h][1]));
          }
        }
      }
    }
  };

  // dv <- dv + p^T do, dk <- dk + ds^T q for keys [j0, j1). Of one part the sums go on where they
  // stand; of more, sums that start at 0 are added later, with half the error.
  void add_key_gradients(TileProducts<kParts>& products, int64_t n, int64_t j0, int64_t j1,
                         bool skip_zeros) {
    if (skip_zeros) {
      add_seen(n, j0, j1, dv, dout_pairs, p);
      add_seen(n, j0, j1, dk, q_pairs, ds);
      return;
    }
    add_products(products, n, j0, j1, dv, dout_pairs, p);
    add_products(products, n, j0, j1, dk, q_pairs, ds);
  }

  void add_products(TileProducts<kParts>& products, int64_t n, int64_t j0, int64_t j1, float* to,
                    Bf16* pairs, Bf16* weights) {
    const int64_t steps = ceil_div(n, 32), along = (j1 - j0) / 32, blocks = along * (width / 32);
    const auto target = [&](int64_t b) {
      return gradient_block(to, j0 + b % along * 32, b / along * 32);
    };
    for (int64_t b = 0; b < blocks; ++b) {
      const Operand left{weight_tile(weights, 0, j0 - slice + b % along * 32, 0),
                         kRows / 32 * kTile, kRows * kSlice, kTile};
      const Operand right{query_pair_tile(pairs, 0, 0, b / along * 32), kTile, kRows * width,
                          width / 16 * kTile};
      if constexpr (kParts == 1) {
        products.template multiply<true>(left, right, steps, target(b));
      } else {
        products.multiply(left, right, steps, sums + b % 2 * 1024,
                          Addition{b < 2 ? nullptr : target(b - 2), sums + b % 2 * 1024,
                                   b < 2 ? 0 : 64, products.calls(steps)});
      }
    }
    products.finish();
    if (kParts > 1)
      for (int64_t b = max64(0, blocks - 2); b < blocks; ++b)
        Addition{target(b), sums + b % 2 * 1024, 64, 1}();
  }

  // dq^T <- k^T ds^T for keys [j0, j1), or dq^T + that
  void add_query_gradients(TileProducts<kParts>& products, int64_t n, int64_t j0, int64_t j1,
                           bool set, bool skip_zeros) {
    for (int64_t i = 0; i < n; i += 32)
      for (int64_t d = 0; d < width; d += 32) {
        float* c = dqt_block(i, d);
        if (skip_zeros) {
          multiply_seen(i, j0, j1, d, c, set);
          continue;
        }
        const Operand left{kt_tile(0, j0, d), kKeys / 32 * kTile, kKeys * width, kTile};
        const Operand right{ds_pair_tile(0, j0 - slice, i), kSlice / 32 * kTile, kRows * kSlice,
                            kTile};
        if (set) {
          products.multiply(left, right, (j1 - j0) / 32, c);
        } else {
          products.template multiply<true>(left, right, (j1 - j0) / 32, c);
        }
      }
    products.finish();
  }

  // acc <- dq where set, else acc + dq; rows of acc are ld apart
  void fold(int64_t n, float* acc, int64_t ld, bool set) {
    for (int64_t i = 0; i < n; i += 16)
      for (int64_t d = 0; d < round_up(head_dim, 16); d += 16) {
        alignas(64) float rows[256];
        V::transpose(dqt_block(i, d) + in_block(d % 32, i % 32), 16, rows, 16);
        for (int64_t r = 0; r < min64(16, n - i); ++r) {
          float* to = acc + (i + r) * ld + d;
          const __m512 x = V::load(rows + r * 16);
          V::store(to, set ? x : V::add(V::load(to), x));
        }
      }
  }

  void end_tile() {}

  const float* dk_row(int64_t j) { return gradient_row(dk, out, j); }
  const float* dv_row(int64_t j) { return gradient_row(dv, out + 16 * width, j); }
  const float* gradient_row(float* blocks, float* row, int64_t j) {
    for (int64_t d = 0; d < width; d += 16)
      V::store(row + d, V::load(gradient_block(blocks, j, d) + in_block(j % 32, d % 32)));
    return row;
  }

  // The slow ways, for q, do or k with NaN or inf that are not seen by all, where only what is seen
  // is multiplied, and for numbers too small for tiles.

  // dp <- v do^T for 32 queries from i and 32 keys from j
  void multiply_small(int64_t i, int64_t j) {
    for (int64_t key = 0; key < 32; ++key)
      for (int64_t row = 0; row < 32; ++row) {
        float total = 0;
        for (int64_t d = 0; d < width; ++d) {
          float value = 0, gradient = 0;
          for (int part = 0; part < kParts; ++part) {
            value += widen(BFloat16{key_tile(v, part, j + key, d)[key % 16 * 32 + d % 32]});
            gradient += widen(BFloat16{
                query_tile(dout, part, i + row, d)[d % 32 / 2 * 32 + row % 16 * 2 + d % 2]});
          }
          total += value * gradient;
        }
        dp[in_block(key, row)] = total;
      }
  }

  void add_seen(int64_t n, int64_t j0, int64_t j1, float* to, Bf16* pairs, Bf16* weights) {
    for (int64_t j = j0; j < j1; ++j)
      for (int64_t d = 0; d < width; ++d) {
        float total = 0;
        for (int64_t i = 0; i < n; ++i) {
          const float weight = weight_of(weights, i, j);
          if (weight == 0) continue;
          float x = 0;
          for (int part = 0; part < kParts; ++part)
            x += widen(BFloat16{
                query_pair_tile(pairs, part, i, d)[i % 16 * 32 + d % 16 * 2 + i % 32 / 16]});
          total += weight * x;
        }
        gradient_block(to, j, d)[in_block(j % 32, d % 32)] += total;
      }
  }

  void multiply_seen(int64_t i0, int64_t j0, int64_t j1, int64_t d0, float* c, bool set) {
    for (int64_t i = 0; i < 32; ++i)
      for (int64_t d = 0; d < 32; ++d) {
        float total = 0;
        for (int64_t j = j0; j < j1; ++j) {
          const float weight = weight_of(ds, i0 + i, j);
          if (weight == 0) continue;
          float x = 0;
          for (int part = 0; part < kParts; ++part)
            x += widen(BFloat16{kt_tile(part, j, d0 + d)[d % 16 * 32 + j % 32]});
          total += weight * x;
        }
        float& to = c[in_block(d, i)];
        to = set ? total : to + total;
      }
  }

  float weight_of(Bf16* weights, int64_t i, int64_t j) {
    float x = 0;
    for (int part = 0; part < kParts; ++part)
      x += widen(BFloat16{
          weight_tile(weights, part, j - slice, i)[j % 16 * 32 + i % 16 * 2 + i % 32 / 16]});
    return x;
  }
};

}  // namespace
