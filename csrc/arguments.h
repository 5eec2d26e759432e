// The arguments that all passes share, in the order and with the names of the ops' schema
// (clinattn/backends/call.py); the tensors come first. No torch.
#pragma once

#include <cstdint>

#define CLINATTN_TENSORS(TENSOR)       \
  TENSOR(Tensor, q)                    \
  TENSOR(Tensor, k)                    \
  TENSOR(Tensor, v)                    \
  TENSOR(OptionalTensor, mask)         \
  TENSOR(OptionalTensor, cu_seqlens_q) \
  TENSOR(OptionalTensor, cu_seqlens_k) \
  TENSOR(OptionalTensor, q_lengths)    \
  TENSOR(OptionalTensor, kv_start)     \
  TENSOR(OptionalTensor, kv_end)       \
  TENSOR(OptionalTensor, lo)           \
  TENSOR(OptionalTensor, hi)           \
  TENSOR(OptionalTensor, times)        \
  TENSOR(OptionalTensor, decay)        \
  TENSOR(OptionalTensor, slopes)       \
  TENSOR(OptionalTensor, relative)     \
  TENSOR(OptionalTensor, seed)

#define CLINATTN_SCALARS(SCALAR) \
  SCALAR(double, scale)          \
  SCALAR(int64_t, window_left)   \
  SCALAR(int64_t, window_right)  \
  SCALAR(bool, bottom_right)     \
  SCALAR(int64_t, max_seqlen_q)  \
  SCALAR(int64_t, max_seqlen_k)  \
  SCALAR(double, softcap)        \
  SCALAR(int64_t, global_prefix) \
  SCALAR(double, dropout_p)

namespace clinattn {

struct Scalars {
#define CLINATTN_FIELD(type, name) type name;
  CLINATTN_SCALARS(CLINATTN_FIELD)
#undef CLINATTN_FIELD
};

}  // namespace clinattn
