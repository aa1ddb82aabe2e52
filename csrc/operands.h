// SPDX-License-Identifier: Apache-2.0
// The packed operands of attention, one block at a time: float32, or pairs of bfloat16 if the processor multiplies such
// pairs: of dimensions in queries and keys, of keys in values and weights. All are arrays of 32-bit words:
//
//   queries [words of a row, panel], keys [block, key_stride], values and weights [words of the keys, padded_dim or
//   panel]
//
// The matrix unit (AMX) reads values as [padded_dim, block / 2]. Words beyond the last key or dimension are zero.
#pragma once
#include "heads.h"
#include "products.h"

namespace sola::SOLA_ISA {
namespace {

constexpr float masked_score = -1e30f;  // the score of keys beyond the last token

struct Total {
  F exact, rounded;  // the sums of the weights, and of the weights as rounded for the product
};

// The scores of `count` keys by a panel of queries, and their maximum; those of keys up to the next multiple of `rows`
// are masked. A word of keys and queries holds one number or two.
template <class Kind>
SOLA_FORCED inline void block_scores(const float* keys, int64_t key_stride, const float* queries, int64_t depth,
                                     int64_t count, float* scores, F (&maximum)[cols]) {
  for (int64_t j = 0; j < count; j += rows) {
    F sums[rows][cols] = {};
    multiply<Kind>(sums, keys + j * key_stride, key_stride, 1, queries, panel, depth);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < cols; ++v) {
        const F s = j + r >= count ? splat(masked_score) : sums[r][v];
        maximum[v] = larger(maximum[v], s);
        narrow(scores + (j + r) * panel + v * W, s);
      }
    }
  }
}

// results [padded_dim, panel] += values' weights
template <class Kind>
inline void add_values(float* results, const float* values, const float* weights, int64_t depth, int64_t padded_dim) {
  for (int64_t d = 0; d < padded_dim; d += rows) {
    multiply_onto<Kind>(results + d * panel, panel, values + d, 1, padded_dim, weights, panel, depth);
  }
}

template <class T>
struct Operands {
  static constexpr bool scaled = true;   // queries are multiplied by the factor of the scores
  static constexpr int64_t step = rows;  // keys and dimensions are padded to a multiple of it

  static int64_t key_stride(int64_t dim) { return round_up(dim, step); }

  static U queries(const T* from, int64_t stride, int64_t count, int64_t dim, float factor, float* to) {
    U max_bits{};
    gather_panel(from, stride, count, dim, factor, to);
    for (int64_t i = 0; i < panel * dim; i += W) max_bits = larger(max_bits, as_bits(widen(to + i)) & 0x7fffffffu);
    return max_bits;
  }
  static U keys(const T* from, int64_t stride, int64_t count, int64_t dim, float* to) {
    return copy_rows(from, stride, count, dim, 1.0f, round_up(count, step), key_stride(dim), to);
  }
  static U values(const T* from, int64_t stride, int64_t count, int64_t dim, float* to) {
    return copy_rows(from, stride, count, dim, 1.0f, count, round_up(dim, step), to);
  }
  SOLA_FORCED static void scores(const float* keys, const float* queries, int64_t count, int64_t dim, float* to,
                                 F (&maximum)[cols]) {
    block_scores<Float32Words>(keys, key_stride(dim), queries, dim, count, to, maximum);
  }
  static void add(float* results, const float* values, const float* weights, int64_t keys, int64_t padded_dim) {
    add_values<Float32Words>(results, values, weights, keys, padded_dim);
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
  static constexpr bool scaled = false;
#if defined(__AMX_BF16__)
  static constexpr int64_t step = 32;
#else
  static constexpr int64_t step = rows;
#endif

  static int64_t key_stride(int64_t dim) { return round_up(dim, step) / 2; }

  static U queries(const bfloat16* from, int64_t stride, int64_t count, int64_t dim, float, float* to) {
    U max_bits{};
    transpose_panel(key_stride(dim), to, [=, &max_bits](int64_t q, int64_t d) {
      const U pairs = q < count && 2 * d < dim ? load_pairs(from + q * stride + 2 * d, dim - 2 * d) : U{};
      max_bits = larger(max_bits, magnitude(pairs));
      return as_float(pairs);
    });
    return max_bits;
  }
  static U keys(const bfloat16* from, int64_t stride, int64_t count, int64_t dim, float* to) {
    U max_bits{};
    const int64_t width = key_stride(dim);
    for (int64_t i = 0; i < round_up(count, step); ++i) {
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
    const int64_t padded_dim = round_up(dim, step);
    const auto word = [=](int64_t key, int64_t d) {
      return key < count && d < dim ? as_bits(load(from + key * stride + d, active_lanes(dim - d))) : U{};
    };
    const auto pairs = [=, &max_bits](int64_t i, int64_t d) {
      const U both = word(2 * i, d) >> 16 | word(2 * i + 1, d);
      max_bits = larger(max_bits, magnitude(both));
      return as_float(both);
    };
#if defined(__AMX_BF16__)
    static_assert(block == 2 * panel);
    transpose_panel(padded_dim, to, pairs);
#else
    for (int64_t i = 0; 2 * i < count; ++i) {
      for (int64_t d = 0; d < padded_dim; d += W) {
        store(to + i * padded_dim + d, pairs(i, d), active_lanes(padded_dim - d));
      }
    }
#endif
    return max_bits;
  }

#if defined(__AMX_BF16__)
  static void scores(const float* keys, const float* queries, int64_t count, int64_t dim, float* to,
                     F (&maximum)[cols]) {
    const int64_t padded_dim = round_up(dim, step);
    multiply_panel<false>(numbers(keys), padded_dim, round_up(count, step), numbers(queries), padded_dim, to, panel);
    for (int64_t j = 0; j < count; ++j) {
      for (int v = 0; v < cols; ++v) maximum[v] = larger(maximum[v], widen(to + j * panel + v * W));
    }
    for (int64_t i = count * panel; i < round_up(count, 2) * panel; ++i) to[i] = masked_score;  // of an odd pair
  }
  static void add(float* results, const float* values, const float* weights, int64_t keys, int64_t padded_dim) {
    multiply_panel<true>(numbers(values), block, padded_dim, numbers(weights), round_up(keys, step), results, panel);
  }
  static const bfloat16* numbers(const float* words) { return reinterpret_cast<const bfloat16*>(words); }
#else
  SOLA_FORCED static void scores(const float* keys, const float* queries, int64_t count, int64_t dim, float* to,
                                 F (&maximum)[cols]) {
    block_scores<BFloat16Pairs>(keys, key_stride(dim), queries, key_stride(dim), count, to, maximum);
  }
  static void add(float* results, const float* values, const float* weights, int64_t keys, int64_t padded_dim) {
    add_values<BFloat16Pairs>(results, values, weights, (keys + 1) / 2, padded_dim);
  }
#endif

  SOLA_FORCED static Total exponentiate(float* scores, int64_t keys, const Reference& reference) {
    Total total{};
#pragma GCC unroll 2
    for (int64_t j = 0; j < keys; j += 2) {
      const float* const at = scores + j * panel;  // the key beyond an odd last one has masked_score
      const F first = power(widen(at), reference), second = power(widen(at + panel), reference);
      // rounds halves up: weights are positive
      const U upper = (as_bits(first) + 0x8000u) & 0xffff0000u, lower = (as_bits(second) + 0x8000u) & 0xffff0000u;
      total.exact += first + second;
      total.rounded += as_float(upper) + as_float(lower);
      narrow(scores + j / 2 * panel, as_float(upper >> 16 | lower));
    }
#if defined(__AMX_BF16__)
    for (int64_t i = (keys + 1) / 2; i < round_up(keys, step) / 2; ++i) narrow(scores + i * panel, F{});
#endif
    return total;
  }
};

#endif

}  // namespace
}  // namespace sola::SOLA_ISA
