// SPDX-License-Identifier: Apache-2.0
// Exponentials of a register of float32: `exp`, with a range check, and `power`, powers of two relative to an integer.
//
// Both add a constant that rounds the argument to a multiple of a unit and leaves n, the number of units, in the low
// bits of the sum. A short polynomial approximates the power of the remainder; that of the n units is formed by integer
// arithmetic on the bits. With AVX-512 the unit is 1/32 of an octave and 2^(i/32) is looked up in a table of two
// registers, so that a quadratic suffices for the remainder. Without it the unit is an octave and the polynomial has
// degree five.
#pragma once
#include "lanes.h"

namespace sola::SOLA_ISA {

#if defined(__AVX512F__)
constexpr int units = 32;  // per octave

// the bits of 2^(i/32)
constexpr uint32_t unit_bits[units] = {
    0x3f800000, 0x3f82cd87, 0x3f85aac3, 0x3f88980f, 0x3f8b95c2, 0x3f8ea43a, 0x3f91c3d3, 0x3f94f4f0,
    0x3f9837f0, 0x3f9b8d3a, 0x3f9ef532, 0x3fa27043, 0x3fa5fed7, 0x3fa9a15b, 0x3fad583f, 0x3fb123f6,
    0x3fb504f3, 0x3fb8fbaf, 0x3fbd08a4, 0x3fc12c4d, 0x3fc5672a, 0x3fc9b9be, 0x3fce248c, 0x3fd2a81e,
    0x3fd744fd, 0x3fdbfbb8, 0x3fe0ccdf, 0x3fe5b907, 0x3feac0c7, 0x3fefe4ba, 0x3ff5257d, 0x3ffa83b3};

// the same times 2^octave, minus the contribution of i to the exponent bits
struct alignas(64) Units {
  uint32_t bits[units];
  explicit constexpr Units(int octave) : bits() {
    for (int i = 0; i < units; ++i) {
      bits[i] = unit_bits[i] + (static_cast<uint32_t>(octave) << 23) - (static_cast<uint32_t>(i) << 18);
    }
  }
};

// 2^(n/32 + octave) for the low bits n; zero in lanes that the mask excludes
template <int octave>
SOLA_FORCED inline F power(U n, __mmask16 mask = 0xffff) {
  static constexpr Units table(octave);
  const __m512i low = _mm512_load_si512(table.bits), high = _mm512_load_si512(table.bits + W);
  const __m512i unit = _mm512_permutex2var_epi32(low, (__m512i)n, high);
  return (F)_mm512_maskz_add_epi32(mask, unit, (__m512i)(n << 18));
}
#else
constexpr int units = 1;
#endif

// exp(a), accurate to 1.8 ulp for |a| <= 1 and to 3.6 ulp for |a| near the limit of 44 (1.1 and 2.5 ulp with fused
// multiply-adds but without the table). For larger |a| and NaN the result is invalid and `range_bits` >= exp_range
// afterwards. The check: 64 octaves are added, so n is within [0, 128) of them exactly if no higher bits differ from
// those of the constant; `range_bits` is the union of the differing bits over all arguments.
constexpr uint32_t exp_range = 128 * units;
constexpr double exp_limit = 44.0;

SOLA_FORCED inline F exp(F a, U& range_bits) {
  constexpr float constant = 12582912.0f + 64 * units;
  const F shifted = a * (units * 1.44269504f) + constant;
  const F r = a - (shifted - constant) * (0.693147181f / units);
  range_bits |= as_bits(shifted) ^ 0x4b400000u;
#if defined(__AVX512F__)
  const F unit = power<-64>(as_bits(shifted));
  return unit * r * (r * 0.5f + 1.0000147f) + unit;
#else
  constexpr float unit = 0x1p-64f;
  const F square = r * r;  // Estrin's scheme: half the dependency chain of Horner's
  const F high = square * (unit * 0.00138146132f) + (r * (unit * 0.00836870982f) + unit * 0.0416683874f);
  const F middle = high * square + (r * (unit * 0.166665207f) + unit * 0.499999935f);
  const F p = middle * square + (r * unit + unit);
  return as_float(as_bits(p) + (as_bits(shifted) << 23));
#endif
}

SOLA_FORCED inline F exp(F a) {
  U range_bits;
  return exp(a, range_bits = U{});
}

// rounds to the nearest integer
inline F round_to_integer(F a) { return (a + 12582912.0f) - 12582912.0f; }

// The integer m that powers of two are relative to. m is subtracted from the rounding constant, which needs no extra
// instruction and is exact up to 2^22, as are m and m - 125.
struct Reference {
  F factor, constant, lower_bound;  // the last one for arguments without the factor
  explicit Reference(F m, F factor = splat(1.0f))
      : factor(factor), constant(12582912.0f / units - m), lower_bound((m - 125.0f) / factor) {}
};

// 2^(s - m) for s = a times the factor of m, accurate to 2e-7 for s up to m + 2; zero for s <= m - 125; without a factor
// exact for integers; NaN gives NaN or zero
SOLA_FORCED inline F power(F a, const Reference& m) {
  const F shifted = a * m.factor + m.constant;
  const F r = a * m.factor - (shifted - m.constant);
#if defined(__AVX512F__)
  const F unit = power<0>(as_bits(shifted), _mm512_cmp_ps_mask((__m512)a, (__m512)m.lower_bound, _CMP_GT_OQ));
  return unit * r * (r * 0.240226507f + 0.693157344f) + unit;
#else
  F p = r * 0.00132029823f + 0.00967495193f;
  p = p * r + 0.0555104738f;
  p = p * r + 0.24022166f;
  p = p * r + 0.693146596f;
  p = p * r + 1.0f;
  p = as_float(as_bits(p) + (as_bits(shifted) << 23));
  return a > m.lower_bound ? p : F{};
#endif
}

}  // namespace sola::SOLA_ISA
