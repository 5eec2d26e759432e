// The device of a call: made current while the scope lives, its stream, and what it can do.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <array>
#include <atomic>
#include <cstddef>

#define CLINATTN_DISPATCH_KEY CUDA

namespace clinattn {

class DeviceScope {
 public:
  explicit DeviceScope(const at::Tensor& t) : guard_(t.device()) {}

  void* stream() const { return c10::cuda::getCurrentCUDAStream(index()).stream(); }

  // 75, 80, 90, ...
  int capability() const {
    static std::array<std::atomic<int>, 64> known{};
    const size_t at = index();
    int capability = at < known.size() ? known[at].load(std::memory_order_relaxed) : 0;
    if (capability > 0) return capability;
    int major = 0, minor = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index()));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index()));
    capability = 10 * major + minor;
    if (at < known.size()) known[at].store(capability, std::memory_order_relaxed);
    return capability;
  }

 private:
  c10::DeviceIndex index() const { return guard_.current_device().index(); }

  c10::cuda::CUDAGuard guard_;
};

}  // namespace clinattn
