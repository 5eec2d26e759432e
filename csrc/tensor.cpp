#include "tensor.h"

#include <algorithm>
#include <cstddef>

namespace clinattn {

namespace {

const char* name_of(torch::headeronly::DeviceType type) {
  using torch::headeronly::DeviceType;
  switch (type) {
    case DeviceType::CPU:
      return "cpu";
    case DeviceType::CUDA:
      return "cuda";
    case DeviceType::Meta:
      return "meta";
    case DeviceType::XPU:
      return "xpu";
    case DeviceType::MPS:
      return "mps";
    default:
      return "another kind of device";
  }
}

// A device as torch numbers it
struct Place {
  int32_t type, index;
  bool operator==(const Place&) const = default;
};

Place place_of(const Tensor& x) {
  Place place;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &place.type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &place.index));
  return place;
}

}  // namespace

bool same_device(const Tensor& a, const Tensor& b) { return place_of(a) == place_of(b); }

std::ostream& operator<<(std::ostream& out, Sizes sizes) {
  const char* between = "[";
  for (const int64_t size : sizes) {
    out << between << size;
    between = ", ";
  }
  return out << (sizes.empty() ? "[]" : "]");
}

std::ostream& operator<<(std::ostream& out, const Device& device) {
  out << name_of(device.type());
  return device.index() < 0 ? out : out << ':' << device.index();
}

Tensor empty(Sizes sizes, ScalarType type, const Tensor& like) {
  constexpr size_t kDims = 8;
  std::array<int64_t, kDims> strides;
  CLINATTN_CHECK(sizes.size() <= kDims, "a tensor has shape ", sizes, "; expected at most ", kDims,
                 " dimensions");
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  const Place place = place_of(like);
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made = nullptr;
  CLINATTN_CHECK(!aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                           strides.data(), dtype, place.type, place.index, &made),
                 "out of memory: a tensor of ", type, " of shape ", sizes, " on ", like.device());
  return Tensor(made);
}

Tensor zeros(Sizes sizes, ScalarType type, const Tensor& like) {
  Tensor x = empty(sizes, type, like);
  zero(x);
  return x;
}

void zero(const Tensor& x) { TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(x.get())); }

void fill(const Tensor& x, double value) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_fill__Scalar(x.get(), value));
}

bool is_floating_point(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

}  // namespace clinattn
