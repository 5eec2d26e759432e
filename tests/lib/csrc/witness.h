// Tells ThreadSanitizer how the warps of a block are ordered, so that it sees races between them: a
// warp is a thread for it, and barriers of the block are all the order there is. Lanes of a warp
// are one thread: whether they wait for each other is not checked.
#pragma once

#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
// For the emulator's own memory, which kernels do not see
#define CLINATTN_UNSEEN __attribute__((no_sanitize("thread"), noinline))
extern "C" void __tsan_acquire(void* at);
extern "C" void __tsan_release(void* at);
#else
#define CLINATTN_UNSEEN
#endif

namespace clinattn::emulated {

#ifdef __SANITIZE_THREAD__

class Witness {
 public:
  // A block begins: its warps see what was written before.
  CLINATTN_UNSEEN void begin(int warps) {
    outside_ = __tsan_get_current_fiber();
    for (int i = 0; i < warps; ++i) warps_.push_back(__tsan_create_fiber(0));
    phase_ = 0;
    __tsan_release(&met_[0]);
  }
  // A warp goes on after a barrier that all warps have reached.
  CLINATTN_UNSEEN void enter(int warp) {
    __tsan_switch_to_fiber(warps_[warp], __tsan_switch_to_fiber_no_sync);
    __tsan_acquire(&met_[phase_ % 2]);
  }
  // The warp has reached the next barrier, and waits.
  CLINATTN_UNSEEN void leave() {
    __tsan_release(&met_[(phase_ + 1) % 2]);
    __tsan_switch_to_fiber(outside_, __tsan_switch_to_fiber_no_sync);
  }
  // All warps have reached the barrier.
  CLINATTN_UNSEEN void all_met() { ++phase_; }
  CLINATTN_UNSEEN void end() {
    __tsan_acquire(&met_[phase_ % 2]);
    for (void* warp : warps_) __tsan_destroy_fiber(warp);
    warps_.clear();
  }

 private:
  void* outside_ = nullptr;
  std::vector<void*> warps_;
  int phase_ = 0;
  char met_[2] = {};  // its addresses stand for barriers, in turns
};

#else

struct Witness {
  void begin(int /*warps*/) {}
  void enter(int /*warp*/) {}
  void leave() {}
  void all_met() {}
  void end() {}
};

#endif

}  // namespace clinattn::emulated
