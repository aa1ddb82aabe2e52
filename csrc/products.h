// SPDX-License-Identifier: Apache-2.0
// Products of a tile of tokens by a weight, for operators that make the tile and use the product while both are in a
// core's own cache: a panel of outputs' weights is packed once, each register of it meets every token of a tile. Sums are
// float32.
#pragma once
#include "elements.h"
#include "tiles.h"

namespace sola::SOLA_ISA {
namespace {

// tokens whose sums a product of float32 holds in registers, of which there are 32 or 16, beside two registers of weights
// and a factor
constexpr int together = register_bytes == 64 ? 12 : 6;
constexpr int64_t tile_tokens = 96;  // as a rule at the most: a multiple of that, and of the matrix unit's 32
constexpr int64_t slice = 384;       // inputs of a weight at a time

// Numbers of a thread [tokens, width], zero at first. Rows take an odd number of the cache's lines, since at multiples of
// large powers of two they would share a few places in it.
template <class T>
struct Tile {
  static constexpr int64_t line = 64 / sizeof(T);
  int64_t stride;
  Buffer<T> numbers;
  Tile(int64_t tokens, int64_t width) : stride((up(width, 32) / line | 1) * line), numbers(up(tokens, 32) * stride) {}
  T* row(int64_t t) const { return numbers.data + t * stride; }
};

// Tokens and inputs come in such numbers: rows of the tile up to the next multiple of `tokens` exist and are computed
// too, inputs up to the next multiple of `inputs` exist and are zero.
template <class T>
struct Step;
template <>
struct Step<float> {
  static constexpr int64_t tokens = 4, inputs = 1;
};

// the weight of a product [outputs, inputs] in panels [inputs, panel], with zeros for outputs that are not there
template <class T>
struct Packed {
  const T* data;
  int64_t inputs, outputs;
  int64_t panels() const { return (outputs + panel - 1) / panel; }
  // the weights of panel p from input i on, which is a multiple of 32
  const T* at(int64_t p, int64_t i = 0) const { return data + (p * up(inputs, Step<T>::inputs) + i) * panel; }
};

inline void pack_panel(const float* weight, int64_t inputs, int64_t outputs, float* to) {
  gather_panel(weight, inputs, outputs, inputs, 1.0f, to);
}

// sums[t][v] (+)= sum_i left[t * step + i * next] right[i * right_stride + v], i < depth, for `count` rows t. Not inlined:
// where GCC knows the steps it takes adjacent factors as a vector and picks them out again, at half the speed.
template <int count, bool onto>
__attribute__((noinline)) void multiply_rows(const float* left, int64_t step, int64_t next, const float* right,
                                      int64_t right_stride, int64_t depth, float* sums, int64_t sums_stride) {
  F tile[count][wide];
#pragma GCC unroll 16
  for (int t = 0; t < count; ++t) {
    for (int v = 0; v < wide; ++v) tile[t][v] = onto ? widen(sums + t * sums_stride + v * W) : F{};
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
    for (int v = 0; v < wide; ++v) narrow(sums + t * sums_stride + v * W, tile[t][v]);
  }
}

// ---- bfloat16, where the processor multiplies it: pairs of inputs lie side by side, [inputs / 2, panel, 2]

#if defined(__AVX512BF16__)
template <>
struct Step<bfloat16> {
  static constexpr int64_t tokens = 32, inputs = 32;
};

inline void pack_panel(const bfloat16* weight, int64_t inputs, int64_t outputs, bfloat16* to) {
  // a pair moves like a number of float32
  turn_panel(up(inputs, 32) / 2, reinterpret_cast<float*>(to), [=](int64_t o, int64_t pair) {
    const int64_t left = o < outputs ? inputs - 2 * pair : 0;
    bfloat16 row[2 * W] = {};
    const int64_t there = left < 2 * W ? left : 2 * W;
    if (left > 0) memcpy(row, weight + o * inputs + 2 * pair, static_cast<size_t>(there) * sizeof *row);
    F bits;
    memcpy(&bits, row, sizeof bits);
    return bits;
  });
}

#if defined(__AMX_BF16__)

// The processor's matrix unit, set to eight tiles of 16 rows of 64 bytes while this lives; whoever used it before finds
// it as it was.
class MatrixUnit {
  alignas(64) uint8_t before_[64];

 public:
  MatrixUnit() {
    _tile_storeconfig(before_);
    alignas(64) uint8_t tiles[64] = {1};  // the palette
    for (int i = 0; i < 8; ++i) tiles[16 + 2 * i] = 64, tiles[48 + i] = 16;
    memory_is_read_and_written();
    _tile_loadconfig(tiles);
  }
  ~MatrixUnit() {
    memory_is_read_and_written();
    _tile_loadconfig(before_);
  }
  MatrixUnit(const MatrixUnit&) = delete;
  // which GCC does not know of the instructions around it
  static void memory_is_read_and_written() { __asm__ volatile("" ::: "memory"); }
};

// 32 tokens by a panel: tiles 0 to 3 are sums, 4 and 5 tokens, 6 and 7 weights. Addresses are in parentheses, since GCC's
// first macros for these instructions cast only the beginning of what they are given.
template <bool onto>
void multiply_block(const bfloat16* left, int64_t stride, const bfloat16* right, int64_t depth, float* sums,
                    int64_t sums_stride) {
  const size_t row = static_cast<size_t>(stride) * sizeof(bfloat16);
  const size_t of_sums = static_cast<size_t>(sums_stride) * sizeof(float);
  constexpr size_t of_weights = 2 * panel * sizeof(bfloat16);
  float* const below = sums + 16 * sums_stride;
  MatrixUnit::memory_is_read_and_written();
  if constexpr (onto) {
    _tile_loadd(0, sums, of_sums);
    _tile_loadd(1, (sums + 16), of_sums);
    _tile_loadd(2, below, of_sums);
    _tile_loadd(3, (below + 16), of_sums);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < depth; i += 32) {
    _tile_loadd(6, (right + i * panel), of_weights);
    _tile_loadd(7, (right + i * panel + 32), of_weights);
    _tile_loadd(4, (left + i), row);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, (left + 16 * stride + i), row);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, of_sums);
  _tile_stored(1, (sums + 16), of_sums);
  _tile_stored(2, below, of_sums);
  _tile_stored(3, (below + 16), of_sums);
  MatrixUnit::memory_is_read_and_written();
}

#else

template <bool onto>
void multiply_block(const bfloat16* left, int64_t stride, const bfloat16* right, int64_t depth, float* sums,
                    int64_t sums_stride) {
  constexpr int count = 8;
  for (int64_t first = 0; first < 32; first += count, left += count * stride, sums += count * sums_stride) {
    __m512 tile[count][wide];
#pragma GCC unroll 8
    for (int t = 0; t < count; ++t) {
      for (int v = 0; v < wide; ++v) tile[t][v] = onto ? (__m512)widen(sums + t * sums_stride + v * W) : (__m512)F{};
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
      for (int v = 0; v < wide; ++v) narrow(sums + t * sums_stride + v * W, (F)tile[t][v]);
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
  MatrixUnit() {}  // nothing to set
};
#endif

// ---- a panel's product for a tile's tokens

// `rows` of them; rows of left and sums up to a multiple of 4 exist
template <bool onto>
SOLA_FORCED inline void multiply_all(const float* left, int64_t step, int64_t next, int64_t rows, const float* right,
                                     int64_t right_stride, int64_t depth, float* sums, int64_t sums_stride) {
  int64_t t = 0;
  for (; t + together <= rows; t += together, left += together * step, sums += together * sums_stride) {
    multiply_rows<together, onto>(left, step, next, right, right_stride, depth, sums, sums_stride);
  }
  if (together > 8 && rows - t > 4) {
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

// sums [rows, panel] += left^T right over tokens: the gradient of a weight, of which left [tokens, rows] has the outputs
inline void multiply_transposed(const float* left, int64_t stride, int64_t rows, const float* right, int64_t right_stride,
                                int64_t tokens, float* sums, int64_t sums_stride) {
  multiply_all<true>(left, 1, stride, rows, right, right_stride, tokens, sums, sums_stride);
}

}  // namespace
}  // namespace sola::SOLA_ISA
