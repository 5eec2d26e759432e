// Included before csrc/cpu/dispatch.cpp: every instruction set is there, and tiles are granted.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

// The library has calls of the system of its own.
#include <atomic>
#include <thread>

namespace emulated {

inline int cpuid(unsigned* a, unsigned* b, unsigned* c, unsigned* d) {
  *a = *b = *c = *d = ~0u;
  return 1;
}

inline long permission(long) { return 0; }
inline long permission(unsigned long* granted) {
  *granted = ~0ul;
  return 0;
}

}  // namespace emulated

#define __builtin_cpu_supports(name) true
#define __get_cpuid_count(leaf, subleaf, a, b, c, d) emulated::cpuid(a, b, c, d)
#define syscall(number, request, argument) emulated::permission(argument)
