// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "register_passes.h"

namespace sola {

struct AttentionKernels;

inline const char* const attention_schemas[] = {
    "attention(Tensor qkv, int head_dim) -> (Tensor, Tensor)",
    "attention_backward(Tensor qkv, int head_dim, Tensor out, Tensor lse, Tensor grad) -> Tensor"};

// the kernels of the active instruction set
const AttentionKernels& current_attention();
const std::array<NamedKernel, 2>& named_attention();

}  // namespace sola
