// The tasks and kernels that an instruction-set unit offers to the torch side.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "../attention.h"
#include "../linear.h"
#include "../rotary.h"

namespace clinattn {

// Query rows [row0, row1) of every query head that shares one kv head of one sequence.
struct ForwardTask {
  int64_t seq, kv_head, row0, row1;
};

// One tile of keys (counted from the first valid key) of one kv head, or with tile < 0 the block
// of query rows that backward_prepare works on.
struct BackwardTask {
  int64_t seq, kv_head, tile;
};

// The memory in which backward tasks sum gradients of what was added to scores; each head of a
// sequence has sums of its own. The index of sums that are not asked for is -1.
struct AddedSums {
  bool wanted = false;
  double* heads = nullptr;          // from starts[sequence] on (heads, the sequence's length)
  const int64_t* starts = nullptr;  // (num_seqs + 1)
  int64_t length = 0;               // the largest
  int64_t slope = -1, decay = -1;
  int64_t rows = -1, row_stride = 0;  // of ds: one sum, or max_q of them where row_stride is 1
  // The last sums: for each entry of a table of relative biases that pairs of the sequence have
  int64_t relative = -1;
  double* columns = nullptr;  // sums of ds over queries, (num_seqs, heads, max_k), or null
  std::atomic<int32_t>* turns = nullptr;  // (num_seqs, heads): key tiles summed so far
  // The gradient of a mask that varies with query and key, in the type of the arithmetic, or null.
  // Heads that share it take turns; sequences that do are not worked on side by side.
  void* mask = nullptr;
  Strides mask_strides;
};

// The data that the backward tasks of one call share. Rows are laid out as lse is, dq_acc as dq is.
struct BackwardShared {
  // The normaliser in base 2, of a large row (normaliser.h) the natural one; +inf where a query
  // sees nothing
  void* lse2;
  void* lse2_low;  // what rounding took from it, in base 2
  void* delta;     // rowsum(do * o) - dlse
  void* dq_acc;    // accumulates dq over key tiles in the type of the arithmetic; may be dq itself
  Strides dq_acc_strides;
  // (sequence, head, query block): key tiles folded into dq so far. Tiles take turns in key order.
  std::atomic<int32_t>* turns;
  const int64_t* block_offsets;  // (num_seqs): first turn of a sequence
  // (num_seqs, kv_heads, 2): the bits of the largest magnitudes of q and of do, of what sees a key
  std::atomic<uint32_t>* largest;
  AddedSums added;
};

struct CpuKernels {
  const char* name;
  int64_t forward_rows;                              // queries of a forward tile
  int64_t backward_rows;                             // queries of a backward block
  int64_t backward_keys;                             // keys of a backward tile
  int64_t vector;                                    // dq_acc rows are padded to a multiple of this
  int64_t (*forward_chunk)(const AttentionParams&);  // query rows of a forward task
  size_t (*forward_scratch)(const AttentionParams&);  // bytes, 64-byte aligned
  // Runs `count` tasks, one after another.
  void (*forward)(const AttentionParams&, const ForwardTask*, int64_t count, void* scratch);
  size_t (*backward_scratch)(const AttentionParams&, const BackwardShared&);
  void (*backward_prepare)(const AttentionParams&, const BackwardShared&, int64_t seq, int64_t head,
                           int64_t block);
  void (*backward)(const AttentionParams&, const BackwardShared&, const BackwardTask*,
                   int64_t count, void* scratch);
  int64_t summary_keys;                              // keys of a task of sums over queries
  int64_t summary_rows;                              // queries of a tile of numbers by query
  int64_t (*summary_chunk)(const AttentionParams&);  // those of a task
  size_t (*summary_scratch)(const AttentionParams&, const SummaryParams&);
  void (*sum_by_key)(const AttentionParams&, const SummaryParams&, const BackwardTask*,
                     int64_t count, void* scratch);
  void (*reduce_by_query)(const AttentionParams&, const SummaryParams&, const ForwardTask*,
                          int64_t count, void* scratch);
  int64_t (*peak_loop)(int64_t steps);  // multiplies and adds in registers; returns the FLOP done
  // tokens [begin, end), at most kRotaryTokens, of a sequence
  void (*rotary)(const RotaryParams&, int64_t seq, int64_t begin, int64_t end, void* scratch);
  const LinearKernels* linear = nullptr;
};

void yield_thread();  // from the torch side: no std:: inline code in these units

const CpuKernels& scalar_kernels();
const CpuKernels& scalar_f64_kernels();
#ifdef CLINATTN_HAVE_AVX2
const CpuKernels& avx2_kernels();
#endif
#ifdef CLINATTN_HAVE_AVX512
const CpuKernels& avx512_kernels();
#endif
#ifdef CLINATTN_HAVE_AVX512_BF16
const CpuKernels& avx512_bf16_kernels();  // of bf16
#endif
#ifdef CLINATTN_HAVE_AMX
// Numbers as so many bf16: one serves bf16, two fp16, three fp32.
const CpuKernels& amx_one_part();
const CpuKernels& amx_two_parts();
const CpuKernels& amx_three_parts();
#endif

}  // namespace clinattn
