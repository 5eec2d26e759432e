// The device of a call: made current while the scope lives, its stream, and what it can do.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "../tensor.h"

#define CLINATTN_DISPATCH_KEY CUDA

namespace clinattn {

class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {}

  void* stream() const {
    void* stream = nullptr;
    CLINATTN_CHECK(!aoti_torch_get_current_cuda_stream(index_, &stream), "cuda:", index_,
                   " has no stream");
    return stream;
  }

  // 75, 80, 90, ...
  int capability() const {
    static std::array<std::atomic<int>, 64> known{};
    const size_t at = index_;
    int capability = at < known.size() ? known[at].load(std::memory_order_relaxed) : 0;
    if (capability > 0) return capability;
    capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                 attribute(cudaDevAttrComputeCapabilityMinor);
    if (at < known.size()) known[at].store(capability, std::memory_order_relaxed);
    return capability;
  }

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, which, index_);
    CLINATTN_CHECK(error == cudaSuccess, "cuda:", index_, ": ", cudaGetErrorString(error));
    return value;
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace clinattn
