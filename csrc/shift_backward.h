// SPDX-License-Identifier: Apache-2.0
// The backward of layer norm, quad shift and interpolations, a band of rows of an image at a time (see passes.h).
#pragma once
#include "shift.h"

namespace sola::SOLA_ISA {
namespace {

// With G = sum_m (1 - mix_m) g_m, the gradient of n is sum_m mix_m g_m plus G, shifted back; mix_m has that of its
// channels, sum g_m (n - shift(n)); then the layer norm's backward.
//
// Gradients says where the rows of g_m are: begin(image, first, last) a band of rows; compute(h), in order; then row(m, h)
// until the next but one is computed, tokens `stride` apart. made(m, w, c, register) is told what the forward made of a
// token of the row, end_row() that the row is complete, end() that the band is.
template <class T, class Gradients>
struct ShiftBackward {
  const Parameters<T>& a;
  const Shift& p;
  Gradients& gradients;
  int64_t row;
  Ring<T> normed, plain, scattered;  // n; n without weight and bias; G
  Buffer<S<T>> scales, gradient, zero;
  Buffer<double> sums;
  Buffer<const T*> grads;  // a row's, of each result

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
    normalise<T>(a, static_cast<const T*>(p.x) + start, normed[h], plain[h], scales.data + h % 3 * p.width);
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
    const int64_t of_image = (p.height + band_rows - 1) / band_rows, image = band / of_image;
    const int64_t first = band % of_image * band_rows;
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
        const V<T> shifted = a.shifted(from, r), difference = get(from[4] + c) - shifted;
        V<T> g = a.shifted(to, r);
        for (int64_t m = 0; m < p.mixes; ++m) {
          const V<T> own = get(grads.data[m] + w * gradients.stride() + c, p.channels - c);
          gradients.made(m, w, c, shifted + get(a.mix(m) + c) * difference);
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

}  // namespace
}  // namespace sola::SOLA_ISA
