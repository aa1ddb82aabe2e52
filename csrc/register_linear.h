// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "linear.h"
#include "register_passes.h"

namespace sola {

inline const char* const linear_schemas[] = {
    "norm_shift_linear(Tensor x, Tensor weight, Tensor bias, float eps, Tensor mixes, Tensor[] projections) -> Tensor[]",
    "gate_linear(Tensor receptance, Tensor value, Tensor projection) -> Tensor",
    "squared_relu_linear(Tensor x, Tensor projection) -> Tensor",
    "spatial_mix(Tensor x, Tensor weight, Tensor bias, float eps, Tensor mixes, Tensor receptance, Tensor output,"
    " Tensor readout) -> Tensor",
    "channel_mix(Tensor x, Tensor weight, Tensor bias, float eps, Tensor mixes, Tensor key, Tensor receptance,"
    " Tensor value) -> Tensor",
    "norm_shift_linear_backward(Tensor x, Tensor weight, Tensor bias, float eps, Tensor mixes, Tensor[] projections,"
    " Tensor[] grads) -> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
    "gate_linear_backward(Tensor receptance, Tensor value, Tensor projection, Tensor grad) -> (Tensor, Tensor, Tensor)",
    "squared_relu_linear_backward(Tensor x, Tensor projection, Tensor grad) -> (Tensor, Tensor)"};

// the products of the active instruction set
const Linear& current_linear();
const std::array<NamedKernel, 8>& named_linear();

}  // namespace sola
