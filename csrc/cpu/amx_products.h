// Products on AMX tiles of numbers that are sums of bf16 parts.
#pragma once

#include "bf16_products.h"

namespace {

// All eight tiles are 16 rows of 64 bytes. What torch had configured on this thread is put back.
struct TileSession {
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static const Config kAllTiles;
  Config before;

  TileSession() {
    // The intrinsics tell the compiler of 8 bytes only: what they read must lie in memory already.
    _tile_storeconfig(&before);
    asm volatile("" ::: "memory");
    _tile_loadconfig(&kAllTiles);
  }
  ~TileSession() { before.palette ? _tile_loadconfig(&before) : _tile_release(); }
};

const TileSession::Config TileSession::kAllTiles;

// Products of two tiles of A with two of B, one block after another. The four sums of a block are
// stored between the first products of the next: a store that waits for its sum would keep later
// instructions from starting. A comes from L2, past L1 where kStream; B should be in L1. work() is
// called with every four products, for vector instructions to run beside them: of more parts than
// one before them, while their operands are on the way, which is faster by some percent.
template <int kNumParts>
struct TileProducts {
  static constexpr int kParts = kNumParts;
  using Session = TileSession;
  static constexpr bool kDelayed = true;  // sums are stored while the next products run
  float* late = nullptr;                  // where the finished sums go,
  bool late_rows, late_columns;           // and whether there are two tiles of them each way

  ~TileProducts() { finish(); }

  // c (four tiles: 00, 01, 10, 11) <- (a0; a1) (b0 b1), or c + that where kAdd; where an operand
  // has one tile, only what that gives
  template <bool kAdd = false, bool kStream = (kParts > 1), class P = Products<kParts>,
            class Work = NoWork>
  void multiply(const Operand& a, const Operand& b, int64_t steps, float* c, Work&& work = {}) {
    if (a.two && b.two) {
      all_steps<P, true, kAdd, kStream>(a, b, steps, c, work);
    } else {
      few_steps<P, kAdd, kStream>(a, b, steps, c, work);
    }
  }

  // Returns how often multiply calls work.
  template <class P = Products<kParts>>
  static int64_t calls(int64_t steps) {
    return P::kCount * steps;
  }

  void finish() {
    if (!late) return;
    _tile_stored(0, late, 64);
    if (late_columns) _tile_stored(1, late + 256, 64);
    if (late_rows) _tile_stored(2, late + 512, 64);
    if (late_rows && late_columns) _tile_stored(3, late + 768, 64);
    late = nullptr;
  }

  // sums + the upper 16 bits of even and of odd
  static __m512 add_cut(__m512 sums, __m512 even, __m512 odd) {
    return _mm512_add_ps(sums, _mm512_add_ps(round_down_to_bf16(even), round_down_to_bf16(odd)));
  }

 private:
  // Where kTwo, both operands have two tiles, so that no branch is needed in between.
  template <class P, bool kTwo, bool kAdd, bool kStream, class Work>
  __attribute__((always_inline)) void all_steps(const Operand& a, const Operand& b, int64_t steps,
                                                float* c, Work& work) {
    asm volatile("" ::: "memory");  // the intrinsics do not say that a tile's load reads memory
    step<P, 0, P::kEnd[0], true, kTwo, kAdd, kStream>(a, b, 0, c, work);
    for (int64_t k = 1; k < steps; ++k)
      step<P, 0, P::kEnd[0], false, kTwo, kAdd, kStream>(a, b, k, c, work);
    if constexpr (P::kPasses == 2)
      for (int64_t k = 0; k < steps; ++k)
        step<P, P::kEnd[0], P::kCount, false, kTwo, kAdd, kStream>(a, b, k, c, work);
    late = c, late_rows = kTwo || a.two, late_columns = kTwo || b.two;
  }
  template <class P, bool kAdd, bool kStream, class Work>
  __attribute__((noinline)) void few_steps(const Operand& a, const Operand& b, int64_t steps,
                                           float* c, Work& work) {
    all_steps<P, false, kAdd, kStream>(a, b, steps, c, work);
  }

  // Products [kBegin, kEnd) of the parts, of step k; where kFirst, the first ones of the block
  template <class P, int kBegin, int kEnd, bool kFirst, bool kTwo, bool kAdd, bool kStream,
            class Work>
  __attribute__((always_inline)) void step(const Operand& a, const Operand& b, int64_t k,
                                           const float* c, Work& work) {
    const bool two_rows = kTwo || a.two, two_columns = kTwo || b.two;
#pragma GCC unroll 5
    for (int i = kBegin; i < kEnd; ++i) {
      const Bf16* left = a.at + P::kA[i] * a.part + k * a.step;
      const Bf16* right = b.at + P::kB[i] * b.part + k * b.step;
      const bool new_a = i == kBegin || P::kA[i] != P::kA[i - 1];
      if (new_a) load_a0<kStream>(left);
      if (i == kBegin || P::kB[i] != P::kB[i - 1]) {
        _tile_loadd(6, right, 64);
        if (two_columns) _tile_loadd(7, right + b.other, 64);
      }
      if (new_a && two_rows) load_a1<kStream>(left + a.other);
      if (kParts > 1) work();
      if (kFirst && i == kBegin) {
        first_products<kAdd>(two_rows, two_columns, c);
      } else {
        _tile_dpbf16ps(0, 4, 6);
        if (two_columns) _tile_dpbf16ps(1, 4, 7);
        if (two_rows) _tile_dpbf16ps(2, 5, 6);
        if (two_rows && two_columns) _tile_dpbf16ps(3, 5, 7);
      }
      if (kParts == 1) work();
    }
  }

  template <bool kStream>
  static void load_a0(const Bf16* at) {
    if constexpr (kStream) {
      _tile_stream_loadd(4, at, 64);
    } else {
      _tile_loadd(4, at, 64);
    }
  }
  template <bool kStream>
  static void load_a1(const Bf16* at) {
    if constexpr (kStream) {
      _tile_stream_loadd(5, at, 64);
    } else {
      _tile_loadd(5, at, 64);
    }
  }

  // The first products of a block of so many tiles, and the stores of the block before
  template <bool kAdd>
  __attribute__((always_inline)) void first_products(bool two_rows, bool two_columns,
                                                     const float* c) {
    if (late) _tile_stored(0, late, 64);
    if constexpr (kAdd) {
      _tile_loadd(0, c, 64);
    } else {
      _tile_zero(0);
    }
    _tile_dpbf16ps(0, 4, 6);
    if (late && late_columns) _tile_stored(1, late + 256, 64);
    if (two_columns) {
      if constexpr (kAdd) {
        _tile_loadd(1, c + 256, 64);
      } else {
        _tile_zero(1);
      }
      _tile_dpbf16ps(1, 4, 7);
    }
    if (late && late_rows) _tile_stored(2, late + 512, 64);
    if (two_rows) {
      if constexpr (kAdd) {
        _tile_loadd(2, c + 512, 64);
      } else {
        _tile_zero(2);
      }
      _tile_dpbf16ps(2, 5, 6);
    }
    if (late && late_rows && late_columns) _tile_stored(3, late + 768, 64);
    if (two_rows && two_columns) {
      if constexpr (kAdd) {
        _tile_loadd(3, c + 768, 64);
      } else {
        _tile_zero(3);
      }
      _tile_dpbf16ps(3, 5, 7);
    }
  }
};

}  // namespace
