// SPDX-License-Identifier: Apache-2.0
// Products of a tile of tokens by a weight, for operators that compute the tile and consume the product while both are
// in the cache of a core: a panel of output weights is packed once, and each of its registers is multiplied by every
// token of a tile. Sums are float32.
#pragma once
#include "elements.h"
#include "tiles.h"

namespace sola::SOLA_ISA {
namespace {

// The rows whose sums a float32 product keeps in registers, of which there are 32 or 16, in addition to two registers
// of weights and a factor.
constexpr int block_rows = register_bytes == 64 ? 12 : 6;
constexpr int64_t tile_tokens = 96;  // the usual maximum: a multiple of block_rows and of the matrix unit's 32
constexpr int64_t slice = 384;       // inputs of a weight that are processed at a time

// Rows of numbers in memory. Loops that store numbers capture it by value: the compiler has to assume that the stores
// change what a reference refers to.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  T* row(int64_t t) const { return data + t * stride; }
};

// A zero-initialised array [tokens, width] of a thread. The stride is an odd number of cache lines, because rows at
// multiples of large powers of two would map to a few cache sets.
template <class T>
struct Tile {
  static constexpr int64_t line = 64 / sizeof(T);
  int64_t stride;
  Buffer<T> numbers;
  Tile(int64_t tokens, int64_t width)
      : stride((round_up(width, 32) / line | 1) * line), numbers(round_up(tokens, 32) * stride) {}
  T* row(int64_t t) const { return numbers.data + t * stride; }
  Rows<T> rows() const { return {numbers.data, stride}; }
};

// The granularity of a product. Rows of the tile up to the next multiple of `tokens` exist and are computed as well;
// inputs up to the next multiple of `inputs` exist and are zero. Sums are used for a `block` of tokens at a time: few
// enough for the processor to multiply the next block meanwhile.
template <class T>
struct Granularity;
template <>
struct Granularity<float> {
  static constexpr int64_t tokens = 4, inputs = 1, block = 24;
};

// the weight of a product [outputs, inputs] in panels [inputs, panel], zero-padded to whole panels
template <class T>
struct Packed {
  const T* data;
  int64_t inputs, outputs;
  int64_t panels() const { return (outputs + panel - 1) / panel; }
  // the weights of panel p from input i on; i is a multiple of 32
  const T* at(int64_t p, int64_t i = 0) const {
    return data + (p * round_up(inputs, Granularity<T>::inputs) + i) * panel;
  }
};

inline void pack_panel(const float* weight, int64_t inputs, int64_t outputs, float* to) {
  gather_panel(weight, inputs, outputs, inputs, 1.0f, to);
}

// sums[t][v] (+)= sum_i left[t * step + i * next] right[i * right_stride + v], i < depth, for `count` rows t. Not
// inlined: with constant strides GCC loads adjacent factors as a vector and extracts them again, at half the speed.
template <int count, bool onto>
__attribute__((noinline)) void multiply_rows(const float* left, int64_t step, int64_t next, const float* right,
                                      int64_t right_stride, int64_t depth, float* sums, int64_t sums_stride) {
  F tile[count][cols];
#pragma GCC unroll 16
  for (int t = 0; t < count; ++t) {
    for (int v = 0; v < cols; ++v) tile[t][v] = onto ? widen(sums + t * sums_stride + v * W) : F{};
  }
  for (int64_t i = 0; i < depth; ++i) {
    const F first = widen(right + i * right_stride), second = widen(right + i * right_stride + W);
#pragma GCC unroll 16
    for (int t = 0; t < count; ++t) {
      const F factor = splat(left[t * step + i * next]);
      tile[t][0] += factor * first, tile[t][1] += factor * second;
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < count; ++t) {
    for (int v = 0; v < cols; ++v) narrow(sums + t * sums_stride + v * W, tile[t][v]);
  }
}

// ---- bfloat16, if the processor multiplies it: pairs of inputs are adjacent, [inputs / 2, panel, 2]

#if defined(__AVX512BF16__)
template <>
struct Granularity<bfloat16> {
  static constexpr int64_t tokens = 32, inputs = 32, block = 32;
};

inline void pack_panel(const bfloat16* weight, int64_t inputs, int64_t outputs, bfloat16* to) {
  // a pair is moved like a float32 number
  transpose_panel(round_up(inputs, 32) / 2, reinterpret_cast<float*>(to), [=](int64_t o, int64_t pair) {
    const int64_t left = o < outputs ? inputs - 2 * pair : 0;
    bfloat16 row[2 * W] = {};
    const int64_t valid = left < 2 * W ? left : 2 * W;
    if (left > 0) memcpy(row, weight + o * inputs + 2 * pair, static_cast<size_t>(valid) * sizeof *row);
    F bits;
    memcpy(&bits, row, sizeof bits);
    return bits;
  });
}

#if defined(__AMX_BF16__)

// Scope that configures the processor's matrix unit (AMX) with eight tiles of 16 rows of 64 bytes; the destructor
// restores the previous configuration.
class MatrixUnit {
  alignas(64) uint8_t saved_[64];

 public:
  MatrixUnit() {
    _tile_storeconfig(saved_);
    alignas(64) uint8_t tiles[64] = {1};  // the palette
    for (int i = 0; i < 8; ++i) tiles[16 + 2 * i] = 64, tiles[48 + i] = 16;
    compiler_barrier();
    _tile_loadconfig(tiles);
  }
  ~MatrixUnit() {
    compiler_barrier();
    _tile_loadconfig(saved_);
  }
  MatrixUnit(const MatrixUnit&) = delete;
  // GCC does not model the memory accesses of the tile instructions
  static void compiler_barrier() { __asm__ volatile("" ::: "memory"); }
};

// 32 tokens by a panel: tiles 0 to 3 hold sums, 4 and 5 tokens, 6 and 7 weights. Addresses are in parentheses because
// the first macros of GCC for these instructions do not parenthesise their arguments in a cast.
template <bool onto>
void multiply_block(const bfloat16* left, int64_t stride, const bfloat16* right, int64_t depth, float* sums,
                    int64_t sums_stride) {
  const size_t row = static_cast<size_t>(stride) * sizeof(bfloat16);
  const size_t sums_bytes = static_cast<size_t>(sums_stride) * sizeof(float);
  constexpr size_t weights_bytes = 2 * panel * sizeof(bfloat16);
  float* const lower = sums + 16 * sums_stride;
  MatrixUnit::compiler_barrier();
  if constexpr (onto) {
    _tile_loadd(0, sums, sums_bytes);
    _tile_loadd(1, (sums + 16), sums_bytes);
    _tile_loadd(2, lower, sums_bytes);
    _tile_loadd(3, (lower + 16), sums_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < depth; i += 32) {
    _tile_loadd(6, (right + i * panel), weights_bytes);
    _tile_loadd(7, (right + i * panel + 32), weights_bytes);
    _tile_loadd(4, (left + i), row);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, (left + 16 * stride + i), row);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, sums_bytes);
  _tile_stored(1, (sums + 16), sums_bytes);
  _tile_stored(2, lower, sums_bytes);
  _tile_stored(3, (lower + 16), sums_bytes);
  MatrixUnit::compiler_barrier();
}

#else

template <bool onto>
void multiply_block(const bfloat16* left, int64_t stride, const bfloat16* right, int64_t depth, float* sums,
                    int64_t sums_stride) {
  constexpr int count = 8;
  for (int64_t first = 0; first < 32; first += count, left += count * stride, sums += count * sums_stride) {
    __m512 tile[count][cols];
#pragma GCC unroll 8
    for (int t = 0; t < count; ++t) {
      for (int v = 0; v < cols; ++v) tile[t][v] = onto ? (__m512)widen(sums + t * sums_stride + v * W) : (__m512)F{};
    }
    for (int64_t i = 0; i < depth; i += 2) {
      const __m512bh a = (__m512bh)_mm512_loadu_si512(right + i * panel);
      const __m512bh b = (__m512bh)_mm512_loadu_si512(right + i * panel + 32);
#pragma GCC unroll 8
      for (int t = 0; t < count; ++t) {
        int32_t pair;
        memcpy(&pair, left + t * stride + i, sizeof pair);
        const __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
        tile[t][0] = _mm512_dpbf16_ps(tile[t][0], factor, a), tile[t][1] = _mm512_dpbf16_ps(tile[t][1], factor, b);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < count; ++t) {
      for (int v = 0; v < cols; ++v) narrow(sums + t * sums_stride + v * W, (F)tile[t][v]);
    }
  }
}

#endif

template <bool onto>
void multiply_panel(const bfloat16* left, int64_t stride, int64_t tokens, const bfloat16* right, int64_t depth, float* sums,
                    int64_t sums_stride) {
  for (int64_t t = 0; t < tokens; t += 32) {
    multiply_block<onto>(left + t * stride, stride, right, depth, sums + t * sums_stride, sums_stride);
  }
}

#endif

#if !defined(__AMX_BF16__)
struct MatrixUnit {
  MatrixUnit() {}  // nothing to configure
};
#endif

// ---- the product of a panel with the tokens of a tile

// Multiply `rows` rows; rows of left and sums up to the next multiple of 4 exist.
template <bool onto>
SOLA_FORCED inline void multiply_all(const float* left, int64_t step, int64_t next, int64_t rows, const float* right,
                                     int64_t right_stride, int64_t depth, float* sums, int64_t sums_stride) {
  int64_t t = 0;
  for (; t + block_rows <= rows; t += block_rows, left += block_rows * step, sums += block_rows * sums_stride) {
    multiply_rows<block_rows, onto>(left, step, next, right, right_stride, depth, sums, sums_stride);
  }
  if (block_rows > 8 && rows - t > 4) {
    multiply_rows<8, onto>(left, step, next, right, right_stride, depth, sums, sums_stride);
    t += 8, left += 8 * step, sums += 8 * sums_stride;
  }
  if (rows - t > 2) {
    multiply_rows<4, onto>(left, step, next, right, right_stride, depth, sums, sums_stride);
    t += 4, left += 4 * step, sums += 4 * sums_stride;
  }
  if (rows > t) multiply_rows<2, onto>(left, step, next, right, right_stride, depth, sums, sums_stride);
}

template <bool onto>
void multiply_panel(const float* left, int64_t stride, int64_t tokens, const float* right, int64_t depth, float* sums,
                    int64_t sums_stride) {
  multiply_all<onto>(left, stride, 1, tokens, right, panel, depth, sums, sums_stride);
}

// sums [rows, panel] += left^T right over tokens: the gradient of a weight whose outputs are the columns of left
// [tokens, rows]
inline void multiply_transposed(const float* left, int64_t stride, int64_t rows, const float* right, int64_t right_stride,
                                int64_t tokens, float* sums, int64_t sums_stride) {
  multiply_all<true>(left, 1, stride, rows, right, right_stride, tokens, sums, sums_stride);
}

}  // namespace
}  // namespace sola::SOLA_ISA
