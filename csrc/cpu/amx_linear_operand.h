// Operands of fp32 linear layers on AMX tiles: each number as the sum of three bf16 parts, which
// hold all its 24 bits. Rows are multiplied by powers of two before they are split, and products
// are multiplied back: digits of small numbers would be lost in tiles.
#pragma once

#include "../linear.h"
#include "bf16_parts.h"

namespace {

using clinattn::Matrix;

// Sixteen rows of either operand lie after sixteen: their parts (3, steps of 32, 16 rows, 32), as B
// packed, and 16 floats, the powers of two that products with them are multiplied by.
struct AmxLinearOperand {
  static constexpr int kParts = 3;
  static constexpr int64_t kDepth = 1024, kSection = 256;

  // Rows are multiplied by 2^24, after which every digit of every number counts, of denormal ones
  // too; those that reach 2^32 by what brings their largest number to [2^55, 2^56): 1024 products
  // of such stay below 2^122. With a row that is not finite all products are infinite or NaN.
  static constexpr float kUsual = -24, kNotFinite = 73, kRaise = 0x1p24f, kBack = 0x1p-48f;
  static constexpr float kLarge = 0x1p32f, kLargest = 55, kInfinity = __builtin_inff();

  static int64_t steps(int64_t depth) { return ceil_div(depth, int64_t{32}); }
  static int64_t parts_of(int64_t depth) { return kParts * steps(depth) * kTile; }
  static int64_t sixteen(int64_t depth) { return parts_of(depth) + 32; }

  // Bytes of so many rows of either operand
  static size_t packed_size(int64_t rows, int64_t depth) {
    return round_up(rows, 32) / 16 * sixteen(depth) * sizeof(Bf16);
  }

  // The powers of 16 rows
  static float* powers(Bf16* at, int64_t depth) {
    return reinterpret_cast<float*>(at + parts_of(depth));
  }
  static const float* powers(const Bf16* at, int64_t depth) {
    return reinterpret_cast<const float*>(at + parts_of(depth));
  }

  // powers <- the powers of 16 rows with these largest magnitudes. Returns whether all are kUsual.
  static bool choose(float* powers) {
    const __m512 sizes = _mm512_loadu_ps(powers);
    const __mmask16 large = _mm512_cmp_ps_mask(sizes, _mm512_set1_ps(kLarge), _CMP_NLT_UQ);
    const __m512 fitting = _mm512_sub_ps(_mm512_getexp_ps(sizes), _mm512_set1_ps(kLargest));
    const __m512 chosen = _mm512_min_ps(fitting, _mm512_set1_ps(kNotFinite));
    _mm512_storeu_ps(powers, _mm512_mask_mov_ps(_mm512_set1_ps(kUsual), large, chosen));
    return large == 0;
  }

  // to <- 2^-power x (n). A result less than 2^-126 becomes 2^-126 with its sign: infinity times 0
  // would be NaN.
  static void scale(const float* x, int64_t n, float power, float* to) {
    const __m512 least = _mm512_set1_ps(0x1p-126f);
    for (int64_t d = 0; d < n; d += 16) {
      const auto there = static_cast<__mmask16>((1u << min64(n - d, 16)) - 1);
      const __m512 from = _mm512_maskz_loadu_ps(there, x + d);
      const __m512 scaled = _mm512_scalef_ps(from, _mm512_set1_ps(-power));
      const __mmask16 lost = _mm512_cmp_ps_mask(_mm512_abs_ps(scaled), least, _CMP_LT_OQ) &
                             _mm512_cmp_ps_mask(from, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      _mm512_storeu_ps(to + d, _mm512_mask_mov_ps(scaled, lost, Avx512::with_sign(least, from)));
    }
  }

  // to <- parts of 16 rows of x from row0 on, of [depth0, depth0 + count), at most a section; what
  // lies outside x is 0. First all have the usual power and powers <- max(powers, sizes of rows);
  // again, they have those that were chosen.
  static void split_rows(const Matrix& x, int64_t row0, int64_t depth0, int64_t count,
                         const Lines& to, float* powers, bool again) {
    alignas(64) float turned[16 * kSection], scaled[kSection];
    const int64_t rows = x.rows - row0 < 16 ? x.rows - row0 : 16;
    const float* from =
        static_cast<const float*>(x.at) + row0 * x.row_stride + depth0 * x.depth_stride;
    int64_t stride = x.row_stride;
    if (x.depth_stride != 1) {
      int64_t k = 0;
      if (rows == 16)
        for (; k + 16 <= count; k += 16)
          Avx512::transpose(from + k * x.depth_stride, x.depth_stride, turned + k, kSection);
      for (; k < count; ++k)
        for (int64_t row = 0; row < rows; ++row)
          turned[row * kSection + k] = from[row + k * x.depth_stride];
      from = turned, stride = kSection;
    }
    for (int64_t row = 0; row < 16; ++row) {
      const Lines line{to.at + 32 * row, to.part, to.line};
      const float* source = row < rows ? from + row * stride : nullptr;
      const int64_t padded = round_up(count, 32);
      float factor = kRaise;
      if (again && powers[row] != kUsual) {
        scale(source, count, powers[row], scaled);
        source = scaled, factor = 1;
      }
      if (again && powers[row] == kNotFinite) {  // its other parts are not looked at
        split_row<1>(line, source, DType::kFloat32, count, padded, factor);
        continue;
      }
      const Contents found =
          split_row<kParts>(line, source, DType::kFloat32, count, padded, factor);
      if (again) continue;
      const float size = found.finite ? found.size() : kInfinity;
      if (size > powers[row]) powers[row] = size;
    }
  }

  // to <- rows rows of depth numbers, where split(row, k, again) does so for 16 rows and a section
  template <class Split>
  static void split_all(Bf16* to, int64_t rows, int64_t depth, const Split& split) {
    const auto powers_of = [&](int64_t row) {
      return powers(to + row / 16 * sixteen(depth), depth);
    };
    rows = round_up(rows, 32);
    for (int64_t row = 0; row < rows; row += 16) Avx512::store(powers_of(row), Avx512::zero());
    for (int64_t k = 0; k < depth; k += kSection)
      for (int64_t row = 0; row < rows; row += 16) split(row, k, false);
    for (int64_t row = 0; row < rows; row += 16)
      if (!choose(powers_of(row)))
        for (int64_t k = 0; k < depth; k += kSection) split(row, k, true);
  }
};

}  // namespace
