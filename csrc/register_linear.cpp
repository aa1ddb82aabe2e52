// SPDX-License-Identifier: Apache-2.0
// Products with the passes around them for the dispatch key CPU: checks and memory (see sola_vision/ops/linear.py for
// their definitions).
#include "register_linear.h"

namespace sola {
namespace {

// a weight [outputs, inputs] as the kernels want it, with memory for its panels
struct Projection {
  Tensor tensor, panels;
  Weight weight;

  explicit Projection(Value value) : tensor(value), panels(nullptr) {}

  void prepare(const char* name, int64_t inputs, int64_t outputs, Type type) {
    const std::vector<int64_t> sizes = tensor.sizes();
    if (outputs < 0 && sizes.size() == 2) outputs = sizes[0];  // any number of them
    expect(tensor, name, {outputs, inputs}, "[outputs, inputs]");
    if (tensor.type(name) != type) {
      throw std::invalid_argument(std::string(name) + " has another dtype than what it multiplies; convert it");
    }
    weight.data = flat(tensor, name, type);
    weight.outputs = outputs, weight.inputs = inputs;
    panels = Tensor::empty({packed_size(outputs, inputs)}, type);
    weight.packed = panels.write();
  }
};

// what multiplies a type, once for a call: another thread may switch to another instruction set
const Linear& multiplied(Type type, const char* name) {
  if (type == Type::bfloat16) need_bfloat16();
  const Linear& linear = current_linear();
  if (type == Type::float32 || (type == Type::bfloat16 && linear.bfloat16)) return linear;
  throw std::invalid_argument(std::string(name) + " must be float32" + (linear.bfloat16 ? " or bfloat16" : "") +
                              ": other types have no kernel here");
}

// the tensors of a list, which is deleted
std::vector<Projection> projections(Value value) {
  void* list = nullptr;
  memcpy(&list, &value, sizeof list);
  std::vector<Projection> all;
  size_t size = 0;
  bool read = shim.torch_list_size(list, &size) == 0;
  for (size_t i = 0; read && i < size; ++i) {
    Value element = 0;
    read = shim.torch_list_get_item(list, i, &element) == 0;
    if (read) all.emplace_back(element);
  }
  check(shim.torch_delete_list(list), "delete a list");
  if (!read) throw std::runtime_error("sola: torch failed to read a list");
  return all;
}

Value list_of(std::vector<Tensor>& tensors) {
  void* list = nullptr;
  check(shim.torch_new_list_reserve_size(tensors.size(), &list), "make a list");
  for (Tensor& tensor : tensors) check(shim.torch_list_push_back(list, tensor.release()), "fill a list");
  Value value = 0;
  memcpy(&value, &list, sizeof list);
  return value;
}

std::vector<int64_t> with_last(std::vector<int64_t> sizes, int64_t last) {
  sizes.back() = last;
  return sizes;
}

// a tensor of a certain size and type, readable by the kernels
const void* beside(Tensor& tensor, const char* name, const std::vector<int64_t>& sizes, Type type) {
  expect(tensor, name, sizes, "the size that fits the others");
  if (tensor.type(name) != type) throw std::invalid_argument(std::string(name) + " has another dtype than the others");
  return flat(tensor, name, type);
}

void norm_shift_linear(Value* stack, uint64_t, uint64_t) {
  ShiftCall call(stack);
  std::vector<Projection> weights = projections(stack[5]);
  call.prepare(0, 0);
  const Linear& linear = multiplied(call.type, "sola::norm_shift_linear: x");
  const size_t mixes = static_cast<size_t>(call.shift.mixes);
  if (mixes != weights.size() || mixes < 1 || mixes > most_mixes) {
    throw std::invalid_argument("sola::norm_shift_linear: " + std::to_string(mixes) + " mixes and " +
                                std::to_string(weights.size()) + " projections, expected as many, 1 to " +
                                std::to_string(most_mixes));
  }
  ShiftLinear problem{call.shift, {}, {}};
  std::vector<Tensor> made;
  for (size_t m = 0; m < mixes; ++m) {
    weights[m].prepare("sola::norm_shift_linear: projection", call.sizes[3], -1, call.type);
    made.push_back(Tensor::empty(with_last(call.sizes, weights[m].weight.outputs), call.type));
    problem.weights[m] = weights[m].weight, problem.out[m] = made[m].write();
  }
  if (!call.nothing()) {
    linear.shift(problem, call.type, parallel_for);
  } else {
    for (size_t m = 0; m < mixes; ++m) {  // without channels the sums are zero
      std::fill_n(static_cast<char*>(problem.out[m]), bytes(count(made[m].sizes()), call.type), 0);
    }
  }
  stack[0] = list_of(made);
}

// value, receptance if it is there, and the projection
void element_linear(Tensor* receptance, Tensor& value, Projection& projection, Value* out) {
  const std::vector<int64_t> sizes = value.sizes();
  const Type type = value.type("sola: value");
  const Linear& linear = multiplied(type, "sola: value");
  if (sizes.empty()) throw std::invalid_argument("sola: value is a number, expected [..., inputs]");
  expect(value, "sola: value", sizes, "itself");
  projection.prepare("sola: projection", sizes.back(), -1, type);
  ElementLinear problem;
  problem.weight = projection.weight;
  problem.value = flat(value, "sola: value", type);
  if (receptance != nullptr) problem.receptance = beside(*receptance, "sola: receptance", sizes, type);
  problem.tokens = count(sizes) / std::max<int64_t>(sizes.back(), 1);
  Tensor made = Tensor::empty(with_last(sizes, projection.weight.outputs), type);
  problem.out = made.write();
  if (count(sizes) > 0) {
    linear.element(problem, type, parallel_for);
  } else {
    std::fill_n(static_cast<char*>(problem.out), bytes(count(made.sizes()), type), 0);
  }
  *out = made.release();
}

void gate_linear(Value* stack, uint64_t, uint64_t) {
  Tensor receptance(stack[0]), value(stack[1]);
  Projection projection(stack[2]);
  element_linear(&receptance, value, projection, stack);
}

void squared_relu_linear(Value* stack, uint64_t, uint64_t) {
  Tensor value(stack[0]);
  Projection projection(stack[1]);
  element_linear(nullptr, value, projection, stack);
}

void spatial_mix(Value* stack, uint64_t, uint64_t) {
  ShiftCall call(stack);
  Projection receptance(stack[5]), output(stack[6]);
  Tensor readout(stack[7]);
  call.prepare(0, 0);
  const Linear& linear = multiplied(call.type, "sola::spatial_mix: x");
  if (call.shift.mixes != 1) {
    throw std::invalid_argument("sola::spatial_mix: " + std::to_string(call.shift.mixes) +
                                " mixes, expected 1: the receptance's");
  }
  const int64_t channels = call.sizes[3];
  receptance.prepare("sola::spatial_mix: receptance", channels, channels, call.type);
  output.prepare("sola::spatial_mix: output", channels, channels, call.type);
  SpatialMix problem{call.shift, receptance.weight, output.weight, nullptr, nullptr};
  problem.readout = beside(readout, "sola::spatial_mix: readout", call.sizes, call.type);
  Tensor out = Tensor::empty(call.sizes, call.type);
  problem.out = out.write();
  if (!call.nothing()) linear.spatial_mix(problem, call.type, parallel_for);
  stack[0] = out.release();
}

void channel_mix(Value* stack, uint64_t, uint64_t) {
  ShiftCall call(stack);
  Projection key(stack[5]), receptance(stack[6]), value(stack[7]);
  call.prepare(0, 0);
  const Linear& linear = multiplied(call.type, "sola::channel_mix: x");
  if (call.shift.mixes != 2) {
    throw std::invalid_argument("sola::channel_mix: " + std::to_string(call.shift.mixes) +
                                " mixes, expected 2: the key's and the receptance's");
  }
  const int64_t channels = call.sizes[3];
  key.prepare("sola::channel_mix: key", channels, -1, call.type);
  receptance.prepare("sola::channel_mix: receptance", channels, channels, call.type);
  value.prepare("sola::channel_mix: value", key.weight.outputs, channels, call.type);
  Tensor out = Tensor::empty(call.sizes, call.type);
  const ChannelMix problem{call.shift, key.weight, receptance.weight, value.weight, out.write()};
  if (key.weight.outputs == 0) {
    out = call.x.copy(call.type);
  } else if (!call.nothing()) {
    linear.channel_mix(problem, call.type, parallel_for);
  }
  stack[0] = out.release();
}

// ---- backwards, in float32

// a product's weight, the gradient of its result, and memory for the weight's
struct ProductGradient {
  Tensor weight, of_result, packed, partial, of_weight;
  Gradient gradient;

  ProductGradient(Tensor w, Tensor grad)
      : weight(std::move(w)), of_result(std::move(grad)), packed(nullptr), partial(nullptr), of_weight(nullptr) {}

  // sizes are those of the inputs
  void prepare(const std::vector<int64_t>& sizes, int64_t parts) {
    const std::vector<int64_t> found = weight.sizes();
    expect(weight, "sola: projection", {found.empty() ? 1 : found[0], sizes.back()}, "[outputs, inputs]");
    expect(of_result, "sola: grad", with_last(sizes, found[0]), "the result's size");
    gradient.weight.data = only_float32(weight, "sola: projection");
    gradient.of_result = only_float32(of_result, "sola: grad");
    gradient.weight.outputs = found[0], gradient.weight.inputs = found[1];
    packed = Tensor::empty({packed_size(found[1], found[0])}, Type::float32);
    partial = Tensor::empty({parts, found[0], found[1]}, Type::float32);
    of_weight = Tensor::empty(found, Type::float32);
    gradient.weight.packed = packed.write();
    gradient.partial = static_cast<float*>(partial.write()), gradient.of_weight = static_cast<float*>(of_weight.write());
  }
  void clear() { std::fill_n(gradient.of_weight, gradient.weight.outputs * gradient.weight.inputs, 0.0f); }

  static const float* only_float32(Tensor& tensor, const char* name) {
    if (tensor.type(name) != Type::float32) throw std::invalid_argument(std::string(name) + " must be float32");
    return static_cast<const float*>(flat(tensor, name, Type::float32));
  }
};

// pieces of the tokens, each of which sums a weight's gradient for itself
int64_t parts_of(int64_t pieces) {
  return std::max<int64_t>(1, std::min<int64_t>(thread_count(), pieces));
}

void element_backward(Tensor* receptance, Tensor& value, ProductGradient& product, Value* out) {
  const std::vector<int64_t> sizes = value.sizes();
  if (sizes.empty()) throw std::invalid_argument("sola: value is a number, expected [..., inputs]");
  ElementLinearBackward problem;
  expect(value, "sola: value", sizes, "itself");
  problem.value = ProductGradient::only_float32(value, "sola: value");
  if (receptance != nullptr) {
    expect(*receptance, "sola: receptance", sizes, "value's size");
    problem.receptance = ProductGradient::only_float32(*receptance, "sola: receptance");
  }
  problem.tokens = count(sizes) / std::max<int64_t>(sizes.back(), 1);
  problem.parts = parts_of(problem.tokens / 96);
  product.prepare(sizes, problem.parts);
  problem.gradient = product.gradient;
  Tensor of_value = Tensor::empty(sizes, Type::float32), of_receptance(nullptr);
  problem.of_value = static_cast<float*>(of_value.write());
  if (receptance != nullptr) {
    of_receptance = Tensor::empty(sizes, Type::float32);
    problem.of_receptance = static_cast<float*>(of_receptance.write());
  }
  if (count(sizes) > 0) {
    current_linear().backward->element(problem, parallel_for);
  } else {
    product.clear();
  }
  if (receptance != nullptr) *out++ = of_receptance.release();
  *out++ = of_value.release();
  *out = product.of_weight.release();
}

void gate_linear_backward(Value* stack, uint64_t, uint64_t) {
  Tensor receptance(stack[0]), value(stack[1]), projection(stack[2]), grad(stack[3]);
  ProductGradient product(std::move(projection), std::move(grad));
  element_backward(&receptance, value, product, stack);
}

void squared_relu_linear_backward(Value* stack, uint64_t, uint64_t) {
  Tensor value(stack[0]), projection(stack[1]), grad(stack[2]);
  ProductGradient product(std::move(projection), std::move(grad));
  element_backward(nullptr, value, product, stack);
}

void norm_shift_linear_backward(Value* stack, uint64_t, uint64_t) {
  ShiftCall call(stack);
  std::vector<Projection> weights = projections(stack[5]), grads = projections(stack[6]);
  call.prepare(0, 0);
  const size_t mixes = static_cast<size_t>(call.shift.mixes);
  const bool as_many = mixes == weights.size() && mixes == grads.size() && mixes >= 1 && mixes <= most_mixes;
  if (!as_many || call.type != Type::float32) {
    throw std::invalid_argument("sola::norm_shift_linear_backward: as many mixes, projections and grads are expected, " +
                                std::string("1 to ") + std::to_string(most_mixes) + ", and x in float32");
  }
  ShiftLinearBackward problem;
  problem.parts = parts_of(bands(call.shift));
  std::vector<ProductGradient> products;
  for (size_t m = 0; m < mixes; ++m) {
    products.emplace_back(std::move(weights[m].tensor), std::move(grads[m].tensor));
    products[m].prepare(call.sizes, problem.parts);
    problem.gradients[m] = products[m].gradient;
  }
  ShiftGradients results(call);
  problem.shift = call.shift;
  if (call.nothing()) {
    for (ProductGradient& product : products) product.clear();
  } else {
    current_linear().backward->shift(problem, parallel_for);
  }
  results.release(stack);
  std::vector<Tensor> of_weights;
  for (ProductGradient& product : products) of_weights.push_back(std::move(product.of_weight));
  stack[4] = list_of(of_weights);
}

}  // namespace

const std::array<NamedKernel, 8>& named_linear() {
  static const std::array<NamedKernel, 8> all{{{"norm_shift_linear", norm_shift_linear},
                                             {"gate_linear", gate_linear},
                                             {"squared_relu_linear", squared_relu_linear},
                                             {"spatial_mix", spatial_mix},
                                             {"channel_mix", channel_mix},
                                             {"norm_shift_linear_backward", norm_shift_linear_backward},
                                             {"gate_linear_backward", gate_linear_backward},
                                             {"squared_relu_linear_backward", squared_relu_linear_backward}}};
  return all;
}

}  // namespace sola
