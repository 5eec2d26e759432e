// Many stacks in one thread of the system, and a jump from one to another.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if !defined(__x86_64__) || defined(CLINATTN_EMULATE_UCONTEXT)
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace clinattn::emulated {

template <class... Arguments>
[[noreturn]] void fail(const char* format, Arguments... arguments) {
  fputs("emulator: ", stderr);
  fprintf(stderr, format, arguments...);
  fputc('\n', stderr);
  abort();
}

struct Stack {
  char* bottom;
  size_t bytes;
};

// Stacks with a page below each that no one may touch. A stack is 0.25 MiB of addresses, and as
// much memory as is used.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  ~Stacks() { release(); }

  void reserve(int count) {
    if (count <= count_) return;
    release();
    void* memory = mmap(nullptr, count * kBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for %d stacks", count);
    memory_ = static_cast<char*>(memory);
    count_ = count;
    for (int i = 0; i < count; ++i) mprotect(memory_ + i * kBytes, page(), PROT_NONE);
  }

  // The ends differ in their low bits, lest all stacks share a few sets of the cache.
  Stack operator[](int i) const {
    return {memory_ + i * kBytes + page(), kBytes - page() - i % 32 * size_t{1088}};
  }

 private:
  static constexpr size_t kBytes = 1 << 18;
  static size_t page() {
    static const size_t bytes = sysconf(_SC_PAGESIZE);
    return bytes;
  }
  void release() {
    if (memory_ != nullptr) munmap(memory_, count_ * kBytes);
    memory_ = nullptr;
    count_ = 0;
  }

  char* memory_ = nullptr;
  int count_ = 0;
};

#if defined(__x86_64__) && !defined(CLINATTN_EMULATE_UCONTEXT)

// Saves the registers that a call must keep on the stack that is left; the compiler has saved the
// rest.
__attribute__((naked, noinline, noipa)) inline void jump(void** /*left*/, void* /*entered*/) {
  asm(R"(
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
  )");
}

class Fiber {
 public:
  // Its first resume calls `body`, which must not return.
  void begin(Stack stack, void (*body)()) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack.bottom, stack.bytes);  // what the last body left there
#endif
    const uintptr_t end = reinterpret_cast<uintptr_t>(stack.bottom + stack.bytes) & ~uintptr_t{15};
    void** top = reinterpret_cast<void**>(end);
    *--top = nullptr;  // where body would return to
    *--top = reinterpret_cast<void*>(body);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    top_ = top;
  }
  // Leaves the fiber that runs, `here`, and enters this one.
  void resume(Fiber& here) { jump(&here.top_, top_); }

 private:
  void* top_ = nullptr;
};

#else

class Fiber {
 public:
  void begin(Stack stack, void (*body)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack.bottom;
    context_.uc_stack.ss_size = stack.bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, body, 0);
  }
  void resume(Fiber& here) { swapcontext(&here.context_, &context_); }

 private:
  ucontext_t context_;
};

#endif

}  // namespace clinattn::emulated
