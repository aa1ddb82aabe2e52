// SPDX-License-Identifier: Apache-2.0
// Products with fused passes for dispatch key CPU: argument checks and memory (see sola_vision/ops/linear.py for their
// definitions).
#include "register_linear.h"

namespace sola {
namespace {

// a weight [outputs, inputs] in the layout that the kernels expect, with memory for its packed panels
struct Projection {
  Tensor tensor, panels;
  Weight weight;

  explicit Projection(Value value) : tensor(value), panels(nullptr) {}

  void prepare(const char* name, int64_t inputs, int64_t outputs, Type type) {
    const std::vector<int64_t> sizes = tensor.sizes();
    if (outputs < 0 && sizes.size() == 2) outputs = sizes[0];  // any number of outputs
    check_size(tensor, name, {outputs, inputs}, "[outputs, inputs]");
    if (tensor.type(name) != type) {
      throw std::invalid_argument(std::string(name) + " must have the dtype of its input; convert it");
    }
    weight.data = contiguous_data(tensor, name, type);
    weight.outputs = outputs, weight.inputs = inputs;
    panels = Tensor::empty({packed_size(outputs, inputs)}, type);
    weight.packed = panels.write();
  }
};

// The kernels for this dtype. Called once per operator call, because another thread may switch the instruction set.
const Linear& product_kernels(Type type, const char* name) {
  if (type == Type::bfloat16) prepare_bfloat16();
  const Linear& linear = current_linear();
  if (type == Type::float32 || (type == Type::bfloat16 && linear.bfloat16)) return linear;
  throw std::invalid_argument(std::string(name) + " must be float32" + (linear.bfloat16 ? " or bfloat16" : "") +
                              "; no kernel exists for other dtypes");
}

// Take the tensors out of a list and delete the list.
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
  check(shim.torch_new_list_reserve_size(tensors.size(), &list), "create a list");
  for (Tensor& tensor : tensors) check(shim.torch_list_push_back(list, tensor.release()), "fill a list");
  Value value = 0;
  memcpy(&value, &list, sizeof list);
  return value;
}

std::vector<int64_t> with_last(std::vector<int64_t> sizes, int64_t last) {
  sizes.back() = last;
  return sizes;
}

// Return the data of a tensor with the given size and dtype, made contiguous.
const void* matching_input(Tensor& tensor, const char* name, const std::vector<int64_t>& sizes, Type type) {
  check_size(tensor, name, sizes, "the matching size");
  if (tensor.type(name) != type) {
    throw std::invalid_argument(std::string(name) + " must have the dtype of the other tensors; convert it");
  }
  return contiguous_data(tensor, name, type);
}

void norm_shift_linear(Value* stack, uint64_t, uint64_t) {
  ShiftCall call(stack);
  std::vector<Projection> weights = projections(stack[5]);
  call.prepare(0, 0);
  const Linear& linear = product_kernels(call.type, "sola::norm_shift_linear: x");
  const size_t mixes = static_cast<size_t>(call.shift.mixes);
  if (mixes != weights.size() || mixes < 1 || mixes > max_mixes) {
    throw std::invalid_argument("sola::norm_shift_linear: got " + std::to_string(mixes) + " mixes and " +
                                std::to_string(weights.size()) + " projections, expected equal numbers from 1 to " +
                                std::to_string(max_mixes));
  }
  ShiftLinear problem{call.shift, {}, {}};
  std::vector<Tensor> outputs;
  for (size_t m = 0; m < mixes; ++m) {
    weights[m].prepare("sola::norm_shift_linear: projection", call.sizes[3], -1, call.type);
    outputs.push_back(Tensor::empty(with_last(call.sizes, weights[m].weight.outputs), call.type));
    problem.weights[m] = weights[m].weight, problem.out[m] = outputs[m].write();
  }
  if (!call.is_empty()) {
    linear.shift(problem, call.type, parallel_for);
  } else {
    for (size_t m = 0; m < mixes; ++m) {  // sums over zero channels are zero
      std::fill_n(static_cast<char*>(problem.out[m]), bytes(count(outputs[m].sizes()), call.type), 0);
    }
  }
  stack[0] = list_of(outputs);
}

// the common implementation; receptance may be null
void element_linear(Tensor* receptance, Tensor& value, Projection& projection, Value* out) {
  const std::vector<int64_t> sizes = value.sizes();
  const Type type = value.type("sola: value");
  const Linear& linear = product_kernels(type, "sola: value");
  if (sizes.empty()) throw std::invalid_argument("sola: value is a scalar, expected [..., inputs]");
  check_size(value, "sola: value", sizes, "its size");
  projection.prepare("sola: projection", sizes.back(), -1, type);
  ElementLinear problem;
  problem.weight = projection.weight;
  problem.value = contiguous_data(value, "sola: value", type);
  if (receptance != nullptr) problem.receptance = matching_input(*receptance, "sola: receptance", sizes, type);
  problem.tokens = count(sizes) / std::max<int64_t>(sizes.back(), 1);
  Tensor result = Tensor::empty(with_last(sizes, projection.weight.outputs), type);
  problem.out = result.write();
  if (count(sizes) > 0) {
    linear.element(problem, type, parallel_for);
  } else {
    std::fill_n(static_cast<char*>(problem.out), bytes(count(result.sizes()), type), 0);
  }
  *out = result.release();
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
  const Linear& linear = product_kernels(call.type, "sola::spatial_mix: x");
  if (call.shift.mixes != 1) {
    throw std::invalid_argument("sola::spatial_mix: got " + std::to_string(call.shift.mixes) +
                                " mixes, expected 1 (receptance)");
  }
  const int64_t channels = call.sizes[3];
  receptance.prepare("sola::spatial_mix: receptance", channels, channels, call.type);
  output.prepare("sola::spatial_mix: output", channels, channels, call.type);
  SpatialMix problem{call.shift, receptance.weight, output.weight, nullptr, nullptr};
  problem.readout = matching_input(readout, "sola::spatial_mix: readout", call.sizes, call.type);
  Tensor out = Tensor::empty(call.sizes, call.type);
  problem.out = out.write();
  if (!call.is_empty()) linear.spatial_mix(problem, call.type, parallel_for);
  stack[0] = out.release();
}

void channel_mix(Value* stack, uint64_t, uint64_t) {
  ShiftCall call(stack);
  Projection key(stack[5]), receptance(stack[6]), value(stack[7]);
  call.prepare(0, 0);
  const Linear& linear = product_kernels(call.type, "sola::channel_mix: x");
  if (call.shift.mixes != 2) {
    throw std::invalid_argument("sola::channel_mix: got " + std::to_string(call.shift.mixes) +
                                " mixes, expected 2 (key and receptance)");
  }
  const int64_t channels = call.sizes[3];
  key.prepare("sola::channel_mix: key", channels, -1, call.type);
  receptance.prepare("sola::channel_mix: receptance", channels, channels, call.type);
  value.prepare("sola::channel_mix: value", key.weight.outputs, channels, call.type);
  Tensor out = Tensor::empty(call.sizes, call.type);
  const ChannelMix problem{call.shift, key.weight, receptance.weight, value.weight, out.write()};
  if (key.weight.outputs == 0) {
    out = call.x.copy(call.type);
  } else if (!call.is_empty()) {
    linear.channel_mix(problem, call.type, parallel_for);
  }
  stack[0] = out.release();
}

// ---- backwards, in float32

// the weight of a product, the gradient of its result, and memory for the gradient of the weight
struct ProductGradient {
  Tensor weight, grad_output, packed, partial, grad_weight;
  Gradient gradient;

  ProductGradient(Tensor w, Tensor grad)
      : weight(std::move(w)), grad_output(std::move(grad)), packed(nullptr), partial(nullptr), grad_weight(nullptr) {}

  // sizes: those of the inputs
  void prepare(const std::vector<int64_t>& sizes, int64_t parts) {
    const std::vector<int64_t> weight_sizes = weight.sizes();
    check_size(weight, "sola: projection", {weight_sizes.empty() ? 1 : weight_sizes[0], sizes.back()},
               "[outputs, inputs]");
    check_size(grad_output, "sola: grad", with_last(sizes, weight_sizes[0]), "the size of the result");
    gradient.weight.data = float32_data(weight, "sola: projection");
    gradient.grad_output = float32_data(grad_output, "sola: grad");
    gradient.weight.outputs = weight_sizes[0], gradient.weight.inputs = weight_sizes[1];
    packed = Tensor::empty({packed_size(weight_sizes[1], weight_sizes[0])}, Type::float32);
    partial = Tensor::empty({parts, weight_sizes[0], weight_sizes[1]}, Type::float32);
    grad_weight = Tensor::empty(weight_sizes, Type::float32);
    gradient.weight.packed = packed.write();
    gradient.partial = static_cast<float*>(partial.write());
    gradient.grad_weight = static_cast<float*>(grad_weight.write());
  }
  void clear() { std::fill_n(gradient.grad_weight, gradient.weight.outputs * gradient.weight.inputs, 0.0f); }

  static const float* float32_data(Tensor& tensor, const char* name) {
    if (tensor.type(name) != Type::float32) throw std::invalid_argument(std::string(name) + " must be float32");
    return static_cast<const float*>(contiguous_data(tensor, name, Type::float32));
  }
};

// the number of parts of the tokens; each part sums the gradient of a weight separately
int64_t part_count(int64_t pieces) {
  return std::max<int64_t>(1, std::min<int64_t>(thread_count(), pieces));
}

void element_backward(Tensor* receptance, Tensor& value, ProductGradient& product, Value* out) {
  const std::vector<int64_t> sizes = value.sizes();
  if (sizes.empty()) throw std::invalid_argument("sola: value is a scalar, expected [..., inputs]");
  ElementLinearBackward problem;
  check_size(value, "sola: value", sizes, "its size");
  problem.value = ProductGradient::float32_data(value, "sola: value");
  if (receptance != nullptr) {
    check_size(*receptance, "sola: receptance", sizes, "the size of value");
    problem.receptance = ProductGradient::float32_data(*receptance, "sola: receptance");
  }
  problem.tokens = count(sizes) / std::max<int64_t>(sizes.back(), 1);
  problem.parts = part_count(problem.tokens / 96);
  product.prepare(sizes, problem.parts);
  problem.gradient = product.gradient;
  Tensor grad_value = Tensor::empty(sizes, Type::float32), grad_receptance(nullptr);
  problem.grad_value = static_cast<float*>(grad_value.write());
  if (receptance != nullptr) {
    grad_receptance = Tensor::empty(sizes, Type::float32);
    problem.grad_receptance = static_cast<float*>(grad_receptance.write());
  }
  if (count(sizes) > 0) {
    current_linear().backward->element(problem, parallel_for);
  } else {
    product.clear();
  }
  if (receptance != nullptr) *out++ = grad_receptance.release();
  *out++ = grad_value.release();
  *out = product.grad_weight.release();
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
  const bool counts_match = mixes == weights.size() && mixes == grads.size() && mixes >= 1 && mixes <= max_mixes;
  if (!counts_match || call.type != Type::float32) {
    throw std::invalid_argument(
        "sola::norm_shift_linear_backward: expected equal numbers of mixes, projections and grads (" +
        std::string("1 to ") + std::to_string(max_mixes) + "), and a float32 x");
  }
  ShiftLinearBackward problem;
  problem.parts = part_count(bands(call.shift));
  std::vector<ProductGradient> products;
  for (size_t m = 0; m < mixes; ++m) {
    products.emplace_back(std::move(weights[m].tensor), std::move(grads[m].tensor));
    products[m].prepare(call.sizes, problem.parts);
    problem.gradients[m] = products[m].gradient;
  }
  ShiftGradients results(call);
  problem.shift = call.shift;
  if (call.is_empty()) {
    for (ProductGradient& product : products) product.clear();
  } else {
    current_linear().backward->shift(problem, parallel_for);
  }
  results.release(stack);
  std::vector<Tensor> grad_weights;
  for (ProductGradient& product : products) grad_weights.push_back(std::move(product.grad_weight));
  stack[4] = list_of(grad_weights);
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
