// The tiles of AMX-BF16 on a machine that has none, by AVX2: each intrinsic that csrc/cpu uses, as
// its manual defines it (see emulated_avx512.h).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "emulated_avx512.h"

namespace emulated {

// A use of tiles that are not configured, or not as the kernels mean them, ends the process.
struct alignas(64) Tiles {
  uint8_t config[64];
  float rows[8][16][16];
};
inline thread_local Tiles tiles = {};

inline void check_tile(int t) {
  if (tiles.config[0] != 1 || tiles.config[48 + t] != 16 || tiles.config[16 + 2 * t] != 64) abort();
}
inline void tile_loadconfig(const void* p) { memcpy(tiles.config, p, 64); }
inline void tile_storeconfig(void* p) { memcpy(p, tiles.config, 64); }
inline void tile_release() { memset(&tiles, 0, sizeof tiles); }
inline void tile_zero(int t) {
  check_tile(t);
  memset(tiles.rows[t], 0, sizeof tiles.rows[t]);
}
inline void tile_loadd(int t, const void* p, int64_t stride) {
  check_tile(t);
  for (int i = 0; i < 16; ++i)
    memcpy(tiles.rows[t][i], static_cast<const char*>(p) + i * stride, 64);
}
inline void tile_stored(int t, void* p, int64_t stride) {
  check_tile(t);
  for (int i = 0; i < 16; ++i) memcpy(static_cast<char*>(p) + i * stride, tiles.rows[t][i], 64);
}
// Sums over even and over odd elements of k, each by fused multiplications and additions, are added
// to each other and then to c; denormal numbers are 0 on the way in and out.
inline void tile_dpbf16ps(int c, int a, int b) {
  check_tile(c), check_tile(a), check_tile(b);
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  for (int half = 0; half < 16; half += 8) {
    __m256 even[16], odd[16];
    for (int k = 0; k < 16; ++k) {
      const __m256i pairs =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tiles.rows[b][k] + half));
      even[k] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
      odd[k] = _mm256_castsi256_ps(_mm256_and_si256(pairs, upper));
    }
    for (int m = 0; m < 16; ++m) {
      __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
      for (int k = 0; k < 16; ++k) {
        const uint32_t pair = as<uint32_t>(tiles.rows[a][m][k]);
        sums[0] = _mm256_fmadd_ps(_mm256_set1_ps(as<float>(pair << 16)), even[k], sums[0]);
        sums[1] = _mm256_fmadd_ps(_mm256_set1_ps(as<float>(pair & 0xffff0000)), odd[k], sums[1]);
      }
      float* to = tiles.rows[c][m] + half;
      _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), _mm256_add_ps(sums[0], sums[1])));
    }
  }
  _mm_setcsr(before);
}

}  // namespace emulated

#undef _tile_loadconfig
#define _tile_loadconfig emulated::tile_loadconfig
#undef _tile_storeconfig
#define _tile_storeconfig emulated::tile_storeconfig
#undef _tile_release
#define _tile_release emulated::tile_release
#undef _tile_zero
#define _tile_zero emulated::tile_zero
#undef _tile_loadd
#define _tile_loadd emulated::tile_loadd
#undef _tile_stored
#define _tile_stored emulated::tile_stored
#undef _tile_dpbf16ps
#define _tile_dpbf16ps emulated::tile_dpbf16ps
#undef _tile_stream_loadd
#define _tile_stream_loadd emulated::tile_loadd
