// Tensors by torch's stable ABI, so that one compiled library runs under every torch from 2.11 on.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>

namespace clinattn {

using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

std::ostream& operator<<(std::ostream& out, Sizes sizes);           // [2, 3]
std::ostream& operator<<(std::ostream& out, const Device& device);  // cpu, cuda:0

// Throws std::runtime_error, which Python gets as RuntimeError.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}
#define CLINATTN_CHECK(condition, ...) \
  do {                                 \
    if (!(condition)) [[unlikely]]     \
      ::clinattn::fail(__VA_ARGS__);   \
  } while (false)

// Returns a contiguous and unwritten tensor on the device of `like`.
Tensor empty(Sizes sizes, ScalarType type, const Tensor& like);
Tensor zeros(Sizes sizes, ScalarType type, const Tensor& like);

void zero(const Tensor& x);
void fill(const Tensor& x, double value);
bool is_floating_point(ScalarType type);
bool same_device(const Tensor& a, const Tensor& b);

// Calls an operator of torch with all of its arguments, those with defaults included.
template <class... Args>
Tensor call_torch(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  CLINATTN_CHECK(!torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION), name,
                 " failed");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace clinattn
