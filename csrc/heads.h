// SPDX-License-Identifier: Apache-2.0
// Where a head's rows lie in the arrays of attention, and how its queries, keys and values become numbers that fit.
#pragma once
#include "attention.h"
#include "exponential.h"
#include "memory.h"
#include "parallel.h"
#include "tiles.h"

namespace sola::SOLA_ISA {
namespace {

constexpr int64_t block = 64;     // keys whose scores by a panel of queries exist at a time
constexpr float largest = 1e30f;  // of products and values; what is larger takes the plain loops in float64
constexpr float largest_score = 4e6f;  // relative to which powers of two are right (exponential.h)

constexpr float log2_e = 1.44269504f;  // scores are multiplied by it, since 2^x takes fewer steps than e^x

template <class T>
struct Head {
  const T *query, *key, *value, *out, *grad;  // of the first token
  T *to_out, *to_query, *to_key, *to_value;
  float* lse;
  int64_t tokens, dim, stride, out_stride;  // from token to token

  Head(const Attention& a, int64_t number) : tokens(a.tokens), dim(a.head_dim) {
    const int64_t image = number / a.heads, head = number % a.heads, width = a.heads * a.head_dim;
    stride = 3 * width, out_stride = width;
    const int64_t from = image * tokens * stride + head * dim, to = image * tokens * width + head * dim;
    query = static_cast<const T*>(a.qkv) + from, key = query + width, value = key + width;
    to_out = static_cast<T*>(a.out) + to, out = to_out;
    grad = a.grad ? static_cast<const T*>(a.grad) + to : nullptr;
    to_query = a.grad_qkv ? static_cast<T*>(a.grad_qkv) + from : nullptr;
    to_key = a.grad_qkv ? to_query + width : nullptr, to_value = a.grad_qkv ? to_key + width : nullptr;
    lse = a.lse + number * tokens;
  }

  float scale() const { return 1.0f / __builtin_sqrtf(static_cast<float>(dim)); }
};

// numbers of some rows in float64, for the plain loops
template <class T>
void to_doubles(const T* from, int64_t stride, int64_t count, int64_t width, double* to) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < width; ++d) to[i * width + d] = static_cast<double>(load(from + i * stride + d, 1)[0]);
  }
}

template <class T>
void from_double(T* to, double number) {
  store(to, splat(static_cast<float>(number)), 1);
}

// weights of all keys for one query into `weights`; the logarithm of the sum of exp(scores)
inline double weights_of(const double* query, const double* keys, int64_t tokens, int64_t dim, double* weights) {
  const double scale = 1.0 / __builtin_sqrt(static_cast<double>(dim));
  double most = -__builtin_inf(), total = 0.0;
  for (int64_t j = 0; j < tokens; ++j) {
    double s = 0.0;
    for (int64_t d = 0; d < dim; ++d) s += query[d] * keys[j * dim + d];
    weights[j] = s * scale;
    most = weights[j] > most ? weights[j] : most;
  }
  for (int64_t j = 0; j < tokens; ++j) {
    const double below = weights[j] - most;
    total += weights[j] = below < -708.0 ? 0.0 : exp(below);  // NaN stays NaN
  }
  for (int64_t j = 0; j < tokens; ++j) weights[j] /= total;
  return most + __builtin_log(total);
}

// whether products of rows stay within a bound
inline bool fits(U left, U right, int64_t dim, float most) {
  const float root = __builtin_sqrtf(most / static_cast<float>(dim));
  return fits(left, root) && fits(right, root);
}

// zeros, for the plain loops
class Doubles {
  Buffer<double> memory_;
  double* next_;

 public:
  explicit Doubles(int64_t count) : memory_(count), next_(memory_.data) {}
  double* take(int64_t count) {
    double* const piece = next_;
    next_ += count;
    return piece;
  }
};

// a thread's memory, in pieces that each begin at a cache line
class Memory {
  Block memory_;
  float* next_;

 public:
  explicit Memory(int64_t floats, int pieces)
      : memory_(static_cast<size_t>(floats + 16 * pieces) * sizeof(float)), next_(memory_.begin<float>()) {}
  float* take(int64_t floats) {
    float* const piece = next_;
    next_ += up(floats, 16);
    return piece;
  }
};

}  // namespace
}  // namespace sola::SOLA_ISA
