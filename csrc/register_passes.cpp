// SPDX-License-Identifier: Apache-2.0
#include "register_passes.h"

namespace sola {
namespace {

void norm_shift(Value* stack, uint64_t, uint64_t) {
  ShiftCall call(stack);
  call.prepare(static_cast<int64_t>(stack[5]), static_cast<int64_t>(stack[6]));
  Tensor out = Tensor::empty(call.out_sizes(), call.type);
  call.shift.out = out.write();
  if (!call.is_empty()) current_passes().shift(call.shift, call.type, parallel_for);
  stack[0] = out.release();
}

void norm_shift_backward(Value* stack, uint64_t, uint64_t) {
  ShiftCall call(stack);
  Tensor grad(stack[5]);
  call.prepare(0, 0);
  check_size(grad, "sola::norm_shift_backward: grad", call.out_sizes(), "the size of the output");
  call.shift.grad = contiguous_data(grad, "sola::norm_shift_backward: grad", call.type);
  ShiftGradients results(call);
  if (!call.is_empty()) current_passes().shift_backward(call.shift, call.type, parallel_for);
  results.release(stack);
}

void layer_norm(Value* stack, uint64_t, uint64_t) {
  Tensor x(stack[0]), weight(stack[1]), bias(stack[2]);
  const std::vector<int64_t> sizes = x.sizes();
  if (sizes.empty()) throw std::invalid_argument("sola::layer_norm: x is a number, expected [..., channels]");
  const int64_t channels = sizes.back(), numbers = count(sizes);
  check_size(x, "sola::layer_norm: x", sizes, "[..., channels]");
  check_size(weight, "sola::layer_norm: weight", {channels}, "[channels]");
  check_size(bias, "sola::layer_norm: bias", {channels}, "[channels]");
  const std::vector<double> weights = parameter(weight, "sola::layer_norm: weight");
  const std::vector<double> biases = parameter(bias, "sola::layer_norm: bias");
  const Type type = x.type("sola::layer_norm: x");
  Tensor out = Tensor::empty(sizes, type);
  Shift norm;
  norm.images = norm.height = 1, norm.channels = channels, norm.eps = to_double(stack[3]);
  norm.weight = weights.data(), norm.bias = biases.data();
  norm.x = contiguous_data(x, "sola::layer_norm: x", type), norm.out = out.write();
  if (numbers > 0) {
    norm.width = numbers / channels;
    current_passes().norm(norm, type, parallel_for);
  }
  stack[0] = out.release();
}

// ---- element-wise passes over contiguous arrays

// The arguments of a call: tensors with the size and dtype of the first one.
struct ElementwiseCall {
  std::vector<Tensor> tensors;
  std::vector<int64_t> sizes;
  Type type;
  Pointwise pass;

  ElementwiseCall(const Value* stack, std::initializer_list<const char*> names) {
    for (size_t i = 0; i < names.size(); ++i) tensors.emplace_back(stack[i]);
    sizes = tensors[0].sizes();
    type = tensors[0].type(*names.begin());
    size_t i = 0;
    for (const char* name : names) {
      check_size(tensors[i], name, sizes, "the size of the first tensor");
      if (tensors[i].type(name) != type) {
        throw std::invalid_argument(std::string(name) + " must have the dtype of the first tensor; convert it");
      }
      ++i;
    }
    pass.count = count(sizes);
  }
  const void* operator[](size_t i) { return contiguous_data(tensors[i], "sola: pass", type); }
  // Copies an input that overlaps `out` at other elements, because writing would overwrite unread elements.
  const void* without_overlap(void* out, size_t i) {
    const uintptr_t data = reinterpret_cast<uintptr_t>((*this)[i]), to = reinterpret_cast<uintptr_t>(out);
    const uintptr_t size = static_cast<uintptr_t>(bytes(pass.count, type));
    if (data != to && data < to + size && to < data + size) tensors[i] = tensors[i].copy(type);
    return tensors[i].read();
  }
  Tensor result(void*& data) const {
    Tensor result = Tensor::empty(sizes, type);
    data = result.write();
    return result;
  }
};

void gate(Value* stack, uint64_t, uint64_t) {
  ElementwiseCall call(stack, {"sola::gate: receptance", "sola::gate: value"});
  Tensor out = call.result(call.pass.out);
  call.pass.receptance = call[0], call.pass.value = call[1];
  current_passes().gate(call.pass, call.type, parallel_for);
  stack[0] = out.release();
}

void gate_backward(Value* stack, uint64_t, uint64_t) {
  ElementwiseCall call(stack,
                       {"sola::gate_backward: receptance", "sola::gate_backward: value", "sola::gate_backward: grad"});
  Tensor receptance = call.result(call.pass.grad_receptance), value = call.result(call.pass.grad_value);
  call.pass.receptance = call[0], call.pass.value = call[1], call.pass.grad = call[2];
  current_passes().gate_backward(call.pass, call.type, parallel_for);
  stack[0] = receptance.release(), stack[1] = value.release();
}

void gated_sum(Value* stack, uint64_t, uint64_t) {
  ElementwiseCall call(stack, {"sola::gated_sum: residual", "sola::gated_sum: receptance", "sola::gated_sum: value"});
  Tensor out = call.result(call.pass.out);
  call.pass.residual = call[0], call.pass.receptance = call[1], call.pass.value = call[2];
  current_passes().gate(call.pass, call.type, parallel_for);
  stack[0] = out.release();
}

void gated_sum_(Value* stack, uint64_t, uint64_t) {
  ElementwiseCall call(stack, {"sola::gated_sum_: residual", "sola::gated_sum_: receptance", "sola::gated_sum_: value",
                    "sola::gated_sum_: out"});
  if (!call.tensors[3].contiguous()) throw std::invalid_argument("sola::gated_sum_: out must be contiguous");
  void* out = call.pass.out = call.tensors[3].write();
  call.pass.residual = call.without_overlap(out, 0), call.pass.receptance = call.without_overlap(out, 1);
  call.pass.value = call.without_overlap(out, 2);
  current_passes().gate(call.pass, call.type, parallel_for);
}

void squared_relu(Value* stack, uint64_t, uint64_t) {
  ElementwiseCall call(stack, {"sola::squared_relu: x"});
  Tensor out = call.result(call.pass.out);
  call.pass.value = call[0];
  current_passes().squared_relu(call.pass, call.type, parallel_for);
  stack[0] = out.release();
}

void squared_relu_backward(Value* stack, uint64_t, uint64_t) {
  ElementwiseCall call(stack, {"sola::squared_relu_backward: x", "sola::squared_relu_backward: grad"});
  Tensor out = call.result(call.pass.grad_value);
  call.pass.value = call[0], call.pass.grad = call[1];
  current_passes().squared_relu_backward(call.pass, call.type, parallel_for);
  stack[0] = out.release();
}

}  // namespace

const std::array<NamedKernel, 9>& named_passes() {
  static const std::array<NamedKernel, 9> all{{{"norm_shift", norm_shift},
                                             {"norm_shift_backward", norm_shift_backward},
                                             {"layer_norm", layer_norm},
                                             {"gate", gate},
                                             {"gate_backward", gate_backward},
                                             {"gated_sum", gated_sum},
                                             {"gated_sum_", gated_sum_},
                                             {"squared_relu", squared_relu},
                                             {"squared_relu_backward", squared_relu_backward}}};
  return all;
}

}  // namespace sola
