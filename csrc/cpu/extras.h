#pragma once

namespace {

// The extras of a plain call: no dropout, no gain of a score other than 1, no gradients of what is
// added to scores. Kernels are compiled apart for such a call, so that these features cost it
// nothing.
struct NoExtras {
  static constexpr bool kAny = false, dropout = false, gains = false, added = false;
  static constexpr float kept_scale = 1;
};

}  // namespace
