// Rows on their way between global and shared memory, moved by all threads of a block.
#pragma once

#include "device.cuh"
#include "layout.h"

namespace clinattn {

struct alignas(16) Chunk {
  uint32_t words[4];
};

// Rows of one head of one sequence, (row, head_dim) with neighbouring elements.
template <class T>
struct Rows {
  const T* base;
  int64_t stride;
  int head_dim;
  bool whole;  // rows are whole chunks, aligned

  CLINATTN_DEVICE Rows(const void* tensor, const Strides& strides, int64_t sequence, int64_t head,
                       int64_t first, int64_t head_dim)
      : base(static_cast<const T*>(tensor) + sequence * strides.batch + head * strides.head +
             first * strides.row),
        stride(strides.row),
        head_dim(static_cast<int>(head_dim)) {
    constexpr int kVector = 16 / sizeof(T);
    whole = head_dim % kVector == 0 && stride % kVector == 0 &&
            reinterpret_cast<uintptr_t>(base) % 16 == 0;
  }

  // A chunk of a row, 0 beyond head_dim
  CLINATTN_DEVICE Chunk chunk(int64_t row, int column) const {
    constexpr int kVector = 16 / sizeof(T);
    const T* from = base + row * stride + column;
    if (whole && column < head_dim) return *reinterpret_cast<const Chunk*>(from);
    union {
      Chunk all = {};
      T x[kVector];
    };
    for (int i = 0; i < kVector; ++i)
      if (column + i < head_dim) x[i] = from[i];
    return all;
  }
};

// The copying of a stream's tiles: kAsync straight to the other of two places while one is in use,
// kStaged by registers while the one place is in use, kLate after its use, where registers are few.
enum class Copies { kAsync, kStaged, kLate };

// Brings tiles of kRows rows.
template <class T, int kRows, int kDim, int kThreads, Copies kCopies>
struct Loader {
  using Place = Tile<T, kDim>;
  static_assert(kThreads % Place::kChunks == 0 || Place::kChunks % kThreads == 0);
  // A thread has the same columns of all its rows.
  static constexpr int kStep = kThreads < Place::kChunks ? 1 : kThreads / Place::kChunks;
  static constexpr int kWide = kThreads < Place::kChunks ? Place::kChunks / kThreads : 1;
  static constexpr int kEach = (kRows + kStep - 1) / kStep;

  Chunk staged[kCopies == Copies::kStaged ? kEach * kWide : 1];

  // f(i, row, column) for the chunks of a thread
  template <class F>
  static CLINATTN_DEVICE void each(const F& f) {
    const int thread = opaque(thread_index()), row = thread / Place::kChunks;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
#pragma unroll
      for (int w = 0; w < kWide; ++w) {
        const int column = (thread % Place::kChunks + w * kThreads) * Place::kVector;
        if (kRows % kStep == 0 || row + i * kStep < kRows)
          f(i * kWide + w, row + i * kStep, column);
      }
  }

  // Rows from `first` on; those that are not alive are 0 and not read.
  template <class Alive>
  CLINATTN_DEVICE void fetch(const Place& to, const Rows<T>& from, int64_t first,
                             const Alive& alive) {
    if (kCopies == Copies::kAsync && from.whole) {
      const T* base = from.base + first * from.stride;
      each([&](int, int row, int column) {
        const bool wanted = column < from.head_dim && alive(row);
        copy_async(to.at(row, column), wanted ? base + row * from.stride + column : from.base,
                   wanted ? 16 : 0);
      });
      return;
    }
    each([&](int i, int row, int column) {
      const Chunk chunk = alive(row) ? from.chunk(first + row, column) : Chunk{};
      if constexpr (kCopies == Copies::kStaged)
        staged[i] = chunk;
      else
        *reinterpret_cast<Chunk*>(to.at(row, column)) = chunk;
    });
  }
  CLINATTN_DEVICE void put(const Place& to) const {
    if constexpr (kCopies == Copies::kStaged)
      each([&](int i, int row, int column) {
        *reinterpret_cast<Chunk*>(to.at(row, column)) = staged[i];
      });
  }
};

// Tiles of two tensors with the same rows, k and v or q and do, or of the first alone:
//   fetch(0); for (i = 0; ...; ++i) { arrive(i); early: fetch(i + 1); use tile i; late: the same }
template <class T, int kRowsOfTile, int kDim, int kThreads, Copies kCopies, int kTensors = 2>
struct Stream {
  using Place = Tile<T, kDim>;
  static constexpr int kRows = kRowsOfTile, kStages = kCopies == Copies::kAsync ? 2 : 1;
  static constexpr int kBytes = kStages * kTensors * Place::bytes(kRows);
  static constexpr bool kEarly = kCopies != Copies::kLate;

  T* memory;
  Loader<T, kRows, kDim, kThreads, kCopies> first_loader, second_loader;

  CLINATTN_DEVICE explicit Stream(char* memory) : memory(reinterpret_cast<T*>(memory)) {}

  CLINATTN_DEVICE Place first(int i) const {
    return {memory + i % kStages * kTensors * kRows * kDim};
  }
  CLINATTN_DEVICE Place second(int i) const { return {first(i).base + kRows * kDim}; }

  template <class Alive>
  CLINATTN_DEVICE void fetch(int i, const Rows<T>& a, const Rows<T>& b, int64_t row,
                             const Alive& alive) {
    if (kCopies == Copies::kLate) sync_block();
    first_loader.fetch(first(i), a, row, alive);
    if constexpr (kTensors == 2) second_loader.fetch(second(i), b, row, alive);
    if constexpr (kCopies == Copies::kAsync) commit_copies();
  }
  // All threads see tile i, and none is at tile i - 1 any more.
  CLINATTN_DEVICE void arrive(int i) {
    if constexpr (kCopies == Copies::kAsync) wait_for_copies<0>();
    if constexpr (kCopies == Copies::kStaged) {
      if (i > 0) sync_block();
      first_loader.put(first(i));
      if constexpr (kTensors == 2) second_loader.put(second(i));
    }
    sync_block();
  }
};

// A tile that stays
template <class T, int kRows, int kDim, int kThreads, class Alive>
CLINATTN_DEVICE void load_tile(const Tile<T, kDim>& to, const Rows<T>& from, int64_t first,
                               const Alive& alive) {
  constexpr int kChunks = Tile<T, kDim>::kChunks, kVector = Tile<T, kDim>::kVector;
  for (int at = thread_index(); at < kRows * kChunks; at += kThreads) {
    const int row = at / kChunks, column = at % kChunks * kVector;
    *reinterpret_cast<Chunk*>(to.at(row, column)) =
        alive(row) ? from.chunk(first + row, column) : Chunk{};
  }
}

// The rows of a warp, which it has in a tile, to contiguous rows of head_dim elements.
template <class T, int kRows, int kDim>
CLINATTN_DEVICE void store_rows(const Tile<T, kDim>& from, int first, T* to, int64_t stride,
                                int count, int head_dim) {
  constexpr int kChunks = Tile<T, kDim>::kChunks, kVector = Tile<T, kDim>::kVector;
  const bool whole = head_dim % kVector == 0 && stride % kVector == 0;
  for (int at = thread_index() % kWarp; at < kRows * kChunks; at += kWarp) {
    const int row = at / kChunks, column = at % kChunks * kVector;
    if (row >= count || column >= head_dim) continue;
    const T* x = from.at(first + row, column);
    T* y = to + row * stride + column;
    if (whole) {
      *reinterpret_cast<Chunk*>(y) = *reinterpret_cast<const Chunk*>(x);
    } else {
      for (int i = 0; i < kVector && column + i < head_dim; ++i) y[i] = x[i];
    }
  }
}

}  // namespace clinattn
