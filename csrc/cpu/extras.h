#pragma once

namespace {

// What a plain call has of dropout, a softcap and gradients of what is added to scores. Kernels are
// compiled for it apart, so that they cost such a call nothing.
struct NoExtras {
  static constexpr bool kAny = false, dropout = false, softcap = false, added = false;
  static constexpr float kept_scale = 1;
};

}  // namespace
