// SPDX-License-Identifier: Apache-2.0
// Where a head's rows lie in the arrays of attention, and how its queries, keys and values become numbers that fit.
#pragma once
#include "attention.h"
#include "parallel.h"
#include "tiles.h"

namespace sola::SOLA_ISA {
namespace {

constexpr int64_t block = 64;      // keys whose scores by a panel of queries exist at a time
constexpr float largest = 1e30f;   // of products and values; what is larger takes the plain loops in float64
constexpr float smallest = -44.0f;  // exp_limit: weights below e^-44 count as that, nothing beside the largest one's 1

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

  // s_ij for all j into `scores`, and the largest
  double scores_of(int64_t i, double* scores) const {
    const double scale = 1.0 / __builtin_sqrt(static_cast<double>(dim));
    double most = -__builtin_inf();
    for (int64_t j = 0; j < tokens; ++j) {
      double s = 0.0;
      for (int64_t d = 0; d < dim; ++d) s += number(query + i * stride + d) * number(key + j * stride + d);
      scores[j] = s * scale;
      most = scores[j] > most ? scores[j] : most;
    }
    return most;
  }

  static double number(const T* a) { return static_cast<double>(load(a, 1)[0]); }
  static void write(T* a, double number) { store(a, splat(static_cast<float>(number)), 1); }
};

// whether scores stay finite, and sums of values
inline bool fits(U queries, U keys, U values, int64_t dim) {
  const float most = __builtin_sqrtf(largest / static_cast<float>(dim));
  return fits(queries, most) && fits(keys, most) && fits(values, largest);
}

// e to the power of what is below zero; weights of the robust path, where NaN stays NaN
inline double weight(double below) { return below < -708.0 ? 0.0 : exp(below); }

// a thread's memory, in pieces that each begin at a cache line
class Memory {
  void* memory_;
  float* next_;

 public:
  explicit Memory(int64_t floats, int pieces) {
    memory_ = malloc(static_cast<size_t>(floats + 16 * (pieces + 1)) * sizeof(float));
    if (!memory_) abort();
    next_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_) + 63) & ~uintptr_t{63});
  }
  float* take(int64_t floats) {
    float* const piece = next_;
    next_ += up(floats, 16);
    return piece;
  }
  ~Memory() { free(memory_); }
  Memory(const Memory&) = delete;
};

}  // namespace
}  // namespace sola::SOLA_ISA
