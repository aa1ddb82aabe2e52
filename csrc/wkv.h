// SPDX-License-Identifier: Apache-2.0
// What the kernels and the registration with torch share: one problem, one parallel loop, one table of entry points for
// each instruction set. Plain data only, so that files compiled for different machines can include it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sola {

enum class Type : int32_t { float64, float32, bfloat16, float16 };

// [batch, tokens, channels]; strides in elements, channels are adjacent
struct Array {
  void* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0;
};

struct Problem {
  int64_t batch = 0, tokens = 0, channels = 0;
  int64_t threads = 1;
  const double *decay = nullptr, *bonus = nullptr;  // [channels]; decay is divided by tokens here, not before
  Array key, value, grad;                           // grad, like all that follows the output, in the backward only
  Array output, grad_key, grad_value;
  double *grad_decay = nullptr, *grad_bonus = nullptr;  // [batch, channels]: one partial sum an image
  float* states = nullptr;  // [batch, chunks, 4, channels]: what enters each chunk; the forward writes it, if there
};

constexpr int chunk_tokens = 32;

using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t count, int64_t grain, Body body, void* context);

[[noreturn]] void out_of_memory(size_t bytes);  // throws, where nothing is compiled for one processor alone

struct Passes;  // passes.h
struct Attend;  // attention.h
struct Linear;  // linear.h

struct Kernel {
  const char* name;
  int lanes;
  void (*forward)(const Problem&, Type, ParallelFor);
  void (*backward)(const Problem&, Type, ParallelFor);
  const Passes* passes;
  const Attend* attend;
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

}  // namespace sola
