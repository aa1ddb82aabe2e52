// SPDX-License-Identifier: Apache-2.0
// The middle of a softmax layer's MLP in one pass: gelu of a 3x3 depth-wise convolution, compiled once for each
// instruction set. Channels are lanes, and the nine tokens around one are read where they are. An offset is added to each
// inside of the image; those outside are zero.
#include "elements.h"
#include "parallel.h"
#include "passes.h"

namespace sola::SOLA_ISA {
namespace {

constexpr int64_t rows_of_task = 4, channels_of_task = 1536;  // nine tokens and nine weights in a cache
constexpr int taps = 9;

// a Phi(a) = max(a, 0) - |a| Phi(-|a|) to 1e-7 of |a|. Phi(-q) = t P(t) exp(-q^2 / 2) with t = 1 / (1 + 0.26 q), and P
// fitted for the least relative error, 3e-7; from 9.3 on it is less than 1e-20.
SOLA_FORCED inline F gelu(F a) {
  F q = as_float(as_bits(a) & 0x7fffffffu);
  q = q < 9.3f ? q : splat(9.3f);
  const F t = reciprocal(1.0f + q * 0.26f);
  F p = t * -0.07566294f + 0.23931677f;
  p = p * t - 0.12242047f;
  p = p * t + 0.17911442f;
  p = p * t + 0.06786504f;
  p = p * t + 0.10837483f;
  p = p * t + 0.10341221f;
  return positive(a) - q * (t * p) * exp(q * q * -0.5f);
}

// Outside: what a token outside of the image holds, the offset's negative.
template <class T>
void task(const Depthwise& p, int64_t image, int64_t first, int64_t channel, const T* outside) {
  const int64_t row = p.width * p.channels;
  const int64_t last = first + rows_of_task < p.height ? first + rows_of_task : p.height;
  const int64_t width = p.channels - channel < channels_of_task ? p.channels - channel : channels_of_task;
  const T* const x = static_cast<const T*>(p.x) + image * p.height * row + channel;
  T* const out = static_cast<T*>(p.out) + image * p.height * row + channel;
  for (int64_t h = first; h < last; ++h) {
    for (int64_t w = 0; w < p.width; ++w) {
      const T* from[taps];
      for (int tap = 0; tap < taps; ++tap) {
        const int64_t y = h + tap / 3 - 1, z = w + tap % 3 - 1;
        const bool inside = y >= 0 && y < p.height && z >= 0 && z < p.width;
        from[tap] = inside ? x + y * row + z * p.channels : outside + channel;
      }
      T* const to = out + h * row + w * p.channels;
      for (int64_t c = 0; c < width; c += W) {
        const int n = at_most_W(width - c);
        const F less = load(outside + channel + c, n);
        F sum = widen(p.bias + channel + c);
#pragma GCC unroll 9
        for (int tap = 0; tap < taps; ++tap) {
          sum += widen(p.weight + tap * p.padded + channel + c) * (load(from[tap] + c, n) - less);
        }
        store(to + c, gelu(sum), n);
      }
    }
  }
}

template <class T>
void each_task(const Depthwise& p, ParallelFor loop) {
  const int64_t bands = (p.height + rows_of_task - 1) / rows_of_task;
  const int64_t blocks = (p.channels + channels_of_task - 1) / channels_of_task;
  parallel(loop, p.images * bands * blocks, 1, [&](int64_t begin, int64_t end) {
    const Buffer<T> outside(p.padded);
    for (int64_t c = 0; c < p.padded; c += W) narrow(outside.data + c, F{} - widen(p.offset + c));
    for (int64_t i = begin; i < end; ++i) {
      task<T>(p, i / blocks / bands, i / blocks % bands * rows_of_task, i % blocks * channels_of_task, outside.data);
    }
  });
}

}  // namespace

void depthwise_gelu(const Depthwise& p, Type type, ParallelFor loop) {
  if (type == Type::bfloat16) return each_task<bfloat16>(p, loop);
  if (type == Type::float16) return each_task<float16>(p, loop);
  each_task<float>(p, loop);
}

}  // namespace sola::SOLA_ISA
