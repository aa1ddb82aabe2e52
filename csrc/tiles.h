// SPDX-License-Identifier: Apache-2.0
// Matrix products in registers, for attention and linear layers: tiles of `rows` by `cols` registers, where numbers of
// the left factor are broadcast and registers of the right factor are adjacent; and panels, which are rows transposed
// to lanes.
#pragma once
#include <cstdlib>

#include "lanes.h"

namespace sola::SOLA_ISA {
namespace {

constexpr int cols = 2;                             // registers in a row of a tile
constexpr int panel = cols * W;                     // numbers in a row of a tile
constexpr int rows = register_bytes == 64 ? 8 : 4;  // enough independent sums to hide the latency of an addition

int64_t round_up(int64_t a, int64_t step) { return (a + step - 1) / step * step; }

// the larger one; a if b is NaN
inline F larger(F a, F b) {
#if defined(__AVX512F__)
  return (F)_mm512_maskz_max_ps(0xffff, (__m512)b, (__m512)a);  // GCC may compile the portable form to two instructions
#else
  return b > a ? b : a;
#endif
}
inline U larger(U a, U b) { return b > a ? b : a; }

// 32-bit words that hold one float32 number
struct Float32Words {
  SOLA_FORCED static F factor(const float* a) { return splat(*a); }
  SOLA_FORCED static F add(F sum, F left, F right) { return sum + left * right; }
};

#if defined(__AVX512BF16__)
// 32-bit words that hold two bfloat16 numbers; both products are added
struct BFloat16Pairs {
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
template <class Kind = Float32Words>
SOLA_FORCED inline void multiply(F (&sums)[rows][cols], const float* left, int64_t step, int64_t next,
                                 const float* right, int64_t stride, int64_t depth) {
  for (int64_t i = 0; i < depth; ++i) {
    const F first = widen(right + i * stride), second = widen(right + i * stride + W);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const F factor = Kind::factor(left + r * step + i * next);
      sums[r][0] = Kind::add(sums[r][0], factor, first), sums[r][1] = Kind::add(sums[r][1], factor, second);
    }
  }
}

// the same, added to a tile in memory
template <class Kind = Float32Words>
__attribute__((noinline)) void multiply_onto(float* sums, int64_t sums_stride, const float* left, int64_t step, int64_t next,
                                      const float* right, int64_t stride, int64_t depth) {
  F tile[rows][cols];
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
struct IndexList {};
template <int n, int... lane>
struct MakeIndexList : MakeIndexList<n - 1, n - 1, lane...> {};
template <int... lane>
struct MakeIndexList<0, lane...> {
  using type = IndexList<lane...>;
};

// One step of a transposition: lanes whose index has bit h are exchanged between a and b.
template <int h, int... lane>
SOLA_FORCED inline void exchange(F& a, F& b, IndexList<lane...>) {
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
      if (!(i & h)) exchange<h>(square[i], square[i + h], typename MakeIndexList<W>::type{});
    }
    transpose<h / 2>(square);
  }
}

inline int active_lanes(int64_t n) { return static_cast<int>(n < W ? n : W); }

// Transpose rows, given as row(q, d): the register of row q from column d on, to [width, panel] at `to`.
template <class Row>
SOLA_FORCED inline void transpose_panel(int64_t width, float* to, const Row& row) {
  for (int64_t q = 0; q < panel; q += W) {
    for (int64_t d = 0; d < width; d += W) {
      F square[W];
      for (int i = 0; i < W; ++i) square[i] = row(q + i, d);
      transpose(square);
      for (int i = 0; i < active_lanes(width - d); ++i) narrow(to + (d + i) * panel + q, square[i]);
    }
  }
}

// Transpose [count, width] at `from`, times scale, to [width, panel] at `to`; columns beyond `count` are zero.
template <class T>
void gather_panel(const T* from, int64_t stride, int64_t count, int64_t width, float scale, float* to) {
  transpose_panel(width, to, [=](int64_t q, int64_t d) {
    return q < count ? load(from + q * stride + d, active_lanes(width - d)) * scale : F{};
  });
}

// The inverse of gather_panel, with a factor per column; columns beyond `count` are not written.
template <class T>
void scatter_panel(const float* from, const Lanes (&factor)[cols], int64_t stride, int64_t count, int64_t width,
                   T* to) {
  for (int64_t q = 0; q < panel && q < count; q += W) {
    for (int64_t d = 0; d < width; d += W) {
      const int n = active_lanes(width - d);
      F square[W];
      for (int i = 0; i < W; ++i) square[i] = i < n ? widen(from + (d + i) * panel + q) * F(factor[q / W]) : F{};
      transpose(square);
      for (int i = 0; i < W && q + i < count; ++i) store(to + (q + i) * stride + d, square[i], n);
    }
  }
}

// Copy [count, width] at `from`, times scale, to [padded_rows, padded_width] at `to`, padded with zeros. Return the
// lane-wise maximum of the magnitudes as bits, where NaN ranks above infinity and infinity above all finite numbers.
template <class T>
U copy_rows(const T* from, int64_t stride, int64_t count, int64_t width, float scale, int64_t padded_rows,
            int64_t padded_width, float* to) {
  U max_bits{};
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < width; d += W) {
      const int n = active_lanes(width - d);
      const F row = load(from + i * stride + d, n) * scale;
      max_bits = larger(max_bits, as_bits(row) & 0x7fffffffu);
      store(to + i * padded_width + d, row, n);
    }
    for (int64_t d = width; d < padded_width; ++d) to[i * padded_width + d] = 0.0f;
  }
  for (int64_t i = count * padded_width; i < padded_rows * padded_width; ++i) to[i] = 0.0f;
  return max_bits;
}

// true if all magnitudes are at most the limit (false for NaN)
inline bool fits(U max_bits, float limit) {
  for (int i = 0; i < W; ++i) {
    const uint32_t bits = max_bits[i];
    float size;
    memcpy(&size, &bits, sizeof size);
    if (!(size <= limit)) return false;
  }
  return true;
}

}  // namespace
}  // namespace sola::SOLA_ISA
