// The forward pass's products on AMX tiles, its softmax on AVX-512.
#pragma once

#include "amx.h"

namespace {

template <int kParts>
struct AmxForward {
  using V = Avx512;
  using T = float;
  using Session = TileSession;
  static constexpr int64_t kRows = 32, kKeys = 256;   // two tiles of queries; keys of a panel
  static constexpr int64_t kBlock = 32, kBegin = 32;  // two tiles of keys, one step of p v
  static constexpr int64_t kChunk = kParts == 1 ? 1024 : 512;

  const int64_t head_dim, width;  // width: head_dim padded to two tiles
  const int64_t rows;
  // Every operand and result lies tile by tile: 16 rows with other lines between them take a tile's
  // load or store up to three times as long.
  Bf16* q;       // (parts, rows / 16, width / 32, tile): 1024 x 64 x 2 bytes = 128 KB in L2
  Bf16 *kt, *v;  // (parts, kKeys / 16, width / 32, tile), (parts, kKeys / 32, width / 16, tile)
  float* s;      // (2, kKeys / 16, 16, 16): 32 KB, as the panels kt and v
  Bf16* p;       // (parts, 2, kKeys / 32, tile): 16 KB
  Bf16* stage;   // (parts, kBlock, width): rows on their way into tiles
  float* sum;    // (2, 2, 16, 16): p v before it joins o
  float* lanes;
  bool finite;

  AmxForward(Arena& a, int64_t head_dim, int64_t rows)
      : head_dim(head_dim), width(round_up(head_dim, 32)), rows(round_up(rows, kRows)) {
    q = a.take<Bf16>(kParts * this->rows * width);
    kt = a.take<Bf16>(kParts * kKeys * width);
    v = a.take<Bf16>(kParts * kKeys * width);
    s = a.take<float>(kRows * kKeys);
    p = a.take<Bf16>(kParts * kRows * kKeys);
    stage = a.take<Bf16>(kParts * kBlock * width);
    sum = a.take<float>(kRows * 32);
    lanes = a.take<float>(16 * 16);
  }

  Bf16* q_tile(int64_t part, int64_t r, int64_t d) {
    return q + ((part * rows + r) / 16 * (width / 32) + d / 32) * kTile;
  }
  Bf16* k_tile(int64_t part, int64_t key, int64_t d) {
    return kt + ((part * kKeys + key) / 16 * (width / 32) + d / 32) * kTile;
  }
  Bf16* v_tile(int64_t part, int64_t key, int64_t d) {
    return v + ((part * kKeys + key) / 32 * (width / 16) + d / 16) * kTile;
  }
  Bf16* p_tile(int64_t part, int64_t row, int64_t key) {
    return p + ((part * 2 + row / 16) * (kKeys / 32) + key / 32) * kTile;
  }
  // 16 scores of one row
  float* segment(int64_t row, int64_t key) {
    return s + (row / 16 * (kKeys / 16) + key / 16) * 256 + row % 16 * 16;
  }

  void put_query(int64_t r, const void* row, DType dtype, bool negate) {
    split_row<kParts>(stage, width, row, dtype, head_dim, width, negate);
    for (int64_t i = 0; i < kParts; ++i)
      for (int64_t d = 0; d < width; d += 32)
        memcpy(q_tile(i, r, d) + r % 16 * 32, stage + i * width + d, 64);
  }

  void begin_panel() { finite = true; }

  void put_keys(int64_t j0, const void* const* k_rows, const void* const* v_rows, DType dtype) {
    for (int64_t j = 0; j < kBlock; ++j)
      split_row<kParts>(stage + j * width, kBlock * width, k_rows[j], dtype, head_dim, width,
                        false);
    for (int64_t i = 0; i < kParts; ++i)
      for (int64_t j = 0; j < kBlock; j += 16)
        for (int64_t d = 0; d < width; d += 32)
          pack_transposed(k_tile(i, j0 + j, d), stage + (i * kBlock + j) * width + d, width);
    for (int64_t j = 0; j < kBlock; ++j)
      finite &= split_row<kParts>(stage + j * width, kBlock * width, v_rows[j], dtype, head_dim,
                                  width, false);
    for (int64_t i = 0; i < kParts; ++i)
      for (int64_t d = 0; d < width; d += 16)
        pack_paired(v_tile(i, j0, d), stage + i * kBlock * width + d, width);
  }

  void scores(int64_t r, int64_t, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j += 32) {
      zero_tiles();
      for (int64_t d = 0; d < width; d += 32)
        multiply_tiles<kParts>(q_tile(0, r, d), q_tile(0, r + 16, d), rows * width, k_tile(0, j, d),
                               k_tile(0, j + 16, d), kKeys * width);
      store_tiles(segment(0, j), segment(0, j + 16), segment(16, j), segment(16, j + 16));
    }
  }

  template <bool kEdge>
  void softmax(int64_t n, int64_t begin, int64_t end, float scale2, float* m, float* l,
               float* alpha) {
    for (int64_t i = 0; i < n; i += 16)
      softmax_rows<kEdge>(i, min64(16, n - i), begin, end, scale2, m + i, l + i, alpha + i);
  }

  // 16 rows, of which n are there: what the others hold must not choose their way.
  template <bool kEdge>
  void softmax_rows(int64_t row0, int64_t n, int64_t begin, int64_t end, float scale2, float* m,
                    float* l, float* alpha) {
    __m512 top[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) top[i] = V::load(segment(row0 + i, begin));
    for (int64_t j = begin + 16; j < end; j += 16) {
      const float* x = segment(row0, j);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) top[i] = V::max(top[i], V::load(x + i * 16));
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) V::store(lanes + i * 16, top[i]);
    // The reference point is an integer: rescaling is then exact, and 2^(s - m) needs no rounding
    // of m.
    const __m512 m_old = V::load(m), highest = V::mul(V::max_rows(lanes), V::set1(scale2));
    const __m512 m_new =
        V::max(_mm512_roundscale_ps(highest, _MM_FROUND_CEIL | _MM_FROUND_NO_EXC), m_old);
    const __m512 m_safe = V::zero_where_hidden(m_new, m_new);
    const __m512 rescale = V::exp2(V::sub(m_old, m_safe));
    V::store(m, m_new);
    V::store(alpha, rescale);
    alignas(64) float base[16], least[16];
    V::store(least, V::div(V::sub(m_safe, V::set1(125)), V::set1(scale2)));
    // beyond 2^22 the numbers n are no longer the low bits of a float
    const __mmask16 present = static_cast<__mmask16>((1u << n) - 1);
    if (_mm512_mask_cmp_ps_mask(present, _mm512_abs_ps(m_safe), V::set1(0x1p22f), _CMP_GE_OQ)) {
      V::store(base, m_safe);
      exponentials<kEdge, true>(row0, begin, end, scale2, base, least);
    } else {
      V::store(base, V::sub(V::set1(kRound), m_safe));
      exponentials<kEdge, false>(row0, begin, end, scale2, base, least);
    }
    V::store(l, V::fma(V::load(l), rescale, V::sum_rows(lanes)));
  }

  // p <- 2^(scale2 s - m) for 16 rows, lanes <- their partial sums. base is kRound - m, or m where
  // kHuge.
  template <bool kEdge, bool kHuge>
  void exponentials(int64_t row0, int64_t begin, int64_t end, float scale2, const float* base,
                    const float* least) {
    const __m512 scale = V::set1(scale2);
    __m512 sum[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sum[i] = V::zero();
    for (int64_t j = begin; j < end; j += 32) {
      const float *x0 = segment(row0, j), *x1 = segment(row0, j + 16);
      Bf16* out = p_tile(0, row0, j);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const __m512 b = V::set1(base[i]), low = V::set1(least[i]);
        const __m512 e0 = exponential<kParts, kEdge, kHuge>(V::load(x0 + i * 16), scale, b, low);
        const __m512 e1 = exponential<kParts, kEdge, kHuge>(V::load(x1 + i * 16), scale, b, low);
        if constexpr (kParts == 1) {
          const __m512bh pair = _mm512_cvtne2ps_pbh(e1, e0);
          _mm512_storeu_si512(out + i * 32, reinterpret_cast<__m512i>(pair));
          // the sum of what is multiplied with v, not of what it was rounded from
          sum[i] =
              _mm512_dpbf16_ps(sum[i], pair, reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80)));
        } else {
          sum[i] = V::add(sum[i], V::add(e0, e1));
          __m512 r0 = e0, r1 = e1;
#pragma GCC unroll 4
          for (int part = 0; part < kParts; ++part) {
            const __m512i pair = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(r1, r0));
            _mm512_storeu_si512(out + part * kRows * kKeys + i * 32, pair);
            r0 = V::sub(r0, widen16(_mm512_castsi512_si256(pair)));
            r1 = V::sub(r1, widen16(_mm512_extracti64x4_epi64(pair, 1)));
          }
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) V::store(lanes + i * 16, sum[i]);
  }

  void accumulate(int64_t n, int64_t begin, int64_t end, float* o, const float* alpha,
                  bool skip_zeros) {
    if (skip_zeros) return accumulate_seen(n, begin, end, o, alpha);
    for (int64_t d = 0; d < width; d += 32) {
      zero_tiles();
      for (int64_t j = begin; j < end; j += 32)
        multiply_tiles<kParts>(p_tile(0, 0, j), p_tile(0, 16, j), kRows * kKeys, v_tile(0, j, d),
                               v_tile(0, j, d + 16), kKeys * width);
      store_tiles(sum, sum + 256, sum + 512, sum + 768);
      for (int64_t row = 0; row < n; ++row) {
        const __m512 scale = V::set1(alpha[row]);
        const float* x = sum + row / 16 * 512 + row % 16 * 16;
        float* c = o + row * width + d;
        V::store(c, V::fma(V::load(c), scale, V::load(x)));
        V::store(c + 16, V::fma(V::load(c + 16), scale, V::load(x + 256)));
      }
    }
  }

  // The slow way for a v with NaN or inf that some rows do not see: only what they see is
  // multiplied.
  void accumulate_seen(int64_t n, int64_t begin, int64_t end, float* o, const float* alpha) {
    for (int64_t row = 0; row < n; ++row)
      for (int64_t d = 0; d < width; ++d) {
        float total = 0;
        for (int64_t j = begin; j < end; ++j) {
          float weight = 0, value = 0;
          for (int i = 0; i < kParts; ++i) {
            weight += widen(BFloat16{p_tile(i, row, j)[row % 16 * 32 + j % 32]});
            value += widen(BFloat16{v_tile(i, j, d)[j % 32 / 2 * 32 + d % 16 * 2 + j % 2]});
          }
          if (weight != 0) total += weight * value;
        }
        o[row * width + d] = o[row * width + d] * alpha[row] + total;
      }
  }
};

}  // namespace
