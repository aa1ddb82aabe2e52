// SPDX-License-Identifier: Apache-2.0
// The backward of products with the passes before them (see linear.h), in float32, compiled once per instruction set.
//
// For y = a W^T, the gradient of a is g W and that of W is the sum of g^T a over tokens. The left factor a of a tile of
// tokens is recomputed; both products read it and the gradients from the cache.
#include "linear.h"

#include "parallel.h"
#include "products.h"
#include "shift_backward.h"

namespace sola::SOLA_ISA {
namespace {

// the weight [outputs, inputs] as the right factor of g: panels of inputs [outputs, panel]
Packed<float> packed(const Gradient& g) {
  return {static_cast<const float*>(g.weight.packed), g.weight.outputs, g.weight.inputs};
}

void pack(const Gradient& g, ParallelFor loop) {
  const int64_t inputs = g.weight.inputs, outputs = g.weight.outputs;
  parallel(loop, packed(g).panels(), 1 + 32768 / (outputs * panel + 1), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      float* to = const_cast<float*>(packed(g).at(p));
      const float* from = static_cast<const float*>(g.weight.data) + p * panel;
      for (int64_t o = 0; o < outputs; ++o, to += panel, from += inputs) {
        for (int64_t c = 0; c < panel; c += W) {
          const int64_t left = inputs - p * panel - c;
          put(to + c, left > 0 ? get(from + c, left) : F{});
        }
      }
    }
  });
}

// Rows of gradients as a left factor: in place, or copied if the product would read beyond the end of the array.
struct GradientRows {
  const float* data;
  int64_t stride;
  GradientRows(const float* from, int64_t tokens, int64_t width, int64_t available, const Tile<float>& copy)
      : data(from), stride(width) {
    if (width % 4 == 0 && round_up(tokens, 4) <= available) return;
    data = copy.row(0), stride = copy.stride;
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t c = 0; c < width; c += W) put(copy.row(t) + c, get(from + t * width + c, width - c));
    }
  }
};

// the gradient of a weight, summed over a part of the tokens
struct Sums {
  Tile<float> sums;
  explicit Sums(const Gradient& g) : sums(g.weight.outputs, g.weight.inputs) {}
  // Add the products of gradient rows with the inputs from `begin` on.
  void add(const GradientRows& g, int64_t outputs, const Tile<float>& inputs, int64_t begin, int64_t width,
           int64_t tokens) {
    for (int64_t c = 0; c < width; c += panel) {
      multiply_transposed(g.data, g.stride, outputs, inputs.row(0) + c, inputs.stride, tokens, sums.row(0) + begin + c,
                          sums.stride);
    }
  }
  void store(const Gradient& g, int64_t part) const {
    const int64_t inputs = g.weight.inputs;
    float* to = g.partial + part * g.weight.outputs * inputs;
    for (int64_t o = 0; o < g.weight.outputs; ++o, to += inputs) {
      for (int64_t c = 0; c < inputs; c += W) put(to + c, get(sums.row(o) + c), inputs - c);
    }
  }
};

void reduce_parts(const Gradient& g, int64_t parts, ParallelFor loop) {
  const int64_t count = g.weight.outputs * g.weight.inputs;
  parallel(loop, (count + W - 1) / W, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * W; c < end * W; c += W) {
      F total = get(g.partial + c, count - c);
      for (int64_t p = 1; p < parts; ++p) total += get(g.partial + p * count + c, count - c);
      put(g.grad_weight + c, total, count - c);
    }
  });
}

void element(const ElementLinearBackward& p, ParallelFor loop) {
  const int64_t outputs = p.gradient.weight.outputs, inputs = p.gradient.weight.inputs;
  const Packed<float> right = packed(p.gradient);
  pack(p.gradient, loop);
  const bool streaming = use_streaming<float>(p.tokens, inputs) && aligned_rows(p.grad_value, inputs, inputs) &&
                         (p.grad_receptance == nullptr || aligned_rows(p.grad_receptance, inputs, inputs));
  const auto write = [streaming](float* to, F f, int64_t n) { streaming ? stream(to, f) : put(to, f, n); };
  parallel(loop, p.parts, 1, [&](int64_t first, int64_t last) {
    const int64_t width = inputs < slice ? inputs : slice;
    const Tile<float> copy(tile_tokens, outputs), recomputed(tile_tokens, width), gradients(tile_tokens, width);
    for (int64_t part = first; part < last; ++part) {
      Sums sums(p.gradient);
      const int64_t end = p.tokens * (part + 1) / p.parts;
      for (int64_t token = p.tokens * part / p.parts; token < end; token += tile_tokens) {
        const int64_t tokens = end - token < tile_tokens ? end - token : tile_tokens;
        const GradientRows g(p.gradient.grad_output + token * outputs, tokens, outputs, p.tokens - token, copy);
        for (int64_t s = 0; s < inputs; s += slice) {
          const int64_t depth = inputs - s < slice ? inputs - s : slice;
          for (int64_t c = 0; c < depth; c += panel) {
            multiply_panel<false>(g.data, g.stride, tokens, right.at((s + c) / panel), outputs, gradients.row(0) + c,
                                  gradients.stride);
          }
          for (int64_t t = 0; t < tokens; ++t) {
            const int64_t from = (token + t) * inputs + s;
            for (int64_t c = 0; c < depth; c += W) {
              const int64_t at = from + c, n = depth - c;
              const F v = get(p.value + at, n), grad_recomputed = get(gradients.row(t) + c);
              if (p.receptance == nullptr) {
                const F a = relu(v);
                put(recomputed.row(t) + c, a * a);
                write(p.grad_value + at, 2 * a * grad_recomputed, n);
              } else {
                const F gate = sigmoid(get(p.receptance + at, n)), grad_v = grad_recomputed * gate;
                put(recomputed.row(t) + c, gate * v);
                write(p.grad_value + at, grad_v, n);
                write(p.grad_receptance + at, grad_v * (1 - gate) * v, n);
              }
            }
          }
          sums.add(g, outputs, recomputed, s, depth, tokens);
        }
      }
      sums.store(p.gradient, part);
    }
    streaming_fence();
  });
  reduce_parts(p.gradient, p.parts, loop);
}

// The gradients of the mixes (the results of norm and shift), computed from those of the products, a few rows of a band
// at a time; see shift_backward.h.
struct MixGradients {
  const ShiftLinearBackward& p;
  const Shift& s;
  const int64_t rows_of_tile, tokens_of_tile;
  const Tile<float> copy;
  // per mix: gradients of two tiles, used alternately, and the recomputed mix of one tile
  const Tile<float> grad_first, grad_second, grad_third, mix_first, mix_second, mix_third;
  const Tile<float>* const grad_tiles[max_mixes] = {&grad_first, &grad_second, &grad_third};
  const Tile<float>* const mix_tiles[max_mixes] = {&mix_first, &mix_second, &mix_third};
  Sums* sums[max_mixes] = {};
  int64_t image = 0, start = 0, stop = 0, computed = 0, from = 0, filled = 0;  // rows; `filled` from `from` on

  static int64_t max_outputs(const ShiftLinearBackward& p) {
    int64_t result = 0;
    for (int64_t m = 0; m < p.shift.mixes; ++m) {
      result = p.gradients[m].weight.outputs > result ? p.gradients[m].weight.outputs : result;
    }
    return result;
  }
  int64_t tokens_if_used(int64_t m, int64_t tokens) const { return m < s.mixes ? tokens : 0; }
  explicit MixGradients(const ShiftLinearBackward& problem)
      : p(problem),
        s(p.shift),
        rows_of_tile((tile_tokens + s.width - 1) / s.width),
        tokens_of_tile(round_up(rows_of_tile * s.width, 4)),
        copy(tokens_of_tile, max_outputs(p)),
        grad_first(tokens_if_used(0, 2 * tokens_of_tile), s.channels),
        grad_second(tokens_if_used(1, 2 * tokens_of_tile), s.channels),
        grad_third(tokens_if_used(2, 2 * tokens_of_tile), s.channels),
        mix_first(tokens_if_used(0, tokens_of_tile), s.channels),
        mix_second(tokens_if_used(1, tokens_of_tile), s.channels),
        mix_third(tokens_if_used(2, tokens_of_tile), s.channels) {}

  // the gradients of product m's result, from row h of the image on
  GradientRows grad_output(int64_t m, int64_t h, int64_t tokens) const {
    const int64_t token = (image * s.height + h) * s.width, outputs = p.gradients[m].weight.outputs;
    return {p.gradients[m].grad_output + token * outputs, tokens, outputs, s.images * s.height * s.width - token, copy};
  }
  void begin(int64_t image_index, int64_t row, int64_t end) {
    image = image_index, from = row, filled = 0;
    start = computed = row > 0 ? row - 1 : 0, stop = end < s.height ? end + 1 : end;
  }
  void compute(int64_t h) {
    if (h < computed) return;
    const int64_t rows = stop - h < rows_of_tile ? stop - h : rows_of_tile, tokens = rows * s.width;
    for (int64_t m = 0; m < s.mixes; ++m) {
      const Packed<float> right = packed(p.gradients[m]);
      const GradientRows g = grad_output(m, h, tokens);
      for (int64_t q = 0; q < right.panels(); ++q) {
        multiply_panel<false>(g.data, g.stride, tokens, right.at(q), right.inputs, place(m, h) + q * panel, stride());
      }
    }
    computed += rows;
  }
  float* place(int64_t m, int64_t h) const {
    const int64_t tile = (h - start) / rows_of_tile % 2, row = (h - start) % rows_of_tile;
    return grad_tiles[m]->row(tile * tokens_of_tile + row * s.width);
  }
  const float* row(int64_t m, int64_t h) const { return place(m, h); }
  int64_t stride() const { return grad_first.stride; }
  void record(int64_t m, int64_t w, int64_t c, F token) { put(mix_tiles[m]->row(filled * s.width + w) + c, token); }
  void end_row() {
    if (++filled == rows_of_tile) end();
  }
  void end() {
    for (int64_t m = 0; m < s.mixes && filled > 0; ++m) {
      const int64_t tokens = filled * s.width;
      sums[m]->add(grad_output(m, from, tokens), p.gradients[m].weight.outputs, *mix_tiles[m], 0, s.channels, tokens);
    }
    from += filled, filled = 0;
  }
};

void shift(const ShiftLinearBackward& p, ParallelFor loop) {
  const Parameters<float> a(p.shift);
  const int64_t mixes = p.shift.mixes, all = bands(p.shift);
  for (int64_t m = 0; m < mixes; ++m) pack(p.gradients[m], loop);
  parallel(loop, p.parts, 1, [&](int64_t first, int64_t last) {
    MixGradients gradients(p);
    ShiftBackward<float, MixGradients> backward(a, gradients);
    for (int64_t part = first; part < last; ++part) {
      Sums sums_first(p.gradients[0]), sums_second(p.gradients[mixes > 1 ? 1 : 0]);
      Sums sums_third(p.gradients[mixes > 2 ? 2 : 0]);
      Sums* const sums[max_mixes] = {&sums_first, &sums_second, &sums_third};
      for (int64_t m = 0; m < mixes; ++m) gradients.sums[m] = sums[m];
      for (int64_t band = all * part / p.parts; band < all * (part + 1) / p.parts; ++band) backward.band(band);
      for (int64_t m = 0; m < mixes; ++m) sums[m]->store(p.gradients[m], part);
    }
  });
  for (int64_t m = 0; m < mixes; ++m) reduce_parts(p.gradients[m], p.parts, loop);
}

}  // namespace

extern const LinearBackward linear_backward = {shift, element};

}  // namespace sola::SOLA_ISA
