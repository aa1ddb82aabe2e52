// SPDX-License-Identifier: Apache-2.0
// What attention multiplies, block by block: float32; or bfloat16 as it is, two numbers at once, where the processor has
// products of such pairs. All lie in words of 32 bits:
//
//   queries [depth, panel], keys [block, across], values [over keys, tall], weights [over keys, panel]
//
// Words beyond the last key or dimension are zero.
#pragma once
#include "heads.h"

namespace sola::SOLA_ISA {
namespace {

struct Total {
  F exact, rounded;  // of weights, and of weights as they are multiplied
};

template <class T>
struct Operands {
  using Kind = Singles;
  static constexpr bool scaled = true;  // the queries, by the factor of the scores

  static int64_t depth(int64_t dim) { return dim; }
  static int64_t across(int64_t dim) { return up(dim, rows); }
  static int64_t over(int64_t keys) { return keys; }

  static U queries(const T* from, int64_t stride, int64_t count, int64_t dim, float factor, float* to) {
    U seen{};
    gather_panel(from, stride, count, dim, factor, to);
    for (int64_t i = 0; i < panel * dim; i += W) seen = larger(seen, as_bits(widen(to + i)) & 0x7fffffffu);
    return seen;
  }
  static U keys(const T* from, int64_t stride, int64_t count, int64_t dim, float* to) {
    return copy_rows(from, stride, count, dim, 1.0f, up(count, rows), across(dim), to);
  }
  static U values(const T* from, int64_t stride, int64_t count, int64_t dim, float* to) {
    return copy_rows(from, stride, count, dim, 1.0f, count, up(dim, rows), to);
  }
  // weights of a register of queries in place of its scores
  SOLA_FORCED static Total weigh(float* scores, int64_t keys, const Reference& reference) {
    F total{};
#pragma GCC unroll 4
    for (float *at = scores, *const end = at + keys * panel; at < end; at += panel) {
      const F w = power(widen(at), reference);
      total += w;
      narrow(at, w);
    }
    return {total, total};
  }
};

#if defined(__AVX512BF16__)

// the first n of 2 W numbers, in pairs; the others are zero
inline U load_pairs(const bfloat16* a, int64_t n) {
  if (__builtin_expect(n >= 2 * W, 1)) {
    U pairs;
    memcpy(&pairs, a, sizeof pairs);
    return pairs;
  }
  return (U)_mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1), a);
}

inline U first_of(U pairs) { return pairs << 16; }  // each of a pair as float32
inline U second_of(U pairs) { return pairs & 0xffff0000u; }
inline U magnitude(U pairs) { return larger(first_of(pairs) & 0x7fffffffu, second_of(pairs) & 0x7fffffffu); }

template <>
struct Operands<bfloat16> {
  using Kind = Pairs;
  static constexpr bool scaled = false;

  static int64_t depth(int64_t dim) { return across(dim); }
  static int64_t across(int64_t dim) { return up(dim, rows) / 2; }
  static int64_t over(int64_t keys) { return (keys + 1) / 2; }

  static U queries(const bfloat16* from, int64_t stride, int64_t count, int64_t dim, float, float* to) {
    U seen{};
    turn_panel(depth(dim), to, [=, &seen](int64_t q, int64_t d) {
      const U pairs = q < count && 2 * d < dim ? load_pairs(from + q * stride + 2 * d, dim - 2 * d) : U{};
      seen = larger(seen, magnitude(pairs));
      return as_float(pairs);
    });
    return seen;
  }
  static U keys(const bfloat16* from, int64_t stride, int64_t count, int64_t dim, float* to) {
    U seen{};
    const int64_t width = across(dim);
    for (int64_t i = 0; i < up(count, rows); ++i) {
      for (int64_t d = 0; d < width; d += W) {
        const U pairs = i < count && 2 * d < dim ? load_pairs(from + i * stride + 2 * d, dim - 2 * d) : U{};
        seen = larger(seen, magnitude(pairs));
        store(to + i * width + d, as_float(pairs), at_most_W(width - d));
      }
    }
    return seen;
  }
  // a number of one key and the next key's
  static U values(const bfloat16* from, int64_t stride, int64_t count, int64_t dim, float* to) {
    U seen{};
    const int64_t tall = up(dim, rows);
    for (int64_t i = 0; i < count; i += 2) {
      for (int64_t d = 0; d < tall; d += W) {
        const auto word = [=](int64_t key) {
          return key < count && d < dim ? as_bits(load(from + key * stride + d, at_most_W(dim - d))) : U{};
        };
        const U pairs = word(i) >> 16 | word(i + 1);
        seen = larger(seen, magnitude(pairs));
        store(to + i / 2 * tall + d, as_float(pairs), at_most_W(tall - d));
      }
    }
    return seen;
  }
  SOLA_FORCED static Total weigh(float* scores, int64_t keys, const Reference& reference) {
    Total total{};
#pragma GCC unroll 2
    for (int64_t j = 0; j < keys; j += 2) {
      const float* const at = scores + j * panel;  // the score of a key that is not there is none
      const F first = power(widen(at), reference), second = power(widen(at + panel), reference);
      const U pairs = pair(first) | pair(second) << 16;
      total.exact += first + second;
      total.rounded += as_float(first_of(pairs)) + as_float(second_of(pairs));
      narrow(scores + j / 2 * panel, as_float(pairs));
    }
    return total;
  }
  SOLA_FORCED static U pair(F a) { return (U)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)_mm512_cvtneps_pbh((__m512)a)); }
};

#endif

}  // namespace
}  // namespace sola::SOLA_ISA
