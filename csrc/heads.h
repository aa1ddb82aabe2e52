// SPDX-License-Identifier: Apache-2.0
// The memory layout of a head in the arrays of attention, conversions to float64, and limits of the float32 path.
#pragma once
#include "attention.h"
#include "exponential.h"
#include "memory.h"
#include "parallel.h"
#include "tiles.h"

namespace sola::SOLA_ISA {
namespace {

constexpr int64_t block = 64;         // keys whose scores by a panel of queries exist at a time
constexpr float value_limit = 1e30f;  // for products and values; heads beyond it are computed in float64
constexpr float score_limit = 4e6f;   // magnitudes up to which `power` is accurate (exponential.h)

constexpr float log2_e = 1.44269504f;  // scores are scaled by it, because 2^x takes fewer instructions than e^x

template <class T>
struct Head {
  const T *query, *key, *value, *out, *grad;  // at the first token
  T *to_out, *to_query, *to_key, *to_value;
  float* lse;
  int64_t tokens, dim, stride, out_stride;  // strides between tokens

  Head(const Attention& a, int64_t index) : tokens(a.tokens), dim(a.head_dim) {
    const int64_t image = index / a.heads, head = index % a.heads, width = a.heads * a.head_dim;
    stride = 3 * width, out_stride = width;
    const int64_t from = image * tokens * stride + head * dim, to = image * tokens * width + head * dim;
    query = static_cast<const T*>(a.qkv) + from, key = query + width, value = key + width;
    to_out = static_cast<T*>(a.out) + to, out = to_out;
    grad = a.grad ? static_cast<const T*>(a.grad) + to : nullptr;
    to_query = a.grad_qkv ? static_cast<T*>(a.grad_qkv) + from : nullptr;
    to_key = a.grad_qkv ? to_query + width : nullptr, to_value = a.grad_qkv ? to_key + width : nullptr;
    lse = a.lse + index * tokens;
  }

  float scale() const { return 1.0f / __builtin_sqrtf(static_cast<float>(dim)); }
};

// Convert rows to float64.
template <class T>
void load_doubles(const T* from, int64_t stride, int64_t count, int64_t width, double* to) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < width; ++d) to[i * width + d] = static_cast<double>(load(from + i * stride + d, 1)[0]);
  }
}

template <class T>
void store_double(T* to, double number) {
  store(to, splat(static_cast<float>(number)), 1);
}

// Write the softmax weights of all keys for one query to `weights` and return the log-sum-exp of the scores.
inline double softmax_weights(const double* query, const double* keys, int64_t tokens, int64_t dim, double* weights) {
  const double scale = 1.0 / __builtin_sqrt(static_cast<double>(dim));
  double maximum = -__builtin_inf(), total = 0.0;
  for (int64_t j = 0; j < tokens; ++j) {
    double s = 0.0;
    for (int64_t d = 0; d < dim; ++d) s += query[d] * keys[j * dim + d];
    weights[j] = s * scale;
    maximum = weights[j] > maximum ? weights[j] : maximum;
  }
  for (int64_t j = 0; j < tokens; ++j) {
    const double exponent = weights[j] - maximum;
    total += weights[j] = exponent < -708.0 ? 0.0 : exp(exponent);  // propagates NaN
  }
  for (int64_t j = 0; j < tokens; ++j) weights[j] /= total;
  return maximum + __builtin_log(total);
}

// true if dot products of rows with these magnitudes stay within the limit
inline bool fits(U left, U right, int64_t dim, float limit) {
  const float root = __builtin_sqrtf(limit / static_cast<float>(dim));
  return fits(left, root) && fits(right, root);
}

// zero-initialised scratch memory of the float64 loops
class DoubleArena {
  Buffer<double> memory_;
  double* next_;

 public:
  explicit DoubleArena(int64_t count) : memory_(count), next_(memory_.data) {}
  double* allocate(int64_t count) {
    double* const piece = next_;
    next_ += count;
    return piece;
  }
};

// scratch memory of a thread; every piece starts at a cache line
class Arena {
  AlignedMemory memory_;
  float* next_;

 public:
  explicit Arena(int64_t floats, int pieces)
      : memory_(static_cast<size_t>(floats + 16 * pieces) * sizeof(float)), next_(memory_.begin<float>()) {}
  float* allocate(int64_t floats) {
    float* const piece = next_;
    next_ += round_up(floats, 16);
    return piece;
  }
};

}  // namespace
}  // namespace sola::SOLA_ISA
