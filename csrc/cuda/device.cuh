// The words that kernels are written in: threads, shared memory, shuffles, asynchronous copies and
// tensor-core products. A C++ compiler alone gets them from tests/lib/csrc/emulator.h.
#pragma once

#ifndef __CUDACC__
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#define CLINATTN_DEVICE __device__ __forceinline__
#define CLINATTN_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define CLINATTN_CONSTANT __grid_constant__ const

namespace clinattn {

using half = __half;
using bfloat16 = __nv_bfloat16;

// Returns whether this compilation is for cards that run a kernel: cards below 8.0, which have
// neither asynchronous copies nor bf16 products, or the others.
__host__ __device__ constexpr bool is_compiled(bool turing) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return turing;
#else
  return !turing;
#endif
}

// Ends a launch with an error: the code of a 7.5 that a driver translates for a later card has none
// of the kernels that such a card is given.
CLINATTN_DEVICE void refuse_card() { __trap(); }

CLINATTN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
CLINATTN_DEVICE int64_t block_index() { return blockIdx.x; }
CLINATTN_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}
CLINATTN_DEVICE void sync_block() { __syncthreads(); }
CLINATTN_DEVICE void sync_warp() { __syncwarp(); }
template <class T>
CLINATTN_DEVICE T shuffle(T x, int lane) {
  return __shfl_sync(0xffffffff, x, lane);
}
template <class T>
CLINATTN_DEVICE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffff, x, mask);
}

CLINATTN_DEVICE bool any_in_warp(bool x) { return __any_sync(0xffffffff, x); }

// Returns x with its origin hidden from the compiler: values that follow from x are then computed
// anew in every turn of a loop, in place of being kept in registers.
CLINATTN_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// x y, rounded: no part of a fused multiply-add
CLINATTN_DEVICE float product(float x, float y) { return __fmul_rn(x, y); }

// 2^x, to 2 ulp; 2^-inf = 0
CLINATTN_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
CLINATTN_DEVICE uint32_t high_word(uint32_t a, uint32_t b) { return __umulhi(a, b); }

CLINATTN_DEVICE float to_float(float x) { return x; }
CLINATTN_DEVICE float to_float(half x) { return __half2float(x); }
CLINATTN_DEVICE float to_float(bfloat16 x) { return __bfloat162float(x); }
template <class T>
CLINATTN_DEVICE T from_float(float x);
template <>
CLINATTN_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
CLINATTN_DEVICE half from_float<half>(float x) {
  return __float2half_rn(x);
}
template <>
CLINATTN_DEVICE bfloat16 from_float<bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two rounded numbers in a register, the first in its lower half
template <class T>
CLINATTN_DEVICE uint32_t pack(float first, float second);
template <>
CLINATTN_DEVICE uint32_t pack<half>(float first, float second) {
  const __half2 x = __floats2half2_rn(first, second);
  return reinterpret_cast<const uint32_t&>(x);
}
template <>
CLINATTN_DEVICE uint32_t pack<bfloat16>(float first, float second) {
  const __nv_bfloat162 x = __floats2bfloat162_rn(first, second);
  return reinterpret_cast<const uint32_t&>(x);
}

CLINATTN_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8x8 matrices of 16-bit numbers: lane l gives the address of row l % 8 of matrix l / 8, and
// gets of each matrix the elements (l / 4, 2 (l % 4)) and the next, or of its transpose.
CLINATTN_DEVICE void load_matrices(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}
CLINATTN_DEVICE void load_transposed(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}

// d <- d + a b with a (16, 16), b (16, 8) and d (16, 8), all spread over a warp as in layout.h.
template <class T>
CLINATTN_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
CLINATTN_DEVICE void multiply<half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
template <>
CLINATTN_DEVICE void multiply<bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// 16 bytes to shared memory, of which the first `bytes` are read and the rest are 0; done when
// wait_for_copies says so.
CLINATTN_DEVICE void copy_async(void* to, const void* from, int bytes) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
#endif
}
CLINATTN_DEVICE void commit_copies() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until all groups but the last kLeft are there
template <int kLeft>
CLINATTN_DEVICE void wait_for_copies() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// Runs a kernel on so many blocks; the error, 0 for none.
template <class... Arguments>
inline int launch(void (*kernel)(Arguments...), int64_t blocks, int threads, int shared_bytes,
                  void* stream, const std::common_type_t<Arguments>&... arguments) {
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    const void* values[] = {&arguments...};
    error =
        cudaLaunchKernel(kernel, static_cast<unsigned>(blocks), threads, const_cast<void**>(values),
                         shared_bytes, static_cast<cudaStream_t>(stream));
  }
  return error;
}

inline const char* error_words(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace clinattn

#endif
