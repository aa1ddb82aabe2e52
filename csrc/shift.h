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
  const Shift& p;
  const int64_t padded, registers;
  Buffer<S<T>> numbers;
  Buffer<typename Lane<T>::Mask> masks;  // [registers][sources]
  Buffer<int> neighbours;                // [registers][sources + 1]: source indices, terminated by -1

  explicit Parameters(const Shift& s)
      : p(s),
        padded((s.channels + lanes<T> - 1) / lanes<T> * lanes<T>),
        registers(padded / lanes<T>),
        numbers((3 + s.mixes) * padded),
        masks(registers * sources),
        neighbours(registers * (sources + 1)) {
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
      for (int which = 0; which < sources; ++which) {
        bool any = false;
        typename Lane<T>::Mask mask = {};
        for (int64_t i = 0; i < lanes<T>; ++i) {
          const int64_t c = r * lanes<T> + i, source = quarter > 0 && c / quarter < 4 ? c / quarter : 4;
          if (source == which) mask[i] = ~0, any = true;
        }
        if (!any) continue;
        masks.data[r * sources + pieces] = mask;
        neighbours.data[r * (sources + 1) + pieces++] = which;
      }
      neighbours.data[r * (sources + 1) + pieces] = -1;
    }
  }
  const S<T>* weight() const { return numbers.data; }
  const S<T>* bias() const { return numbers.data + padded; }
  const S<T>* valid() const { return numbers.data + 2 * padded; }  // 1 for channels, 0 for the padding
  const S<T>* mix(int64_t m) const { return numbers.data + (3 + m) * padded; }

  // register r of the shifted token, given the tokens of its neighbours
  V<T> shifted(const S<T>* const (&from)[sources], int64_t r) const {
    const int* which = neighbours.data + r * (sources + 1);
    V<T> s = get(from[which[0]] + r * lanes<T>);
    for (int piece = 1; which[piece] >= 0; ++piece) {
      s = masks.data[r * sources + piece] ? get(from[which[piece]] + r * lanes<T>) : s;
    }
    return s;
  }
};

// Normalise a row of tokens: to `out` with weight and bias and, unless null, to `plain` without them.
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
      const V<T> v = (get(out + c) - mean) * get(a.valid() + c);
      put(out + c, v);
      squares += v * v;
    }
    const S<T> scale = 1 / square_root(sum(squares) / count + static_cast<S<T>>(p.eps));
    for (int64_t c = 0; c < a.padded; c += lanes<T>) {
      const V<T> v = get(out + c) * scale;
      if (plain != nullptr) put(plain + w * a.padded + c, v);
      put(out + c, v * get(a.weight() + c) + get(a.bias() + c));
    }
    if (scales != nullptr) scales[w] = scale;
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
