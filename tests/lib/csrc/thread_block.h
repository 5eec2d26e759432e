// Runs the threads of a block as fibers. Warps run one after the other, each until all its lanes
// wait for the block; lanes run one after the other, each until it reaches a collective.
//
// CLINATTN_EMULATOR_SEED chooses the order of lanes, warps and blocks: 0 ascending, 1 descending,
// others at random. CLINATTN_EMULATOR_THREADS blocks run at a time, 1 unless set.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <source_location>
#include <thread>
#include <vector>

#include "fibers.h"
#include "witness.h"

namespace clinattn::emulated {

using Where = std::source_location;

// An operation of all lanes of a warp together, which the last lane to arrive performs for all.
struct Collective {
  const char* name;
  Where where;
  void (*perform)(Collective* const (&lanes)[32]);
  bool waits_for_block = false;
};

// 16 bytes on their way to shared memory
struct Copy {
  char* to;
  const char* from;
  int bytes, group;
};

struct Warp;

struct Lane {
  Fiber fiber;
  int thread;
  Warp* warp;
  Lane* next;  // of the warp; none after the last
  std::vector<Copy> copies;
  int groups;  // of copies, committed
};

struct Warp {
  Lane* first;
  Collective* reached[32];  // by each lane
};

// Of the environment
inline uint64_t setting(const char* name, uint64_t otherwise) {
  const char* value = getenv(name);
  return value == nullptr || *value == 0 ? otherwise : strtoull(value, nullptr, 10);
}

// Puts things in the order of the seed.
class Order {
 public:
  Order(uint64_t seed, int64_t salt) : seed_(seed), random_(seed * 7919 + salt) {}
  template <class T>
  void arrange(std::vector<T>& ascending) {
    if (seed_ == 1) std::reverse(ascending.begin(), ascending.end());
    if (seed_ > 1) std::shuffle(ascending.begin(), ascending.end(), random_);
  }
  std::vector<int> of(int count) {
    std::vector<int> all(count);
    std::iota(all.begin(), all.end(), 0);
    arrange(all);
    return all;
  }

 private:
  uint64_t seed_;
  std::minstd_rand random_;
};

// A multiprocessor: it runs one block after the other, on one thread of the system.
class Processor {
 public:
  // The processor that runs on this thread of the system
  static inline constinit thread_local Processor* here = nullptr;

  CLINATTN_UNSEEN int64_t block() const { return block_; }
  CLINATTN_UNSEEN char* shared() const { return shared_; }
  CLINATTN_UNSEEN Lane& lane() const { return *lane_; }
  CLINATTN_UNSEEN bool is_shared(const void* p, int bytes) const {
    const char* first = static_cast<const char*>(p);
    return first >= shared_ && first + bytes <= shared_ + shared_bytes_;
  }

  void run(int64_t block, int threads, int shared_bytes, uint64_t seed,
           const std::function<void()>& kernel) {
    here = this;
    block_ = block;
    kernel_ = &kernel;
    Order order(seed, block);
    clear_shared(shared_bytes);
    begin_lanes(threads, order);
    witness_.begin(threads / 32);
    for (int returned = 0; returned == 0; witness_.all_met()) {
      for (int i : order.of(threads / 32)) {
        witness_.enter(i);
        returned += resume(warps_[i]);
        witness_.leave();
      }
      if (returned > 0 && returned < threads / 32) report_deadlock(threads / 32);
    }
    witness_.end();
    check_guards();
  }

  // Returns when all lanes of the warp are there and the last has performed the collective.
  CLINATTN_UNSEEN void arrive(Collective& collective) {
    Lane& lane = *lane_;
    Warp& warp = *lane.warp;
    warp.reached[lane.thread % 32] = &collective;
    const Collective& first = *warp.reached[warp.first->thread % 32];
    if (collective.where.line() != first.where.line() ||
        collective.where.column() != first.where.column()) {
      report_divergence(lane);
    }
    if (lane.next != nullptr) {
      lane_ = lane.next;
      lane_->fiber.resume(lane.fiber);
    } else {
      if (collective.perform != nullptr) collective.perform(warp.reached);
      if (collective.waits_for_block) return scheduler_.resume(lane.fiber);
      lane_ = warp.first;
      lane_->fiber.resume(lane.fiber);
    }
  }

 private:
  static constexpr int kGuard = 4096, kAlignment = 128;
  static constexpr char kUnwritten = static_cast<char>(0xff);  // NaN in every format
  static constexpr char kReturn[] = "return";

  void clear_shared(int bytes) {
    shared_bytes_ = bytes;
    memory_.assign(bytes + 2 * kGuard + kAlignment, kUnwritten);
    const uintptr_t first = reinterpret_cast<uintptr_t>(memory_.data()) + kGuard;
    shared_ = memory_.data() + kGuard + (kAlignment - first % kAlignment) % kAlignment;
  }

  void begin_lanes(int threads, Order& order) {
    stacks_.reserve(threads);
    if (lanes_.size() < static_cast<size_t>(threads)) lanes_ = std::vector<Lane>(threads);
    warps_.resize(threads / 32);
    for (int w = 0; w < threads / 32; ++w) {
      Lane* next = nullptr;
      const std::vector<int> in_order = order.of(32);
      for (int i = 31; i >= 0; --i) {
        const int thread = 32 * w + in_order[i];
        Lane& lane = lanes_[thread];
        lane.thread = thread;
        lane.warp = &warps_[w];
        lane.next = next;
        lane.copies.clear();
        lane.groups = 0;
        lane.fiber.begin(stacks_[thread], run_thread);
        next = &lane;
      }
      warps_[w].first = next;
    }
  }

  CLINATTN_UNSEEN static void run_thread() {
    (*here->kernel_)();
    Collective end{kReturn, {}, nullptr, true};
    here->arrive(end);
    fail("a thread goes on after its end");
  }

  // Resumes a warp. Returns whether the warp has returned; else it is at a barrier of the block.
  CLINATTN_UNSEEN bool resume(Warp& warp) {
    lane_ = warp.first;
    lane_->fiber.resume(scheduler_);
    return warp.reached[0]->name == kReturn;
  }

  struct Description {
    char text[256];
    explicit Description(const Collective& c) {
      if (c.name == kReturn) {
        snprintf(text, sizeof(text), "return");
      } else {
        snprintf(text, sizeof(text), "%s at %s:%d", c.name, c.where.file_name(),
                 static_cast<int>(c.where.line()));
      }
    }
  };

  [[noreturn]] void report_divergence(const Lane& lane) const {
    const Lane& first = *lane.warp->first;
    fail("divergence in block %lld: thread %d is at %s, thread %d of its warp at %s",
         static_cast<long long>(block_), first.thread,
         Description(*lane.warp->reached[first.thread % 32]).text, lane.thread,
         Description(*lane.warp->reached[lane.thread % 32]).text);
  }

  [[noreturn]] void report_deadlock(int warps) const {
    const Warp *waiting = nullptr, *returned = nullptr;
    for (int w = 0; w < warps; ++w) {
      (warps_[w].reached[0]->name == kReturn ? returned : waiting) = &warps_[w];
    }
    fail("deadlock in block %lld: warp %d waits in %s, and warp %d has returned",
         static_cast<long long>(block_), waiting->first->thread / 32,
         Description(*waiting->reached[0]).text, returned->first->thread / 32);
  }

  void check_guards() const {
    const char* end = shared_ + shared_bytes_;
    check_untouched(memory_.data(), shared_);
    check_untouched(end, memory_.data() + memory_.size());
  }
  void check_untouched(const char* first, const char* last) const {
    const char* at = std::find_if(first, last, [](char c) { return c != kUnwritten; });
    if (at != last) {
      fail("block %lld wrote byte %td of its %d bytes of shared memory",
           static_cast<long long>(block_), at - shared_, shared_bytes_);
    }
  }

  int64_t block_ = 0;
  const std::function<void()>* kernel_ = nullptr;
  Fiber scheduler_;
  Lane* lane_ = nullptr;  // that runs
  std::vector<Lane> lanes_;
  std::vector<Warp> warps_;
  Stacks stacks_;
  Witness witness_;
  std::vector<char> memory_;  // guards and, between them, what the block sees
  char* shared_ = nullptr;
  int shared_bytes_ = 0;
};

inline void run_blocks(int64_t blocks, int threads, int shared_bytes,
                       const std::function<void()>& kernel) {
  const uint64_t seed = setting("CLINATTN_EMULATOR_SEED", 0);
  const uint64_t at_a_time = setting("CLINATTN_EMULATOR_THREADS", 1);
  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), int64_t{0});
  Order(seed, -1).arrange(order);
  if (at_a_time <= 1) {
    static thread_local Processor processor;
    for (int64_t block : order) processor.run(block, threads, shared_bytes, seed, kernel);
    return;
  }
  std::atomic<int64_t> next = 0;
  std::vector<std::thread> workers;
  for (uint64_t i = 0; i < at_a_time; ++i) {
    workers.emplace_back([&] {
      Processor processor;
      for (int64_t at; (at = next++) < blocks;) {
        processor.run(order[at], threads, shared_bytes, seed, kernel);
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
}

}  // namespace clinattn::emulated
