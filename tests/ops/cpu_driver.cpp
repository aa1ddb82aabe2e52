// SPDX-License-Identifier: Apache-2.0
// Runs the operators of the CPU kernel on irregular shapes in exactly sized allocations, without torch: a driver for
// the address and undefined-behaviour sanitizers. Compiled with the kernels as SOLA_ISA=generic.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "attention.h"
#include "lanes.h"
#include "wkv.h"

void sola::out_of_memory(size_t) { abort(); }

namespace {

using namespace sola;

// three uneven ranges, as different threads would process them
void pieces(int64_t count, int64_t, Body body, void* context) {
  const int64_t first = count / 3, second = count - count / 4;
  if (first > 0) body(0, first, context);
  if (second > first) body(first, second, context);
  if (count > second) body(second, count, context);
}

template <class T>
void run(Type type, int64_t batch, int64_t tokens, int64_t channels, int64_t threads, double range) {
  const size_t count = static_cast<size_t>(batch * tokens * channels), each = static_cast<size_t>(channels);
  // separate allocations of exactly the right size: the sanitizer reports an access one element beyond the end
  std::vector<T> key(count), value(count), grad(count), output(count), grad_key(count), grad_value(count);
  std::vector<double> decay(each), bonus(each), grad_decay(each * batch), grad_bonus(each * batch);
  std::vector<float> states(static_cast<size_t>((tokens + chunk_tokens - 1) / chunk_tokens * 4) * each * batch);
  unsigned state = 1;
  const auto random = [&] { return (state = state * 1664525u + 1013904223u) / 4294967296.0 * 2.0 - 1.0; };
  const auto fill = [&](std::vector<T>& to, double size) {
    for (T& one : to) {
      if constexpr (sizeof(T) == 2) {
        one.bits = static_cast<uint16_t>((random() < 0 ? 0x8000 : 0) | (0x3c00 + static_cast<int>(random() * 255)));
      } else {
        one = static_cast<T>(random() * size);
      }
    }
  };
  fill(key, range), fill(value, 1.0), fill(grad, 1.0);
  for (double& w : decay) w = random() * 20.0;
  for (double& u : bonus) u = random() * 3.0;
  const auto array = [&](std::vector<T>& a) { return Array{a.data(), tokens * channels, channels}; };
  Problem p;
  p.batch = batch, p.tokens = tokens, p.channels = channels, p.threads = threads;
  p.decay = decay.data(), p.bonus = bonus.data();
  p.key = array(key), p.value = array(value), p.grad = array(grad), p.output = array(output);
  p.grad_key = array(grad_key), p.grad_value = array(grad_value);
  p.grad_decay = grad_decay.data(), p.grad_bonus = grad_bonus.data();
  generic::kernel.forward(p, type, pieces);  // states is null: none are stored
  p.states = states.data();
  generic::kernel.forward(p, type, pieces);
  generic::kernel.backward(p, type, pieces);
}

template <class T>
void attend(Type type, int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim, float size) {
  const size_t width = static_cast<size_t>(heads * head_dim), count = static_cast<size_t>(batch * tokens) * width;
  std::vector<T> qkv(3 * count), out(count), grad(count), grad_qkv(3 * count);
  std::vector<float> lse(static_cast<size_t>(batch * heads * tokens));
  unsigned state = 1;
  const auto fill = [&](std::vector<T>& to) {
    for (T& one : to) {
      const float number = static_cast<float>((state = state * 1664525u + 1013904223u) / 4294967296.0 - 0.5) * size;
      generic::store(&one, generic::splat(number), 1);
    }
  };
  fill(qkv), fill(grad);
  Attention a;
  a.batch = batch, a.tokens = tokens, a.heads = heads, a.head_dim = head_dim;
  a.qkv = qkv.data(), a.out = out.data(), a.lse = lse.data(), a.grad = grad.data(), a.grad_qkv = grad_qkv.data();
  generic::attention_kernels.forward(a, type, pieces);
  generic::attention_kernels.backward(a, type, pieces);
}

}  // namespace

int main() {
  int cases = 0;
  for (int64_t tokens : {1, 2, 7, 16, 33, 64, 65, 300}) {
    for (int64_t head_dim : {1, 4, 16, 33}) {
      for (float size : {1.0f, 1e30f}) {  // the second one takes the float64 loops
        attend<float>(Type::float32, 2, tokens, 3, head_dim, size);
        attend<generic::bfloat16>(Type::bfloat16, 1, tokens, 2, head_dim, size);
        attend<generic::float16>(Type::float16, 1, tokens, 1, head_dim, 1.0f);
        ++cases;
      }
    }
  }
  for (int64_t tokens : {1, 2, 31, 32, 33, 49, 197, 513}) {
    for (int64_t channels : {1, 3, 8, 16, 33, 96}) {
      for (int64_t batch : {1, 2}) {
        for (int64_t threads : {1, 64}) {
          for (double range : {3.0, 50.0, 1e4}) {
            run<float>(Type::float32, batch, tokens, channels, threads, range);
            run<double>(Type::float64, batch, tokens, channels, threads, range);
            ++cases;
          }
          run<generic::bfloat16>(Type::bfloat16, batch, tokens, channels, threads, 1.0);
          run<generic::float16>(Type::float16, batch, tokens, channels, threads, 1.0);
        }
      }
    }
  }
  std::printf("%d cases\n", cases);
  return 0;
}
