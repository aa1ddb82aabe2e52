// SPDX-License-Identifier: Apache-2.0
// The passes for the dispatch key CPU: checks and memory (see sola_vision/ops/passes.py for their definitions).
#pragma once
#include "passes.h"
#include "tensor.h"

namespace sola {

inline const char* const pass_schemas[] = {
    "norm_shift(Tensor x, Tensor weight, Tensor bias, float eps, Tensor mixes, int top, int bottom) -> Tensor",
    "norm_shift_backward(Tensor x, Tensor weight, Tensor bias, float eps, Tensor mixes, Tensor grad)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "gate(Tensor receptance, Tensor value) -> Tensor",
    "gate_backward(Tensor receptance, Tensor value, Tensor grad) -> (Tensor, Tensor)",
    "gated_sum(Tensor residual, Tensor receptance, Tensor value) -> Tensor",
    "gated_sum_(Tensor residual, Tensor receptance, Tensor value, Tensor(a!) out) -> ()",
    "squared_relu(Tensor x) -> Tensor",
    "squared_relu_backward(Tensor x, Tensor grad) -> Tensor"};

struct NamedKernel {
  const char* name;
  torch::Boxed function;
};

// the passes of the instruction set in use
const Passes& current_passes();
const std::array<NamedKernel, 8>& named_passes();

}  // namespace sola
