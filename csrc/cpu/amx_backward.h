// The backward pass's products on AMX tiles, its gradients of scores on AVX-512.
#pragma once

#include "amx.h"

namespace {

template <int kParts>
struct AmxBackward {
  using V = Avx512;
  using T = float;
  using Session = TileSession;
  static constexpr int64_t kRows = 64, kKeys = 128;   // queries of a block, keys of a tile
  static constexpr int64_t kBlock = 32, kBegin = 32;  // keys packed at a time; columns of a step

  const int64_t head_dim, width;  // width: head_dim padded to two tiles
  // Tile by tile, parts outermost; sizes at D 64 and one part. All stays in L2.
  Bf16 *kt, *vt, *k;             // K^T, V^T and K as B operands: 16 KB each
  Bf16 *q, *dout, *qt, *dout_t;  // q, do, q^T, do^T as A operands: 8 KB each
  float *s, *dp;                 // (kRows / 16, kKeys / 16, 16, 16): 32 KB each
  Bf16 *p, *ds;                  // as B operands (kRows / 32, kKeys / 16, tile): 16 KB each
  Bf16* ds_rows;                 // ds as A operand (kRows / 16, kKeys / 32, tile): 16 KB
  float *dkt, *dvt;              // dk^T and dv^T (width / 16, kKeys / 16, 16, 16): 32 KB each
  Bf16 *stage, *stage2, *tile;   // rows on their way into tiles
  float *sum, *out;  // products before they are added; a gradient's rows on their way out
  float *whole, *fraction, *delta;  // (kRows): p = fraction 2^(s - whole), whole an integer
  bool finite_keys, finite_rows;

  AmxBackward(Arena& a, int64_t head_dim) : head_dim(head_dim), width(round_up(head_dim, 32)) {
    kt = a.take<Bf16>(kParts * kKeys * width);
    vt = a.take<Bf16>(kParts * kKeys * width);
    k = a.take<Bf16>(kParts * kKeys * width);
    q = a.take<Bf16>(kParts * kRows * width);
    dout = a.take<Bf16>(kParts * kRows * width);
    qt = a.take<Bf16>(kParts * kRows * width);
    dout_t = a.take<Bf16>(kParts * kRows * width);
    s = a.take<float>(kRows * kKeys);
    dp = a.take<float>(kRows * kKeys);
    p = a.take<Bf16>(kParts * kRows * kKeys);
    ds = a.take<Bf16>(kParts * kRows * kKeys);
    ds_rows = a.take<Bf16>(kParts * kRows * kKeys);
    dkt = a.take<float>(kKeys * width);
    dvt = a.take<float>(kKeys * width);
    stage = a.take<Bf16>(kParts * kRows * width);
    stage2 = a.take<Bf16>(kParts * kRows * width);
    tile = a.take<Bf16>(kTile);
    sum = a.take<float>(32 * 32);
    out = a.take<float>(2 * 16 * width);
    whole = a.take<float>(kRows);
    fraction = a.take<float>(kRows);
    delta = a.take<float>(kRows);
  }

  Bf16* kt_tile(int64_t part, int64_t key, int64_t d) { return across(kt, part, key, d); }
  Bf16* vt_tile(int64_t part, int64_t key, int64_t d) { return across(vt, part, key, d); }
  Bf16* across(Bf16* base, int64_t part, int64_t key, int64_t d) {
    return base + ((part * kKeys + key) / 16 * (width / 32) + d / 32) * kTile;
  }
  Bf16* k_tile(int64_t part, int64_t key, int64_t d) {
    return k + ((part * kKeys + key) / 32 * (width / 16) + d / 16) * kTile;
  }
  // 16 rows of 32 elements of q or do
  Bf16* row_tile(Bf16* base, int64_t part, int64_t i, int64_t d) {
    return base + ((part * kRows + i) / 16 * (width / 32) + d / 32) * kTile;
  }
  // 16 elements of 32 rows
  Bf16* column_tile(Bf16* base, int64_t part, int64_t i, int64_t d) {
    return base + ((part * kRows + i) / 32 * (width / 16) + d / 16) * kTile;
  }
  Bf16* pair_tile(Bf16* base, int64_t part, int64_t i, int64_t key) {
    return base + ((part * kRows + i) / 32 * (kKeys / 16) + key / 16) * kTile;
  }
  Bf16* ds_row_tile(int64_t part, int64_t i, int64_t key) {
    return ds_rows + ((part * kRows + i) / 16 * (kKeys / 32) + key / 32) * kTile;
  }
  float* gradient_tile(float* base, int64_t d, int64_t key) {
    return base + (d / 16 * (kKeys / 16) + key / 16) * 256;
  }
  static int64_t score_at(int64_t i, int64_t key) {
    return (i / 16 * (kKeys / 16) + key / 16) * 256 + i % 16 * 16;
  }
  float* segment(int64_t i, int64_t key) { return s + score_at(i, key); }

  void begin_tile() {
    finite_keys = true;
    memset(dkt, 0, kKeys * width * sizeof(float));
    memset(dvt, 0, kKeys * width * sizeof(float));
  }

  void put_keys(int64_t j0, const void* const* k_rows, const void* const* v_rows, DType dtype) {
    for (int64_t j = 0; j < kBlock; ++j) {
      finite_keys &= split_row<kParts>(stage + j * width, kBlock * width, k_rows[j], dtype,
                                       head_dim, width, false);
      split_row<kParts>(stage2 + j * width, kBlock * width, v_rows[j], dtype, head_dim, width,
                        false);
    }
    for (int64_t i = 0; i < kParts; ++i) {
      const int64_t at = i * kBlock * width;
      for (int64_t j = 0; j < kBlock; j += 16)
        for (int64_t d = 0; d < width; d += 32) {
          pack_transposed(kt_tile(i, j0 + j, d), stage + at + j * width + d, width);
          pack_transposed(vt_tile(i, j0 + j, d), stage2 + at + j * width + d, width);
        }
      for (int64_t d = 0; d < width; d += 16) pack_paired(k_tile(i, j0, d), stage + at + d, width);
    }
  }

  void begin_block() { finite_rows = true; }

  void put_row(int64_t i, const void* q_row, const void* do_row, DType dtype, bool negate,
               float lse2, float low, float row_delta) {
    finite_rows &=
        split_row<kParts>(stage + i * width, kRows * width, q_row, dtype, head_dim, width, negate);
    finite_rows &=
        split_row<kParts>(stage2 + i * width, kRows * width, do_row, dtype, head_dim, width, false);
    const bool seeing = lse2 != __builtin_inff();
    whole[i] = seeing ? __builtin_ceilf(lse2) : 0;
    fraction[i] = seeing ? __builtin_exp2f((whole[i] - lse2) - low) : 0;
    delta[i] = row_delta;
  }

  // Packs the staged rows; those from n to the next pair of tiles become zeros that give nothing.
  void end_block(int64_t n) {
    const int64_t rows = round_up(n, 32);
    for (int64_t i = n; i < rows; ++i)
      put_row(i, nullptr, nullptr, DType::kFloat32, false, __builtin_inff(), 0, 0);
    for (int64_t part = 0; part < kParts; ++part)
      for (int64_t i = 0; i < rows; i += 32)
        for (int64_t d = 0; d < width; d += 16) {
          pack_rows(q, qt, stage, part, i, d);
          pack_rows(dout, dout_t, stage2, part, i, d);
        }
  }

  void pack_rows(Bf16* as_rows, Bf16* as_columns, const Bf16* staged, int64_t part, int64_t i,
                 int64_t d) {
    const Bf16* rows = staged + (part * kRows + i) * width + d;
    pack_paired(tile, rows, width);
    pack_transposed(column_tile(as_columns, part, i, d), tile, 32);
    for (int64_t r = 0; r < 32; ++r)
      memcpy(row_tile(as_rows, part, i + r, d) + r % 16 * 32 + d % 32, rows + r * width, 32);
  }

  // s <- q k^T, dp <- do v^T
  void scores(int64_t n, int64_t begin, int64_t end) {
    for (int64_t i = 0; i < n; i += 32)
      for (int64_t j = begin; j < end; j += 32) {
        scores_of_block(q, kt, s, i, j);
        scores_of_block(dout, vt, dp, i, j);
      }
  }

  void scores_of_block(Bf16* rows, Bf16* keys, float* c, int64_t i, int64_t j) {
    zero_tiles();
    for (int64_t d = 0; d < width; d += 32)
      multiply_tiles<kParts>(row_tile(rows, 0, i, d), row_tile(rows, 0, i + 16, d), kRows * width,
                             across(keys, 0, j, d), across(keys, 0, j + 16, d), kKeys * width);
    store_tiles(c + score_at(i, j), c + score_at(i, j + 16), c + score_at(i + 16, j),
                c + score_at(i + 16, j + 16));
  }

  // p and ds from s and dp; 0 where kEdge has given a score -inf
  template <bool kEdge>
  void gradients(int64_t n, int64_t begin, int64_t end, float scale2) {
    for (int64_t i = 0; i < round_up(n, 32); i += 2) {
      if (is_huge(whole[i]) || is_huge(whole[i + 1])) {
        gradients_of_pair<kEdge, true>(i, begin, end, scale2);
      } else {
        gradients_of_pair<kEdge, false>(i, begin, end, scale2);
      }
    }
  }
  static bool is_huge(float x) { return __builtin_fabsf(x) >= 0x1p22f; }

  template <bool kEdge, bool kHuge>
  void gradients_of_pair(int64_t i, int64_t begin, int64_t end, float scale2) {
    const __m512 scale = V::set1(scale2);
    __m512 base[2], least[2], factor[2], d[2];
    __mmask16 seeing[2];  // a row that sees nothing may meet a v that is not finite
    for (int r = 0; r < 2; ++r) {
      base[r] = V::set1(kHuge ? whole[i + r] : kRound - whole[i + r]);
      least[r] = V::set1((whole[i + r] - 125) / scale2);
      factor[r] = V::set1(fraction[i + r]);
      d[r] = V::set1(delta[i + r]);
      seeing[r] = fraction[i + r] != 0 ? 0xffff : 0;
    }
    for (int64_t j = begin; j < end; j += 32) {
      __m512 e[2][2], g[2][2];  // [row][half of the columns]
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r)
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          const int64_t at = score_at(i + r, j + 16 * h);
          const __m512 x = V::load(s + at);
          e[r][h] = _mm512_maskz_mul_ps(
              seeing[r], exponential<kParts, kEdge, kHuge>(x, scale, base[r], least[r]), factor[r]);
          g[r][h] = _mm512_maskz_mul_ps(seeing[r], e[r][h], V::sub(V::load(dp + at), d[r]));
          if (kEdge) g[r][h] = V::zero_where_hidden(g[r][h], x);
        }
#pragma GCC unroll 3
      for (int part = 0; part < kParts; ++part) {
        put_pairs(p, part, i, j, e);
        __m512 rounded[2][2];
#pragma GCC unroll 4
        for (int x = 0; x < 4; ++x) rounded[x / 2][x % 2] = round_to_bf16(g[x / 2][x % 2]);
#pragma GCC unroll 2
        for (int r = 0; r < 2; ++r)
          _mm512_storeu_si512(ds_row_tile(part, i, j) + (i + r) % 16 * 32,
                              concatenate(rounded[r][0], rounded[r][1]));
        put_pairs(ds, part, i, j, g);
      }
    }
  }

  // A part of two rows as a line of B operands; x keeps what the part leaves.
  void put_pairs(Bf16* base, int64_t part, int64_t i, int64_t j, __m512 (&x)[2][2]) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512 even = round_to_bf16(x[0][h]), odd = round_to_bf16(x[1][h]);
      _mm512_storeu_si512(pair_tile(base, part, i, j + 16 * h) + i % 32 * 16, alternate(even, odd));
      if (kParts > 1) {
        x[0][h] = V::sub(x[0][h], even);
        x[1][h] = V::sub(x[1][h], odd);
      }
    }
  }

  // dv^T <- dv^T + do^T p, dk^T <- dk^T + q^T ds
  void accumulate(int64_t n, int64_t begin, int64_t end, bool skip_zeros) {
    if (skip_zeros) {
      accumulate_seen(n, begin, end, dvt, dout, p);
      accumulate_seen(n, begin, end, dkt, q, ds);
      return;
    }
    for (int64_t j = begin; j < end; j += 32)
      for (int64_t d = 0; d < width; d += 32) {
        accumulate_block(n, d, j, dvt, dout_t, p);
        accumulate_block(n, d, j, dkt, qt, ds);
      }
  }

  void accumulate_block(int64_t n, int64_t d, int64_t j, float* c, Bf16* columns, Bf16* pairs) {
    zero_tiles();
    for (int64_t i = 0; i < n; i += 32)
      multiply_tiles<kParts>(column_tile(columns, 0, i, d), column_tile(columns, 0, i, d + 16),
                             kRows * width, pair_tile(pairs, 0, i, j),
                             pair_tile(pairs, 0, i, j + 16), kRows * kKeys);
    store_tiles(sum, sum + 256, sum + 512, sum + 768);
    for (int x = 0; x < 4; ++x) {
      float* to = gradient_tile(c, d + x / 2 * 16, j + x % 2 * 16);
      for (int e = 0; e < 256; e += 16)
        V::store(to + e, V::add(V::load(to + e), V::load(sum + x * 256 + e)));
    }
  }

  // acc <- ds k where set, else acc + ds k; rows of acc are ld apart
  void fold(int64_t n, int64_t begin, int64_t end, float* acc, int64_t ld, bool set,
            bool skip_zeros) {
    if (skip_zeros) return fold_seen(n, begin, end, acc, ld, set);
    const int64_t columns = round_up(head_dim, 16);  // what a row of acc has
    for (int64_t i = 0; i < n; i += 32)
      for (int64_t d = 0; d < columns; d += 32) {
        zero_tiles();
        for (int64_t j = begin; j < end; j += 32)
          multiply_tiles<kParts>(ds_row_tile(0, i, j), ds_row_tile(0, i + 16, j), kRows * kKeys,
                                 k_tile(0, j, d), k_tile(0, j, d + 16), kKeys * width);
        store_tiles(sum, sum + 256, sum + 512, sum + 768);
        for (int64_t r = 0; r < min64(32, n - i); ++r)
          for (int64_t h = 0; h < min64(32, columns - d); h += 16) {
            float* to = acc + (i + r) * ld + d + h;
            const __m512 x = V::load(sum + (r / 16 * 2 + h / 16) * 256 + r % 16 * 16);
            V::store(to, set ? x : V::add(V::load(to), x));
          }
      }
  }

  void end_tile() {}

  // Row j of dk and dv, gathered from the 16 columns of the transposed sums that hold it.
  const float* dk_row(int64_t j) { return gradient_row(dkt, out, j); }
  const float* dv_row(int64_t j) { return gradient_row(dvt, out + 16 * width, j); }
  const float* gradient_row(float* sums, float* rows, int64_t j) {
    if (j % 16 == 0)
      for (int64_t d = 0; d < width; d += 16)
        V::transpose(gradient_tile(sums, d, j), 16, rows + d, width);
    return rows + j % 16 * width;
  }

  // The slow ways, for q, do or k with NaN or inf that are not seen by all: only what is seen is
  // multiplied.
  void accumulate_seen(int64_t n, int64_t begin, int64_t end, float* sums, Bf16* rows,
                       Bf16* pairs) {
    for (int64_t j = begin; j < end; ++j)
      for (int64_t d = 0; d < width; ++d) {
        float total = 0;
        for (int64_t i = 0; i < n; ++i) {
          const float weight = pair_value(pairs, i, j);
          if (weight == 0) continue;
          float x = 0;
          for (int part = 0; part < kParts; ++part)
            x += widen(BFloat16{row_tile(rows, part, i, d)[i % 16 * 32 + d % 32]});
          total += weight * x;
        }
        gradient_tile(sums, d, j)[d % 16 * 16 + j % 16] += total;
      }
  }

  void fold_seen(int64_t n, int64_t begin, int64_t end, float* acc, int64_t ld, bool set) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t d = 0; d < round_up(head_dim, 16); ++d) {
        float total = 0;
        for (int64_t j = begin; j < end; ++j) {
          const float weight = pair_value(ds, i, j);
          if (weight == 0) continue;
          float x = 0;
          for (int part = 0; part < kParts; ++part)
            x += widen(BFloat16{k_tile(part, j, d)[j % 32 / 2 * 32 + d % 16 * 2 + j % 2]});
          total += weight * x;
        }
        acc[i * ld + d] = set ? total : acc[i * ld + d] + total;
      }
  }

  float pair_value(Bf16* pairs, int64_t i, int64_t j) {
    float x = 0;
    for (int part = 0; part < kParts; ++part)
      x += widen(BFloat16{pair_tile(pairs, part, i, j)[i % 32 / 2 * 32 + j % 16 * 2 + i % 2]});
    return x;
  }
};

}  // namespace
