// SPDX-License-Identifier: Apache-2.0
// The interface between the kernels and their registration with torch: a problem, a parallel loop, and a table of entry
// points per instruction set. Plain data only, because files compiled for different instruction sets include it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sola {

enum class Type : int32_t { float64, float32, bfloat16, float16 };

// [batch, tokens, channels]; strides in elements, adjacent channels
struct Array {
  void* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0;
};

struct Problem {
  int64_t batch = 0, tokens = 0, channels = 0;
  int64_t threads = 1;
  const double *decay = nullptr, *bonus = nullptr;  // [channels]; the kernel divides decay by the number of tokens
  Array key, value, grad;                           // grad and all fields after output are for the backward only
  Array output, grad_key, grad_value;
  double *grad_decay = nullptr, *grad_bonus = nullptr;  // [batch, channels]: partial sums per image
  float* states = nullptr;  // [batch, chunks, 4, channels]: entering states; written by the forward unless null
};

constexpr int chunk_tokens = 32;

using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t count, int64_t grain, Body body, void* context);

[[noreturn]] void out_of_memory(size_t bytes);  // throws; defined in a file without instruction-set flags

struct Passes;  // passes.h
struct AttentionKernels;  // attention.h
struct Linear;  // linear.h

struct Kernel {
  const char* name;
  int lanes;
  void (*forward)(const Problem&, Type, ParallelFor);
  void (*backward)(const Problem&, Type, ParallelFor);
  const Passes* passes;
  const AttentionKernels* attention;
  const Linear* linear;
};

namespace generic {
extern const Kernel kernel;
}
namespace avx2 {
extern const Kernel kernel;
}
namespace avx512 {
extern const Kernel kernel;
}
namespace avx512_bf16 {
extern const Kernel kernel;
}

}  // namespace sola
