// From products q.k to weights: terms and masks of pairs, intervals, and what dropout keeps.
#pragma once

#include <math.h>

#include "../large.h"
#include "products.cuh"

namespace clinattn {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr float kInfinity = __builtin_huge_valf(), kLargest = 3.402823466e38f;

// To some ulp, near 0 too; the polynomial there is that of Cephes' tanhf.
CLINATTN_DEVICE float tanh_accurate(float x) {
  const float size = fabsf(x), z = x * x;
  float series = fmaf(-5.70498872745e-3f, z, 2.06390887954e-2f);
  series = fmaf(series, z, -5.37397155531e-2f);
  series = fmaf(series, z, 1.33314422036e-1f);
  series = fmaf(series, z, -3.33332819422e-1f);
  const float limit = 1 - 2 / (exp2_fast(size * static_cast<float>(2 * kLog2e)) + 1);
  return size < 0.625f ? fmaf(series * z, x, x) : copysignf(limit, x);
}

// The scores of one head of one sequence: natural ones, or q.k as it comes where that is all
struct Scores {
  const char* mask = nullptr;
  const float *times = nullptr, *table = nullptr;
  float scale, cap, scale_over_cap, slope = 0, decay = 0;
  bool by_pair;  // more than masks of keys, which hide them and leave the other scores as they are

  CLINATTN_DEVICE Scores(const AttentionParams& p, const Sequence& seq, int64_t head)
      : scale(static_cast<float>(p.scale)),
        cap(static_cast<float>(p.softcap)),
        scale_over_cap(p.softcap != 0 ? fminf(static_cast<float>(p.scale / p.softcap), kLargest)
                                      : 0) {
    if (p.mask.ptr)
      mask = static_cast<const char*>(p.mask.ptr) +
             (seq.index * p.mask.batch + head * p.mask.head) * mask_size(p);
    if (p.decay) {
      decay = static_cast<const float*>(p.decay)[head];
      times =
          static_cast<const float*>(p.times) + (p.cu_seqlens_q ? seq.q_row0 : seq.index * p.max_q);
    }
    if (p.slopes) slope = static_cast<const float*>(p.slopes)[seq.index * p.slopes_batch + head];
    if (p.relative)
      table = static_cast<const float*>(p.relative) + head * (2 * p.relative_reach + 1);
    by_pair = are_by_pair(p);
  }
  static CLINATTN_SHARED bool are_by_pair(const AttentionParams& p) {
    return p.softcap != 0 || p.decay || p.slopes || p.relative ||
           (p.mask.ptr && (p.mask.row != 0 || p.mask.dtype != DType::kBool));
  }

  // The factors that make natural scores, and scores in base 2: of natural ones where by_pair, else
  // of q.k.
  CLINATTN_DEVICE float natural() const { return by_pair ? 1 : scale; }
  CLINATTN_DEVICE float base2(const AttentionParams& p) const {
    return static_cast<float>(by_pair ? kLog2e : p.scale * kLog2e);
  }

  static CLINATTN_DEVICE int64_t mask_size(const AttentionParams& p) {
    return p.mask.dtype == DType::kBool ? 1 : p.mask.dtype == DType::kFloat32 ? 4 : 2;
  }
  // Returns what the mask adds to the score of a pair, -inf where the mask hides it.
  CLINATTN_DEVICE float mask_at(const AttentionParams& p, int64_t i, int64_t j) const {
    const char* at = mask + (i * p.mask.row + j * p.mask.key) * mask_size(p);
    switch (p.mask.dtype) {
      case DType::kBool:
        return *at ? 0 : -kInfinity;
      case DType::kFloat32:
        return *reinterpret_cast<const float*>(at);
      case DType::kFloat16:
        return to_float(*reinterpret_cast<const half*>(at));
      default:
        return to_float(*reinterpret_cast<const bfloat16*>(at));
    }
  }
  // Returns whether a mask that is the same for all queries hides a key.
  CLINATTN_DEVICE bool hides_key(const AttentionParams& p, int64_t j) const {
    return mask && p.mask.row == 0 && mask_at(p, 0, j) == -kInfinity;
  }
  // Returns whether keys that no query of a tile sees are known only with the scores.
  CLINATTN_DEVICE bool hides_pairs(const AttentionParams& p) const {
    return mask && p.mask.row != 0;
  }

  // The score of x = q.k, -inf where the mask hides it or there is no such pair. gain gets the
  // derivative of the softcap.
  CLINATTN_DEVICE float operator()(const AttentionParams& p, const Sequence& seq, float x,
                                   int64_t i, int64_t j, float& gain) const {
    gain = 1;
    if (i < 0 || i >= seq.q_end || j < seq.k_begin || j >= seq.k_end) return -kInfinity;
    if (p.softcap != 0) {
      const float t = tanh_accurate(x * scale_over_cap);
      gain = (1 - t) * (1 + t);
      x = t * cap;
    } else {
      x *= scale;
    }
    const int64_t ahead = j - i - seq.offset;
    if (table) {
      const int64_t reach = p.relative_reach;
      x += table[clamp(ahead, -reach, reach) + reach];
    }
    if (p.slopes) x -= slope * fabsf(static_cast<float>(ahead));
    if (times) x -= decay * fabsf(times[i] - times[j]);
    if (mask) {
      const float m = mask_at(p, i, j);
      x = m == -kInfinity ? m : x + m;
    }
    return x;
  }

  // Adds the share of the derivative d of a score to the derivatives of decay and slope.
  CLINATTN_DEVICE void add_distances(const Sequence& seq, float d, int64_t i, int64_t j,
                                     float& of_decay, float& of_slope) const {
    if (times) of_decay = fmaf(-d, fabsf(times[i] - times[j]), of_decay);
    of_slope = fmaf(-d, fabsf(static_cast<float>(j - i - seq.offset)), of_slope);
  }
};

// Columns [lo, hi) and those before prefix, of a tile of keys: what a query sees of it.
struct Visible {
  int lo, hi, prefix;

  static CLINATTN_DEVICE Visible of(const Sequence& seq, int64_t i, int64_t k0, int keys) {
    if (i < 0 || i >= seq.q_end) return {0, 0, 0};
    return {static_cast<int>(clamp(seq.lo(i) - k0, 0, keys)),
            static_cast<int>(clamp(seq.hi(i) - k0, 0, keys)),
            static_cast<int>(clamp(seq.k_prefix - k0, 0, keys))};
  }
  CLINATTN_DEVICE bool sees(int column) const {
    return (column >= lo && column < hi) || column < prefix;
  }
};

// Returns whether weights of a row are formed of natural scores, less the maximum or the normaliser
// before they go to base 2: where scores are formed pair by pair anyway, and in large rows.
CLINATTN_DEVICE bool are_whole(const Scores& scores, float m2) {
  return scores.by_pair || is_large(m2);
}

// Returns the power of 2 that multiplies a row's weights when its maximum grows from m_old to m.
CLINATTN_DEVICE float growth(const Scores& scores, float scale2, float m_old, float m) {
  const auto reference = [&](float x) {
    const float x2 = x * scale2;
    return are_whole(scores, x2) ? product(x, scores.natural()) * kLog2e : static_cast<double>(x2);
  };
  return m_old == -kInfinity ? m_old : static_cast<float>(reference(m_old) - reference(m));
}

// The normaliser of a row with the maximum m and the sum l as a natural logarithm, and what
// rounding took from it
struct TwoPart {
  float high, low;
};
CLINATTN_DEVICE TwoPart normaliser(const Scores& scores, float scale2, float m, float l) {
  const bool whole = are_whole(scores, m * scale2);
  const double log_l = logf(l),
               x = whole ? product(m, scores.natural()) : static_cast<double>(m * scale2) * kLn2;
  float high = static_cast<float>(x + log_l);
  if (!scores.by_pair && !isinf(high) && high == high) high = on_side(high, whole);
  return {high, isinf(high) ? 0 : static_cast<float>((x - high) + log_l)};
}
// Scores less such a normaliser, in base 2
CLINATTN_DEVICE float less_normaliser(float x, float lse, float lse_low) {
  return ((x - lse) - lse_low) * static_cast<float>(kLog2e);
}
CLINATTN_DEVICE TwoPart base2(float high, float low) {
  const double x = (static_cast<double>(high) + low) * kLog2e;
  const float y = static_cast<float>(x);
  return {y, isinf(y) ? 0 : static_cast<float>(x - y)};
}

// Returns log2 of the weight of a score x of a row with such a normaliser, which is a natural one
// or in base 2.
CLINATTN_DEVICE float log2_weight(float x, TwoPart lse, bool natural, const Scores& scores,
                                  float scale2) {
  return natural ? less_normaliser(product(x, scores.natural()), lse.high, lse.low)
                 : fmaf(x, scale2, -lse.high) - lse.low;
}

// The rows whose normaliser is taken off q.k before all other rows are scaled: large rows
// (kNatural), and rows of 16 bits whose second part counts (kBase2).
enum class Apart : uint8_t { kNo, kNatural, kBase2 };
template <class T>
CLINATTN_DEVICE Apart is_apart(float lse) {
  if (is_large_normaliser(lse)) return Apart::kNatural;
  return sizeof(T) == 2 && fabsf(lse) >= 1024 && lse - lse == 0 ? Apart::kBase2 : Apart::kNo;
}
// Returns x = q.k less the normaliser of such a row, in the unit of x.
template <class T>
CLINATTN_DEVICE float less_apart(float x, Apart apart, float scale, float scale2, float lse,
                                 float lse_low) {
  if (sizeof(T) == 4 || apart == Apart::kNatural)
    return less_normaliser(product(x, scale), lse, lse_low) / scale2;
  return (fmaf(x, scale2, -lse) - lse_low) / scale2;
}

// The draws of dropout, as backends/reference/philox.py defines them. The counter of 16 keys of a
// query is (key / 16, query, head, sequence).
struct Dropout {
  uint32_t key0, key1, head, sequence, threshold;

  CLINATTN_DEVICE Dropout(const AttentionParams& p, int64_t seq, int64_t head)
      : head(static_cast<uint32_t>(head)),
        sequence(static_cast<uint32_t>(seq)),
        threshold(p.dropout_threshold) {
    const uint64_t seed = p.dropout_threshold ? *p.seed_at : 0;
    key0 = static_cast<uint32_t>(seed);
    key1 = static_cast<uint32_t>(seed >> 32);
  }

  struct Words {
    uint32_t x[4];
  };
  CLINATTN_DEVICE Words philox(uint32_t block, uint32_t query) const {
    constexpr uint32_t kFirst = 0xD2511F53, kSecond = 0xCD9E8D57;
    uint32_t c0 = block, c1 = query, c2 = head, c3 = sequence, k0 = key0, k1 = key1;
#pragma unroll
    for (int round = 0; round < 7; ++round) {
      const uint32_t high0 = high_word(c0, kFirst), low0 = c0 * kFirst;
      const uint32_t high1 = high_word(c2, kSecond), low1 = c2 * kSecond;
      c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
      k0 += 0x9E3779B9, k1 += 0xBB67AE85;
    }
    return {{c0, c1, c2, c3}};
  }

  // The least byte of a query that is kept; 256 where none is
  CLINATTN_DEVICE uint32_t least(uint32_t query) const {
    const uint32_t word = philox(0xffffffff, query).x[0];
    return (threshold >> 16) + ((word & 0xffff) < (threshold & 0xffff) ? 1 : 0);
  }
  // A bit for each of 16 keys
  CLINATTN_DEVICE uint32_t kept(uint32_t block, uint32_t query, uint32_t least) const {
    const Words words = philox(block, query);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i)
      bits |= (words.x[i / 4] >> i % 4 * 8 & 0xff) >= least ? 1u << i : 0;
    return bits;
  }
};

CLINATTN_DEVICE float kept_scale(const AttentionParams& p) {
  const double kept = 1 - p.dropout_threshold / 16777216.0;
  return kept > 0 ? static_cast<float>(1 / kept) : 0;
}

// The pairs of kQueries queries and kKeys keys that a warp keeps, a bit each. kBlocks covers keys
// that do not start at a multiple of 16.
template <int kQueries, int kKeys>
struct Kept {
  static constexpr int kBlocks = (kKeys + 15) / 16 + 1;
  static constexpr int kBytes = kQueries * kBlocks * 2;

  uint16_t* bits;  // (kQueries, kBlocks)
  int shift;

  CLINATTN_DEVICE void draw(const Dropout& dropout, int64_t first_query, const uint16_t* least,
                            int64_t first_key) {
    shift = static_cast<int>(first_key % 16);
    sync_warp();  // the last tile's are used up
    for (int at = lane_index(); at < kQueries * kBlocks; at += kWarp) {
      const int query = at / kBlocks;
      bits[at] = static_cast<uint16_t>(
          dropout.kept(static_cast<uint32_t>(first_key / 16 + at % kBlocks),
                       static_cast<uint32_t>(first_query + query), least[query]));
    }
    sync_warp();
  }
  CLINATTN_DEVICE bool at(int query, int key) const {
    key += shift;
    return bits[query * kBlocks + key / 16] >> key % 16 & 1;
  }
};

}  // namespace clinattn
