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
#include <vector>

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

// The emulator runs the kernels for all cards.
constexpr bool is_compiled(bool /*turing*/) { return true; }
inline void refuse_card() { emulated::fail("no kernel for this card"); }

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
      to.result = static_cast<Shuffle&>(*lanes[to.source & 31]).value;
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

// mma.m16n8k16. Lane l holds pairs in row l / 4 and columns 2 (l % 4) and the next, and in those 8
// below or to the right: of a, of d and of b transposed.
template <class T>
struct Multiply : Collective {
  float* d;
  const uint32_t* a;
  uint32_t b[2];

  static void perform(Collective* const (&lanes)[32]) {
    T a[16][16], b[8][16];  // b transposed
    alignas(16) float d[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Multiply& from = static_cast<Multiply&>(*lanes[lane]);
      const int i = lane / 4, j = lane % 4 * 2;
      for (int r = 0; r < 4; ++r) memcpy(&a[i + r % 2 * 8][j + r / 2 * 8], &from.a[r], 4);
      for (int r = 0; r < 2; ++r) memcpy(&b[i][j + r * 8], &from.b[r], 4);
      for (int r = 0; r < 2; ++r) memcpy(&d[i + r * 8][j], &from.d[2 * r], 8);
    }
    add_product(d, a, b);
    for (int lane = 0; lane < 32; ++lane) {
      const Multiply& to = static_cast<Multiply&>(*lanes[lane]);
      const int i = lane / 4, j = lane % 4 * 2;
      for (int r = 0; r < 2; ++r) memcpy(&to.d[2 * r], &d[i + r * 8][j], 8);
    }
  }

  // In fp32, term by term
  static void add_product(float (&d)[16][8], const T (&a)[16][16], const T (&b)[8][16]) {
    using Four = float __attribute__((vector_size(16), may_alias));
    alignas(16) float x[16][16], y[16][8];
    for (int i = 0; i < 16; ++i) {
      for (int k = 0; k < 16; ++k) x[i][k] = to_float(a[i][k]);
    }
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) y[k][j] = to_float(b[j][k]);
    }
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 8; j += 4) {
        Four& sum = reinterpret_cast<Four&>(d[i][j]);
        for (int k = 0; k < 16; ++k) sum += x[i][k] * reinterpret_cast<const Four&>(y[k][j]);
      }
    }
  }
};

[[noreturn]] inline void fail_at(Where where, const char* why) {
  fail("%s:%d: %s", where.file_name(), static_cast<int>(where.line()), why);
}
inline void check_row(const void* row, Where where) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0 || !processor().is_shared(row, 16)) {
    fail_at(where, "these are not 16 aligned bytes of shared memory");
  }
}

inline void load(uint32_t (&x)[4], const void* row, bool transposed, Where where) {
  check_row(row, where);
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

inline bool any_in_warp(bool x, emulated::Where where = emulated::Where::current()) {
  int any = x;
  for (int lanes = 1; lanes < 32; lanes *= 2) any |= shuffle_xor(any, lanes, where);
  return any != 0;
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
  if (!kAmpere && std::is_same_v<T, bfloat16>) {
    emulated::fail_at(where, "products of bfloat16 need compute capability 8.0");
  }
  emulated::Multiply<T> all{{"multiply", where, emulated::Multiply<T>::perform}, d, a, {b0, b1}};
  processor().arrive(all);
}

inline int opaque(int x) { return x; }
inline float product(float x, float y) { return x * y; }
inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < FLT_MIN ? 0 : y;  // NaN stays
}
inline uint32_t high_word(uint32_t a, uint32_t b) { return uint64_t{a} * b >> 32; }

// The bytes are NaN until wait_for_copies, and are read no earlier.
inline void copy_async(void* to, const void* from, int bytes,
                       emulated::Where where = emulated::Where::current()) {
  if (!kAmpere) emulated::fail_at(where, "copy_async needs compute capability 8.0");
  emulated::check_row(to, where);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes < 0 || bytes > 16) {
    emulated::fail_at(where, "copy_async takes up to 16 bytes from a multiple of 16");
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
    if (copy.bytes > 0) memcpy(copy.to, copy.from, copy.bytes);
    return true;
  });
}

// Runs a kernel on so many blocks; the error of CUDA, 0 for none.
template <class... Arguments>
inline int launch(void (*kernel)(Arguments...), int64_t blocks, int threads, int shared_bytes,
                  void* /*stream*/, const std::common_type_t<Arguments>&... arguments) {
  static_assert(!(std::is_reference_v<Arguments> || ...), "a kernel takes its arguments by value");
  if (shared_bytes < 0 || shared_bytes > kLargestSharedMemory) return 1;
  if (blocks < 1 || blocks > 0x7fffffff || threads < 1 || threads > 1024) return 9;
  if (threads % 32 != 0) emulated::fail("%d threads are not whole warps", threads);
  emulated::run_blocks(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
  return 0;
}

inline const char* error_words(int /*error*/) { return "the launch asks for what no card has"; }

}  // namespace clinattn
