// The forward pass's products on AMX tiles, its softmax on AVX-512.
#pragma once

#include "amx.h"

namespace {

template <int kParts>
struct AmxForward {
  using V = Avx512;
  using T = float;
  using Session = TileSession;
  using P = Products<kParts>;
  static constexpr int64_t kRows = 32, kKeys = 256;   // two tiles of queries; keys of a panel
  static constexpr int64_t kBlock = 32, kBegin = 32;  // two tiles of keys, one step of p v
  static constexpr int64_t kChunk = kParts == 1 ? 1024 : 512;

  const int64_t head_dim, width;  // width: head_dim padded to two tiles
  const int64_t rows;
  Bf16* q;  // (parts, rows, width): 1024 x 64 x 2 bytes = 128 KB in L2
  Bf16 *kt,
      *v;    // (parts, kKeys / 16, width / 32, tile), (parts, kKeys / 32, width / 16, tile): 32 KB
  float* s;  // (kRows, kKeys): 32 KB
  Bf16* p;   // (parts, kRows, kKeys): 16 KB
  Bf16* stage;  // (parts, kBlock, width): rows on their way into tiles
  float* sum;   // (kRows, 32): the tiles of p v before they join o
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

  void put_query(int64_t r, const void* row, DType dtype, bool negate) {
    split_row<kParts>(q + r * width, rows * width, row, dtype, head_dim, width, negate);
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

  Bf16* k_tile(int64_t part, int64_t key, int64_t d) {
    return kt + ((part * kKeys + key) / 16 * (width / 32) + d / 32) * kTile;
  }
  Bf16* v_tile(int64_t part, int64_t key, int64_t d) {
    return v + ((part * kKeys + key) / 32 * (width / 16) + d / 16) * kTile;
  }

  void scores(int64_t r, int64_t, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j += 32) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int i = 0; i < P::kCount; ++i)
        for (int64_t d = 0; d < width; d += 32) {
          const Bf16* a = q + (P::kA[i] * rows + r) * width + d;
          _tile_loadd(4, a, width * 2);
          _tile_loadd(5, a + 16 * width, width * 2);
          _tile_loadd(6, k_tile(P::kB[i], j, d), 64);
          _tile_loadd(7, k_tile(P::kB[i], j + 16, d), 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      store_tiles(s + j, kKeys);
    }
  }

  static void store_tiles(float* c, int64_t ld) {
    _tile_stored(0, c, ld * 4);
    _tile_stored(1, c + 16, ld * 4);
    _tile_stored(2, c + 16 * ld, ld * 4);
    _tile_stored(3, c + 16 * ld + 16, ld * 4);
  }

  template <bool kEdge>
  void softmax(int64_t n, int64_t begin, int64_t end, float scale2, float* m, float* l,
               float* alpha) {
    for (int64_t i = 0; i < n; i += 16)
      softmax_rows<kEdge>(i, min64(16, n - i), begin, end, scale2, m + i, l + i, alpha + i);
  }

  template <bool kEdge>
  void softmax_rows(int64_t i, int64_t n, int64_t begin, int64_t end, float scale2, float* m,
                    float* l, float* alpha) {
    const float* x = s + i * kKeys;
    for (int64_t row = 0; row < n; ++row) {
      __m512 top0 = V::load(x + row * kKeys + begin), top1 = V::load(x + row * kKeys + begin + 16);
      for (int64_t j = begin + 32; j < end; j += 32) {
        top0 = V::max(top0, V::load(x + row * kKeys + j));
        top1 = V::max(top1, V::load(x + row * kKeys + j + 16));
      }
      V::store(lanes + row * 16, V::max(top0, top1));
    }
    // The reference point is an integer: rescaling is then exact, and 2^(s - m) needs no rounding
    // of m.
    const __m512 m_old = V::load(m), top = V::mul(V::max_rows(lanes), V::set1(scale2));
    const __m512 m_new =
        V::max(_mm512_roundscale_ps(top, _MM_FROUND_CEIL | _MM_FROUND_NO_EXC), m_old);
    const __m512 m_safe = V::zero_where_hidden(m_new, m_new);
    const __m512 rescale = V::exp2(V::sub(m_old, m_safe));
    V::store(m, m_new);
    V::store(alpha, rescale);
    alignas(64) float base[16], least[16];
    V::store(base, V::sub(V::set1(kRound), m_safe));
    V::store(least, V::div(V::sub(m_safe, V::set1(125)), V::set1(scale2)));
    const bool huge = _mm512_cmp_ps_mask(_mm512_abs_ps(m_safe), V::set1(0x1p22f), _CMP_NLT_UQ);
    for (int64_t row = 0; row < n; ++row) {
      const __m512 sum = huge ? exponentials<kEdge, true>(x + row * kKeys, i + row, begin, end,
                                                          scale2, kRound - base[row], 0)
                              : exponentials<kEdge, false>(x + row * kKeys, i + row, begin, end,
                                                           scale2, base[row], least[row]);
      V::store(lanes + row * 16, sum);
    }
    V::store(l, V::fma(V::load(l), rescale, V::sum_rows(lanes)));
  }

  static constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer in the low bits

  // p[row] <- 2^(scale2 x - m); returns partial sums. base is kRound - m (kHuge: base is m).
  template <bool kEdge, bool kHuge>
  __m512 exponentials(const float* x, int64_t row, int64_t begin, int64_t end, float scale2,
                      float base, float least) {
    const __m512 scale = V::set1(scale2), b = V::set1(base), low = V::set1(least);
    Bf16* out = p + row * kKeys;
    __m512 sum0 = V::zero(), sum1 = V::zero();
    for (int64_t j = begin; j < end; j += 32) {
      const __m512 e0 = exponential<kEdge, kHuge>(V::load(x + j), scale, b, low);
      const __m512 e1 = exponential<kEdge, kHuge>(V::load(x + j + 16), scale, b, low);
      if constexpr (kParts == 1) {
        const __m512bh pair = _mm512_cvtne2ps_pbh(e1, e0);
        _mm512_storeu_si512(out + j, reinterpret_cast<__m512i>(pair));
        // the sum of what is multiplied with v, not of what it was rounded from
        sum0 = _mm512_dpbf16_ps(sum0, pair, reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80)));
      } else {
        sum0 = V::add(sum0, e0);
        sum1 = V::add(sum1, e1);
        __m512 r0 = e0, r1 = e1;
        for (int i = 0; i < kParts; ++i) {
          const __m512i pair = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(r1, r0));
          _mm512_storeu_si512(out + i * kRows * kKeys + j, pair);
          r0 = V::sub(r0, widen16(_mm512_castsi512_si256(pair)));
          r1 = V::sub(r1, widen16(_mm512_extracti64x4_epi64(pair, 1)));
        }
      }
    }
    return V::add(sum0, sum1);
  }

  // With an integer m, n = round(scale2 x - m) stands in the low bits of k and 2^n is an addition
  // to the exponent. No 2^n below 2^-125 is made; where kEdge, hidden scores of -inf give 0.
  template <bool kEdge, bool kHuge>
  static __m512 exponential(__m512 x, __m512 scale, __m512 base, __m512 least) {
    if constexpr (kHuge) return V::exp2(V::fma(x, scale, V::sub(V::zero(), base)));
    const __m512 z = _mm512_max_ps(least, x);  // in this order NaN stays NaN
    const __m512 k = V::fma(z, scale, base);
    const __m512 r = _mm512_fmsub_ps(z, scale, V::sub(k, base));
    __m512 y;
    if constexpr (kParts == 1) {
      y = V::set1(kExp2Short[3]);
      for (int i = 2; i >= 0; --i) y = V::fma(y, r, V::set1(kExp2Short[i]));
    } else {
      y = V::exp2_fraction(r);
    }
    const __m512 e = _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(y), _mm512_slli_epi32(_mm512_castps_si512(k), 23)));
    return kEdge ? V::zero_where_hidden(e, x) : e;
  }

  void accumulate(int64_t n, int64_t begin, int64_t end, float* o, const float* alpha,
                  bool skip_zeros) {
    if (skip_zeros) return accumulate_seen(n, begin, end, o, alpha);
    for (int64_t d = 0; d < width; d += 32) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int i = 0; i < P::kCount; ++i)
        for (int64_t j = begin; j < end; j += 32) {
          const Bf16* a = p + P::kA[i] * kRows * kKeys + j;
          _tile_loadd(4, a, kKeys * 2);
          _tile_loadd(5, a + 16 * kKeys, kKeys * 2);
          _tile_loadd(6, v_tile(P::kB[i], j, d), 64);
          _tile_loadd(7, v_tile(P::kB[i], j, d + 16), 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      store_tiles(sum, 32);
      for (int64_t row = 0; row < n; ++row) {
        const __m512 scale = V::set1(alpha[row]);
        float* c = o + row * width + d;
        V::store(c, V::fma(V::load(c), scale, V::load(sum + row * 32)));
        V::store(c + 16, V::fma(V::load(c + 16), scale, V::load(sum + row * 32 + 16)));
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
            weight += widen(BFloat16{p[(i * kRows + row) * kKeys + j]});
            value += widen(BFloat16{v_tile(i, j, d)[j % 32 / 2 * 32 + d % 16 * 2 + j % 2]});
          }
          if (weight != 0) total += weight * value;
        }
        o[row * width + d] = o[row * width + d] * alpha[row] + total;
      }
  }
};

}  // namespace
