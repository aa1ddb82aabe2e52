// SPDX-License-Identifier: Apache-2.0
// Layer norm, quad shift and interpolations, one row of tokens after another (see passes.h).
#pragma once
#include "elements.h"
#include "passes.h"

namespace sola::SOLA_ISA {
namespace {

// The parameters in the precision of the arithmetic, zero-padded to whole registers, and the neighbours that the lanes
// of each register are taken from: a register across the border of two channel quarters blends them.
template <class T>
struct Parameters {
  static constexpr int sources = 5;  // left, right, above, below, the token itself
  struct Run {                       // adjacent registers with the same neighbour; -1: one register that blends
    int64_t begin, end;
    int source;
  };
  const Shift& p;
  const int64_t padded, registers;
  Buffer<S<T>> numbers;
  Buffer<typename Lane<T>::Mask> masks;  // [registers][sources]
  Buffer<int> neighbours;                // [registers][sources + 1]: source indices, terminated by -1
  Buffer<Run> runs;
  int64_t number_of_runs = 0;

  explicit Parameters(const Shift& s)
      : p(s),
        padded((s.channels + lanes<T> - 1) / lanes<T> * lanes<T>),
        registers(padded / lanes<T>),
        numbers((3 + s.mixes) * padded),
        masks(registers * sources),
        neighbours(registers * (sources + 1)),
        runs(registers) {
    for (int64_t c = 0; c < p.channels; ++c) {
      numbers.data[c] = static_cast<S<T>>(p.weight[c]);
      numbers.data[padded + c] = static_cast<S<T>>(p.bias[c]);
      numbers.data[2 * padded + c] = 1;
      for (int64_t m = 0; m < p.mixes; ++m) {
        numbers.data[(3 + m) * padded + c] = static_cast<S<T>>(p.mix[m * p.channels + c]);
      }
    }
    const int64_t quarter = p.channels / 4;
    const auto source_of = [quarter](int64_t c) {
      return static_cast<int>(quarter > 0 && c / quarter < 4 ? c / quarter : 4);
    };
    for (int64_t r = 0; r < registers; ++r) {
      const int64_t first = r * lanes<T>;
      int pieces = 0;
      for (int which = source_of(first), last = source_of(first + lanes<T> - 1); which <= last; ++which) {
        typename Lane<T>::Mask& mask = masks.data[r * sources + pieces];
        const int64_t begin = which * quarter, end = which < 4 ? begin + quarter : padded;
        for (int64_t i = 0; i < lanes<T>; ++i) mask[i] = first + i >= begin && first + i < end ? ~0 : 0;
        neighbours.data[r * (sources + 1) + pieces++] = which;
      }
      neighbours.data[r * (sources + 1) + pieces] = -1;
      const int source = pieces == 1 ? neighbours.data[r * (sources + 1)] : -1;
      const bool continues = source >= 0 && number_of_runs > 0 && runs.data[number_of_runs - 1].source == source;
      if (continues) {
        runs.data[number_of_runs - 1].end = r + 1;
      } else {
        runs.data[number_of_runs++] = {r, r + 1, source};
      }
    }
  }
  const S<T>* weight() const { return numbers.data; }
  const S<T>* bias() const { return numbers.data + padded; }
  const S<T>* valid() const { return numbers.data + 2 * padded; }  // 1 for channels, 0 for the padding
  const S<T>* mix(int64_t m) const { return numbers.data + (3 + m) * padded; }

  // calls use(first channel, register of the shifted token) for all registers, given the tokens of its neighbours
  template <class Use>
  SOLA_FORCED void each_shifted(const S<T>* const (&from)[sources], const Use& use) const {
    for (const Run *run = runs.data, *const last = run + number_of_runs; run < last; ++run) {
      if (run->source < 0) {
        use(run->begin * lanes<T>, shifted(from, run->begin));
        continue;
      }
      const S<T>* const source = from[run->source];
      for (int64_t c = run->begin * lanes<T>, end = run->end * lanes<T>; c < end; c += lanes<T>) use(c, get(source + c));
    }
  }

  // register r of the shifted token
  V<T> shifted(const S<T>* const (&from)[sources], int64_t r) const {
    const int* which = neighbours.data + r * (sources + 1);
    V<T> s = get(from[which[0]] + r * lanes<T>);
    for (int piece = 1; which[piece] >= 0; ++piece) {
      s = masks.data[r * sources + piece] ? get(from[which[piece]] + r * lanes<T>) : s;
    }
    return s;
  }
};

// Normalise `count` adjacent tokens (see normalise), whose sums would otherwise wait for each other's reductions.
template <int count, class T>
SOLA_FORCED inline void normalise_together(const Parameters<T>& a, const T* x, S<T>* out, S<T>* plain, S<T>* scales) {
  const int64_t channels = a.p.channels, padded = a.padded;
  const S<T> number = static_cast<S<T>>(channels), eps = static_cast<S<T>>(a.p.eps);
  V<T> sums[count] = {};
  for (int64_t c = 0; c < padded; c += lanes<T>) {
#pragma GCC unroll 4
    for (int t = 0; t < count; ++t) {
      const V<T> v = get(x + t * channels + c, channels - c);
      put(out + t * padded + c, v);
      sums[t] += v;
    }
  }
  S<T> mean[count], scale[count];
#pragma GCC unroll 4
  for (int t = 0; t < count; ++t) mean[t] = sum(sums[t]) / number, sums[t] = V<T>{};
  for (int64_t c = 0; c < padded; c += lanes<T>) {
    const V<T> valid = get(a.valid() + c);
#pragma GCC unroll 4
    for (int t = 0; t < count; ++t) {
      const V<T> v = (get(out + t * padded + c) - mean[t]) * valid;
      put(out + t * padded + c, v);
      sums[t] += v * v;
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < count; ++t) scale[t] = 1 / square_root(sum(sums[t]) / number + eps);
  for (int64_t c = 0; c < padded; c += lanes<T>) {
    const V<T> weight = get(a.weight() + c), bias = get(a.bias() + c);
#pragma GCC unroll 4
    for (int t = 0; t < count; ++t) {
      const V<T> v = get(out + t * padded + c) * scale[t];
      if (plain != nullptr) put(plain + t * padded + c, v);
      put(out + t * padded + c, v * weight + bias);
    }
  }
  for (int t = 0; t < count && scales != nullptr; ++t) scales[t] = scale[t];
}

// Normalise adjacent tokens: to `out` with weight and bias and, unless null, to `plain` without them.
template <class T>
void normalise(const Parameters<T>& a, int64_t tokens, const T* x, S<T>* out, S<T>* plain, S<T>* scales) {
  const auto at = [](S<T>* to, int64_t offset) { return to != nullptr ? to + offset : nullptr; };
  constexpr int together = 4;
  int64_t t = 0;
  for (; t + together <= tokens; t += together) {
    normalise_together<together>(a, x + t * a.p.channels, out + t * a.padded, at(plain, t * a.padded), at(scales, t));
  }
  for (; t < tokens; ++t) {
    normalise_together<1>(a, x + t * a.p.channels, out + t * a.padded, at(plain, t * a.padded), at(scales, t));
  }
}

// the left, right, upper and lower neighbours of token w of a row, and the token itself; zero outside the image
template <class T>
struct Neighbours {
  const S<T>*above, *here, *below, *zero;  // rows, null outside the image
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

// A ring of three rows: row h of the input is in slot h % 3. The rows of a band are visited in order and computed once.
template <class T>
struct Ring {
  Buffer<S<T>> rows;
  int64_t size;
  explicit Ring(int64_t row) : rows(3 * row), size(row) {}
  S<T>* operator[](int64_t h) const { return rows.data + h % 3 * size; }
};

}  // namespace
}  // namespace sola::SOLA_ISA
