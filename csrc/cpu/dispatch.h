// The instruction set in force: the best that is compiled in and that this machine runs, unless
// CLINATTN_CPU_ISA or set_instruction_set names another.
#pragma once

#include <string>
#include <vector>

#include "isa.h"

namespace clinattn {

std::vector<std::string> instruction_sets();        // usable here, best last
const char* instruction_set();                      // in force
void set_instruction_set(const std::string& name);  // "" is automatic; throws std::invalid_argument

// The precision that torch.set_float32_matmul_precision allows in fp32
enum class Precision { kHighest, kHigh, kMedium };

const CpuKernels& cpu_kernels(DType dtype, Precision precision = Precision::kHighest);

// FLOP/s of the register loop that serves a dtype ("float32", ...) on all of torch's threads, the
// best of a few rounds; throws std::invalid_argument
double peak_flops(const std::string& dtype);

}  // namespace clinattn
