// SPDX-License-Identifier: Apache-2.0
// One SIMD register of channels: the compiler's vector types (GCC and Clang), and loads and stores that convert. There
// are few intrinsics, so the same source compiles to SSE2, AVX2, AVX-512 and NEON. Everything is in the namespace of
// its instruction set, and nothing of the C++ standard library is used: the linker keeps one copy of an inline
// function, and a copy compiled for AVX-512 must not be called on other CPUs.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// forced inlining: a call in the innermost loop would reload its constants for every token
#define SOLA_FORCED __attribute__((always_inline))

namespace sola::SOLA_ISA {

#if defined(__AVX512F__)
constexpr int register_bytes = 64;
#elif defined(__AVX2__)
constexpr int register_bytes = 32;
#else
constexpr int register_bytes = 16;
#endif
constexpr int W = register_bytes / 4;  // the number of lanes, i.e. of channels processed at once

typedef float F __attribute__((vector_size(register_bytes)));
typedef int32_t I __attribute__((vector_size(register_bytes)));
typedef uint32_t U __attribute__((vector_size(register_bytes)));
typedef uint16_t H __attribute__((vector_size(register_bytes / 2)));

// the same in memory, for loops over lanes, which compilers vectorise better than loops over the elements of F
struct alignas(register_bytes) Lanes {
  float at[W];
  operator F() const {
    F f;
    memcpy(&f, at, sizeof f);
    return f;
  }
  Lanes& operator=(F f) {
    memcpy(at, &f, sizeof f);
    return *this;
  }
};

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline F splat(float a) { return a - F{}; }
inline F as_float(U a) { return reinterpret_cast<F>(a); }
inline U as_bits(F a) { return reinterpret_cast<U>(a); }

// max(m, |a|); a NaN in `a` may or may not be propagated here, but the results that depend on it are NaN in any case
inline F max_abs(F m, F a) {
#if defined(__AVX512F__)
  return (F)_mm512_maskz_range_ps(0xffff, (__m512)m, (__m512)a, 0b1011);
#else
  const I magnitude = reinterpret_cast<I>(as_bits(a) & 0x7fffffffu), maximum = reinterpret_cast<I>(m);
  return reinterpret_cast<F>(magnitude > maximum ? magnitude : maximum);
#endif
}

// true for zero itself, but not for subnormal numbers, which compare equal to zero in some floating-point modes
inline bool is_zero(float a) {
  uint32_t bits;
  memcpy(&bits, &a, sizeof bits);
  return bits == 0;
}

// 1 / a to about 1 ulp, if neither a nor 1 / a is subnormal; avoids a division, which would be the slowest step
inline F reciprocal(F a) {
#if defined(__AVX512F__)
  const F rough = (F)_mm512_maskz_rcp14_ps(0xffff, (__m512)a);  // GCC warns about the unmasked form
  return rough + rough * (1.0f - a * rough);
#else
  return 1.0f / a;
#endif
}

// exp(a) in double precision, for one number or a vector; propagates NaN. Below -708 the result is 3e-308 instead of
// less, which is negligible compared with the 1 in every sum of the float64 path.
template <class A, class Bits>
inline A exp_float64(A a) {
  const A lower = A{} - 708.0, upper = A{} + 709.0;
  a = a < lower ? lower : a;
  a = a > upper ? upper : a;
  const A shifted = a * 1.4426950408889634 + 6755399441055744.0;
  const A n = shifted - 6755399441055744.0;
  const A r = (a - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  A p = A{} + 1.0 / 6227020800.0;
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
  Bits scale;
  memcpy(&scale, &shifted, sizeof scale);
  scale = (scale << 52) + (uint64_t{1023} << 52);
  A factor;
  memcpy(&factor, &scale, sizeof factor);
  return p * factor;
}

inline double exp(double a) { return exp_float64<double, uint64_t>(a); }

// the lanes in double precision, which take two registers
typedef double D __attribute__((vector_size(register_bytes)));
typedef uint64_t DU __attribute__((vector_size(register_bytes)));
typedef float HF __attribute__((vector_size(register_bytes / 2)));

struct Wide {
  D half[2];

  static Wide of(double a) { return {{a - D{}, a - D{}}}; }
  static Wide of(const double (&lanes)[W]) {
    Wide wide;
    memcpy(&wide, lanes, sizeof wide);
    return wide;
  }
  static Wide of(const Lanes& lanes) {
    Wide wide;
    for (int i = 0; i < 2; ++i) {
      HF part;
      memcpy(&part, lanes.at + i * W / 2, sizeof part);
      wide.half[i] = __builtin_convertvector(part, D);
    }
    return wide;
  }
  void round_to(Lanes& lanes) const {
    for (int i = 0; i < 2; ++i) {
      const HF part = __builtin_convertvector(half[i], HF);
      memcpy(lanes.at + i * W / 2, &part, sizeof part);
    }
  }
  double operator[](int lane) const { return half[lane / (W / 2)][lane % (W / 2)]; }
  Wide exp() const { return {{exp_float64<D, DU>(half[0]), exp_float64<D, DU>(half[1])}}; }
  friend Wide operator*(Wide a, Wide b) { return {{a.half[0] * b.half[0], a.half[1] * b.half[1]}}; }
  friend Wide operator+(Wide a, Wide b) { return {{a.half[0] + b.half[0], a.half[1] + b.half[1]}}; }
  friend Wide operator-(Wide a, Wide b) { return {{a.half[0] - b.half[0], a.half[1] - b.half[1]}}; }
};

// ---- conversions between float32 registers and the element types in memory

inline F widen(const float* a) {
  F f;
  memcpy(&f, a, sizeof f);
  return f;
}

inline void narrow(float* a, F f) { memcpy(a, &f, sizeof f); }

inline D widen(const double* a) {
  D d;
  memcpy(&d, a, sizeof d);
  return d;
}

inline void narrow(double* a, D d) { memcpy(a, &d, sizeof d); }

// Convert between bfloat16 in memory and the low half of each lane; GCC 12 does not vectorise the generic form.
#if defined(__AVX512F__)
inline U spread(const bfloat16* a) { return (U)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)a)); }
inline void gather(bfloat16* a, U bits) {
  _mm256_storeu_si256((__m256i*)a, _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)bits));
}
#elif defined(__AVX2__)
inline U spread(const bfloat16* a) { return (U)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)a)); }
inline void gather(bfloat16* a, U bits) {
  const __m256i pairs = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);  // within each half
  _mm_storeu_si128((__m128i*)a, _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0b1000)));
}
#else
inline U spread(const bfloat16* a) {
  H h;
  memcpy(&h, a, sizeof h);
  return __builtin_convertvector(h, U);
}
inline void gather(bfloat16* a, U bits) {
  const H h = __builtin_convertvector(bits, H);
  memcpy(a, &h, sizeof h);
}
#endif

inline F widen(const bfloat16* a) { return as_float(spread(a) << 16); }

#if defined(__AVX512BF16__)
// the instruction flushes subnormal numbers to zero
inline void narrow(bfloat16* a, F f) { _mm256_storeu_si256((__m256i*)a, (__m256i)_mm512_cvtneps_pbh((__m512)f)); }
#else
inline void narrow(bfloat16* a, F f) {
  const U bits = as_bits(f), even = (bits >> 16) & 1u;
  const U rounded = (bits + 0x7fffu + even) >> 16;
  gather(a, f == f ? rounded : U{} + 0x7fc0u);
}
#endif

#if defined(__AVX512F__)
inline F widen(const float16* a) { return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)a)); }
inline void narrow(float16* a, F f) { _mm256_storeu_si256((__m256i*)a, _mm512_cvtps_ph((__m512)f, 0)); }
#elif defined(__AVX2__)
inline F widen(const float16* a) { return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)a)); }
inline void narrow(float16* a, F f) { _mm_storeu_si128((__m128i*)a, _mm256_cvtps_ph((__m256)f, 0)); }
#else
// half to single: shift the fields into place and rebias the exponent; subnormals are computed without subnormal
// operands
inline F widen(const float16* a) {
  H h;
  memcpy(&h, a, sizeof h);
  const U bits = __builtin_convertvector(h, U), size = (bits & 0x7fffu) << 13, exponent = bits & 0x7c00u;
  const U small = as_bits(as_float(size + (113u << 23)) - 0x1p-14f);
  const U normal = size + ((exponent == 0x7c00u ? U{} + 224u : U{} + 112u) << 23);
  return as_float((exponent == 0u ? small : normal) | (bits & 0x8000u) << 16);
}

// single to half, round to nearest even: normal numbers by integer rounding, subnormals by adding a number whose last
// bit is that of a half; too large numbers become infinity
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

// Flush subnormal results (below 1e-38) to zero within this scope: decayed scan states would otherwise slow down the
// loops. The fast path is only used where such numbers are negligible. Subnormal operands keep their value.
class FlushSubnormals {
#if defined(__x86_64__)
  unsigned before_ = _mm_getcsr();

 public:
  explicit FlushSubnormals(bool on) { _mm_setcsr(on ? (before_ | 0x8000u) & ~0x40u : before_ & ~0x8040u); }
  ~FlushSubnormals() { _mm_setcsr(before_); }
#else
 public:
  explicit FlushSubnormals(bool) {}
  ~FlushSubnormals() {}
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
};

// Load or store the first n of W channels at `a`; the other lanes are zero and are not written.
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
