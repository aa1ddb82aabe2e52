// SPDX-License-Identifier: Apache-2.0
#include "register_passes.h"

namespace sola {
namespace {

void norm_shift(Value* stack, uint64_t, uint64_t) {
  ShiftCall call(stack);
  call.prepare(static_cast<int64_t>(stack[5]), static_cast<int64_t>(stack[6]));
  Tensor out = Tensor::empty(call.out_sizes(), call.type);
  call.shift.out = out.write();
  if (!call.nothing()) current_passes().shift(call.shift, call.type, parallel_for);
  stack[0] = out.release();
}

void norm_shift_backward(Value* stack, uint64_t, uint64_t) {
  ShiftCall call(stack);
  Tensor grad(stack[5]);
  call.prepare(0, 0);
  expect(grad, "sola::norm_shift_backward: grad", call.out_sizes(), "the output's size");
  call.shift.grad = flat(grad, "sola::norm_shift_backward: grad", call.type);
  ShiftGradients results(call);
  if (!call.nothing()) current_passes().shift_backward(call.shift, call.type, parallel_for);
  results.release(stack);
}

// ---- flat passes

// tensors of one size and type, which those of the first
struct Flat {
  std::vector<Tensor> tensors;
  std::vector<int64_t> sizes;
  Type type;
  Pointwise pass;

  Flat(const Value* stack, std::initializer_list<const char*> names) {
    for (size_t i = 0; i < names.size(); ++i) tensors.emplace_back(stack[i]);
    sizes = tensors[0].sizes();
    type = tensors[0].type(*names.begin());
    size_t i = 0;
    for (const char* name : names) {
      expect(tensors[i], name, sizes, "the first one's size");
      if (tensors[i].type(name) != type) {
        throw std::invalid_argument(std::string(name) + " has another dtype than the first tensor; convert it");
      }
      ++i;
    }
    pass.count = count(sizes);
  }
  const void* operator[](size_t i) { return flat(tensors[i], "sola: pass", type); }
  // not to be overwritten by what is written to `out` for another element
  const void* beside(void* out, size_t i) {
    const uintptr_t data = reinterpret_cast<uintptr_t>((*this)[i]), to = reinterpret_cast<uintptr_t>(out);
    const uintptr_t size = static_cast<uintptr_t>(bytes(pass.count, type));
    if (data != to && data < to + size && to < data + size) tensors[i] = tensors[i].copy(type);
    return tensors[i].read();
  }
  Tensor result(void*& data) const {
    Tensor made = Tensor::empty(sizes, type);
    data = made.write();
    return made;
  }
};

void gate(Value* stack, uint64_t, uint64_t) {
  Flat call(stack, {"sola::gate: receptance", "sola::gate: value"});
  Tensor out = call.result(call.pass.out);
  call.pass.receptance = call[0], call.pass.value = call[1];
  current_passes().gate(call.pass, call.type, parallel_for);
  stack[0] = out.release();
}

void gate_backward(Value* stack, uint64_t, uint64_t) {
  Flat call(stack, {"sola::gate_backward: receptance", "sola::gate_backward: value", "sola::gate_backward: grad"});
  Tensor receptance = call.result(call.pass.grad_receptance), value = call.result(call.pass.grad_value);
  call.pass.receptance = call[0], call.pass.value = call[1], call.pass.grad = call[2];
  current_passes().gate_backward(call.pass, call.type, parallel_for);
  stack[0] = receptance.release(), stack[1] = value.release();
}

void gated_sum(Value* stack, uint64_t, uint64_t) {
  Flat call(stack, {"sola::gated_sum: residual", "sola::gated_sum: receptance", "sola::gated_sum: value"});
  Tensor out = call.result(call.pass.out);
  call.pass.residual = call[0], call.pass.receptance = call[1], call.pass.value = call[2];
  current_passes().gate(call.pass, call.type, parallel_for);
  stack[0] = out.release();
}

void gated_sum_(Value* stack, uint64_t, uint64_t) {
  Flat call(stack, {"sola::gated_sum_: residual", "sola::gated_sum_: receptance", "sola::gated_sum_: value",
                    "sola::gated_sum_: out"});
  if (!call.tensors[3].contiguous()) throw std::invalid_argument("sola::gated_sum_: out must be contiguous");
  void* out = call.pass.out = call.tensors[3].write();
  call.pass.residual = call.beside(out, 0), call.pass.receptance = call.beside(out, 1);
  call.pass.value = call.beside(out, 2);
  current_passes().gate(call.pass, call.type, parallel_for);
}

void squared_relu(Value* stack, uint64_t, uint64_t) {
  Flat call(stack, {"sola::squared_relu: x"});
  Tensor out = call.result(call.pass.out);
  call.pass.value = call[0];
  current_passes().squared_relu(call.pass, call.type, parallel_for);
  stack[0] = out.release();
}

void squared_relu_backward(Value* stack, uint64_t, uint64_t) {
  Flat call(stack, {"sola::squared_relu_backward: x", "sola::squared_relu_backward: grad"});
  Tensor out = call.result(call.pass.grad_value);
  call.pass.value = call[0], call.pass.grad = call[1];
  current_passes().squared_relu_backward(call.pass, call.type, parallel_for);
  stack[0] = out.release();
}

// ---- depth-wise convolution with gelu

void depthwise_gelu(Value* stack, uint64_t, uint64_t) {
  Tensor x(stack[0]), offset(stack[1]), weight(stack[2]), bias(stack[3]);
  const std::vector<int64_t> sizes = x.sizes();
  const Type type = x.type("sola::depthwise_gelu: x");
  if (sizes.size() != 4) {
    throw std::invalid_argument("sola::depthwise_gelu: x is " + text(sizes) + ", expected [batch, height, width, channels]");
  }
  // there is no kernel in float64: torch's own operators compute that, and do not come here
  if (type == Type::float64) throw std::invalid_argument("sola::depthwise_gelu: float64 has no kernel; use torch's conv2d");
  expect(offset, "sola::depthwise_gelu: offset", {sizes[3]}, "[channels]");
  expect(weight, "sola::depthwise_gelu: weight", {sizes[3], 1, 3, 3}, "[channels, 1, 3, 3]");
  expect(bias, "sola::depthwise_gelu: bias", {sizes[3]}, "[channels]");
  Depthwise p;
  p.images = sizes[0], p.height = sizes[1], p.width = sizes[2], p.channels = sizes[3];
  p.padded = (p.channels + 15) / 16 * 16;
  std::vector<float> numbers(static_cast<size_t>(11 * p.padded));  // a row of channels for each of 11 numbers
  const auto rows = [&](const Tensor& tensor, const char* name, int64_t count, int64_t first) {
    const std::vector<double> found = parameter(tensor, name);
    for (int64_t row = 0; row < count; ++row) {
      float* const to = numbers.data() + (first + row) * p.padded;
      for (int64_t c = 0; c < p.channels; ++c) to[c] = static_cast<float>(found[c * count + row]);
    }
    return numbers.data() + first * p.padded;
  };
  p.weight = rows(weight, "sola::depthwise_gelu: weight", 9, 0);
  p.bias = rows(bias, "sola::depthwise_gelu: bias", 1, 9);
  p.offset = rows(offset, "sola::depthwise_gelu: offset", 1, 10);
  p.x = flat(x, "sola::depthwise_gelu: x", type);
  Tensor out = Tensor::empty(sizes, type);
  p.out = out.write();
  if (count(sizes) > 0) current_passes().depthwise_gelu(p, type, parallel_for);
  stack[0] = out.release();
}

}  // namespace

const std::array<NamedKernel, 9>& named_passes() {
  static const std::array<NamedKernel, 9> all{{{"norm_shift", norm_shift},
                                             {"norm_shift_backward", norm_shift_backward},
                                             {"gate", gate},
                                             {"gate_backward", gate_backward},
                                             {"gated_sum", gated_sum},
                                             {"gated_sum_", gated_sum_},
                                             {"squared_relu", squared_relu},
                                             {"squared_relu_backward", squared_relu_backward},
                                             {"depthwise_gelu", depthwise_gelu}}};
  return all;
}

}  // namespace sola
