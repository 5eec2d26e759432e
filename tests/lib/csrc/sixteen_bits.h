// half and bfloat16: conversions to and from float, to nearest, ties to even.
#pragma once

#include <bit>
#include <cstdint>

namespace clinattn {

struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
inline float to_float(half x) {  // without branches, so that loops of it become vectors
  constexpr uint32_t kExponent = 0x1f << 23, kRebias = 112 << 23;
  const uint32_t shifted = (x.bits & 0x7fffu) << 13, exponent = shifted & kExponent;
  const uint32_t normal = shifted + kRebias + (exponent == kExponent ? kRebias : 0);
  // 2^-14 + x, less 2^-14
  const float small = std::bit_cast<float>(shifted + (113 << 23)) - 0x1p-14f;
  const uint32_t size = exponent == 0 ? std::bit_cast<uint32_t>(small) : normal;
  return std::bit_cast<float>(size | (x.bits & 0x8000u) << 16);
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline half from_float<half>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000;
  const uint32_t size = bits & 0x7fffffff;
  uint32_t y;
  if (size > 0x7f800000) return {0x7fff};
  if (size >= 143 << 23) {  // 2^16 and more
    y = 0x7c00;
  } else if (size < 113 << 23) {  // the sum has 2^-24 in its last place, as subnormals have
    y = std::bit_cast<uint32_t>(std::bit_cast<float>(size) + 0.5f) - std::bit_cast<uint32_t>(0.5f);
  } else {
    y = (size - (112 << 23) + 0xfff + (size >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | y)};
}
template <>
inline bfloat16 from_float<bfloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// Two rounded numbers in a register, the first in its lower half
template <class T>
inline uint32_t pack(float first, float second) {
  return from_float<T>(first).bits | uint32_t{from_float<T>(second).bits} << 16;
}

}  // namespace clinattn
