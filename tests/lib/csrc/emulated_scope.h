// In place of csrc/cuda/device_scope.h: CPU tensors stand for those of a device that is emulated.
#pragma once

#include <cstdlib>

#include "tensor.h"

#define CLINATTN_DISPATCH_KEY CPU

namespace clinattn {

class DeviceScope {
 public:
  explicit DeviceScope(const Tensor&) {}

  void* stream() const { return nullptr; }

  // CLINATTN_EMULATED_CAPABILITY, by default 80
  int capability() const {
    const char* asked = std::getenv("CLINATTN_EMULATED_CAPABILITY");
    return asked ? std::atoi(asked) : 80;
  }
};

}  // namespace clinattn
