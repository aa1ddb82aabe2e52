// SPDX-License-Identifier: Apache-2.0
// The passes for dispatch key CPU: argument checks and memory (see sola_vision/ops/passes.py for their definitions).
#pragma once
#include "passes.h"
#include "tensor.h"

namespace sola {

inline const char* const pass_schemas[] = {
    "norm_shift(Tensor x, Tensor weight, Tensor bias, float eps, Tensor mixes, int top, int bottom) -> Tensor",
    "norm_shift_backward(Tensor x, Tensor weight, Tensor bias, float eps, Tensor mixes, Tensor grad)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
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

// must be called before the kernels multiply bfloat16
void prepare_bfloat16();

// the passes of the active instruction set
const Passes& current_passes();
const std::array<NamedKernel, 9>& named_passes();

inline double to_double(Value value) {
  double result = 0.0;
  memcpy(&result, &value, sizeof result);
  return result;
}

// Return the data of a tensor, made contiguous and converted to this dtype if necessary.
inline const void* contiguous_data(Tensor& tensor, const char* name, Type type) {
  if (tensor.type(name) != type || !tensor.contiguous()) tensor = tensor.copy(type);
  return tensor.read();
}

inline int64_t count(const std::vector<int64_t>& sizes) {
  int64_t count = 1;
  for (int64_t size : sizes) count *= size;
  return count;
}

inline int64_t bytes(int64_t count, Type type) { return count * (type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2); }

// ---- layer norm, quad shift, interpolations

struct ShiftCall {
  Tensor x, weight, bias, mixes;
  Type type;
  std::vector<int64_t> sizes;
  std::vector<double> weight_values, bias_values, mix_values;
  Shift shift;

  explicit ShiftCall(const Value* stack) : x(stack[0]), weight(stack[1]), bias(stack[2]), mixes(stack[4]) {
    shift.eps = to_double(stack[3]);
  }

  void prepare(int64_t top, int64_t bottom) {
    sizes = x.sizes();
    if (sizes.size() != 4) {
      throw std::invalid_argument("sola::norm_shift: x is " + format_sizes(sizes) +
                                  ", expected [batch, height, width, channels]");
    }
    if (top < 0 || bottom < 0 || top + bottom > sizes[1]) {
      throw std::invalid_argument("sola::norm_shift: top " + std::to_string(top) + " and bottom " +
                                  std::to_string(bottom) + " do not fit a height of " + std::to_string(sizes[1]));
    }
    const std::vector<int64_t> mix_sizes = mixes.sizes();
    check_size(weight, "sola::norm_shift: weight", {sizes[3]}, "[channels]");
    check_size(bias, "sola::norm_shift: bias", {sizes[3]}, "[channels]");
    check_size(mixes, "sola::norm_shift: mixes", {mix_sizes.empty() ? 1 : mix_sizes[0], sizes[3]}, "[mixes, channels]");
    weight_values = parameter(weight, "sola::norm_shift: weight");
    bias_values = parameter(bias, "sola::norm_shift: bias");
    mix_values = parameter(mixes, "sola::norm_shift: mixes");
    type = x.type("sola::norm_shift: x");
    shift.images = sizes[0], shift.height = sizes[1], shift.width = sizes[2], shift.channels = sizes[3];
    shift.mixes = mix_sizes[0], shift.top = top, shift.bottom = bottom;
    shift.weight = weight_values.data(), shift.bias = bias_values.data(), shift.mix = mix_values.data();
    shift.x = contiguous_data(x, "sola::norm_shift: x", type);
  }

  bool is_empty() const { return count(sizes) * shift.mixes == 0; }
  std::vector<int64_t> out_sizes() const {
    return {shift.mixes, sizes[0], sizes[1] - shift.top - shift.bottom, sizes[2], sizes[3]};
  }
};

// memory for the gradients of a call; its problem points to it
struct ShiftGradients {
  ShiftCall& call;
  Tensor grad_x;
  std::vector<double> partial;

  explicit ShiftGradients(ShiftCall& c) : call(c), grad_x(Tensor::empty(c.sizes, c.type)) {
    Shift& s = call.shift;
    s.grad_x = grad_x.write();
    if (call.is_empty()) {  // without mixes the gradient of x is zero
      std::fill_n(static_cast<char*>(s.grad_x), bytes(count(call.sizes), call.type), 0);
      return;
    }
    partial.resize(static_cast<size_t>(bands(s) * (2 + s.mixes) * s.channels));
    s.partial = partial.data();
  }

  // the sum of row `row` of the bands' [rows, channels] over the bands, in order; zero if the call is empty
  void sum_bands(int64_t row, double* out) const {
    const Shift& s = call.shift;
    std::fill_n(out, s.channels, 0.0);
    for (int64_t band = 0; band < bands(s) && !partial.empty(); ++band) {
      const double* from = partial.data() + (band * (2 + s.mixes) + row) * s.channels;
      for (int64_t c = 0; c < s.channels; ++c) out[c] += from[c];
    }
  }

  // Return the gradients of x, weight, bias and mixes on the stack, in the dtypes of these arguments.
  void release(Value* stack) {
    const Shift& s = call.shift;
    Tensor grads[3] = {Tensor::empty({s.channels}, Type::float64), Tensor::empty({s.channels}, Type::float64),
                       Tensor::empty({s.mixes, s.channels}, Type::float64)};
    for (int64_t row = 0; row < 2 + s.mixes; ++row) {
      sum_bands(row, static_cast<double*>(grads[row < 2 ? row : 2].write()) + (row < 2 ? 0 : (row - 2) * s.channels));
    }
    const Type types[3] = {call.weight.type("sola::norm_shift: weight"), call.bias.type("sola::norm_shift: bias"),
                           call.mixes.type("sola::norm_shift: mixes")};
    stack[0] = grad_x.release();
    for (size_t i = 0; i < 3; ++i) stack[1 + i] = grads[i].copy(types[i]).release();
  }
};

}  // namespace sola
