// Rows of q, k, v, o and the mask, to and from the type of the arithmetic.
#pragma once

#include <stddef.h>
#include <string.h>

#include <type_traits>

#include "../interval.h"

namespace {

using clinattn::DType;
using clinattn::Mask;
using clinattn::Strides;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline int64_t dtype_size(DType t) {
  switch (t) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kBool:
      return 1;
    default:
      return 2;
  }
}

template <class P>
inline P* row_at(P* base, DType t, const Strides& s, int64_t seq, int64_t head, int64_t row) {
  using Byte = std::conditional_t<std::is_const_v<P>, const char, char>;
  return static_cast<Byte*>(base) + (seq * s.batch + head * s.head + row * s.row) * dtype_size(t);
}

// Asks for the lines of a row, which is needed soon, to come to L2.
inline void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64)
    __builtin_prefetch(static_cast<const char*>(row) + at, 0, 2);
}

template <class V, class E>
inline void load_elements(typename V::T* dst, const E* src, int64_t n) {
  int64_t j = 0;
  for (; j + V::kWidth <= n; j += V::kWidth) V::store(dst + j, V::load_as(src + j));
  if (j < n) {
    E tail[V::kWidth] = {};
    memcpy(tail, src + j, (n - j) * sizeof(E));
    V::store(dst + j, V::load_as(tail));
  }
}

// dst (padded to a multiple of the vector width with zeros) <- src (n)
template <class V>
inline void load_row(typename V::T* dst, const void* src, DType t, int64_t n) {
  if constexpr (sizeof(typename V::T) == 8) {
    load_elements<V>(dst, static_cast<const double*>(src), n);
  } else {
    if (t == DType::kFloat32) load_elements<V>(dst, static_cast<const float*>(src), n);
    if (t == DType::kBFloat16) load_elements<V>(dst, static_cast<const BFloat16*>(src), n);
    if (t == DType::kFloat16) load_elements<V>(dst, static_cast<const Float16*>(src), n);
  }
}

// the same; zeros where src is null
template <class V>
inline void load_row_or_zeros(typename V::T* dst, const void* src, DType t, int64_t n) {
  if (src) return load_row<V>(dst, src, t, n);
  for (int64_t j = 0; j < n; j += V::kWidth) V::store(dst + j, V::zero());
}

template <class T>
alignas(64) inline constexpr T kZeroRow[256] = {};

// Returns the numbers of a row where they are, zeros where src is null, or else a copy as load_row
// makes it.
template <class V>
inline const typename V::T* row_or_copy(const void* src, DType t, int64_t n, typename V::T* copy) {
  using T = typename V::T;
  if (!src) return kZeroRow<T>;
  if (n % V::kWidth == 0 && t == (sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32))
    return static_cast<const T*>(src);
  load_row<V>(copy, src, t, n);
  return copy;
}

// x (n, a multiple of the vector width) <- -x
template <class V>
inline void negate_row(typename V::T* x, int64_t n) {
  for (int64_t j = 0; j < n; j += V::kWidth) V::store(x + j, V::sub(V::zero(), V::load(x + j)));
}

template <class V, class E, class Op>
inline void store_elements(E* dst, const typename V::T* src, int64_t n, Op op) {
  int64_t j = 0;
  for (; j + V::kWidth <= n; j += V::kWidth) V::store_as(dst + j, op(V::load(src + j)));
  if (j < n) {
    E tail[V::kWidth];
    V::store_as(tail, op(V::load(src + j)));
    memcpy(dst + j, tail, (n - j) * sizeof(E));
  }
}

// dst (n) <- op(src), rounded once
template <class V, class Op>
inline void store_row(void* dst, const typename V::T* src, DType t, int64_t n, Op op) {
  if constexpr (sizeof(typename V::T) == 8) {
    store_elements<V>(static_cast<double*>(dst), src, n, op);
  } else {
    if (t == DType::kFloat32) store_elements<V>(static_cast<float*>(dst), src, n, op);
    if (t == DType::kBFloat16) store_elements<V>(static_cast<BFloat16*>(dst), src, n, op);
    if (t == DType::kFloat16) store_elements<V>(static_cast<Float16*>(dst), src, n, op);
  }
}

template <class V>
inline bool all_finite(const typename V::T* x, int64_t n) {
  auto acc = V::zero();
  // x * 0 is NaN for inf and NaN, else 0
  for (int64_t j = 0; j < n; j += V::kWidth) acc = V::fma(V::load(x + j), V::zero(), acc);
  return V::hsum(acc) == 0;
}

// Weights below 2^kLeastPower are 0. No sum of fp32 shows them, and neither they nor their products
// with ordinary numbers are denormal, each of which would cost about 150 cycles.
constexpr float kLeastPower = -100;

// 2^r on [-1/2, 1/2] is 1 + r (c0 + r (c1 + ...)), within 3.0e-9 relative: each coefficient was
// rounded before the later ones were fitted
constexpr float kExp2[6] = {0.6931472f,   0.24022648f,  0.055503596f,
                            0.009618499f, 0.001339097f, 0.00015329309f};
// 2^r on [0, 1] with 1 at 0: minimax of the relative error, 7.5e-8
constexpr float kExp2Above[6] = {1,           0.69315104f, 0.24016659f,
                                 0.05579452f, 0.00902266f, 0.00186505f};
// 2^r on [0, 1] where 16 bits are enough: minimax of the relative error, 7.5e-5
constexpr float kExp2Short[4] = {0.9999252f, 0.69583356f, 0.22606716f, 0.07802452f};
constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

template <class T, class E, class Op>
inline void mask_elements(T* dst, const void* ptr, int64_t offset, int64_t stride, int64_t n,
                          Op op) {
  const E* src = static_cast<const E*>(ptr) + offset;
  if (stride == 1) {
    for (int64_t j = 0; j < n; ++j) dst[j] = op(src[j]);
  } else {
    for (int64_t j = 0; j < n; ++j) dst[j] = op(src[j * stride]);
  }
}

inline float widen(BFloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

inline float widen(Float16 x) {
  uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  float f;
  if (rest >= 0x7c00) {
    uint32_t bits = 0x7f800000 | (rest & 0x3ff) << 13;
    memcpy(&f, &bits, 4);
  } else {
    uint32_t bits = rest << 13;  // the exponent is off by 112, also for subnormals
    memcpy(&f, &bits, 4);
    f *= 0x1p112f;
  }
  uint32_t bits;
  memcpy(&bits, &f, 4);
  bits |= sign;
  memcpy(&f, &bits, 4);
  return f;
}

// dst (n) <- what the mask adds to the scores of one query and keys [key, key + n); -inf hides a
// key
template <class T>
inline void load_mask(T* dst, const Mask& m, int64_t seq, int64_t head, int64_t row, int64_t key,
                      int64_t n) {
  constexpr T kHidden = -static_cast<T>(__builtin_inf());
  int64_t offset = seq * m.batch + head * m.head + row * m.row + key * m.key;
  switch (m.dtype) {
    case DType::kBool:
      mask_elements<T, uint8_t>(dst, m.ptr, offset, m.key, n,
                                [](uint8_t x) { return x ? T(0) : kHidden; });
      break;
    case DType::kFloat32:
      mask_elements<T, float>(dst, m.ptr, offset, m.key, n, [](float x) { return T(x); });
      break;
    case DType::kFloat64:
      mask_elements<T, double>(dst, m.ptr, offset, m.key, n, [](double x) { return T(x); });
      break;
    case DType::kBFloat16:
      mask_elements<T, BFloat16>(dst, m.ptr, offset, m.key, n,
                                 [](BFloat16 x) { return T(widen(x)); });
      break;
    case DType::kFloat16:
      mask_elements<T, Float16>(dst, m.ptr, offset, m.key, n,
                                [](Float16 x) { return T(widen(x)); });
      break;
  }
}

// Returns how much the mask shows of keys [k0, k0 + keys) for one head: a mask that is the same for
// all queries may hide or show all of these keys. buffer holds keys elements.
template <class T>
inline Sight mask_sight(const AttentionParams& p, const Sequence& seq, int64_t head, int64_t k0,
                        int64_t keys, T* buffer) {
  if (!p.mask.ptr) return Sight::kFull;
  if (p.mask.row != 0) return Sight::kEdge;
  load_mask(buffer, p.mask, seq.index, head, 0, k0, keys);
  bool any = false, all = p.mask.dtype == DType::kBool;
  for (int64_t j = 0; j < keys; ++j) {
    any |= buffer[j] != -static_cast<T>(__builtin_inf());
    all &= buffer[j] == 0;
  }
  return !any ? Sight::kNone : all ? Sight::kFull : Sight::kEdge;
}

// Returns whether a mask that is the same for all queries shows the key to some head of the group.
// A key that such a mask hides is padding: its k and v are packed as zeros.
inline bool seen_by_group(const AttentionParams& p, const Sequence& seq, int64_t kv_head,
                          int64_t key) {
  if (!p.mask.ptr || p.mask.row != 0) return true;
  const int64_t group = p.heads / p.kv_heads;
  for (int64_t g = 0; g < (p.mask.head ? group : 1); ++g) {
    double x = 0;
    load_mask(&x, p.mask, seq.index, kv_head * group + g, 0, key, 1);
    if (x != -__builtin_inf()) return true;
  }
  return false;
}

// Hands out pieces of one aligned block, or only counts them when it has none.
struct Arena {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (count * sizeof(T) + 63) / 64 * 64;
    return p;
  }
};

}  // namespace
