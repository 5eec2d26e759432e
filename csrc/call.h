// The arguments of the ops: popped from the dispatcher's stack, checked, and turned into the plain
// pointers that kernels take. The checks read no values of tensors, so that they serve any device
// and never stop the host.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "arguments.h"
#include "attention.h"
#include "tensor.h"

namespace clinattn {

struct Arguments {
#define CLINATTN_FIELD(type, name) type name;
  CLINATTN_TENSORS(CLINATTN_FIELD)
#undef CLINATTN_FIELD
  Scalars scalars;
};

struct BackwardArguments {
  Tensor dout;
  OptionalTensor dlse;
  Tensor o, lse;
  OptionalTensor lse_low;
  Arguments call;
  int64_t needs;
};

struct SummaryArguments {
  Tensor lse;
  OptionalTensor lse_low, weights, dout;
  Arguments call;
  int64_t reduce, top;
};

// Bits of `needs`
enum Needs : int64_t { kNeedMask = 1, kNeedDecay = 2, kNeedSlopes = 4, kNeedRelative = 8 };

// The results of a backward op in their order; those that `needs` leaves out are empty.
struct Gradients {
  Tensor dq, dk, dv, mask, decay, slopes, relative;
};

// The stack of a boxed kernel: arguments are popped in the order of the schema, results pushed at
// the end.
class Stack {
 public:
  Stack(StableIValue* values, uint64_t count) : values_(values), count_(count) {}

  template <class T>
  T pop() {
    check_left();
    return torch::stable::detail::to<T>(values_[popped_++]);
  }
  Arguments pop_arguments();
  // A bare call: q, k, v (B, H, N, D), is_causal, and a scale that may be left out
  Arguments pop_bare();
  BackwardArguments pop_backward();
  // do, o, lse and lse_low, then a bare call
  BackwardArguments pop_bare_backward();
  SummaryArguments pop_summary();

  void push(std::initializer_list<Tensor> results);
  void push(const Gradients& g) { push({g.dq, g.dk, g.dv, g.mask, g.decay, g.slopes, g.relative}); }

 private:
  void check_left() const;

  StableIValue* values_;
  uint64_t count_, popped_ = 0;
};

// Checks throw std::runtime_error with the name of the argument, its value and the expected one.

// Checks types, shapes and strides. In the packed layout max_q and max_k are the totals. The seed
// is not read: seed_at points to it.
AttentionParams check_shapes(const Arguments& a);
DType dtype_of(const Tensor& t, const char* name);
// Checks that the tensors named in `needs` were passed.
void check_needs(const Arguments& a, int64_t needs);
// Checks device, type, shape and last stride. Where no type is given, it is that of `like`.
void check_layout(const Tensor& t, const char* name, Sizes sizes, const Tensor& like);
void check_layout(const Tensor& t, const char* name, Sizes sizes, const Tensor& like,
                  ScalarType type);

// The strides of a dense (B, H, N, D) or packed (T, H, D) tensor
Strides strides_of(const Tensor& t);

// Sizes of a tensor of up to four dimensions, kept here: a vector would ask for memory.
struct Shape {
  std::array<int64_t, 4> sizes;
  size_t rank;
  operator Sizes() const { return {sizes.data(), rank}; }
};

Shape output_shape(const AttentionParams& p, const Tensor& q);
// Shape and type of lse and of the tensors that are laid out like lse
Shape stat_shape(const AttentionParams& p);
ScalarType stat_type(const Tensor& q);

// Checks do, dlse, o, lse and lse_low, and points p to them. Holds the contiguous copies of those
// that needed one.
class BackwardInputs {
 public:
  BackwardInputs(AttentionParams& p, const BackwardArguments& b);

 private:
  std::array<OptionalTensor, 4> copies_;
};
// Checks lse, lse_low, weights and do, and points p and s to them. Holds a contiguous do where one
// was needed.
class SummaryInputs {
 public:
  SummaryInputs(AttentionParams& p, SummaryParams& s, const SummaryArguments& a);

 private:
  OptionalTensor copy_;
};
// Returns values of 0 and places of -1, and points s to them; places are empty but for kTopK.
std::array<Tensor, 2> allocate_summary(const AttentionParams& p, SummaryParams& s, const Tensor& q);

// Returns unwritten and contiguous dq, dk and dv, and points p to them.
std::array<Tensor, 3> allocate_gradients(AttentionParams& p, const Arguments& a);

}  // namespace clinattn
