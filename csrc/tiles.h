// SPDX-License-Identifier: Apache-2.0
// Matrix products in registers, for attention and linear layers: tiles of `rows` by `wide` registers, numbers of the left
// factor broadcast, registers of the right one adjacent; and panels, rows of memory turned into columns of lanes.
#pragma once
#include <cstdlib>

#include "lanes.h"

namespace sola::SOLA_ISA {
namespace {

constexpr int wide = 2;                             // registers of a tile's row
constexpr int panel = wide * W;                     // numbers in it
constexpr int rows = register_bytes == 64 ? 8 : 4;  // of a tile: as many sums as hide the latency of an addition

int64_t up(int64_t a, int64_t step) { return (a + step - 1) / step * step; }

// the larger one; a if b is NaN
inline F larger(F a, F b) {
#if defined(__AVX512F__)
  return (F)_mm512_maskz_max_ps(0xffff, (__m512)b, (__m512)a);  // GCC may make two instructions of the other
#else
  return b > a ? b : a;
#endif
}
inline U larger(U a, U b) { return b > a ? b : a; }

// what words of 32 bits are to a product
struct Singles {
  SOLA_FORCED static F factor(const float* a) { return splat(*a); }
  SOLA_FORCED static F add(F sum, F left, F right) { return sum + left * right; }
};

#if defined(__AVX512BF16__)
// two numbers of bfloat16, whose products are both added
struct Pairs {
  SOLA_FORCED static F factor(const float* a) {
    int32_t bits;
    memcpy(&bits, a, sizeof bits);
    return (F)_mm512_set1_epi32(bits);
  }
  SOLA_FORCED static F add(F sum, F left, F right) {
    return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
  }
};
#endif

// sums[r][v] += sum_i left[r * step + i * next] right[i * stride + v], i < depth
template <class Kind = Singles>
SOLA_FORCED inline void multiply(F (&sums)[rows][wide], const float* left, int64_t step, int64_t next, const float* right,
                                 int64_t stride, int64_t depth) {
  for (int64_t i = 0; i < depth; ++i) {
    const F first = widen(right + i * stride), second = widen(right + i * stride + W);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const F factor = Kind::factor(left + r * step + i * next);
      sums[r][0] = Kind::add(sums[r][0], factor, first), sums[r][1] = Kind::add(sums[r][1], factor, second);
    }
  }
}

// the same onto a tile in memory
template <class Kind = Singles>
__attribute__((noinline)) void multiply_onto(float* sums, int64_t sums_stride, const float* left, int64_t step, int64_t next,
                                      const float* right, int64_t stride, int64_t depth) {
  F tile[rows][wide];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    tile[r][0] = widen(sums + r * sums_stride), tile[r][1] = widen(sums + r * sums_stride + W);
  }
  multiply<Kind>(tile, left, step, next, right, stride, depth);
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    narrow(sums + r * sums_stride, tile[r][0]), narrow(sums + r * sums_stride + W, tile[r][1]);
  }
}

// ---- panels

template <int... lane>
struct Order {};
template <int n, int... lane>
struct Count : Count<n - 1, n - 1, lane...> {};
template <int... lane>
struct Count<0, lane...> {
  using order = Order<lane...>;
};

// one step of a transposition: lanes whose number has bit h change sides
template <int h, int... lane>
SOLA_FORCED inline void exchange(F& a, F& b, Order<lane...>) {
#if defined(__clang__) || __GNUC__ >= 12
  const F low = __builtin_shufflevector(a, b, (lane & h ? W + lane - h : lane)...);
  b = __builtin_shufflevector(a, b, (lane & h ? W + lane : lane + h)...);
#else
  const F low = __builtin_shuffle(a, b, I{(lane & h ? W + lane - h : lane)...});
  b = __builtin_shuffle(a, b, I{(lane & h ? W + lane : lane + h)...});
#endif
  a = low;
}

template <int h = W / 2>
SOLA_FORCED inline void transpose(F (&square)[W]) {
  if constexpr (h > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (!(i & h)) exchange<h>(square[i], square[i + h], typename Count<W>::order{});
    }
    transpose<h / 2>(square);
  }
}

inline int at_most_W(int64_t n) { return static_cast<int>(n < W ? n : W); }

// rows of which row(q, d) is a register from number d on -> [width, panel] at `to`
template <class Row>
SOLA_FORCED inline void turn_panel(int64_t width, float* to, const Row& row) {
  for (int64_t q = 0; q < panel; q += W) {
    for (int64_t d = 0; d < width; d += W) {
      F square[W];
      for (int i = 0; i < W; ++i) square[i] = row(q + i, d);
      transpose(square);
      for (int i = 0; i < at_most_W(width - d); ++i) narrow(to + (d + i) * panel + q, square[i]);
    }
  }
}

// [count, width] at `from`, times scale -> [width, panel] at `to`; columns that are missing are zero
template <class T>
void gather_panel(const T* from, int64_t stride, int64_t count, int64_t width, float scale, float* to) {
  turn_panel(width, to, [=](int64_t q, int64_t d) {
    return q < count ? load(from + q * stride + d, at_most_W(width - d)) * scale : F{};
  });
}

// the opposite, each column times its own factor; columns from `count` on are not written
template <class T>
void scatter_panel(const float* from, const Lanes (&factor)[wide], int64_t stride, int64_t count, int64_t width, T* to) {
  for (int64_t q = 0; q < panel && q < count; q += W) {
    for (int64_t d = 0; d < width; d += W) {
      const int n = at_most_W(width - d);
      F square[W];
      for (int i = 0; i < W; ++i) square[i] = i < n ? widen(from + (d + i) * panel + q) * F(factor[q / W]) : F{};
      transpose(square);
      for (int i = 0; i < W && q + i < count; ++i) store(to + (q + i) * stride + d, square[i], n);
    }
  }
}

// [count, width] at `from`, times scale -> [wanted, tall] at `to`, zero beyond. What is largest in them: bits of
// magnitudes, among which NaN is above infinity and that above all numbers.
template <class T>
U copy_rows(const T* from, int64_t stride, int64_t count, int64_t width, float scale, int64_t wanted, int64_t tall,
            float* to) {
  U seen{};
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < width; d += W) {
      const int n = at_most_W(width - d);
      const F row = load(from + i * stride + d, n) * scale;
      seen = larger(seen, as_bits(row) & 0x7fffffffu);
      store(to + i * tall + d, row, n);
    }
    for (int64_t d = width; d < tall; ++d) to[i * tall + d] = 0.0f;
  }
  for (int64_t i = count * tall; i < wanted * tall; ++i) to[i] = 0.0f;
  return seen;
}

// whether all are numbers up to `most`
inline bool fits(U seen, float most) {
  for (int i = 0; i < W; ++i) {
    const uint32_t bits = seen[i];
    float size;
    memcpy(&size, &bits, sizeof size);
    if (!(size <= most)) return false;
  }
  return true;
}

}  // namespace
}  // namespace sola::SOLA_ISA
