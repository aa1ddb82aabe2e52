// SPDX-License-Identifier: Apache-2.0
// Matrix products fused with the element-wise passes before and after them, as plain-data problems (see wkv.h). The
// normalised, shifted, gated or hidden values of a token never leave the cache of a core.
#pragma once
#include <cstdint>

#include "passes.h"

namespace sola {

// The weight of a product [outputs, inputs], and memory of packed_size numbers for its packed panels.
struct Weight {
  const void* data = nullptr;
  int64_t outputs = 0, inputs = 0;
  void* packed = nullptr;
};
constexpr int64_t outputs_of_panel = 32;  // a multiple of the panel width of every instruction set
// static: each file needs its own copy, see lanes.h
static inline int64_t packed_size(int64_t outputs, int64_t inputs) {
  return (outputs + outputs_of_panel - 1) / outputs_of_panel * outputs_of_panel * ((inputs + 31) / 32 * 32);
}

// out_m [tokens, outputs_m] = (mix_m n + (1 - mix_m) shift(n)) weight_m^T for 1 to 3 mixes; n is the layer norm of x
constexpr int64_t max_mixes = 3;
struct ShiftLinear {
  Shift shift;  // top and bottom are 0, out is null
  Weight weights[max_mixes];
  void* out[max_mixes] = {};
};

// out [tokens, outputs] = a weight^T with a [tokens, inputs] = sigmoid(receptance) value, or max(value, 0)^2 if
// receptance is null
struct ElementLinear {
  int64_t tokens = 0;
  const void *receptance = nullptr, *value = nullptr;
  Weight weight;
  void* out = nullptr;
};

// out [tokens, channels] = x + (sigmoid(r) readout) output^T, where r is the product of the single mix with the
// receptance weight
struct SpatialMix {
  Shift shift;  // as above, one mix
  Weight receptance, output;
  const void* readout = nullptr;  // [tokens, channels]
  void* out = nullptr;
};

// out [tokens, channels] = x + sigmoid(r) (max(k, 0)^2 value^T), where k and r are the products of the first and second
// mix with the key weight and the receptance weight
struct ChannelMix {
  Shift shift;  // as above, two mixes
  Weight key, receptance, value;
  void* out = nullptr;
};

// The backwards, in float32. The tokens are divided into `parts`; the gradient of a weight is summed per part and then
// over the parts in order.
struct Gradient {
  Weight weight;  // packed as [inputs, outputs]
  const float* grad_output = nullptr;  // [tokens, outputs]
  float *partial = nullptr, *grad_weight = nullptr;  // [parts, outputs, inputs], [outputs, inputs]
};
struct ShiftLinearBackward {
  Shift shift;  // grad_x and partial are set, grad is null
  Gradient gradients[max_mixes];
  int64_t parts = 1;
};
struct ElementLinearBackward {
  int64_t tokens = 0, parts = 1;
  const float *receptance = nullptr, *value = nullptr;  // as in the forward
  Gradient gradient;
  float *grad_receptance = nullptr, *grad_value = nullptr;
};

// float32, and bfloat16 if the instruction set multiplies it
struct Linear {
  bool bfloat16;
  void (*shift)(const ShiftLinear&, Type, ParallelFor);
  void (*element)(const ElementLinear&, Type, ParallelFor);
  void (*spatial_mix)(const SpatialMix&, Type, ParallelFor);
  void (*channel_mix)(const ChannelMix&, Type, ParallelFor);
  const struct LinearBackward* backward;
};
struct LinearBackward {
  void (*shift)(const ShiftLinearBackward&, ParallelFor);
  void (*element)(const ElementLinearBackward&, ParallelFor);
};

namespace generic {
extern const Linear linear;
extern const LinearBackward linear_backward;
}
namespace avx2 {
extern const Linear linear;
extern const LinearBackward linear_backward;
}
namespace avx512 {
extern const Linear linear;
extern const LinearBackward linear_backward;
}
namespace avx512_bf16 {
extern const Linear linear;
}
namespace amx {
extern const Linear linear;
}

}  // namespace sola
