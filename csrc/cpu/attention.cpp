// The torch side of the CPU kernels: checks, allocation, the list of tasks, threads.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <numeric>

#include "dispatch.h"
#include "interval.h"

namespace clinattn {

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBool:
      return DType::kBool;
    default:
      TORCH_CHECK(false, name, " has dtype ", t.scalar_type(),
                  "; expected float32, float64, bfloat16, float16 (or bool, for a mask)");
  }
}

void check_layout(const Tensor& t, const char* name, at::IntArrayRef sizes, const Tensor& like) {
  TORCH_CHECK(t.device().is_cpu(), name, " is on ", t.device(), "; expected cpu");
  TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " has dtype ", t.scalar_type(),
              "; expected ", like.scalar_type());
  TORCH_CHECK(t.sizes() == sizes, name, " has shape ", t.sizes(), "; expected ", sizes);
  TORCH_CHECK(t.numel() == 0 || t.stride(-1) == 1 || t.size(-1) == 1, name, " has last stride ",
              t.stride(-1), "; expected 1");
}

// Dense (B, H, N, D) or packed (T, H, D)
Strides strides_of(const Tensor& t) {
  if (t.dim() == 4) return {t.stride(0), t.stride(1), t.stride(2)};
  return {0, t.stride(1), t.stride(0)};
}

const int32_t* int32_values(const OptionalTensor& t, const char* name, int64_t count) {
  if (!t) return nullptr;
  TORCH_CHECK(t->device().is_cpu() && t->scalar_type() == at::kInt && t->is_contiguous() &&
                  t->dim() == 1 && t->size(0) == count,
              name, " is ", t->scalar_type(), " of shape ", t->sizes(), " on ", t->device(),
              "; expected contiguous int32 of shape [", count, "] on cpu");
  return t->const_data_ptr<int32_t>();
}

const int32_t* cumulative(const OptionalTensor& t, const char* name, int64_t total) {
  TORCH_CHECK(t->dim() == 1 && t->size(0) >= 1, name, " has shape ", t->sizes(),
              "; expected (sequences + 1)");
  const int32_t* c = int32_values(t, name, t->size(0));
  TORCH_CHECK(c[0] == 0, name, " starts at ", c[0], "; expected 0");
  for (int64_t i = 1; i < t->size(0); ++i)
    TORCH_CHECK(c[i] >= c[i - 1], name, " decreases at ", i, ": ", c[i - 1], " to ", c[i]);
  TORCH_CHECK(c[t->size(0) - 1] <= total, name, " ends at ", c[t->size(0) - 1], "; the tensor has ",
              total, " rows");
  return c;
}

int64_t longest(const int32_t* c, int64_t sequences) {
  int64_t n = 0;
  for (int64_t i = 0; i < sequences; ++i) n = std::max<int64_t>(n, c[i + 1] - c[i]);
  return n;
}

// The arguments that both passes share, as the op's schema orders them.
struct Arguments {
  const Tensor &q, &k, &v;
  const OptionalTensor &mask, &cu_seqlens_q, &cu_seqlens_k, &q_lengths, &kv_start, &kv_end;
  double scale;
  int64_t window_left, window_right;
  bool bottom_right;
};

AttentionParams check(const Arguments& a) {
  AttentionParams p{};
  const bool packed = a.cu_seqlens_q.has_value();
  const int64_t rank = packed ? 3 : 4;
  TORCH_CHECK(packed == a.cu_seqlens_k.has_value(),
              "give both cu_seqlens_q and cu_seqlens_k, or neither");
  TORCH_CHECK(a.q.dim() == rank && a.k.dim() == rank, "q and k have rank ", a.q.dim(), " and ",
              a.k.dim(), "; expected ", rank);
  p.dtype = dtype_of(a.q, "q");
  TORCH_CHECK(p.dtype != DType::kBool, "q is bool; expected a floating-point type");
  p.head_dim = a.q.size(-1);
  p.heads = a.q.size(1);
  p.kv_heads = a.k.size(1);
  TORCH_CHECK(p.head_dim >= 1 && p.head_dim <= 256, "head_dim is ", p.head_dim,
              "; expected 1 to 256");
  TORCH_CHECK(p.kv_heads > 0 ? p.heads % p.kv_heads == 0 : p.heads == 0, "q has ", p.heads,
              " heads, k ", p.kv_heads, "; expected a multiple");
  check_layout(a.q, "q", a.q.sizes(), a.q);
  if (packed) {
    p.total_q = a.q.size(0);
    p.total_k = a.k.size(0);
    p.num_seqs = a.cu_seqlens_q->numel() - 1;
    p.cu_seqlens_q = cumulative(a.cu_seqlens_q, "cu_seqlens_q", p.total_q);
    p.cu_seqlens_k = cumulative(a.cu_seqlens_k, "cu_seqlens_k", p.total_k);
    TORCH_CHECK(a.cu_seqlens_k->numel() == p.num_seqs + 1, "cu_seqlens_k has ",
                a.cu_seqlens_k->numel(), " entries, cu_seqlens_q ", p.num_seqs + 1,
                "; expected as many");
    p.max_q = longest(p.cu_seqlens_q, p.num_seqs);
    p.max_k = longest(p.cu_seqlens_k, p.num_seqs);
    check_layout(a.k, "k", {p.total_k, p.kv_heads, p.head_dim}, a.q);
    TORCH_CHECK(!a.mask && !a.q_lengths && !a.kv_start && !a.kv_end,
                "mask, q_lengths, kv_start and kv_end are for the dense layout");
  } else {
    p.num_seqs = a.q.size(0);
    p.max_q = a.q.size(2);
    p.max_k = a.k.size(2);
    check_layout(a.k, "k", {p.num_seqs, p.kv_heads, p.max_k, p.head_dim}, a.q);
    p.q_lengths = int32_values(a.q_lengths, "q_lengths", p.num_seqs);
    p.kv_start = int32_values(a.kv_start, "kv_start", p.num_seqs);
    p.kv_end = int32_values(a.kv_end, "kv_end", p.num_seqs);
  }
  check_layout(a.v, "v", a.k.sizes(), a.q);
  p.q = a.q.const_data_ptr();
  p.k = a.k.const_data_ptr();
  p.v = a.v.const_data_ptr();
  p.q_strides = strides_of(a.q);
  p.k_strides = strides_of(a.k);
  p.v_strides = strides_of(a.v);
  if (a.mask) {
    const Tensor& m = *a.mask;
    TORCH_CHECK(m.device().is_cpu() && m.dim() == 4, "mask has rank ", m.dim(), " on ", m.device(),
                "; expected 4 on cpu");
    const int64_t full[4] = {p.num_seqs, p.heads, p.max_q, p.max_k};
    int64_t stride[4];
    for (int d = 0; d < 4; ++d) {
      TORCH_CHECK(m.size(d) == full[d] || m.size(d) == 1, "mask has shape ", m.sizes(),
                  "; expected to broadcast to ", at::IntArrayRef(full, 4));
      stride[d] = m.size(d) == 1 ? 0 : m.stride(d);
    }
    p.mask = {m.const_data_ptr(), dtype_of(m, "mask"), stride[0], stride[1], stride[2], stride[3]};
  }
  constexpr int64_t kFar = int64_t{1} << 40;  // no sum of row numbers and windows can overflow
  p.window_left = std::min(a.window_left, kFar);
  p.window_right = std::min(a.window_right, kFar);
  p.bottom_right = a.bottom_right;
  p.scale = a.scale;
  return p;
}

// lse and what is laid out like it
std::vector<int64_t> stat_shape(const AttentionParams& p) {
  if (p.cu_seqlens_q) return {p.heads, p.total_q};
  return {p.num_seqs, p.heads, p.max_q};
}

at::ScalarType math_type(const Tensor& q) {
  return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// torch refuses to answer where its old and new settings contradict each other.
Precision matmul_precision() {
  try {
    switch (at::globalContext().float32MatmulPrecision()) {
      case at::Float32MatmulPrecision::MEDIUM:
        return Precision::kMedium;
      case at::Float32MatmulPrecision::HIGH:
        return Precision::kHigh;
      default:
        return Precision::kHighest;
    }
  } catch (const c10::Error&) {
    return Precision::kHighest;
  }
}

// Uninitialised memory, or NaN when tests look for elements that nothing wrote.
Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options) {
  static const bool poison = std::getenv("CLINATTN_POISON_OUTPUTS") != nullptr;
  Tensor t = at::empty(sizes, options);
  return poison ? t.fill_(std::numeric_limits<double>::quiet_NaN()) : t;
}

// 64-byte aligned memory of a thread, kept between calls so that it stays mapped and in cache.
void* thread_scratch(size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> block;
  thread_local size_t size = 0;
  if (size < bytes) {
    bytes = (bytes + 4095) / 4096 * 4096;
    block.reset(std::aligned_alloc(4096, bytes));
    TORCH_CHECK(block, "out of memory: ", bytes, " bytes of scratch");
    size = bytes;
  }
  return block.get();
}

// Runs task(i, scratch) for i in [0, count) on torch's threads. Tasks start in order of i, each as
// soon as a thread is free.
template <class Task>
void run_tasks(int64_t count, size_t scratch_bytes, const Task& task) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(count, at::get_num_threads());
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    void* scratch = thread_scratch(scratch_bytes);
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i, scratch);
  });
}

// Costliest first, so that no thread is left with a long task at the end.
template <class Task>
std::vector<Task> by_cost(const std::vector<Task>& tasks, const std::vector<double>& cost) {
  std::vector<int64_t> order(tasks.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return cost[a] > cost[b]; });
  std::vector<Task> sorted;
  sorted.reserve(tasks.size());
  for (int64_t i : order) sorted.push_back(tasks[i]);
  return sorted;
}

std::vector<ForwardTask> forward_tasks(const AttentionParams& p, const CpuKernels& kernels) {
  // Four tasks a thread even out the end; results do not depend on how rows are grouped into tasks.
  const int64_t rows = (p.cu_seqlens_q ? p.total_q : p.num_seqs * p.max_q) * p.kv_heads;
  const int64_t fair = round_up(rows / (4 * at::get_num_threads()) + 1, kernels.forward_rows);
  const int64_t chunk = std::min(kernels.forward_chunk(p), fair);
  std::vector<ForwardTask> tasks;
  std::vector<double> cost;
  for (int64_t b = 0; b < p.num_seqs; ++b) {
    const Sequence seq(p, b);
    for (int64_t h = 0; h < p.kv_heads; ++h)
      for (int64_t i = 0; i < seq.rows_q; i += chunk) {
        const int64_t end = std::min(i + chunk, seq.rows_q), last = std::min(end, seq.q_end) - 1;
        tasks.push_back({b, h, i, end});
        cost.push_back(last < i ? 0
                                : static_cast<double>(last + 1 - i) * (seq.hi(last) - seq.lo(i)));
      }
  }
  return by_cost(tasks, cost);
}

std::tuple<Tensor, Tensor, Tensor> cpu_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& q_lengths, const OptionalTensor& kv_start, const OptionalTensor& kv_end,
    double scale, int64_t window_left, int64_t window_right, bool bottom_right,
    int64_t /*max_seqlen_q*/, int64_t /*max_seqlen_k*/) {
  AttentionParams p = check({q, k, v, mask, cu_seqlens_q, cu_seqlens_k, q_lengths, kv_start, kv_end,
                             scale, window_left, window_right, bottom_right});
  const auto stat = q.options().dtype(math_type(q));
  Tensor o = allocate(q.sizes(), q.options());
  const auto stat_sizes = stat_shape(p);
  Tensor lse = allocate(stat_sizes, stat), lse_low = allocate(stat_sizes, stat);
  if (o.numel() == 0) return {o, lse, lse_low};
  if (p.cu_seqlens_q && p.cu_seqlens_q[p.num_seqs] < p.total_q) {
    o.zero_();
    lse.fill_(-std::numeric_limits<double>::infinity());
    lse_low.zero_();
  }
  p.o = o.mutable_data_ptr();
  p.o_strides = strides_of(o);
  p.lse = lse.mutable_data_ptr();
  p.lse_low = lse_low.mutable_data_ptr();
  const CpuKernels& kernels = cpu_kernels(p.dtype, matmul_precision());
  const auto tasks = forward_tasks(p, kernels);
  run_tasks(tasks.size(), kernels.forward_scratch(p),
            [&](int64_t i, void* scratch) { kernels.forward(p, tasks[i], scratch); });
  return {o, lse, lse_low};
}

// The key tiles of a head come in order, which the turns on dq rely on. As many heads as there are
// threads go side by side, longest sequences first: then turns are rarely waited for.
std::vector<BackwardTask> backward_tasks(const AttentionParams& p, const CpuKernels& kernels) {
  struct Head {
    int64_t seq, kv_head, tiles;
  };
  std::vector<Head> heads;
  std::vector<double> cost;
  for (int64_t b = 0; b < p.num_seqs; ++b) {
    const Sequence seq(p, b);
    const int64_t tiles =
        std::max<int64_t>(1, ceil_div(seq.k_end - seq.k_begin, kernels.backward_keys));
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      heads.push_back({b, h, tiles});
      cost.push_back(static_cast<double>(tiles) * seq.q_end);
    }
  }
  heads = by_cost(heads, cost);
  std::vector<BackwardTask> tasks;
  const size_t side_by_side = at::get_num_threads();
  for (size_t first = 0; first < heads.size(); first += side_by_side) {
    const size_t last = std::min(first + side_by_side, heads.size());
    bool more = true;
    for (int64_t tile = 0; more; ++tile) {
      more = false;
      for (size_t h = first; h < last; ++h) {
        if (tile < heads[h].tiles) tasks.push_back({heads[h].seq, heads[h].kv_head, tile});
        more |= tile + 1 < heads[h].tiles;
      }
    }
  }
  return tasks;
}

std::tuple<Tensor, Tensor, Tensor> cpu_backward(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& o, const Tensor& lse,
    const OptionalTensor& lse_low, const Tensor& q, const Tensor& k, const Tensor& v,
    const OptionalTensor& mask, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, const OptionalTensor& q_lengths,
    const OptionalTensor& kv_start, const OptionalTensor& kv_end, double scale, int64_t window_left,
    int64_t window_right, bool bottom_right, int64_t /*max_seqlen_q*/, int64_t /*max_seqlen_k*/) {
  AttentionParams p = check({q, k, v, mask, cu_seqlens_q, cu_seqlens_k, q_lengths, kv_start, kv_end,
                             scale, window_left, window_right, bottom_right});
  const bool packed = p.cu_seqlens_q != nullptr;
  const auto stat = q.options().dtype(math_type(q));
  const auto stat_sizes = stat_shape(p);
  check_layout(dout, "do", q.sizes(), q);
  check_layout(o, "o", q.sizes(), q);
  const Tensor like = at::empty({0}, stat);
  check_layout(lse, "lse", stat_sizes, like);
  const Tensor lse_c = lse.contiguous();
  Tensor lse_low_c;
  p.lse_low = nullptr;
  if (lse_low) {
    check_layout(*lse_low, "lse_low", stat_sizes, like);
    lse_low_c = lse_low->contiguous();
    p.lse_low = const_cast<void*>(lse_low_c.const_data_ptr());
  }
  Tensor dlse_c;
  if (dlse) {
    check_layout(*dlse, "dlse", stat_sizes, like);
    dlse_c = dlse->contiguous();
    p.dlse = dlse_c.const_data_ptr();
  }
  Tensor dq = allocate(q.sizes(), q.options()), dk = allocate(k.sizes(), q.options()),
         dv = allocate(k.sizes(), q.options());
  if (packed && p.cu_seqlens_q[p.num_seqs] < p.total_q) dq.zero_();
  if (packed && p.cu_seqlens_k[p.num_seqs] < p.total_k) dk.zero_(), dv.zero_();
  if (p.num_seqs == 0 || p.heads == 0) return {dq, dk, dv};
  p.dout = dout.const_data_ptr();
  p.do_strides = strides_of(dout);
  p.o = const_cast<void*>(o.const_data_ptr());
  p.o_strides = strides_of(o);
  p.lse = const_cast<void*>(lse_c.const_data_ptr());
  p.dq = dq.mutable_data_ptr();
  p.dk = dk.mutable_data_ptr();
  p.dv = dv.mutable_data_ptr();
  p.dq_strides = strides_of(dq);
  p.dk_strides = strides_of(dk);
  p.dv_strides = strides_of(dv);

  const CpuKernels& kernels = cpu_kernels(p.dtype, matmul_precision());
  BackwardShared shared{};
  const Tensor lse2 = at::empty(stat_sizes, stat), lse2_low = at::empty(stat_sizes, stat),
               delta = at::empty(stat_sizes, stat);
  shared.lse2 = lse2.mutable_data_ptr();
  shared.lse2_low = lse2_low.mutable_data_ptr();
  shared.delta = delta.mutable_data_ptr();
  // dq itself accumulates when its rows are whole vectors of the arithmetic's type
  const int64_t width = round_up(p.head_dim, kernels.vector);
  Tensor dq_acc = dq;
  if (width != p.head_dim || q.scalar_type() != math_type(q)) {
    auto sizes = q.sizes().vec();
    sizes.back() = width;
    dq_acc = at::empty(sizes, stat);
  }
  shared.dq_acc = dq_acc.mutable_data_ptr();
  shared.dq_acc_strides = strides_of(dq_acc);

  std::vector<int64_t> block_offsets(p.num_seqs);
  std::vector<std::pair<int64_t, int64_t>> rows;  // (sequence, block)
  for (int64_t b = 0; b < p.num_seqs; ++b) {
    block_offsets[b] = static_cast<int64_t>(rows.size()) * p.heads;
    const int64_t blocks = ceil_div(Sequence(p, b).rows_q, kernels.backward_rows) + 1;
    for (int64_t i = 0; i < blocks; ++i) rows.push_back({b, i});
  }
  const int64_t blocks = static_cast<int64_t>(rows.size());
  std::vector<std::atomic<int32_t>> turns(blocks * p.heads);
  shared.turns = turns.data();
  shared.block_offsets = block_offsets.data();
  at::parallel_for(0, blocks * p.heads, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels.backward_prepare(p, shared, rows[i % blocks].first, i / blocks,
                               rows[i % blocks].second);
  });
  const auto tasks = backward_tasks(p, kernels);
  run_tasks(tasks.size(), kernels.backward_scratch(p),
            [&](int64_t i, void* scratch) { kernels.backward(p, shared, tasks[i], scratch); });
  return {dq, dk, dv};
}

}  // namespace

}  // namespace clinattn

TORCH_LIBRARY_IMPL(clinattn, CPU, m) {
  m.impl("cpu_forward", clinattn::cpu_forward);
  m.impl("cpu_backward", clinattn::cpu_backward);
}
