// SPDX-License-Identifier: Apache-2.0
// The backward of products with the passes before them (see linear.h), compiled once for each instruction set, float32.
//
// With y = a W^T the gradient of a is g W, and that of W the sum of g^T a over tokens. What the forward's pass made of a
// tile of tokens is made again, and both products take it from the cache, as they do the gradients.
#include "linear.h"

#include "parallel.h"
#include "products.h"
#include "shift_backward.h"

namespace sola::SOLA_ISA {
namespace {

// a weight [outputs, inputs] as right factor of g: panels of inputs [outputs, panel]
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

// Rows of gradients as a left factor: where they lie, or copied where products would read beyond their end.
struct Rows {
  const float* data;
  int64_t stride;
  Rows(const float* from, int64_t tokens, int64_t width, int64_t there, const Tile<float>& copy)
      : data(from), stride(width) {
    if (width % 4 == 0 && up(tokens, 4) <= there) return;
    data = copy.row(0), stride = copy.stride;
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t c = 0; c < width; c += W) put(copy.row(t) + c, get(from + t * width + c, width - c));
    }
  }
};

// a piece's sums of a weight's gradient
struct Sums {
  Tile<float> sums;
  explicit Sums(const Gradient& g) : sums(g.weight.outputs, g.weight.inputs) {}
  // tokens' rows of gradients, and inputs from `begin` on
  void add(const Rows& g, int64_t outputs, const Tile<float>& inputs, int64_t begin, int64_t width, int64_t tokens) {
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

void add_parts(const Gradient& g, int64_t parts, ParallelFor loop) {
  const int64_t count = g.weight.outputs * g.weight.inputs;
  parallel(loop, (count + W - 1) / W, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * W; c < end * W; c += W) {
      F total = get(g.partial + c, count - c);
      for (int64_t p = 1; p < parts; ++p) total += get(g.partial + p * count + c, count - c);
      put(g.of_weight + c, total, count - c);
    }
  });
}

void element(const ElementLinearBackward& p, ParallelFor loop) {
  const int64_t outputs = p.gradient.weight.outputs, inputs = p.gradient.weight.inputs;
  const Packed<float> right = packed(p.gradient);
  pack(p.gradient, loop);
  const bool past = streamed<float>(p.tokens, inputs) && in_registers(p.of_value, inputs, inputs) &&
                    (p.of_receptance == nullptr || in_registers(p.of_receptance, inputs, inputs));
  const auto write = [past](float* to, F f, int64_t n) { past ? stream(to, f) : put(to, f, n); };
  parallel(loop, p.parts, 1, [&](int64_t first, int64_t last) {
    const int64_t width = inputs < slice ? inputs : slice;
    const Tile<float> copy(tile_tokens, outputs), made(tile_tokens, width), gradients(tile_tokens, width);
    for (int64_t part = first; part < last; ++part) {
      Sums sums(p.gradient);
      const int64_t end = p.tokens * (part + 1) / p.parts;
      for (int64_t token = p.tokens * part / p.parts; token < end; token += tile_tokens) {
        const int64_t tokens = end - token < tile_tokens ? end - token : tile_tokens;
        const Rows g(p.gradient.of_result + token * outputs, tokens, outputs, p.tokens - token, copy);
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
              const F v = get(p.value + at, n), of_made = get(gradients.row(t) + c);
              if (p.receptance == nullptr) {
                const F a = positive(v);
                put(made.row(t) + c, a * a);
                write(p.of_value + at, 2 * a * of_made, n);
              } else {
                const F open = sigmoid(get(p.receptance + at, n)), through = of_made * open;
                put(made.row(t) + c, open * v);
                write(p.of_value + at, through, n);
                write(p.of_receptance + at, through * (1 - open) * v, n);
              }
            }
          }
          sums.add(g, outputs, made, s, depth, tokens);
        }
      }
      sums.store(p.gradient, part);
    }
    streams_are_done();
  });
  add_parts(p.gradient, p.parts, loop);
}

// Gradients of what norm and shift make from those of the products, some rows of a band at a time; see shift_backward.h.
struct GradientsOfProducts {
  const ShiftLinearBackward& p;
  const Shift& s;
  const int64_t rows_of_tile, tokens_of_tile;
  const Tile<float> copy;
  // of each result: gradients of two tiles in turns, and what the forward made of one
  const Tile<float> first, second, third, made_first, made_second, made_third;
  const Tile<float>* const of_made[most_mixes] = {&first, &second, &third};
  const Tile<float>* const made_of[most_mixes] = {&made_first, &made_second, &made_third};
  Sums* sums[most_mixes] = {};
  int64_t image = 0, start = 0, stop = 0, computed = 0, from = 0, filled = 0;  // rows; `filled` from `from` on are made

  static int64_t widest(const ShiftLinearBackward& p) {
    int64_t most = 0;
    for (int64_t m = 0; m < p.shift.mixes; ++m) {
      most = p.gradients[m].weight.outputs > most ? p.gradients[m].weight.outputs : most;
    }
    return most;
  }
  int64_t if_there(int64_t m, int64_t tokens) const { return m < s.mixes ? tokens : 0; }
  explicit GradientsOfProducts(const ShiftLinearBackward& problem)
      : p(problem),
        s(p.shift),
        rows_of_tile((tile_tokens + s.width - 1) / s.width),
        tokens_of_tile(up(rows_of_tile * s.width, 4)),
        copy(tokens_of_tile, widest(p)),
        first(if_there(0, 2 * tokens_of_tile), s.channels),
        second(if_there(1, 2 * tokens_of_tile), s.channels),
        third(if_there(2, 2 * tokens_of_tile), s.channels),
        made_first(if_there(0, tokens_of_tile), s.channels),
        made_second(if_there(1, tokens_of_tile), s.channels),
        made_third(if_there(2, tokens_of_tile), s.channels) {}

  // rows h on of the image's gradients of result m
  Rows of_result(int64_t m, int64_t h, int64_t tokens) const {
    const int64_t token = (image * s.height + h) * s.width, outputs = p.gradients[m].weight.outputs;
    return {p.gradients[m].of_result + token * outputs, tokens, outputs, s.images * s.height * s.width - token, copy};
  }
  void begin(int64_t of_image, int64_t row, int64_t end) {
    image = of_image, from = row, filled = 0;
    start = computed = row > 0 ? row - 1 : 0, stop = end < s.height ? end + 1 : end;
  }
  void compute(int64_t h) {
    if (h < computed) return;
    const int64_t rows = stop - h < rows_of_tile ? stop - h : rows_of_tile, tokens = rows * s.width;
    for (int64_t m = 0; m < s.mixes; ++m) {
      const Packed<float> right = packed(p.gradients[m]);
      const Rows g = of_result(m, h, tokens);
      for (int64_t q = 0; q < right.panels(); ++q) {
        multiply_panel<false>(g.data, g.stride, tokens, right.at(q), right.inputs, place(m, h) + q * panel, stride());
      }
    }
    computed += rows;
  }
  float* place(int64_t m, int64_t h) const {
    const int64_t tile = (h - start) / rows_of_tile % 2, row = (h - start) % rows_of_tile;
    return of_made[m]->row(tile * tokens_of_tile + row * s.width);
  }
  const float* row(int64_t m, int64_t h) const { return place(m, h); }
  int64_t stride() const { return first.stride; }
  void made(int64_t m, int64_t w, int64_t c, F token) { put(made_of[m]->row(filled * s.width + w) + c, token); }
  void end_row() {
    if (++filled == rows_of_tile) end();
  }
  void end() {
    for (int64_t m = 0; m < s.mixes && filled > 0; ++m) {
      const int64_t tokens = filled * s.width;
      sums[m]->add(of_result(m, from, tokens), p.gradients[m].weight.outputs, *made_of[m], 0, s.channels, tokens);
    }
    from += filled, filled = 0;
  }
};

void shift(const ShiftLinearBackward& p, ParallelFor loop) {
  const Parameters<float> a(p.shift);
  const int64_t mixes = p.shift.mixes, all = bands(p.shift);
  for (int64_t m = 0; m < mixes; ++m) pack(p.gradients[m], loop);
  parallel(loop, p.parts, 1, [&](int64_t first, int64_t last) {
    GradientsOfProducts gradients(p);
    ShiftBackward<float, GradientsOfProducts> backward(a, gradients);
    for (int64_t part = first; part < last; ++part) {
      Sums of_first(p.gradients[0]), of_second(p.gradients[mixes > 1 ? 1 : 0]);
      Sums of_third(p.gradients[mixes > 2 ? 2 : 0]);
      Sums* const sums[most_mixes] = {&of_first, &of_second, &of_third};
      for (int64_t m = 0; m < mixes; ++m) gradients.sums[m] = sums[m];
      for (int64_t band = all * part / p.parts; band < all * (part + 1) / p.parts; ++band) backward.band(band);
      for (int64_t m = 0; m < mixes; ++m) sums[m]->store(p.gradients[m], part);
    }
  });
  for (int64_t m = 0; m < mixes; ++m) add_parts(p.gradients[m], p.parts, loop);
}

}  // namespace

extern const LinearBackward linear_backward = {shift, element};

}  // namespace sola::SOLA_ISA
