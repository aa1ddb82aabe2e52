// SPDX-License-Identifier: Apache-2.0
// Softmax attention (the quadratic layers) as a plain-data problem (see wkv.h). For each head:
//
//   out_i = sum_j exp(s_ij - lse_i) v_j,    s_ij = q_i . k_j / sqrt(head_dim),    lse_i = log sum_j exp(s_ij)
#pragma once
#include <cstdint>

#include "wkv.h"

namespace sola {

struct Attention {
  int64_t batch = 0, tokens = 0, heads = 0, head_dim = 0;
  int64_t threads = 1;
  const void* qkv = nullptr;  // [batch, tokens, 3, heads, head_dim]
  void* out = nullptr;        // [batch, tokens, heads, head_dim]; an input of the backward
  float* lse = nullptr;       // [batch, heads, tokens]; an input of the backward
  // backward only:
  const void* grad = nullptr;  // like out
  void* grad_qkv = nullptr;    // like qkv
};

// float32, bfloat16 and float16, accumulated in float32; the forwards of avx512_bf16 and amx multiply bfloat16
struct AttentionKernels {
  void (*forward)(const Attention&, Type, ParallelFor);
  void (*backward)(const Attention&, Type, ParallelFor);
};

namespace generic {
extern const AttentionKernels attention_kernels;
void attention_backward(const Attention&, Type, ParallelFor);
}  // namespace generic
namespace avx2 {
extern const AttentionKernels attention_kernels;
void attention_backward(const Attention&, Type, ParallelFor);
}  // namespace avx2
namespace avx512 {
extern const AttentionKernels attention_kernels;
void attention_backward(const Attention&, Type, ParallelFor);
}  // namespace avx512
namespace avx512_bf16 {
extern const AttentionKernels attention_kernels;
}  // namespace avx512_bf16
namespace amx {
extern const AttentionKernels attention_kernels;
}  // namespace amx

}  // namespace sola
