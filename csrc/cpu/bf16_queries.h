// A tile of queries into which blocks of keys are folded, and the blocks that are folded together.
#pragma once

#include "bf16_parts.h"
#include "normaliser.h"

namespace {

// The state of the queries of a tile: their reference points, and the sums of weights of the group
// of blocks at hand.
template <class Hide>
struct Bf16Queries {
  using V = Avx512;
  // offset: -m, or 0 for a query that has seen nothing; top: the natural maximum of a large row,
  // whose reference point it is, and whose offset is 0
  __m512 m[2], offset[2], top[2], l[2];
  __mmask16 there[2];  // the rest of the last 16 is computed, too, and never looked at
  int64_t halves;      // of 16
  bool fresh;          // o is 0
  const Bf16* q;
  Packing packing;
  float *m_out, *top_out, *l_out, *o;
  Hide hide;
  __m512 cut[2];  // of one part and with dropout: the sums of weights as they are multiplied

  void refer(int64_t i, __m512 reference) {
    m[i] = reference;
    offset[i] = V::sub(V::zero(), V::zero_where_hidden(reference, reference));
    offset[i] = _mm512_mask_mov_ps(offset[i], large(i), V::zero());
  }
  __mmask16 large(int64_t i) const {
    const __mmask16 seen = _mm512_cmp_ps_mask(m[i], V::set1(-__builtin_inff()), _CMP_NEQ_UQ);
    return _mm512_mask_cmp_ps_mask(there[i] & seen, V::abs(m[i]), V::set1(kLarge<float>),
                                   _CMP_GE_OQ);
  }
  __mmask16 unseen(int64_t i) const {
    return _mm512_mask_cmp_ps_mask(there[i], m[i], V::set1(-__builtin_inff()), _CMP_EQ_OQ);
  }
};

// Blocks whose weights are multiplied with v together, [first, last] of those that lie between
// two multiples of kGroup. Where edge, some query does not see some key that is multiplied.
template <class Hide>
struct Bf16Group {
  Bf16Queries<Hide>* queries;
  int64_t index, at, first, last;
  bool edge;
  Bf16* p;
  bool fresh;  // its p v is the first that o gets
};

}  // namespace
