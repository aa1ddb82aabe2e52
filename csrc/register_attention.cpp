// SPDX-License-Identifier: Apache-2.0
// Attention for dispatch key CPU: argument checks and memory (see sola_vision/ops/softmax.py for its definition).
#include "register_attention.h"

#include "attention.h"

namespace sola {
namespace {

// The arguments of a call: checked tensors, in a layout that the kernel supports, and the resulting problem.
struct Call {
  Tensor qkv;
  std::vector<int64_t> sizes;
  Type type;
  Attention problem;

  explicit Call(const Value* stack) : qkv(stack[0]) {}

  void prepare(int64_t head_dim) {
    sizes = qkv.sizes();
    type = qkv.type("sola::attention: qkv");
    if (sizes.size() != 3 || head_dim < 1 || sizes[2] % (3 * head_dim) != 0) {
      throw std::invalid_argument("sola::attention: qkv is " + format_sizes(sizes) +
                                  ", expected [batch, tokens, 3 * heads * head_dim] with head_dim = " +
                                  std::to_string(head_dim));
    }
    problem.batch = sizes[0], problem.tokens = sizes[1];
    problem.heads = sizes[2] / (3 * head_dim), problem.head_dim = head_dim;
    problem.threads = thread_count();
    problem.qkv = contiguous_input(qkv, "sola::attention: qkv", sizes, type);
    // float64 has no kernel: ops.attention uses torch's own operators for it and does not dispatch here
    if (type == Type::float64) throw std::invalid_argument("sola::attention: float64 has no kernel; use ops.attention");
  }

  const void* contiguous_input(Tensor& tensor, const char* name, const std::vector<int64_t>& expected,
                               Type dtype) const {
    check_size(tensor, name, expected, "the size that matches qkv");
    if (tensor.type(name) != dtype || !tensor.contiguous()) tensor = tensor.copy(dtype);
    return tensor.read();
  }
  std::vector<int64_t> out_sizes() const { return {sizes[0], sizes[1], sizes[2] / 3}; }
  std::vector<int64_t> lse_sizes() const { return {sizes[0], problem.heads, sizes[1]}; }
};

void attention(Value* stack, uint64_t, uint64_t) {
  Call call(stack);
  call.prepare(static_cast<int64_t>(stack[1]));
  if (call.type == Type::bfloat16) prepare_bfloat16();
  Tensor out = Tensor::empty(call.out_sizes(), call.type), lse = Tensor::empty(call.lse_sizes(), Type::float32);
  call.problem.out = out.write(), call.problem.lse = static_cast<float*>(lse.write());
  current_attention().forward(call.problem, call.type, parallel_for);
  stack[0] = out.release(), stack[1] = lse.release();
}

void attention_backward(Value* stack, uint64_t, uint64_t) {
  Call call(stack);
  Tensor out(stack[2]), lse(stack[3]), grad(stack[4]);  // owned before any check can throw
  call.prepare(static_cast<int64_t>(stack[1]));
  Attention& a = call.problem;
  a.out = const_cast<void*>(call.contiguous_input(out, "sola::attention_backward: out", call.out_sizes(), call.type));
  a.grad = call.contiguous_input(grad, "sola::attention_backward: grad", call.out_sizes(), call.type);
  const void* const sums = call.contiguous_input(lse, "sola::attention_backward: lse", call.lse_sizes(), Type::float32);
  a.lse = static_cast<float*>(const_cast<void*>(sums));
  Tensor grad_qkv = Tensor::empty(call.sizes, call.type);
  a.grad_qkv = grad_qkv.write();
  current_attention().backward(a, call.type, parallel_for);
  stack[0] = grad_qkv.release();
}

}  // namespace

const std::array<NamedKernel, 2>& named_attention() {
  static const std::array<NamedKernel, 2> all{
      {{"attention", attention}, {"attention_backward", attention_backward}}};
  return all;
}

}  // namespace sola
