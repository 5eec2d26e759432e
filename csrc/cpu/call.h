// The call on the CPU, where values are checked, too.
#pragma once

#include "../call.h"

namespace clinattn {

// As check_shapes, with the longest of packed sequences in max_q and max_k, and the seed in seed.
AttentionParams check(const Arguments& a);

}  // namespace clinattn
