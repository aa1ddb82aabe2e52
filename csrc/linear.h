// SPDX-License-Identifier: Apache-2.0
// Matrix products with the passes before and after them, as problems in plain data (see wkv.h). A token's normalised,
// shifted, gated or hidden values exist in a core's own cache only.
#pragma once
#include <cstdint>

#include "passes.h"

namespace sola {

// The weight of a product [outputs, inputs], and memory of packed_size numbers for its panels.
struct Weight {
  const void* data = nullptr;
  int64_t outputs = 0, inputs = 0;
  void* packed = nullptr;
};
constexpr int64_t outputs_of_panel = 32;  // or a divisor of it
// static: each file its own copy, see lanes.h
static inline int64_t packed_size(int64_t outputs, int64_t inputs) {
  return (outputs + outputs_of_panel - 1) / outputs_of_panel * outputs_of_panel * ((inputs + 31) / 32 * 32);
}

// out_m [tokens, outputs_m] = (mix_m n + (1 - mix_m) shift(n)) weight_m^T with n the layer norm of x: 1 to 3 of them
constexpr int64_t most_mixes = 3;
struct ShiftLinear {
  Shift shift;  // its top and bottom are 0, its out is null
  Weight weights[most_mixes];
  void* out[most_mixes] = {};
};

// out [tokens, outputs] = a weight^T, a [tokens, inputs] = sigmoid(receptance) value, or max(value, 0)^2 without a
// receptance
struct ElementLinear {
  int64_t tokens = 0;
  const void *receptance = nullptr, *value = nullptr;
  Weight weight;
  void* out = nullptr;
};

// out [tokens, channels] = x + (sigmoid(r) readout) output^T, where r is the product of the one mix with the receptance's
// weight
struct SpatialMix {
  Shift shift;  // as above, one mix
  Weight receptance, output;
  const void* readout = nullptr;  // [tokens, channels]
  void* out = nullptr;
};

// out [tokens, channels] = x + sigmoid(r) (max(k, 0)^2 value^T), where k and r are the products of the first and second
// mix with the key's and the receptance's weight
struct ChannelMix {
  Shift shift;  // as above, two mixes
  Weight key, receptance, value;
  void* out = nullptr;
};

// The backwards, in float32. A weight's gradient is summed in parts, one for each of `parts` pieces of the tokens, and
// then over those in their order.
struct Gradient {
  Weight weight;  // packed holds [inputs, outputs]
  const float* of_result = nullptr;  // [tokens, outputs]
  float *partial = nullptr, *of_weight = nullptr;  // [parts, outputs, inputs], [outputs, inputs]
};
struct ShiftLinearBackward {
  Shift shift;  // with grad_x and partial, without grad
  Gradient gradients[most_mixes];
  int64_t parts = 1;
};
struct ElementLinearBackward {
  int64_t tokens = 0, parts = 1;
  const float *receptance = nullptr, *value = nullptr;  // as above
  Gradient gradient;
  float *of_receptance = nullptr, *of_value = nullptr;
};

// float32, and bfloat16 where the instruction set has products of it
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
