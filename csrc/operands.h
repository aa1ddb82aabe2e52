// SPDX-License-Identifier: Apache-2.0
// The packed operands of attention, one block at a time: float32, or pairs of bfloat16 if the processor multiplies such
// pairs. All are arrays of 32-bit words:
//
//   queries [depth, panel], keys [block, key_stride], values [value_rows, padded_dim], weights [value_rows, panel]
//
// Words beyond the last key or dimension are zero.
#pragma once
#include "heads.h"

namespace sola::SOLA_ISA {
namespace {

struct Total {
  F exact, rounded;  // the sums of the weights, and of the weights as rounded for the product
};

template <class T>
struct Operands {
  using Kind = Float32Words;
  static constexpr bool scaled = true;  // queries are multiplied by the factor of the scores

  static int64_t depth(int64_t dim) { return dim; }
  static int64_t key_stride(int64_t dim) { return round_up(dim, rows); }
  static int64_t value_rows(int64_t keys) { return keys; }

  static U queries(const T* from, int64_t stride, int64_t count, int64_t dim, float factor, float* to) {
    U max_bits{};
    gather_panel(from, stride, count, dim, factor, to);
    for (int64_t i = 0; i < panel * dim; i += W) max_bits = larger(max_bits, as_bits(widen(to + i)) & 0x7fffffffu);
    return max_bits;
  }
  static U keys(const T* from, int64_t stride, int64_t count, int64_t dim, float* to) {
    return copy_rows(from, stride, count, dim, 1.0f, round_up(count, rows), key_stride(dim), to);
  }
  static U values(const T* from, int64_t stride, int64_t count, int64_t dim, float* to) {
    return copy_rows(from, stride, count, dim, 1.0f, count, round_up(dim, rows), to);
  }
  // Replace the scores of one register of queries with weights and return their sum.
  SOLA_FORCED static Total exponentiate(float* scores, int64_t keys, const Reference& reference) {
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

// Load the first n of 2 W numbers as pairs; the others are zero.
inline U load_pairs(const bfloat16* a, int64_t n) {
  if (__builtin_expect(n >= 2 * W, 1)) {
    U pairs;
    memcpy(&pairs, a, sizeof pairs);
    return pairs;
  }
  return (U)_mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1), a);
}

inline U first_of(U pairs) { return pairs << 16; }  // as float32
inline U second_of(U pairs) { return pairs & 0xffff0000u; }
inline U magnitude(U pairs) { return larger(first_of(pairs) & 0x7fffffffu, second_of(pairs) & 0x7fffffffu); }

template <>
struct Operands<bfloat16> {
  using Kind = BFloat16Pairs;
  static constexpr bool scaled = false;

  static int64_t depth(int64_t dim) { return key_stride(dim); }
  static int64_t key_stride(int64_t dim) { return round_up(dim, rows) / 2; }
  static int64_t value_rows(int64_t keys) { return (keys + 1) / 2; }

  static U queries(const bfloat16* from, int64_t stride, int64_t count, int64_t dim, float, float* to) {
    U max_bits{};
    transpose_panel(depth(dim), to, [=, &max_bits](int64_t q, int64_t d) {
      const U pairs = q < count && 2 * d < dim ? load_pairs(from + q * stride + 2 * d, dim - 2 * d) : U{};
      max_bits = larger(max_bits, magnitude(pairs));
      return as_float(pairs);
    });
    return max_bits;
  }
  static U keys(const bfloat16* from, int64_t stride, int64_t count, int64_t dim, float* to) {
    U max_bits{};
    const int64_t width = key_stride(dim);
    for (int64_t i = 0; i < round_up(count, rows); ++i) {
      for (int64_t d = 0; d < width; d += W) {
        const U pairs = i < count && 2 * d < dim ? load_pairs(from + i * stride + 2 * d, dim - 2 * d) : U{};
        max_bits = larger(max_bits, magnitude(pairs));
        store(to + i * width + d, as_float(pairs), active_lanes(width - d));
      }
    }
    return max_bits;
  }
  // a pair holds the numbers of two consecutive keys
  static U values(const bfloat16* from, int64_t stride, int64_t count, int64_t dim, float* to) {
    U max_bits{};
    const int64_t padded_dim = round_up(dim, rows);
    for (int64_t i = 0; i < count; i += 2) {
      for (int64_t d = 0; d < padded_dim; d += W) {
        const auto word = [=](int64_t key) {
          return key < count && d < dim ? as_bits(load(from + key * stride + d, active_lanes(dim - d))) : U{};
        };
        const U pairs = word(i) >> 16 | word(i + 1);
        max_bits = larger(max_bits, magnitude(pairs));
        store(to + i / 2 * padded_dim + d, as_float(pairs), active_lanes(padded_dim - d));
      }
    }
    return max_bits;
  }
  SOLA_FORCED static Total exponentiate(float* scores, int64_t keys, const Reference& reference) {
    Total total{};
#pragma GCC unroll 2
    for (int64_t j = 0; j < keys; j += 2) {
      const float* const at = scores + j * panel;  // keys beyond the last token have masked_score
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
