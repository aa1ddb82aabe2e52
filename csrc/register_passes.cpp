// SPDX-License-Identifier: Apache-2.0
#include "register_passes.h"

namespace sola {
namespace {

double number(Value value) {
  double number = 0.0;
  memcpy(&number, &value, sizeof number);
  return number;
}

// readable by the kernels: contiguous, of this type
const void* flat(Tensor& tensor, const char* name, Type type) {
  if (tensor.type(name) != type || !tensor.contiguous()) tensor = tensor.copy(type);
  return tensor.read();
}

int64_t count(const std::vector<int64_t>& sizes) {
  int64_t count = 1;
  for (int64_t size : sizes) count *= size;
  return count;
}

int64_t bytes(int64_t count, Type type) { return count * (type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2); }

// ---- layer norm, quad shift, interpolations

struct ShiftCall {
  Tensor x, weight, bias, mixes;
  Type type;
  std::vector<int64_t> sizes;
  std::vector<double> of_weight, of_bias, of_mixes;
  Shift shift;

  explicit ShiftCall(const Value* stack) : x(stack[0]), weight(stack[1]), bias(stack[2]), mixes(stack[4]) {
    shift.eps = number(stack[3]);
  }

  void prepare(int64_t top, int64_t bottom) {
    sizes = x.sizes();
    if (sizes.size() != 4) {
      throw std::invalid_argument("sola::norm_shift: x is " + text(sizes) + ", expected [batch, height, width, channels]");
    }
    if (top < 0 || bottom < 0 || top + bottom > sizes[1]) {
      throw std::invalid_argument("sola::norm_shift: top " + std::to_string(top) + " and bottom " +
                                  std::to_string(bottom) + " do not fit a height of " + std::to_string(sizes[1]));
    }
    const std::vector<int64_t> found = mixes.sizes();
    expect(weight, "sola::norm_shift: weight", {sizes[3]}, "[channels]");
    expect(bias, "sola::norm_shift: bias", {sizes[3]}, "[channels]");
    expect(mixes, "sola::norm_shift: mixes", {found.empty() ? 1 : found[0], sizes[3]}, "[mixes, channels]");
    of_weight = parameter(weight, "sola::norm_shift: weight");
    of_bias = parameter(bias, "sola::norm_shift: bias");
    of_mixes = parameter(mixes, "sola::norm_shift: mixes");
    type = x.type("sola::norm_shift: x");
    shift.images = sizes[0], shift.height = sizes[1], shift.width = sizes[2], shift.channels = sizes[3];
    shift.mixes = found[0], shift.top = top, shift.bottom = bottom;
    shift.weight = of_weight.data(), shift.bias = of_bias.data(), shift.mix = of_mixes.data();
    shift.x = flat(x, "sola::norm_shift: x", type);
  }

  bool nothing() const { return count(sizes) * shift.mixes == 0; }
  std::vector<int64_t> out_sizes() const {
    return {shift.mixes, sizes[0], sizes[1] - shift.top - shift.bottom, sizes[2], sizes[3]};
  }
};

void norm_shift(Value* stack, uint64_t, uint64_t) {
  ShiftCall call(stack);
  call.prepare(static_cast<int64_t>(stack[5]), static_cast<int64_t>(stack[6]));
  Tensor out = Tensor::empty(call.out_sizes(), call.type);
  call.shift.out = out.write();
  if (!call.nothing()) current_passes().shift(call.shift, call.type, parallel_for);
  stack[0] = out.release();
}

// row `row` of the bands' [rows, channels], summed over the bands in their order
void total(const std::vector<double>& partial, const Shift& s, int64_t row, double* out) {
  std::fill_n(out, s.channels, 0.0);
  for (int64_t band = 0; band < bands(s); ++band) {
    const double* from = partial.data() + (band * (2 + s.mixes) + row) * s.channels;
    for (int64_t c = 0; c < s.channels; ++c) out[c] += from[c];
  }
}

void norm_shift_backward(Value* stack, uint64_t, uint64_t) {
  ShiftCall call(stack);
  Tensor grad(stack[5]);
  call.prepare(0, 0);
  expect(grad, "sola::norm_shift_backward: grad", call.out_sizes(), "the output's size");
  Shift& s = call.shift;
  s.grad = flat(grad, "sola::norm_shift_backward: grad", call.type);
  Tensor grad_x = Tensor::empty(call.sizes, call.type);
  s.grad_x = grad_x.write();
  std::vector<double> partial(static_cast<size_t>(bands(s) * (2 + s.mixes) * s.channels));
  s.partial = partial.data();
  const bool empty = call.nothing();
  if (empty) {  // without mixes x has no gradient, but it may have elements
    std::fill_n(static_cast<char*>(s.grad_x), bytes(count(call.sizes), call.type), 0);
  } else {
    current_passes().shift_backward(s, call.type, parallel_for);
  }
  Tensor grads[3] = {Tensor::empty({s.channels}, Type::float64), Tensor::empty({s.channels}, Type::float64),
                     Tensor::empty({s.mixes, s.channels}, Type::float64)};
  for (int64_t row = 0; row < 2 + s.mixes; ++row) {
    double* out = static_cast<double*>(grads[row < 2 ? row : 2].write()) + (row < 2 ? 0 : (row - 2) * s.channels);
    if (empty) {
      std::fill_n(out, s.channels, 0.0);
    } else {
      total(partial, s, row, out);
    }
  }
  const Type types[3] = {call.weight.type("sola::norm_shift: weight"), call.bias.type("sola::norm_shift: bias"),
                         call.mixes.type("sola::norm_shift: mixes")};
  stack[0] = grad_x.release();
  for (size_t i = 0; i < 3; ++i) stack[1 + i] = grads[i].copy(types[i]).release();
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

}  // namespace

const std::array<NamedKernel, 8>& named_passes() {
  static const std::array<NamedKernel, 8> all{{{"norm_shift", norm_shift},
                                             {"norm_shift_backward", norm_shift_backward},
                                             {"gate", gate},
                                             {"gate_backward", gate_backward},
                                             {"gated_sum", gated_sum},
                                             {"gated_sum_", gated_sum_},
                                             {"squared_relu", squared_relu},
                                             {"squared_relu_backward", squared_relu_backward}}};
  return all;
}

}  // namespace sola
