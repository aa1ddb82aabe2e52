// SPDX-License-Identifier: Apache-2.0
// The backward of layer norm, quad shift and interpolations, one band of rows of an image at a time (see passes.h).
#pragma once
#include "shift.h"

namespace sola::SOLA_ISA {
namespace {

// With G = sum_m (1 - mix_m) g_m, the gradient of n is sum_m mix_m g_m plus G, shifted back. The gradient of mix_m is
// the sum of g_m (n - shift(n)) over tokens. The backward of the layer norm follows.
//
// Gradients provides the rows of g_m: begin(image, first, last) starts a band of rows, compute(h) is called in order,
// and row(m, h) is valid until the row after the next one is computed, with tokens `stride` apart. record(m, w, c,
// register) receives the recomputed forward result of a token; end_row() marks the end of a row, end() the end of the
// band.
template <class T, class Gradients>
struct ShiftBackward {
  const Parameters<T>& a;
  const Shift& p;
  Gradients& gradients;
  int64_t row;
  Ring<T> normed, plain, scattered;  // n; n without weight and bias; G
  Buffer<S<T>> scales, gradient, zero;
  Buffer<double> sums;
  Buffer<const T*> grads;  // one row for each mix

  ShiftBackward(const Parameters<T>& parameters, Gradients& g)
      : a(parameters),
        p(parameters.p),
        gradients(g),
        row(p.width * p.channels),
        normed(p.width * a.padded),
        plain(p.width * a.padded),
        scattered(p.width * a.padded),
        scales(3 * p.width),
        gradient(a.padded),
        zero(a.padded),
        sums((2 + p.mixes) * a.padded),
        grads(p.mixes) {}

  void compute(int64_t image, int64_t h) {
    if (h < 0 || h >= p.height) return;
    const int64_t start = (image * p.height + h) * row;
    normalise<T>(a, p.width, static_cast<const T*>(p.x) + start, normed[h], plain[h], scales.data + h % 3 * p.width);
    gradients.compute(h);
    for (int64_t m = 0; m < p.mixes; ++m) grads.data[m] = gradients.row(m, h);
    for (int64_t w = 0; w < p.width; ++w) {
      for (int64_t c = 0; c < a.padded; c += lanes<T>) {
        V<T> total = {};
        for (int64_t m = 0; m < p.mixes; ++m) {
          total += (1 - get(a.mix(m) + c)) * get(grads.data[m] + w * gradients.stride() + c, p.channels - c);
        }
        put(scattered[h] + w * a.padded + c, total);
      }
    }
  }

  void band(int64_t band) {
    const int64_t bands_per_image = (p.height + band_rows - 1) / band_rows, image = band / bands_per_image;
    const int64_t first = band % bands_per_image * band_rows;
    const int64_t last = first + band_rows < p.height ? first + band_rows : p.height;
    memset(static_cast<void*>(sums.data), 0, static_cast<size_t>((2 + p.mixes) * a.padded) * sizeof(double));
    const Buffer<S<T>> row_sums((2 + p.mixes) * a.padded);
    gradients.begin(image, first, last);
    compute(image, first - 1);
    compute(image, first);
    for (int64_t h = first; h < last; ++h) {
      compute(image, h + 1);
      one_row(image, h, row_sums.data);
      for (int64_t i = 0; i < (2 + p.mixes) * a.padded; ++i) {
        sums.data[i] += row_sums.data[i];
        row_sums.data[i] = 0;
      }
      gradients.end_row();
    }
    gradients.end();
    for (int64_t i = 0; i < 2 + p.mixes; ++i) {
      memcpy(p.partial + (band * (2 + p.mixes) + i) * p.channels, sums.data + i * a.padded,
             static_cast<size_t>(p.channels) * sizeof(double));
    }
  }

  void one_row(int64_t image, int64_t h, S<T>* totals) {
    const int64_t start = (image * p.height + h) * row;
    for (int64_t m = 0; m < p.mixes; ++m) grads.data[m] = gradients.row(m, h);
    const bool top = h > 0, bottom = h + 1 < p.height;
    const Neighbours<T> near{top ? normed[h - 1] : nullptr, normed[h], bottom ? normed[h + 1] : nullptr, zero.data,
                             p.width, a.padded};
    // the adjoint of the shift swaps the neighbours: the gradient of a value from the left goes to the left
    const Neighbours<T> back{bottom ? scattered[h + 1] : nullptr, scattered[h], top ? scattered[h - 1] : nullptr,
                             zero.data, p.width, a.padded};
    S<T>*grad_weight = totals, *grad_bias = totals + a.padded, *grad_mix = totals + 2 * a.padded;
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
        const V<T> shifted = a.shifted(from, r), difference = get(from[4] + c) - shifted;
        V<T> g = a.shifted(to, r);
        for (int64_t m = 0; m < p.mixes; ++m) {
          const V<T> g_m = get(grads.data[m] + w * gradients.stride() + c, p.channels - c);
          gradients.record(m, w, c, shifted + get(a.mix(m) + c) * difference);
          g += get(a.mix(m) + c) * g_m;
          put(grad_mix + m * a.padded + c, get(grad_mix + m * a.padded + c) + g_m * difference);
        }
        const V<T> n = get(hat + c);
        put(grad_weight + c, get(grad_weight + c) + g * n);
        put(grad_bias + c, get(grad_bias + c) + g);
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

}  // namespace
}  // namespace sola::SOLA_ISA
