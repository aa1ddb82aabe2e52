// SPDX-License-Identifier: Apache-2.0
// The element-wise passes around the operator, compiled once per instruction set (SOLA_ISA is its name).
//
// Every value is read and written once: layer norm, quad shift and the interpolations are fused into one pass from x to
// the inputs of the projections, and so are a gate and its residual sum, and squared ReLU. The arithmetic is float32,
// or float64 for float64 tensors. The backward of the shift recomputes norms and differences from x instead of storing
// them.
#include "passes.h"

#include "parallel.h"
#include "shift_backward.h"

namespace sola::SOLA_ISA {
namespace {

// ---- layer norm, quad shift, interpolations

template <class T>
void shift_band(const Parameters<T>& a, int64_t band, const Ring<T>& ring, const S<T>* zero) {
  const Shift& p = a.p;
  const int64_t out_rows = p.height - p.top - p.bottom, bands_per_image = (out_rows + band_rows - 1) / band_rows;
  const int64_t image = band / bands_per_image, first = p.top + band % bands_per_image * band_rows;
  const int64_t last = first + band_rows < p.top + out_rows ? first + band_rows : p.top + out_rows;
  const T* x = static_cast<const T*>(p.x) + image * p.height * p.width * p.channels;
  T* out = static_cast<T*>(p.out) + (image * out_rows - p.top) * p.width * p.channels;
  const int64_t row = p.width * p.channels, plane = p.images * out_rows * row;
  const auto compute = [&](int64_t h) {
    if (h >= 0 && h < p.height) normalise<T>(a, p.width, x + h * row, ring[h], nullptr, nullptr);
  };
  compute(first - 1);
  compute(first);
  for (int64_t h = first; h < last; ++h) {
    compute(h + 1);
    const Neighbours<T> near{h > 0 ? ring[h - 1] : nullptr, ring[h], h + 1 < p.height ? ring[h + 1] : nullptr, zero,
                             p.width, a.padded};
    for (int64_t w = 0; w < p.width; ++w) {
      const S<T>* from[5];
      near.of(w, from);
      T* token = out + h * row + w * p.channels;
      a.each_shifted(from, [&](int64_t c, V<T> shifted) {
        const V<T> difference = get(from[4] + c) - shifted;
        for (int64_t m = 0; m < p.mixes; ++m) {
          put(token + m * plane + c, shifted + get(a.mix(m) + c) * difference, p.channels - c);
        }
      });
    }
  }
}

template <class T>
void shift_of(const Shift& p, ParallelFor loop) {
  const Parameters<T> a(p);
  parallel(loop, bands(p), 1, [&](int64_t begin, int64_t end) {
    const Ring<T> ring(p.width * a.padded);
    const Buffer<S<T>> zero(a.padded);
    for (int64_t band = begin; band < end; ++band) shift_band<T>(a, band, ring, zero.data);
  });
}

template <class T>
void norm_of(const Shift& p, ParallelFor loop) {
  constexpr int64_t block = 16;  // tokens, which stay in the first-level cache
  const Parameters<T> a(p);
  const T* const x = static_cast<const T*>(p.x);
  T* const out = static_cast<T*>(p.out);
  parallel(loop, p.images * p.height * p.width, 1 + 16384 / p.channels, [&](int64_t begin, int64_t end) {
    const Buffer<S<T>> normed(block * a.padded);
    for (int64_t first = begin; first < end; first += block) {
      const int64_t tokens = end - first < block ? end - first : block, channels = p.channels;
      normalise<T>(a, tokens, x + first * channels, normed.data, nullptr, nullptr);
      const S<T>* from = normed.data;
      T* to = out + first * channels;
      for (int64_t t = 0; t < tokens; ++t, from += a.padded, to += channels) {
        for (int64_t c = 0; c < channels; c += lanes<T>) put(to + c, get(from + c), channels - c);
      }
    }
  });
}

// gradients [mixes, images, height, width, channels] stored in memory
template <class T>
struct StoredGradients {
  const Shift& p;
  int64_t image = 0;
  void begin(int64_t image_index, int64_t, int64_t) { image = image_index; }
  void compute(int64_t) {}
  const T* row(int64_t m, int64_t h) const {
    return static_cast<const T*>(p.grad) + ((m * p.images + image) * p.height + h) * p.width * p.channels;
  }
  int64_t stride() const { return p.channels; }
  void record(int64_t, int64_t, int64_t, V<T>) {}
  void end_row() {}
  void end() {}
};

template <class T>
void shift_backward_of(const Shift& p, ParallelFor loop) {
  const Parameters<T> a(p);
  parallel(loop, bands(p), 1, [&](int64_t begin, int64_t end) {
    StoredGradients<T> gradients{p};
    ShiftBackward<T, StoredGradients<T>> backward(a, gradients);
    for (int64_t band = begin; band < end; ++band) backward.band(band);
  });
}

// ---- element-wise passes over contiguous arrays

// calls function(i, n) for each register: it starts at element i and holds n elements
template <class T, class Function>
void each_register(int64_t count, ParallelFor loop, Function&& function) {
  const int64_t registers = (count + lanes<T> - 1) / lanes<T>;
  parallel(loop, registers, 2048, [&](int64_t begin, int64_t end) {
    const int64_t full = end * lanes<T> <= count ? end : end - 1;
    for (int64_t r = begin; r < full; ++r) function(r * lanes<T>, lanes<T>);
    if (full < end) function(full * lanes<T>, count - full * lanes<T>);
  });
}

template <class T>
void gate_of(const Pointwise& p, ParallelFor loop) {
  const T *residual = static_cast<const T*>(p.residual), *receptance = static_cast<const T*>(p.receptance);
  const T* value = static_cast<const T*>(p.value);
  T* out = static_cast<T*>(p.out);
  if (residual == nullptr) {
    each_register<T>(p.count, loop, [=](int64_t i, int64_t n) {
      put(out + i, sigmoid(get(receptance + i, n)) * get(value + i, n), n);
    });
  } else {
    each_register<T>(p.count, loop, [=](int64_t i, int64_t n) {
      put(out + i, get(residual + i, n) + sigmoid(get(receptance + i, n)) * get(value + i, n), n);
    });
  }
}

template <class T>
void gate_backward_of(const Pointwise& p, ParallelFor loop) {
  const T *receptance = static_cast<const T*>(p.receptance), *value = static_cast<const T*>(p.value);
  const T* grad = static_cast<const T*>(p.grad);
  T *grad_receptance = static_cast<T*>(p.grad_receptance), *grad_value = static_cast<T*>(p.grad_value);
  each_register<T>(p.count, loop, [=](int64_t i, int64_t n) {
    const V<T> gate_value = sigmoid(get(receptance + i, n)), g = get(grad + i, n) * gate_value;
    put(grad_value + i, g, n);
    put(grad_receptance + i, g * (1 - gate_value) * get(value + i, n), n);
  });
}

template <class T>
void squared_relu_of(const Pointwise& p, ParallelFor loop) {
  const T* value = static_cast<const T*>(p.value);
  T* out = static_cast<T*>(p.out);
  each_register<T>(p.count, loop, [=](int64_t i, int64_t n) {
    const V<T> a = relu(get(value + i, n));
    put(out + i, a * a, n);
  });
}

template <class T>
void squared_relu_backward_of(const Pointwise& p, ParallelFor loop) {
  const T *value = static_cast<const T*>(p.value), *grad = static_cast<const T*>(p.grad);
  T* out = static_cast<T*>(p.grad_value);
  each_register<T>(p.count, loop, [=](int64_t i, int64_t n) {
    put(out + i, 2 * relu(get(value + i, n)) * get(grad + i, n), n);
  });
}

#define SOLA_BY_TYPE(name, Problem)                              \
  void name(const Problem& p, Type type, ParallelFor loop) {     \
    switch (type) {                                              \
      case Type::float64: return name##_of<double>(p, loop);     \
      case Type::float32: return name##_of<float>(p, loop);      \
      case Type::bfloat16: return name##_of<bfloat16>(p, loop);  \
      case Type::float16: return name##_of<float16>(p, loop);    \
    }                                                            \
  }
SOLA_BY_TYPE(shift, Shift)
SOLA_BY_TYPE(shift_backward, Shift)
SOLA_BY_TYPE(norm, Shift)
SOLA_BY_TYPE(gate, Pointwise)
SOLA_BY_TYPE(gate_backward, Pointwise)
SOLA_BY_TYPE(squared_relu, Pointwise)
SOLA_BY_TYPE(squared_relu_backward, Pointwise)
#undef SOLA_BY_TYPE

}  // namespace

extern const Passes passes = {shift, shift_backward, norm, gate, gate_backward, squared_relu, squared_relu_backward};

}  // namespace sola::SOLA_ISA
