// SPDX-License-Identifier: Apache-2.0
// Operations on one register of elements of any type, in the precision of the arithmetic: float32, or float64 for
// float64.
#pragma once
#include "exponential.h"
#include "memory.h"

namespace sola::SOLA_ISA {
namespace {

template <class T>
struct Lane {
  using Vector = F;
  using Scalar = float;
  using Mask = I;
};
template <>
struct Lane<double> {
  using Vector = D;
  using Scalar = double;
  using Mask = DU;
};
template <class T>
using V = typename Lane<T>::Vector;
template <class T>
using S = typename Lane<T>::Scalar;
template <class T>
constexpr int64_t lanes = register_bytes / sizeof(S<T>);

template <class T>
V<T> get(const T* a, int64_t n = lanes<T>) {
  if (__builtin_expect(n >= lanes<T>, 1)) return widen(a);
  T part[lanes<T>] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = a[i];
  return widen(part);
}

template <class T>
void put(T* a, V<T> v, int64_t n = lanes<T>) {
  if (__builtin_expect(n >= lanes<T>, 1)) return narrow(a, v);
  T part[lanes<T>];
  narrow(part, v);
  for (int64_t i = 0; i < n; ++i) a[i] = part[i];
}

// Non-temporal stores of a whole register to an aligned address. `streaming_fence` orders them before subsequent
// operations.
#if defined(__AVX512F__)
inline void stream(float* a, F v) { _mm512_stream_ps(a, (__m512)v); }
#elif defined(__AVX2__)
inline void stream(float* a, F v) { _mm256_stream_ps(a, (__m256)v); }
#else
inline void stream(float* a, F v) { narrow(a, v); }
#endif
inline void stream(bfloat16* a, F v) {
#if defined(__AVX512F__)
  alignas(32) bfloat16 part[W];
  narrow(part, v);
  _mm256_stream_si256((__m256i*)a, _mm256_load_si256((const __m256i*)part));
#else
  narrow(a, v);
#endif
}
// Results larger than the caches are streamed; an ordinary store would first read each cache line.
template <class T>
bool use_streaming(int64_t tokens, int64_t outputs) {
  return tokens * outputs * static_cast<int64_t>(sizeof(T)) > int64_t{16} << 20;
}
// true if rows of this stride and width consist of whole, aligned registers
template <class T>
bool aligned_rows(const T* to, int64_t stride, int64_t width) {
  const uintptr_t alignment = reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>((stride | width) * sizeof(T));
  return alignment % (W * sizeof(T)) == 0;
}
inline void streaming_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// the sum of all lanes
#if defined(__AVX512F__)
inline float sum(F v) { return _mm512_reduce_add_ps((__m512)v); }
inline double sum(D v) { return _mm512_reduce_add_pd((__m512d)v); }
#else
template <class Vec>
auto sum(Vec v) {
  auto first = v[0], second = v[1];
  for (size_t i = 2; i < sizeof v / sizeof first; i += 2) first += v[i], second += v[i + 1];
  return first + second;
}
#endif

inline float square_root(float a) { return __builtin_sqrtf(a); }
inline double square_root(double a) { return __builtin_sqrt(a); }

// 1 / (1 + exp(-a)); for |a| > 44 the result is 0 or 1 to within 1e-19
inline F sigmoid(F a) {
  F inside = a < -44.0f ? splat(-44.0f) : a;
  inside = inside > 44.0f ? splat(44.0f) : inside;
  const F result = reciprocal(1.0f + exp(F{} - inside));
  return a == a ? result : a;
}
inline D sigmoid(D a) {
  const D result = 1.0 / (1.0 + exp_float64<D, DU>(D{} - a));
  return a == a ? result : a;
}

// max(a, 0); propagates NaN
template <class Vec>
Vec relu(Vec a) {
  return a <= 0 ? Vec{} : a;
}

}  // namespace
}  // namespace sola::SOLA_ISA
