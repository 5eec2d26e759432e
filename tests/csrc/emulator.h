// The words of csrc/cuda/device.cuh for a C++ compiler alone: kernels run on the CPU, thread by
// thread, and what a GPU leaves undefined is made to show.
//
// CLINATTN_EMULATE_TURING: as below compute capability 8.0.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "sixteen_bits.h"
#include "thread_block.h"

#define CLINATTN_HD inline
#define CLINATTN_DEVICE inline
#define CLINATTN_KERNEL(threads, blocks) inline void
#define CLINATTN_CONSTANT const

namespace clinattn {

#ifdef CLINATTN_EMULATE_TURING
constexpr bool kAmpere = false;
constexpr int kLargestSharedMemory = 64 * 1024;
#else
constexpr bool kAmpere = true;
constexpr int kLargestSharedMemory = 227 * 1024;
#endif

inline emulated::Processor& processor() { return *emulated::Processor::here; }

inline int thread_index() { return processor().lane().thread; }
inline int64_t block_index() { return processor().block(); }
inline char* shared_memory() { return processor().shared(); }

inline void sync_block(emulated::Where where = emulated::Where::current()) {
  emulated::Collective all{"sync_block", where, nullptr, true};
  processor().arrive(all);
}
inline void sync_warp(emulated::Where where = emulated::Where::current()) {
  emulated::Collective all{"sync_warp", where, nullptr};
  processor().arrive(all);
}

namespace emulated {

template <class T>
struct Shuffle : Collective {
  T value;
  int source;
  T result;

  static void perform(Collective* const (&lanes)[32]) {
    for (Collective* each : lanes) {
      Shuffle& to = static_cast<Shuffle&>(*each);
      to.result = static_cast<Shuffle&>(*lanes[to.source % 32]).value;
    }
  }
};

// Lane l holds of an 8x8 matrix the elements (l / 4, 2 (l % 4)) and the next.
struct LoadMatrices : Collective {
  uint32_t* x;
  const uint16_t* row;

  template <bool kTransposed>
  static void perform(Collective* const (&lanes)[32]) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const uint16_t* rows[8];
      for (int i = 0; i < 8; ++i) rows[i] = of(lanes[8 * matrix + i]).row;
      for (int lane = 0; lane < 32; ++lane) {
        const int i = lane / 4, j = lane % 4 * 2;
        const uint32_t first = kTransposed ? rows[j][i] : rows[i][j];
        const uint32_t second = kTransposed ? rows[j + 1][i] : rows[i][j + 1];
        of(lanes[lane]).x[matrix] = first | second << 16;
      }
    }
  }
  static LoadMatrices& of(Collective* lane) { return static_cast<LoadMatrices&>(*lane); }
};

// mma.m16n8k16: a row-major, b column-major, d row-major
template <class T>
struct Multiply : Collective {
  float* d;
  const uint32_t* a;
  uint32_t b[2];

  static void perform(Collective* const (&lanes)[32]) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Multiply& from = static_cast<Multiply&>(*lanes[lane]);
      const int i = lane / 4, j = lane % 4 * 2;
      for (int r = 0; r < 4; ++r) {
        for (int e : {0, 1}) a[i + r % 2 * 8][j + r / 2 * 8 + e] = element(from.a[r], e);
      }
      for (int r : {0, 1}) {
        for (int e : {0, 1}) b[j + r * 8 + e][i] = element(from.b[r], e);
      }
    }
    for (int lane = 0; lane < 32; lane += 4) {
      for (int below : {0, 1}) {
        float sum[8];
        for (int j = 0; j < 8; ++j) sum[j] = number(lanes, lane, below, j);
        for (int k = 0; k < 16; ++k) {
          for (int j = 0; j < 8; ++j) sum[j] += a[lane / 4 + 8 * below][k] * b[k][j];
        }
        for (int j = 0; j < 8; ++j) number(lanes, lane, below, j) = sum[j];
      }
    }
  }
  static float element(uint32_t pair, int e) {
    return to_float(T{static_cast<uint16_t>(pair >> 16 * e)});
  }
  // Of d, in the row that the lane begins or the eighth below it
  static float& number(Collective* const (&lanes)[32], int lane, int below, int j) {
    return static_cast<Multiply&>(*lanes[lane + j / 2]).d[2 * below + j % 2];
  }
};

inline void load(uint32_t (&x)[4], const void* row, bool transposed, Where where) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0 || !processor().is_shared(row, 16)) {
    fail("%s:%d: the row of a matrix is not 16 aligned bytes of shared memory", where.file_name(),
         static_cast<int>(where.line()));
  }
  LoadMatrices all{{transposed ? "load_transposed" : "load_matrices", where,
                    transposed ? LoadMatrices::perform<true> : LoadMatrices::perform<false>},
                   x,
                   static_cast<const uint16_t*>(row)};
  processor().arrive(all);
}

}  // namespace emulated

template <class T>
inline T shuffle(T x, int lane, emulated::Where where = emulated::Where::current()) {
  emulated::Shuffle<T> all{{"shuffle", where, emulated::Shuffle<T>::perform}, x, lane, x};
  processor().arrive(all);
  return all.result;
}
template <class T>
inline T shuffle_xor(T x, int mask, emulated::Where where = emulated::Where::current()) {
  const int lane = thread_index() % 32 ^ mask;
  emulated::Shuffle<T> all{{"shuffle_xor", where, emulated::Shuffle<T>::perform}, x, lane, x};
  processor().arrive(all);
  return all.result;
}

inline void load_matrices(uint32_t (&x)[4], const void* row,
                          emulated::Where where = emulated::Where::current()) {
  emulated::load(x, row, false, where);
}
inline void load_transposed(uint32_t (&x)[4], const void* row,
                            emulated::Where where = emulated::Where::current()) {
  emulated::load(x, row, true, where);
}

template <class T>
inline void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                     emulated::Where where = emulated::Where::current()) {
  if (!kAmpere && std::is_same_v<T, bfloat16>) emulated::fail("no bf16 products below 8.0");
  emulated::Multiply<T> all{{"multiply", where, emulated::Multiply<T>::perform}, d, a, {b0, b1}};
  processor().arrive(all);
}

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < FLT_MIN ? 0 : y;  // NaN stays
}
inline uint32_t high_word(uint32_t a, uint32_t b) { return uint64_t{a} * b >> 32; }

// The bytes are NaN until wait_for_copies, and are read no earlier.
inline void copy_async(void* to, const void* from, int bytes) {
  if (!kAmpere) emulated::fail("no asynchronous copies below 8.0");
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || !processor().is_shared(to, 16)) {
    emulated::fail("a copy does not go to 16 aligned bytes of shared memory");
  }
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes < 0 || bytes > 16) {
    emulated::fail("a copy of %d bytes from %p, not up to 16 from aligned ones", bytes, from);
  }
  emulated::Lane& lane = processor().lane();
  lane.copies.push_back(
      {static_cast<char*>(to), static_cast<const char*>(from), bytes, lane.groups});
  memset(to, 0xff, 16);
}
inline void commit_copies() { ++processor().lane().groups; }
template <int kLeft>
inline void wait_for_copies() {
  emulated::Lane& lane = processor().lane();
  std::erase_if(lane.copies, [&](const emulated::Copy& copy) {
    if (copy.group >= lane.groups - kLeft) return false;
    memset(copy.to, 0, 16);
    memcpy(copy.to, copy.from, copy.bytes);
    return true;
  });
}

// Runs a kernel on so many blocks; the error of CUDA, 0 for none.
template <class... Parameters, class... Arguments>
inline int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes,
                  void* /*stream*/, const Arguments&... arguments) {
  static_assert(!(std::is_reference_v<Parameters> || ...), "a kernel takes its arguments by value");
  if (shared_bytes < 0 || shared_bytes > kLargestSharedMemory) return 1;
  if (blocks < 1 || blocks > 0x7fffffff || threads < 1 || threads > 1024) return 9;
  if (threads % 32 != 0) emulated::fail("%d threads are not whole warps", threads);
  emulated::run_blocks(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
  return 0;
}

}  // namespace clinattn
