// SPDX-License-Identifier: Apache-2.0
// The element-wise passes around the operator, as plain-data problems (see wkv.h).
#pragma once
#include <cstdint>

#include "wkv.h"

namespace sola {

// out_m = mix_m n + (1 - mix_m) shift(n), where n is the layer norm of x over its channels
struct Shift {
  int64_t images = 0, height = 0, width = 0, channels = 0, mixes = 0;
  int64_t top = 0, bottom = 0;  // halo rows of x: neighbours of the shift without a result
  double eps = 0.0;
  const double *weight = nullptr, *bias = nullptr, *mix = nullptr;  // [channels], [channels], [mixes, channels]
  const void* x = nullptr;  // [images, height, width, channels]
  void* out = nullptr;      // [mixes, images, height - top - bottom, width, channels]
  // backward only, where top and bottom are 0:
  const void* grad = nullptr;  // like out
  void* grad_x = nullptr;      // like x
  double* partial = nullptr;   // [bands, 2 + mixes, channels]: partial sums of weight, bias and mix per band
};

// Images are divided into bands of rows independently of the number of threads, so sums over tokens always have the
// same order. static: each file needs its own copy, see lanes.h
constexpr int64_t band_rows = 16;
static inline int64_t bands(const Shift& s) { return s.images * ((s.height - s.top - s.bottom + band_rows - 1) / band_rows); }

// contiguous arrays; those that a pass does not use are null
struct Pointwise {
  int64_t count = 0;
  const void *residual = nullptr, *receptance = nullptr, *value = nullptr, *grad = nullptr;
  void *out = nullptr, *grad_receptance = nullptr, *grad_value = nullptr;
};

struct Passes {
  void (*shift)(const Shift&, Type, ParallelFor);
  void (*shift_backward)(const Shift&, Type, ParallelFor);
  void (*norm)(const Shift&, Type, ParallelFor);  // out [images, height, width, channels] = n, without mixes
  void (*gate)(const Pointwise&, Type, ParallelFor);           // out = [residual +] sigmoid(receptance) value
  void (*gate_backward)(const Pointwise&, Type, ParallelFor);  // grad_receptance, grad_value
  void (*squared_relu)(const Pointwise&, Type, ParallelFor);   // out = max(value, 0)^2
  void (*squared_relu_backward)(const Pointwise&, Type, ParallelFor);
};

namespace generic {
extern const Passes passes;
}
namespace avx2 {
extern const Passes passes;
}
namespace avx512 {
extern const Passes passes;
}
namespace avx512_bf16 {
extern const Passes passes;
}

}  // namespace sola
