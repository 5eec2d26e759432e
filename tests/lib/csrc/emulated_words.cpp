// Kernels that say each word of csrc/cuda/device.cuh, right or wrong (tests/cuda/test_emulator.py).
// The first argument names one; numbers come from stdin and go to stdout as they are in memory.
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "cuda/device.cuh"

using namespace clinattn;

namespace {

template <class T>
std::vector<T> read(size_t count) {
  std::vector<T> x(count);
  x.resize(fread(x.data(), sizeof(T), count, stdin));
  return x;
}
template <class T>
void write(const std::vector<T>& x) {
  fwrite(x.data(), sizeof(T), x.size(), stdout);
}

template <class T>
void round() {
  std::vector<T> rounded;
  for (float x : read<float>(1 << 21)) rounded.push_back(from_float<T>(x));
  write(rounded);
}
template <class T>
void widen() {
  std::vector<float> widened;
  for (T x : read<T>(1 << 16)) widened.push_back(to_float(x));
  write(widened);
}

// Fragments by the tables of the PTX ISA, "Matrix fragments for mma.m16n8k16"
template <class T>
CLINATTN_KERNEL(32, 1)
product(const float* a, const float* b, const float* c, float* d) {
  const int lane = thread_index(), group = lane >> 2, in_group = lane & 3;
  uint32_t x[4], y[2];
  for (int r = 0; r < 4; ++r) {
    const int row = r == 0 || r == 2 ? group : group + 8;
    const int column = in_group * 2 + (r < 2 ? 0 : 8);
    x[r] = pack<T>(a[row * 16 + column], a[row * 16 + column + 1]);
  }
  for (int r = 0; r < 2; ++r) {
    const int row = in_group * 2 + (r < 1 ? 0 : 8);
    y[r] = pack<T>(b[row * 8 + group], b[(row + 1) * 8 + group]);
  }
  float z[4];
  for (int i = 0; i < 4; ++i) {
    z[i] = c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
  }
  multiply<T>(z, x, y[0], y[1]);
  for (int i = 0; i < 4; ++i) {
    d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = z[i];
  }
}
template <class T>
void multiply_matrices() {
  const std::vector<float> a = read<float>(256), b = read<float>(128), c = read<float>(128);
  std::vector<float> d(128);
  launch(product<T>, 1, 32, 0, nullptr, a.data(), b.data(), c.data(), d.data());
  write(d);
}

// Number i of shared memory is i; lane l gives row 5 l mod 32 of 8 numbers.
CLINATTN_KERNEL(32, 1) load(uint32_t* x) {
  const int lane = thread_index();
  uint16_t* shared = reinterpret_cast<uint16_t*>(shared_memory());
  for (int i = lane; i < 256; i += 32) shared[i] = static_cast<uint16_t>(i);
  sync_warp();
  uint32_t plain[4], transposed[4];
  load_matrices(plain, shared + 5 * lane % 32 * 8);
  load_transposed(transposed, shared + 5 * lane % 32 * 8);
  for (int i = 0; i < 4; ++i) {
    x[lane * 4 + i] = plain[i];
    x[128 + lane * 4 + i] = transposed[i];
  }
}
void load_matrices_of_shared_memory() {
  std::vector<uint32_t> x(256);
  launch(load, 1, 32, 512, nullptr, x.data());
  write(x);
}

// A lane gets from the one three further, and from the one that differs in bits 0 and 3.
CLINATTN_KERNEL(64, 1) exchange(int* x) {
  const int thread = thread_index(), lane = thread % 32;
  int* mine = x + (block_index() * 64 + thread) * 2;
  mine[0] = shuffle(thread, lane + 3);
  mine[1] = shuffle_xor(thread, 9);
}
void exchange_in_warps() {
  std::vector<int> x(3 * 128);
  launch(exchange, 3, 64, 0, nullptr, x.data());
  write(x);
}

// Each warp but the last hands its numbers to the next.
template <bool kWaits>
CLINATTN_KERNEL(128, 1)
hand_over(float* out) {
  const int thread = thread_index();
  float* shared = reinterpret_cast<float*>(shared_memory());
  shared[thread] = static_cast<float>(thread);
  if (kWaits) sync_block();
  out[block_index() * 128 + thread] = shared[thread < 32 ? thread : thread - 32];
}
template <bool kWaits>
void hand_over_shared() {
  std::vector<float> out(5 * 128);
  launch(hand_over<kWaits>, 5, 128, 512, nullptr, out.data());
  write(out);
}

// Each lane but the last hands its number to the next.
template <bool kWaits>
CLINATTN_KERNEL(32, 1)
hand_around(float* out) {
  const int lane = thread_index();
  float* shared = reinterpret_cast<float*>(shared_memory());
  shared[lane] = static_cast<float>(lane);
  if (kWaits) sync_warp();
  out[lane] = shared[lane == 0 ? lane : lane - 1];
}
template <bool kWaits>
void hand_around_warp() {
  std::vector<float> out(32);
  launch(hand_around<kWaits>, 1, 32, 128, nullptr, out.data());
  write(out);
}

// Two groups of 16 bytes a lane, the first short of some; read when all but kLeft are there.
template <int kLeft, bool kCommits>
CLINATTN_KERNEL(32, 1)
copy(const float* from, float* to) {
  const int lane = thread_index();
  float* shared = reinterpret_cast<float*>(shared_memory());
  for (int i = lane; i < 256; i += 32) shared[i] = 0;
  sync_warp();
  copy_async(shared + 4 * lane, from + 4 * lane, lane % 5 * 4);
  commit_copies();
  copy_async(shared + 128 + 4 * lane, from + 128 + 4 * lane, 16);
  if (kCommits) commit_copies();
  wait_for_copies<kLeft>();
  sync_warp();
  for (int i = lane; i < 256; i += 32) to[i] = shared[i];
}
template <int kLeft, bool kCommits>
void copy_to_shared() {
  alignas(16) float from[256];
  std::vector<float> to(256);
  for (int i = 0; i < 256; ++i) from[i] = static_cast<float>(i + 1);
  launch(copy<kLeft, kCommits>, 1, 32, 1024, nullptr, static_cast<const float*>(from), to.data());
  write(to);
}

CLINATTN_KERNEL(32, 1) scalars(const float* x, float* y) {
  const int lane = thread_index();
  y[lane] = exp2_fast(x[lane]);
}
void raise_to_powers() {
  const std::vector<float> x = read<float>(32);
  std::vector<float> y(32);
  launch(scalars, 1, 32, 0, nullptr, x.data(), y.data());
  write(y);
}

// Kernels and launches that the emulator refuses

CLINATTN_KERNEL(32, 1) diverge() {
  if (thread_index() < 16) {
    shuffle_xor(1, 1);
  } else {
    sync_warp();
  }
}
CLINATTN_KERNEL(32, 1) leave_warp() {
  if (thread_index() == 7) return;
  sync_warp();
}
CLINATTN_KERNEL(64, 1) leave_block() {
  if (thread_index() >= 32) return;
  sync_block();
}
CLINATTN_KERNEL(32, 1) write_outside(int at) { shared_memory()[at] = 0; }
CLINATTN_KERNEL(32, 1) load_outside(int at) {
  uint32_t x[4];
  load_matrices(x, shared_memory() + at);
}
CLINATTN_KERNEL(32, 1) copy_outside(const char* from, int at) {
  copy_async(shared_memory() + at, from, 16);
}
alignas(16) char bytes[32];

CLINATTN_KERNEL(32, 1) nothing() {}
void launch_too_much() {
  write<int>({launch(nothing, 1, 1024, 0, nullptr), launch(nothing, 1, 32, 228 * 1024, nullptr),
              launch(nothing, 0, 32, 0, nullptr), launch(nothing, 1, 1056, 0, nullptr)});
}

const std::map<std::string, void (*)()> kTests = {
    {"round_half", round<half>},
    {"round_bfloat16", round<bfloat16>},
    {"widen_half", widen<half>},
    {"widen_bfloat16", widen<bfloat16>},
    {"multiply_half", multiply_matrices<half>},
    {"multiply_bfloat16", multiply_matrices<bfloat16>},
    {"load", load_matrices_of_shared_memory},
    {"exchange", exchange_in_warps},
    {"hand_over", hand_over_shared<true>},
    {"hand_over_unsynchronized", hand_over_shared<false>},
    {"hand_around", hand_around_warp<true>},
    {"hand_around_unsynchronized", hand_around_warp<false>},
    {"copy", copy_to_shared<0, true>},
    {"copy_one_left", copy_to_shared<1, true>},
    {"copy_two_left", copy_to_shared<2, true>},
    {"copy_uncommitted", copy_to_shared<0, false>},
    {"exp2", raise_to_powers},
    {"launch", launch_too_much},
    {"diverge", [] { launch(diverge, 1, 32, 0, nullptr); }},
    {"leave_warp", [] { launch(leave_warp, 1, 32, 0, nullptr); }},
    {"leave_block", [] { launch(leave_block, 1, 64, 0, nullptr); }},
    {"write_after", [] { launch(write_outside, 1, 32, 100, nullptr, 100); }},
    {"write_before", [] { launch(write_outside, 1, 32, 100, nullptr, -1); }},
    {"load_outside", [] { launch(load_outside, 1, 32, 128, nullptr, 128); }},
    {"load_unaligned", [] { launch(load_outside, 1, 32, 128, nullptr, 8); }},
    {"copy_outside", [] { launch(copy_outside, 1, 32, 128, nullptr, bytes + 0, 128); }},
    {"copy_unaligned", [] { launch(copy_outside, 1, 32, 128, nullptr, bytes + 8, 0); }},
};

}  // namespace

int main(int, char** arguments) {
  kTests.at(arguments[1])();
  return 0;
}
