#include "call.h"

#include <algorithm>
#include <cmath>
#include <optional>

namespace clinattn {

namespace {

// Python reads it in the file, before loading: a library with other arguments is not loaded.
#define CLINATTN_WORDS(type, name) #type " " #name ", "
[[gnu::used]] constexpr char kArguments[] =
    "clinattn arguments: " CLINATTN_TENSORS(CLINATTN_WORDS) CLINATTN_SCALARS(CLINATTN_WORDS);
#undef CLINATTN_WORDS

const int32_t* int32_values(const OptionalTensor& t, const char* name, int64_t count,
                            const Tensor& q) {
  if (!t) return nullptr;
  CLINATTN_CHECK(same_device(*t, q) && t->scalar_type() == ScalarType::Int && t->is_contiguous() &&
                     t->dim() == 1 && t->size(0) == count,
                 name, " is ", t->scalar_type(), " of shape ", t->sizes(), " on ", t->device(),
                 "; expected contiguous int32 of shape [", count, "] on ", q.device());
  return static_cast<const int32_t*>(t->const_data_ptr());
}

const int32_t* cumulative(const OptionalTensor& t, const char* name, const Tensor& q) {
  CLINATTN_CHECK(t->dim() == 1 && t->size(0) >= 1, name, " has shape ", t->sizes(),
                 "; expected (sequences + 1)");
  return int32_values(t, name, t->size(0), q);
}

// Contiguous, in the type of lse
const void* stat_values(const OptionalTensor& t, const char* name, Sizes sizes, ScalarType type,
                        const Tensor& q) {
  if (!t) return nullptr;
  CLINATTN_CHECK(same_device(*t, q) && t->scalar_type() == type && t->is_contiguous() &&
                     t->sizes().equals(sizes),
                 name, " is ", t->scalar_type(), " of shape ", t->sizes(), " on ", t->device(),
                 "; expected contiguous ", type, " of shape ", sizes, " on ", q.device());
  return t->const_data_ptr();
}

const int32_t* row_bounds(const OptionalTensor& t, const char* name, Sizes sizes, const Tensor& q) {
  return static_cast<const int32_t*>(stat_values(t, name, sizes, ScalarType::Int, q));
}

// t has three or four dimensions.
Shape with_last(const Tensor& t, int64_t size) {
  const Sizes sizes = t.sizes();
  Shape shape{{}, sizes.size()};
  std::copy(sizes.begin(), sizes.end() - 1, shape.sizes.begin());
  shape.sizes[shape.rank - 1] = size;
  return shape;
}

void check_intervals(const Arguments& a, Sizes rows, AttentionParams& p) {
  CLINATTN_CHECK(a.lo.has_value() == a.hi.has_value(), "give both lo and hi, or neither");
  p.lo = row_bounds(a.lo, "lo", rows, a.q);
  p.hi = row_bounds(a.hi, "hi", rows, a.q);
  CLINATTN_CHECK(p.global_prefix >= 0, "global_prefix is ", p.global_prefix, "; expected >= 0");
}

void check_score_terms(const Arguments& a, Sizes rows, AttentionParams& p) {
  const ScalarType stat = stat_type(a.q);
  CLINATTN_CHECK(a.times.has_value() == a.decay.has_value(),
                 "give both times and decay, or neither");
  p.times = stat_values(a.times, "times", rows, stat, a.q);
  p.decay = stat_values(a.decay, "decay", {p.heads}, stat, a.q);
  CLINATTN_CHECK(!a.times || a.q.size(-2) == a.k.size(-2) || a.cu_seqlens_q.has_value(),
                 "times needs as many queries as keys");
  if (a.slopes) {
    const int64_t batch = a.slopes->dim() == 2 && a.slopes->size(0) == 1 ? 1 : p.num_seqs;
    p.slopes = stat_values(a.slopes, "slopes", {batch, p.heads}, stat, a.q);
    p.slopes_batch = batch == 1 ? 0 : p.heads;
  }
  if (a.relative) {
    const int64_t width = a.relative->dim() == 2 ? a.relative->size(1) : 0;
    CLINATTN_CHECK(width % 2 == 1, "relative has shape ", a.relative->sizes(),
                   "; expected [heads, odd]");
    p.relative = stat_values(a.relative, "relative", {p.heads, width}, stat, a.q);
    p.relative_reach = width / 2;
  }
  CLINATTN_CHECK(p.softcap >= 0, "softcap is ", p.softcap, "; expected >= 0");
}

void check_dropout(const Arguments& a, AttentionParams& p) {
  CLINATTN_CHECK(p.dropout_p >= 0 && p.dropout_p <= 1, "dropout_p is ", p.dropout_p,
                 "; expected 0 to 1");
  CLINATTN_CHECK(a.seed.has_value() == (p.dropout_p > 0), "seed goes with dropout_p > 0");
  if (!a.seed) return;
  CLINATTN_CHECK(same_device(*a.seed, a.q) && a.seed->scalar_type() == ScalarType::Long &&
                     a.seed->numel() == 1,
                 "seed is ", a.seed->scalar_type(), " of shape ", a.seed->sizes(), " on ",
                 a.seed->device(), "; expected one int64 on ", a.q.device());
  p.seed_at = static_cast<const uint64_t*>(a.seed->const_data_ptr());
  p.dropout_threshold = static_cast<uint32_t>(std::nearbyint(p.dropout_p * (1 << 24)));
}

}  // namespace

void Stack::check_left() const {
  CLINATTN_CHECK(popped_ < count_, "the op has ", count_, " arguments; this library takes more");
}

Arguments Stack::pop_arguments() {
#define CLINATTN_POP(type, name) .name = pop<type>(),
  return {CLINATTN_TENSORS(CLINATTN_POP).scalars = {CLINATTN_SCALARS(CLINATTN_POP)}};
#undef CLINATTN_POP
}

Arguments Stack::pop_bare() {
  Arguments a{.q = pop<Tensor>(), .k = pop<Tensor>(), .v = pop<Tensor>()};
  CLINATTN_CHECK(a.q.dim() == 4 && a.k.dim() == 4 && a.q.size(1) == a.k.size(1),
                 "q and k have shapes ", a.q.sizes(), " and ", a.k.sizes(),
                 "; expected four dimensions, and as many heads");
  a.scalars.window_left = -1;
  a.scalars.window_right = pop<bool>() ? 0 : -1;
  const auto scale = pop<std::optional<double>>();
  a.scalars.scale = scale ? *scale : std::pow(static_cast<double>(a.q.size(3)), -0.5);
  return a;
}

BackwardArguments Stack::pop_bare_backward() {
  return {
      .dout = pop<Tensor>(),
      .dlse = std::nullopt,
      .o = pop<Tensor>(),
      .lse = pop<Tensor>(),
      .lse_low = pop<Tensor>(),
      .call = pop_bare(),
      .needs = 0,
  };
}

BackwardArguments Stack::pop_backward() {
  return {
      .dout = pop<Tensor>(),
      .dlse = pop<OptionalTensor>(),
      .o = pop<Tensor>(),
      .lse = pop<Tensor>(),
      .lse_low = pop<OptionalTensor>(),
      .call = pop_arguments(),
      .needs = pop<int64_t>(),
  };
}

SummaryArguments Stack::pop_summary() {
  return {
      .lse = pop<Tensor>(),
      .lse_low = pop<OptionalTensor>(),
      .weights = pop<OptionalTensor>(),
      .dout = pop<OptionalTensor>(),
      .call = pop_arguments(),
      .reduce = pop<int64_t>(),
      .top = pop<int64_t>(),
  };
}

void Stack::push(std::initializer_list<Tensor> results) {
  CLINATTN_CHECK(popped_ == count_, "the op has ", count_, " arguments; this library takes ",
                 popped_);
  StableIValue* at = values_;
  for (const Tensor& x : results) *at++ = torch::stable::detail::from(x);
}

DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Bool:
      return DType::kBool;
    default:
      CLINATTN_CHECK(false, name, " has dtype ", t.scalar_type(),
                     "; expected float32, float64, bfloat16, float16 (or bool, for a mask)");
  }
}

void check_needs(const Arguments& a, int64_t needs) {
  CLINATTN_CHECK(!(needs & kNeedMask) || (a.mask && is_floating_point(a.mask->scalar_type())),
                 "needs asks for the gradient of a mask; expected one of floating point");
  CLINATTN_CHECK(!(needs & kNeedDecay) || a.decay,
                 "needs asks for the gradient of decay; none given");
  CLINATTN_CHECK(!(needs & kNeedSlopes) || a.slopes,
                 "needs asks for the gradient of slopes; none given");
  CLINATTN_CHECK(!(needs & kNeedRelative) || a.relative,
                 "needs asks for the gradient of relative; none given");
}

void check_layout(const Tensor& t, const char* name, Sizes sizes, const Tensor& like,
                  ScalarType type) {
  CLINATTN_CHECK(same_device(t, like), name, " is on ", t.device(), "; expected ", like.device());
  CLINATTN_CHECK(t.scalar_type() == type, name, " has dtype ", t.scalar_type(), "; expected ",
                 type);
  CLINATTN_CHECK(t.sizes().equals(sizes), name, " has shape ", t.sizes(), "; expected ", sizes);
  CLINATTN_CHECK(t.numel() == 0 || t.stride(-1) == 1 || t.size(-1) == 1, name, " has last stride ",
                 t.stride(-1), "; expected 1");
}

void check_layout(const Tensor& t, const char* name, Sizes sizes, const Tensor& like) {
  check_layout(t, name, sizes, like, like.scalar_type());
}

Strides strides_of(const Tensor& t) {
  if (t.dim() == 4) return {t.stride(0), t.stride(1), t.stride(2)};
  return {0, t.stride(1), t.stride(0)};
}

AttentionParams check_shapes(const Arguments& a) {
  AttentionParams p{a.scalars};
  const bool packed = a.cu_seqlens_q.has_value();
  const int64_t rank = packed ? 3 : 4;
  CLINATTN_CHECK(packed == a.cu_seqlens_k.has_value(),
                 "give both cu_seqlens_q and cu_seqlens_k, or neither");
  CLINATTN_CHECK(a.q.dim() == rank && a.k.dim() == rank && a.v.dim() == rank,
                 "q, k and v have rank ", a.q.dim(), ", ", a.k.dim(), " and ", a.v.dim(),
                 "; expected ", rank);
  p.dtype = dtype_of(a.q, "q");
  CLINATTN_CHECK(p.dtype != DType::kBool, "q is bool; expected a floating-point type");
  p.head_dim = a.q.size(-1);
  p.value_dim = a.v.size(-1);
  p.heads = a.q.size(1);
  p.kv_heads = a.k.size(1);
  CLINATTN_CHECK(p.head_dim >= 1 && p.head_dim <= 256, "head_dim is ", p.head_dim,
                 "; expected 1 to 256");
  CLINATTN_CHECK(p.value_dim >= 1 && p.value_dim <= 256, "the head_dim of v is ", p.value_dim,
                 "; expected 1 to 256");
  CLINATTN_CHECK(p.kv_heads > 0 ? p.heads % p.kv_heads == 0 : p.heads == 0, "q has ", p.heads,
                 " heads, k ", p.kv_heads, "; expected a multiple");
  check_layout(a.q, "q", a.q.sizes(), a.q);
  if (packed) {
    p.total_q = a.q.size(0);
    p.total_k = a.k.size(0);
    p.num_seqs = a.cu_seqlens_q->numel() - 1;
    p.cu_seqlens_q = cumulative(a.cu_seqlens_q, "cu_seqlens_q", a.q);
    p.cu_seqlens_k = cumulative(a.cu_seqlens_k, "cu_seqlens_k", a.q);
    CLINATTN_CHECK(a.cu_seqlens_k->numel() == p.num_seqs + 1, "cu_seqlens_k has ",
                   a.cu_seqlens_k->numel(), " entries, cu_seqlens_q ", p.num_seqs + 1,
                   "; expected as many");
    p.max_q = p.total_q;
    p.max_k = p.total_k;
    check_layout(a.k, "k", {p.total_k, p.kv_heads, p.head_dim}, a.q);
    CLINATTN_CHECK(!a.mask && !a.q_lengths && !a.kv_start && !a.kv_end,
                   "mask, q_lengths, kv_start and kv_end are for the dense layout");
  } else {
    p.num_seqs = a.q.size(0);
    p.max_q = a.q.size(2);
    p.max_k = a.k.size(2);
    check_layout(a.k, "k", {p.num_seqs, p.kv_heads, p.max_k, p.head_dim}, a.q);
    p.q_lengths = int32_values(a.q_lengths, "q_lengths", p.num_seqs, a.q);
    p.kv_start = int32_values(a.kv_start, "kv_start", p.num_seqs, a.q);
    p.kv_end = int32_values(a.kv_end, "kv_end", p.num_seqs, a.q);
  }
  check_layout(a.v, "v", with_last(a.k, p.value_dim), a.q);
  p.q = a.q.const_data_ptr();
  p.k = a.k.const_data_ptr();
  p.v = a.v.const_data_ptr();
  p.q_strides = strides_of(a.q);
  p.k_strides = strides_of(a.k);
  p.v_strides = strides_of(a.v);
  if (a.mask) {
    const Tensor& m = *a.mask;
    CLINATTN_CHECK(same_device(m, a.q) && m.dim() == 4, "mask has rank ", m.dim(), " on ",
                   m.device(), "; expected 4 on ", a.q.device());
    const int64_t full[4] = {p.num_seqs, p.heads, p.max_q, p.max_k};
    int64_t stride[4];
    for (int d = 0; d < 4; ++d) {
      CLINATTN_CHECK(m.size(d) == full[d] || m.size(d) == 1, "mask has shape ", m.sizes(),
                     "; expected to broadcast to ", Sizes(full, 4));
      stride[d] = m.size(d) == 1 ? 0 : m.stride(d);
    }
    p.mask = {m.const_data_ptr(), dtype_of(m, "mask"), stride[0], stride[1], stride[2], stride[3]};
  }
  const Shape rows = packed ? Shape{{p.total_q}, 1} : Shape{{p.num_seqs, p.max_q}, 2};
  check_intervals(a, rows, p);
  check_score_terms(a, rows, p);
  check_dropout(a, p);
  constexpr int64_t kFar = int64_t{1} << 40;  // no sum of row numbers and windows can overflow
  p.window_left = std::min(p.window_left, kFar);
  p.window_right = std::min(p.window_right, kFar);
  return p;
}

Shape output_shape(const AttentionParams& p, const Tensor& q) { return with_last(q, p.value_dim); }

Shape stat_shape(const AttentionParams& p) {
  if (p.cu_seqlens_q) return {{p.heads, p.total_q}, 2};
  return {{p.num_seqs, p.heads, p.max_q}, 3};
}

ScalarType stat_type(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

BackwardInputs::BackwardInputs(AttentionParams& p, const BackwardArguments& b) {
  const Tensor& q = b.call.q;
  const auto of_o = output_shape(p, q);
  const bool by_rows = b.dout.dim() == 0 || b.dout.stride(-1) == 1 || b.dout.size(-1) == 1;
  const Tensor& dout = by_rows ? b.dout : copies_[3].emplace(torch::stable::contiguous(b.dout));
  check_layout(dout, "do", of_o, q);
  check_layout(b.o, "o", of_o, q);
  const auto sizes = stat_shape(p);
  const auto stat = [&](const Tensor& x, const char* name, OptionalTensor& copy) {
    check_layout(x, name, sizes, q, stat_type(q));
    if (x.is_contiguous()) return const_cast<void*>(x.const_data_ptr());
    copy = torch::stable::contiguous(x);
    return copy->mutable_data_ptr();
  };
  p.lse = stat(b.lse, "lse", copies_[0]);
  p.lse_low = b.lse_low ? stat(*b.lse_low, "lse_low", copies_[1]) : nullptr;
  p.dlse = b.dlse ? stat(*b.dlse, "dlse", copies_[2]) : nullptr;
  p.dout = dout.const_data_ptr();
  p.do_strides = strides_of(dout);
  p.o = const_cast<void*>(b.o.const_data_ptr());
  p.o_strides = strides_of(b.o);
}

SummaryInputs::SummaryInputs(AttentionParams& p, SummaryParams& s, const SummaryArguments& a) {
  const Tensor& q = a.call.q;
  CLINATTN_CHECK(a.reduce >= 0 && a.reduce <= static_cast<int64_t>(Reduce::kTopK), "reduce is ",
                 a.reduce, "; expected 0 to 5");
  CLINATTN_CHECK(a.top >= 1 && a.top <= kMostTop, "top is ", a.top, "; expected 1 to ", kMostTop);
  CLINATTN_CHECK(p.dropout_threshold == 0, "dropout_p is ", p.dropout_p, "; expected 0");
  s = {.reduce = static_cast<Reduce>(a.reduce), .top = a.top};
  const auto sizes = stat_shape(p);
  const auto stat = [&](const Tensor& x, const char* name) {
    check_layout(x, name, sizes, q, stat_type(q));
    CLINATTN_CHECK(x.is_contiguous(), name, " has strides; expected a contiguous one");
    return const_cast<void*>(x.const_data_ptr());
  };
  p.lse = stat(a.lse, "lse");
  p.lse_low = a.lse_low ? stat(*a.lse_low, "lse_low") : nullptr;
  s.weights = a.weights ? stat(*a.weights, "weights") : nullptr;
  CLINATTN_CHECK(!s.needs_dp() || a.dout, "do is missing; reduce is ", a.reduce);
  if (!s.needs_dp()) return;
  const bool by_rows = a.dout->stride(-1) == 1 || a.dout->size(-1) == 1;
  const Tensor& dout = by_rows ? *a.dout : copy_.emplace(torch::stable::contiguous(*a.dout));
  check_layout(dout, "do", output_shape(p, q), q);
  p.dout = dout.const_data_ptr();
  p.do_strides = strides_of(dout);
}

std::array<Tensor, 2> allocate_summary(const AttentionParams& p, SummaryParams& s,
                                       const Tensor& q) {
  Shape shape = stat_shape(p);
  if (s.by_key()) shape.sizes[shape.rank - 1] = p.cu_seqlens_k ? p.total_k : p.max_k;
  if (s.reduce == Reduce::kTopK) shape.sizes[shape.rank++] = s.top;
  const Shape none{{0}, 1};
  const Tensor values = empty(shape, stat_type(q), q);
  const Tensor places = empty(s.reduce == Reduce::kTopK ? shape : none, ScalarType::Long, q);
  zero(values);
  if (places.numel() > 0) fill(places, -1);
  s.values = values.mutable_data_ptr();
  s.places = static_cast<int64_t*>(places.mutable_data_ptr());
  return {values, places};
}

std::array<Tensor, 3> allocate_gradients(AttentionParams& p, const Arguments& a) {
  const auto like = [&](const Tensor& x) { return empty(x.sizes(), x.scalar_type(), x); };
  std::array<Tensor, 3> grads = {like(a.q), like(a.k), like(a.v)};
  p.dq = grads[0].mutable_data_ptr();
  p.dk = grads[1].mutable_data_ptr();
  p.dv = grads[2].mutable_data_ptr();
  p.dq_strides = strides_of(grads[0]);
  p.dk_strides = strides_of(grads[1]);
  p.dv_strides = strides_of(grads[2]);
  return grads;
}

}  // namespace clinattn
