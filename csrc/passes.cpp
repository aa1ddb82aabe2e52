// SPDX-License-Identifier: Apache-2.0
// The element-wise passes around the operator, compiled once for each instruction set (SOLA_ISA names it).
//
// Every value crosses memory once: layer norm, quad shift and the interpolations are one pass from x to the inputs of
// the projections; a gate with its residual is one; so is squared ReLU. Arithmetic is float32, float64 for float64
// tensors. The backward of the shift computes norms and differences again from x instead of keeping them.
#include "passes.h"

#include <cstdlib>

#include "lanes.h"
#include "parallel.h"

namespace sola::SOLA_ISA {
namespace {

// ---- one register of either precision

template <class T>
struct Lane {
  using Vector = F;
  using Scalar = float;
  using Mask = I;
};
template <>
struct Lane<double> {
  using Vector = D;
  using Scalar = double;
  using Mask = DU;
};
template <class T>
using V = typename Lane<T>::Vector;
template <class T>
using S = typename Lane<T>::Scalar;
template <class T>
constexpr int64_t lanes = register_bytes / sizeof(S<T>);

template <class T>
V<T> get(const T* a, int64_t n = lanes<T>) {
  if (__builtin_expect(n >= lanes<T>, 1)) return widen(a);
  T part[lanes<T>] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = a[i];
  return widen(part);
}

template <class T>
void put(T* a, V<T> v, int64_t n = lanes<T>) {
  if (__builtin_expect(n >= lanes<T>, 1)) return narrow(a, v);
  T part[lanes<T>];
  narrow(part, v);
  for (int64_t i = 0; i < n; ++i) a[i] = part[i];
}

// of all lanes
#if defined(__AVX512F__)
inline float sum(F v) { return _mm512_reduce_add_ps((__m512)v); }
inline double sum(D v) { return _mm512_reduce_add_pd((__m512d)v); }
#else
template <class Vec>
auto sum(Vec v) {
  auto first = v[0], second = v[1];
  for (size_t i = 2; i < sizeof v / sizeof first; i += 2) first += v[i], second += v[i + 1];
  return first + second;
}
#endif

inline float root(float a) { return __builtin_sqrtf(a); }
inline double root(double a) { return __builtin_sqrt(a); }

// 1 / (1 + exp(-a)); beyond 44 it is 0 or 1 to 1e-19
inline F sigmoid(F a) {
  F inside = a < -44.0f ? splat(-44.0f) : a;
  inside = inside > 44.0f ? splat(44.0f) : inside;
  const F result = reciprocal(1.0f + exp(F{} - inside));
  return a == a ? result : a;
}
inline D sigmoid(D a) {
  const D result = 1.0 / (1.0 + exp_float64<D, DU>(D{} - a));
  return a == a ? result : a;
}

template <class T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t count)
      : data(static_cast<T*>(std::aligned_alloc(64, (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64))) {
    if (data == nullptr) std::abort();
    memset(static_cast<void*>(data), 0, static_cast<size_t>(count) * sizeof(T));
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
};

// ---- layer norm, quad shift, interpolations

// The parameters in the arithmetic's precision, rows padded with zeros to whole registers; and which neighbours the
// lanes of a register come from: a register on the edge of two quarters blends them.
template <class T>
struct Parameters {
  static constexpr int most = 5;  // left, right, above, below, itself
  const Shift& p;
  const int64_t padded, registers;
  Buffer<S<T>> numbers;
  Buffer<typename Lane<T>::Mask> masks;  // [registers][most]
  Buffer<int> neighbours;                // [registers][most + 1]: which, then -1

  explicit Parameters(const Shift& s)
      : p(s),
        padded((s.channels + lanes<T> - 1) / lanes<T> * lanes<T>),
        registers(padded / lanes<T>),
        numbers((3 + s.mixes) * padded),
        masks(registers * most),
        neighbours(registers * (most + 1)) {
    for (int64_t c = 0; c < p.channels; ++c) {
      numbers.data[c] = static_cast<S<T>>(p.weight[c]);
      numbers.data[padded + c] = static_cast<S<T>>(p.bias[c]);
      numbers.data[2 * padded + c] = 1;
      for (int64_t m = 0; m < p.mixes; ++m) {
        numbers.data[(3 + m) * padded + c] = static_cast<S<T>>(p.mix[m * p.channels + c]);
      }
    }
    const int64_t quarter = p.channels / 4;
    for (int64_t r = 0; r < registers; ++r) {
      int pieces = 0;
      for (int which = 0; which < most; ++which) {
        bool any = false;
        typename Lane<T>::Mask mask = {};
        for (int64_t i = 0; i < lanes<T>; ++i) {
          const int64_t c = r * lanes<T> + i, own = quarter > 0 && c / quarter < 4 ? c / quarter : 4;
          if (own == which) mask[i] = ~0, any = true;
        }
        if (!any) continue;
        masks.data[r * most + pieces] = mask;
        neighbours.data[r * (most + 1) + pieces++] = which;
      }
      neighbours.data[r * (most + 1) + pieces] = -1;
    }
  }
  const S<T>* weight() const { return numbers.data; }
  const S<T>* bias() const { return numbers.data + padded; }
  const S<T>* inside() const { return numbers.data + 2 * padded; }  // 1 for channels, 0 for the padding
  const S<T>* mix(int64_t m) const { return numbers.data + (3 + m) * padded; }

  // register r of the shifted token, from the neighbours' tokens
  V<T> shifted(const S<T>* const (&from)[most], int64_t r) const {
    const int* which = neighbours.data + r * (most + 1);
    V<T> s = get(from[which[0]] + r * lanes<T>);
    for (int piece = 1; which[piece] >= 0; ++piece) {
      s = masks.data[r * most + piece] ? get(from[which[piece]] + r * lanes<T>) : s;
    }
    return s;
  }
};

// A row of tokens, normalised without weight and bias (into `plain`, when it is wanted) and with them.
template <class T>
void normalise(const Parameters<T>& a, const T* x, S<T>* out, S<T>* plain, S<T>* scales) {
  const Shift& p = a.p;
  const S<T> count = static_cast<S<T>>(p.channels);
  for (int64_t w = 0; w < p.width; ++w, x += p.channels, out += a.padded) {
    V<T> total = {};
    for (int64_t c = 0; c < a.padded; c += lanes<T>) {
      const V<T> v = get(x + c, p.channels - c);
      put(out + c, v);
      total += v;
    }
    const S<T> mean = sum(total) / count;
    V<T> squares = {};
    for (int64_t c = 0; c < a.padded; c += lanes<T>) {
      const V<T> v = (get(out + c) - mean) * get(a.inside() + c);
      put(out + c, v);
      squares += v * v;
    }
    const S<T> scale = 1 / root(sum(squares) / count + static_cast<S<T>>(p.eps));
    for (int64_t c = 0; c < a.padded; c += lanes<T>) {
      const V<T> v = get(out + c) * scale;
      if (plain != nullptr) put(plain + w * a.padded + c, v);
      put(out + c, v * get(a.weight() + c) + get(a.bias() + c));
    }
    if (scales != nullptr) scales[w] = scale;
  }
}

// the tokens left, right, above, below of token w of a row, and itself; zero outside of the image
template <class T>
struct Neighbours {
  const S<T>*above, *here, *below, *zero;  // rows, null outside of the image
  int64_t width, padded;
  void of(int64_t w, const S<T>* (&from)[5]) const {
    const S<T>* token = here + w * padded;
    from[0] = w > 0 ? token - padded : zero;
    from[1] = w + 1 < width ? token + padded : zero;
    from[2] = above != nullptr ? above + w * padded : zero;
    from[3] = below != nullptr ? below + w * padded : zero;
    from[4] = token;
  }
};

// Row h of the input lies in slot h % 3 of a ring; a band's rows are visited in order, each computed once.
template <class T>
struct Ring {
  Buffer<S<T>> rows;
  int64_t size;
  explicit Ring(int64_t row) : rows(3 * row), size(row) {}
  S<T>* operator[](int64_t h) const { return rows.data + h % 3 * size; }
};

template <class T>
void shift_band(const Parameters<T>& a, int64_t band, const Ring<T>& ring, const S<T>* zero) {
  const Shift& p = a.p;
  const int64_t kept = p.height - p.top - p.bottom, of_image = (kept + band_rows - 1) / band_rows;
  const int64_t image = band / of_image, first = p.top + band % of_image * band_rows;
  const int64_t last = first + band_rows < p.top + kept ? first + band_rows : p.top + kept;
  const T* x = static_cast<const T*>(p.x) + image * p.height * p.width * p.channels;
  T* out = static_cast<T*>(p.out) + (image * kept - p.top) * p.width * p.channels;
  const int64_t row = p.width * p.channels, plane = p.images * kept * row;
  const auto compute = [&](int64_t h) {
    if (h >= 0 && h < p.height) normalise<T>(a, x + h * row, ring[h], nullptr, nullptr);
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
      for (int64_t r = 0, c = 0; r < a.registers; ++r, c += lanes<T>) {
        const V<T> s = a.shifted(from, r), difference = get(from[4] + c) - s;
        for (int64_t m = 0; m < p.mixes; ++m) {
          put(token + m * plane + c, s + get(a.mix(m) + c) * difference, p.channels - c);
        }
      }
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

// With G = sum_m (1 - mix_m) g_m, the gradient of n is sum_m mix_m g_m plus G, shifted back; mix_m has that of its
// channels, sum g_m (n - shift(n)); then the layer norm's backward.
template <class T>
struct ShiftBackward {
  const Parameters<T>& a;
  const Shift& p;
  int64_t row, plane;
  Ring<T> normed, plain, scattered;  // n; n without weight and bias; G
  Buffer<S<T>> scales, gradient, zero;
  Buffer<double> sums;

  explicit ShiftBackward(const Parameters<T>& parameters)
      : a(parameters),
        p(parameters.p),
        row(p.width * p.channels),
        plane(p.images * p.height * row),
        normed(p.width * a.padded),
        plain(p.width * a.padded),
        scattered(p.width * a.padded),
        scales(3 * p.width),
        gradient(a.padded),
        zero(a.padded),
        sums((2 + p.mixes) * a.padded) {}

  void compute(int64_t image, int64_t h) {
    if (h < 0 || h >= p.height) return;
    const int64_t start = (image * p.height + h) * row;
    normalise<T>(a, static_cast<const T*>(p.x) + start, normed[h], plain[h], scales.data + h % 3 * p.width);
    const T* grad = static_cast<const T*>(p.grad) + start;
    for (int64_t w = 0; w < p.width; ++w) {
      for (int64_t c = 0; c < a.padded; c += lanes<T>) {
        V<T> total = {};
        for (int64_t m = 0; m < p.mixes; ++m) {
          total += (1 - get(a.mix(m) + c)) * get(grad + m * plane + w * p.channels + c, p.channels - c);
        }
        put(scattered[h] + w * a.padded + c, total);
      }
    }
  }

  void band(int64_t band) {
    const int64_t of_image = (p.height + band_rows - 1) / band_rows, image = band / of_image;
    const int64_t first = band % of_image * band_rows;
    const int64_t last = first + band_rows < p.height ? first + band_rows : p.height;
    memset(static_cast<void*>(sums.data), 0, static_cast<size_t>((2 + p.mixes) * a.padded) * sizeof(double));
    const Buffer<S<T>> row_sums((2 + p.mixes) * a.padded);
    compute(image, first - 1);
    compute(image, first);
    for (int64_t h = first; h < last; ++h) {
      compute(image, h + 1);
      one_row(image, h, row_sums.data);
      for (int64_t i = 0; i < (2 + p.mixes) * a.padded; ++i) {
        sums.data[i] += row_sums.data[i];
        row_sums.data[i] = 0;
      }
    }
    for (int64_t i = 0; i < 2 + p.mixes; ++i) {
      memcpy(p.partial + (band * (2 + p.mixes) + i) * p.channels, sums.data + i * a.padded,
             static_cast<size_t>(p.channels) * sizeof(double));
    }
  }

  void one_row(int64_t image, int64_t h, S<T>* totals) {
    const int64_t start = (image * p.height + h) * row;
    const T* grad = static_cast<const T*>(p.grad) + start;
    const bool top = h > 0, bottom = h + 1 < p.height;
    const Neighbours<T> near{top ? normed[h - 1] : nullptr, normed[h], bottom ? normed[h + 1] : nullptr, zero.data,
                             p.width, a.padded};
    // what came from the left goes back to the left: the adjoint swaps the neighbours
    const Neighbours<T> back{bottom ? scattered[h + 1] : nullptr, scattered[h], top ? scattered[h - 1] : nullptr,
                             zero.data, p.width, a.padded};
    S<T>*of_weight = totals, *of_bias = totals + a.padded, *of_mix = totals + 2 * a.padded;
    const S<T> count = static_cast<S<T>>(p.channels);
    for (int64_t w = 0; w < p.width; ++w) {
      const S<T>*from[5], *to[5];
      near.of(w, from);
      back.of(w, to);
      const S<T>* left = to[0];
      to[0] = to[1], to[1] = left;
      const S<T>* hat = plain[h] + w * a.padded;
      V<T> total = {}, along = {};
      for (int64_t r = 0, c = 0; r < a.registers; ++r, c += lanes<T>) {
        const V<T> difference = get(from[4] + c) - a.shifted(from, r);
        V<T> g = a.shifted(to, r);
        for (int64_t m = 0; m < p.mixes; ++m) {
          const V<T> own = get(grad + m * plane + w * p.channels + c, p.channels - c);
          g += get(a.mix(m) + c) * own;
          put(of_mix + m * a.padded + c, get(of_mix + m * a.padded + c) + own * difference);
        }
        const V<T> n = get(hat + c);
        put(of_weight + c, get(of_weight + c) + g * n);
        put(of_bias + c, get(of_bias + c) + g);
        g *= get(a.weight() + c);
        put(gradient.data + c, g);
        total += g;
        along += g * n;
      }
      const S<T> mean = sum(total) / count, slope = sum(along) / count, scale = scales.data[h % 3 * p.width + w];
      T* out = static_cast<T*>(p.grad_x) + start + w * p.channels;
      for (int64_t c = 0; c < a.padded; c += lanes<T>) {
        put(out + c, scale * (get(gradient.data + c) - mean - slope * get(hat + c)), p.channels - c);
      }
    }
  }
};

template <class T>
void shift_backward_of(const Shift& p, ParallelFor loop) {
  const Parameters<T> a(p);
  parallel(loop, bands(p), 1, [&](int64_t begin, int64_t end) {
    ShiftBackward<T> backward(a);
    for (int64_t band = begin; band < end; ++band) backward.band(band);
  });
}

// ---- flat passes

// function(i, n): the register that begins at element i and has n of its elements
template <class T, class Function>
void each_register(int64_t count, ParallelFor loop, Function&& function) {
  const int64_t registers = (count + lanes<T> - 1) / lanes<T>;
  parallel(loop, registers, 2048, [&](int64_t begin, int64_t end) {
    const int64_t whole = end * lanes<T> <= count ? end : end - 1;
    for (int64_t r = begin; r < whole; ++r) function(r * lanes<T>, lanes<T>);
    if (whole < end) function(whole * lanes<T>, count - whole * lanes<T>);
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
    const V<T> open = sigmoid(get(receptance + i, n)), g = get(grad + i, n) * open;
    put(grad_value + i, g, n);
    put(grad_receptance + i, g * (1 - open) * get(value + i, n), n);
  });
}

// max(a, 0) where NaN stays NaN
template <class Vec>
Vec positive(Vec a) {
  return a <= 0 ? Vec{} : a;
}

template <class T>
void squared_relu_of(const Pointwise& p, ParallelFor loop) {
  const T* value = static_cast<const T*>(p.value);
  T* out = static_cast<T*>(p.out);
  each_register<T>(p.count, loop, [=](int64_t i, int64_t n) {
    const V<T> a = positive(get(value + i, n));
    put(out + i, a * a, n);
  });
}

template <class T>
void squared_relu_backward_of(const Pointwise& p, ParallelFor loop) {
  const T *value = static_cast<const T*>(p.value), *grad = static_cast<const T*>(p.grad);
  T* out = static_cast<T*>(p.grad_value);
  each_register<T>(p.count, loop, [=](int64_t i, int64_t n) {
    put(out + i, 2 * positive(get(value + i, n)) * get(grad + i, n), n);
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
SOLA_BY_TYPE(gate, Pointwise)
SOLA_BY_TYPE(gate_backward, Pointwise)
SOLA_BY_TYPE(squared_relu, Pointwise)
SOLA_BY_TYPE(squared_relu_backward, Pointwise)
#undef SOLA_BY_TYPE

}  // namespace

extern const Passes passes = {shift, shift_backward, gate, gate_backward, squared_relu, squared_relu_backward};

}  // namespace sola::SOLA_ISA
