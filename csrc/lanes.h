// SPDX-License-Identifier: Apache-2.0
// One SIMD register of channels: vector types of the compiler (GCC and Clang), loads and stores that convert, exp.
// No intrinsics but for float16, so the same lines make SSE2, AVX2, AVX-512 and NEON. Everything lies in the namespace
// of its instruction set, and nothing comes from the C++ library: a shared inline function compiled for AVX-512 must
// not be the copy that the linker keeps for everyone.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sola::SOLA_ISA {

#if defined(__AVX512F__)
constexpr int register_bytes = 64;
#elif defined(__AVX2__)
constexpr int register_bytes = 32;
#else
constexpr int register_bytes = 16;
#endif
constexpr int W = register_bytes / 4;  // lanes: channels handled at once

typedef float F __attribute__((vector_size(register_bytes)));
typedef int32_t I __attribute__((vector_size(register_bytes)));
typedef uint32_t U __attribute__((vector_size(register_bytes)));
typedef uint16_t H __attribute__((vector_size(register_bytes / 2)));

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline F splat(float a) { return a - F{}; }
inline F as_float(U a) { return reinterpret_cast<F>(a); }
inline U as_bits(F a) { return reinterpret_cast<U>(a); }

// max(m, |a|) on the bits: as integers NaN is larger than infinity, so a NaN cannot slip through a check
inline F max_abs(F m, F a) {
  const I magnitude = reinterpret_cast<I>(as_bits(a) & 0x7fffffffu), most = reinterpret_cast<I>(m);
  return reinterpret_cast<F>(magnitude > most ? magnitude : most);
}

// exp(a) to about 1 ulp for |a| < 87; anything else is the robust path's business. exp(a) = 2^n exp(r), |r| <= ln(2)/2:
// adding 1.5 * 2^23 rounds to an integer and leaves n in the low bits, whence it is added to the exponent.
inline F exp(F a) {
  const F shifted = a * 1.44269504f + 12582912.0f;
  const F n = shifted - 12582912.0f;
  const F r = (a - n * 0.693359375f) + n * 2.12194440e-4f;
  F p = r * 0.00138146132f + 0.00836870982f;
  p = p * r + 0.0416683874f;
  p = p * r + 0.166665207f;
  p = p * r + 0.499999935f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return as_float(as_bits(p) + (as_bits(shifted) << 23));
}

// exp(a) in double precision for one lane, without branches so that loops over lanes vectorise; NaN stays NaN. Below
// -708 the result is 3e-308 instead of less, which is nothing beside the 1 that every sum here contains.
inline double exp(double a) {
  a = a < -708.0 ? -708.0 : a;
  a = a > 709.0 ? 709.0 : a;
  const double shifted = a * 1.4426950408889634 + 6755399441055744.0;
  const double n = shifted - 6755399441055744.0;
  const double r = (a - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  uint64_t bits, scale;
  memcpy(&bits, &shifted, 8);
  scale = (bits << 52) + (uint64_t{1023} << 52);
  double factor;
  memcpy(&factor, &scale, 8);
  return p * factor;
}

// ---- float32 in registers <-> the element types in memory

inline F widen(const float* a) {
  F f;
  memcpy(&f, a, sizeof f);
  return f;
}

inline void narrow(float* a, F f) { memcpy(a, &f, sizeof f); }

inline F widen(const bfloat16* a) {
  H h;
  memcpy(&h, a, sizeof h);
  return as_float(__builtin_convertvector(h, U) << 16);
}

inline void narrow(bfloat16* a, F f) {
  const U bits = as_bits(f), even = (bits >> 16) & 1u;
  const U rounded = (bits + 0x7fffu + even) >> 16;
  const H h = __builtin_convertvector(f == f ? rounded : U{} + 0x7fc0u, H);
  memcpy(a, &h, sizeof h);
}

#if defined(__AVX512F__)
inline F widen(const float16* a) { return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)a)); }
inline void narrow(float16* a, F f) { _mm256_storeu_si256((__m256i*)a, _mm512_cvtps_ph((__m512)f, 0)); }
#elif defined(__AVX2__)
inline F widen(const float16* a) { return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)a)); }
inline void narrow(float16* a, F f) { _mm_storeu_si128((__m128i*)a, _mm256_cvtps_ph((__m256)f, 0)); }
#else
// half to single: shift the fields into place and move the exponent's bias; subnormals without a subnormal in between
inline F widen(const float16* a) {
  H h;
  memcpy(&h, a, sizeof h);
  const U bits = __builtin_convertvector(h, U), size = (bits & 0x7fffu) << 13, exponent = bits & 0x7c00u;
  const U small = as_bits(as_float(size + (113u << 23)) - 0x1p-14f);
  const U normal = size + ((exponent == 0x7c00u ? U{} + 224u : U{} + 112u) << 23);
  return as_float((exponent == 0u ? small : normal) | (bits & 0x8000u) << 16);
}

// single to half, to nearest even: normal numbers by integer rounding, subnormals by adding a number whose last bit is
// half's last bit, too large ones to infinity
inline void narrow(float16* a, F f) {
  const U bits = as_bits(f), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  const U normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
  const U small = as_bits(as_float(size) + 0.5f) - 0x3f000000u;
  const U finite = size < 0x38800000u ? small : normal;
  const U large = size > 0x7f800000u ? U{} + 0x7e00u : U{} + 0x7c00u;
  const H h = __builtin_convertvector((size >= 0x477ff000u ? large : finite) | sign, H);
  memcpy(a, &h, sizeof h);
}
#endif

// Results below 1e-38 become zero while this lives: decayed states would otherwise crawl through subnormal numbers. The
// fast path is entered only where nothing of that size matters.
class FlushSubnormals {
#if defined(__x86_64__)
  unsigned before_ = _mm_getcsr();

 public:
  explicit FlushSubnormals(bool on) { _mm_setcsr(on ? before_ | 0x8040u : before_ & ~0x8040u); }
  ~FlushSubnormals() { _mm_setcsr(before_); }
#else
 public:
  explicit FlushSubnormals(bool) {}
  ~FlushSubnormals() {}
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
};

// the first n of W channels at a; the others are zero and stay unwritten
template <class T>
inline F load(const T* a, int n) {
  if (__builtin_expect(n == W, 1)) return widen(a);
  T part[W] = {};
  for (int i = 0; i < n; ++i) part[i] = a[i];
  return widen(part);
}

template <class T>
inline void store(T* a, F f, int n) {
  if (__builtin_expect(n == W, 1)) return narrow(a, f);
  T part[W];
  narrow(part, f);
  for (int i = 0; i < n; ++i) a[i] = part[i];
}

template <class T>
inline void load(const T* a, int n, double* out) {
  const F f = load(a, n);
  for (int i = 0; i < W; ++i) out[i] = f[i];
}

template <class T>
inline void store(T* a, const double* in, int n) {
  F f;
  for (int i = 0; i < W; ++i) f[i] = static_cast<float>(in[i]);
  store(a, f, n);
}

inline void load(const double* a, int n, double* out) {
  for (int i = 0; i < W; ++i) out[i] = i < n ? a[i] : 0.0;
}

inline void store(double* a, const double* in, int n) {
  for (int i = 0; i < n; ++i) a[i] = in[i];
}

}  // namespace sola::SOLA_ISA
