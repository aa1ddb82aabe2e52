// SPDX-License-Identifier: Apache-2.0
// Matrix products fused with the passes before and after them, compiled once per instruction set (see linear.h).
//
// A thread processes its tokens one tile at a time: it computes the left factor of a tile, multiplies blocks of it by
// one panel of a weight after another, and consumes the sums while they are in its cache. The summation order depends
// on neither the tiles nor the number of threads.
#include "linear.h"

#include "parallel.h"
#include "products.h"
#include "shift.h"

namespace sola::SOLA_ISA {
namespace {

constexpr int64_t tile_bytes_limit = 1024 << 10;    // per thread, so that tiles stay in the second-level cache
constexpr int64_t weight_bytes_limit = 2048 << 10;  // larger weights are read again for every tile

// The number of tokens in a tile, given the elements of type T and of float32 that a token takes, and the elements of
// the weights.
template <class T>
int64_t tokens_of_tile(int64_t elements, int64_t float32_elements, int64_t weights) {
  constexpr int64_t min_tokens = sizeof(T) == 4 ? 2 * block_rows : 32, size = sizeof(T);
  const int64_t target = weights * size > weight_bytes_limit ? 2 * tile_tokens : tile_tokens;
  const int64_t max_tokens =
      tile_bytes_limit / (elements * size + float32_elements * int64_t{sizeof(float)} + 1) / min_tokens * min_tokens;
  return max_tokens < min_tokens ? min_tokens : max_tokens < target ? max_tokens : target;
}

template <class T>
Packed<T> packed(const Weight& w) {
  return {static_cast<const T*>(w.packed), w.inputs, w.outputs};
}

template <class T>
void pack(const Weight& w, ParallelFor loop) {
  const Packed<T> to = packed<T>(w);
  parallel(loop, to.panels(), 1 + 32768 / (w.inputs * panel + 1), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      pack_panel(static_cast<const T*>(w.data) + p * panel * w.inputs, w.inputs, w.outputs - p * panel,
                 const_cast<T*>(to.at(p)));
    }
  });
}

// sums (+)= left right^T over `depth` inputs of the weight, starting at `begin`, the input that column 0 of left holds
template <class T>
void multiply(const Tile<T>& left, int64_t tokens, const Packed<T>& right, int64_t begin, int64_t depth,
              const Tile<float>& sums) {
  for (int64_t p = 0; p < right.panels(); ++p) {
    float* const to = sums.row(0) + p * panel;
    if (begin == 0) {
      multiply_panel<false>(left.row(0), left.stride, tokens, right.at(p), depth, to, sums.stride);
    } else {
      multiply_panel<true>(left.row(0), left.stride, tokens, right.at(p, begin), depth, to, sums.stride);
    }
  }
}

// left right^T for some panels, one panel and block of tokens at a time in `sums`: calls use(first token, number of
// tokens, first output, number of outputs) after each
template <class T, class Use>
void each_block(const Tile<T>& left, int64_t tokens, const Packed<T>& right, int64_t begin, int64_t end,
                const Tile<float>& sums, const Use& use) {
  for (int64_t p = begin; p < end; ++p) {
    const int64_t outputs = right.outputs - p * panel < panel ? right.outputs - p * panel : panel;
    for (int64_t t = 0; t < tokens; t += Granularity<T>::block) {
      const int64_t count = tokens - t < Granularity<T>::block ? tokens - t : Granularity<T>::block;
      multiply_panel<false>(left.row(t), left.stride, count, right.at(p), right.inputs, sums.row(0), sums.stride);
      use(t, count, p * panel, outputs);
    }
  }
}

// The arrays [tokens, channels] to prefetch for a tile. If a feature map exceeds the second-level cache, its cache
// lines are prefetched while tokens are mixed and arrive during the products, as does the row that is normalised next.
template <class T>
struct PrefetchPlan {
  const T* read = nullptr;
  const T* written[max_mixes] = {};
};

// Write the mixes of one token to rows, and call prefetch(c) for every register of channels.
template <int mixes, class T, class Prefetch>
SOLA_FORCED inline void mix_token(const Parameters<T>& a, const float* const (&from)[5], T* const (&to)[max_mixes],
                                  const Prefetch& prefetch) {
  const float *const token = from[4], *mix[mixes];
  for (int m = 0; m < mixes; ++m) mix[m] = a.mix(m);
  a.each_shifted(from, [&](int64_t c, F shifted) SOLA_FORCED {
    prefetch(c);
    const F difference = get(token + c) - shifted;
    for (int m = 0; m < mixes; ++m) put(to[m] + c, shifted + get(mix[m] + c) * difference);
  });
}

// Normalise and shift rows `begin` to `end` of all images, one tile of tokens at a time: calls use(first token,
// tokens).
template <class T, class Use>
void each_tile(const Parameters<T>& a, int64_t begin, int64_t end, const Tile<T>* const (&tiles)[max_mixes],
               int64_t tile_size, const PrefetchPlan<T>& plan, const Use& use) {
  const Shift& p = a.p;
  const T* const x = static_cast<const T*>(p.x);
  const Ring<T> ring(p.width * a.padded);
  const Buffer<float> zero(a.padded);
  const bool enabled = p.images * p.height * p.width * p.channels * static_cast<int64_t>(sizeof(T)) > int64_t{4} << 20;
  int64_t filled = 0;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t h = r % p.height;
    const auto compute = [&](int64_t row) {  // a row of the image
      if (row < 0 || row >= p.height) return;
      normalise<T>(a, p.width, x + (r - h + row) * p.width * p.channels, ring[row], nullptr, nullptr);
    };
    if (r == begin || h == 0) compute(h - 1), compute(h);
    compute(h + 1);
    const Neighbours<T> near{h > 0 ? ring[h - 1] : nullptr, ring[h], h + 1 < p.height ? ring[h + 1] : nullptr,
                             zero.data, p.width, a.padded};
    const int64_t rows_ahead = h + 2 < p.height ? 2 : 0;
    const auto prefetch = [&](int64_t token, int64_t c) SOLA_FORCED {
      if (!enabled || c * static_cast<int64_t>(sizeof(T)) % 64 != 0) return;
      const int64_t at = token * p.channels + c;
      __builtin_prefetch(x + at + rows_ahead * p.width * p.channels, 0, 2);
      if (plan.read != nullptr) __builtin_prefetch(plan.read + at, 0, 2);
      for (const T* written : plan.written) {
        if (written != nullptr) __builtin_prefetch(written + at, 1);
      }
    };
    for (int64_t w = 0; w < p.width; ++w) {
      const float* from[5];
      near.of(w, from);
      T* to[max_mixes] = {};
      for (int64_t m = 0; m < p.mixes; ++m) to[m] = tiles[m]->row(filled);
      const auto prefetch_at = [&](int64_t c) SOLA_FORCED { prefetch(r * p.width + w, c); };
      switch (p.mixes) {
        case 1: mix_token<1, T>(a, from, to, prefetch_at); break;
        case 2: mix_token<2, T>(a, from, to, prefetch_at); break;
        default: mix_token<3, T>(a, from, to, prefetch_at);
      }
      if (++filled == tile_size) {
        use(r * p.width + w + 1 - filled, filled);
        filled = 0;
      }
    }
  }
  if (filled > 0) use(end * p.width - filled, filled);
}

// Store element(t, c) to [tokens, width] at `to`, with non-temporal stores if `streaming` is set and rows are aligned.
template <class T, class Element>
void write(T* to, int64_t stride, int64_t tokens, int64_t width, bool streaming, const Element& element) {
  if (streaming && aligned_rows(to, stride, width)) {
    for (int64_t t = 0; t < tokens; ++t, to += stride) {
      for (int64_t c = 0; c < width; c += W) stream(to + c, element(t, c));
    }
    return;
  }
  for (int64_t t = 0; t < tokens; ++t, to += stride) {
    for (int64_t c = 0; c < width; c += W) put(to + c, element(t, c), width - c);
  }
}

int64_t total_rows(const Shift& s) { return s.images * s.height; }
int64_t min_rows(const Shift& s) { return (tile_tokens + s.width - 1) / s.width; }

template <class T>
void shift_of(const ShiftLinear& p, ParallelFor loop) {
  const Parameters<T> a(p.shift);
  const int64_t mixes = p.shift.mixes, channels = p.shift.channels;
  int64_t outputs = 0;
  for (int64_t m = 0; m < mixes; ++m) pack<T>(p.weights[m], loop), outputs += p.weights[m].outputs;
  const bool streaming = use_streaming<T>(total_rows(p.shift) * p.shift.width, outputs);
  parallel(loop, total_rows(p.shift), min_rows(p.shift), [&](int64_t begin, int64_t end) {
    const MatrixUnit unit;
    const int64_t tile_size = tokens_of_tile<T>(mixes * channels, panel, outputs * channels);
    const Tile<T> first(tile_size, channels), second(mixes > 1 ? tile_size : 0, channels),
        third(mixes > 2 ? tile_size : 0, channels);
    const Tile<T>* const tiles[max_mixes] = {&first, &second, &third};
    const Tile<float> sums(Granularity<T>::block, panel);
    PrefetchPlan<T> plan;
    for (int64_t m = 0; m < mixes && !streaming; ++m) {
      if (p.weights[m].outputs == channels) plan.written[m] = static_cast<const T*>(p.out[m]);
    }
    each_tile<T>(a, begin, end, tiles, tile_size, plan, [&](int64_t token, int64_t tokens) {
      for (int64_t m = 0; m < mixes; ++m) {
        const Packed<T> right = packed<T>(p.weights[m]);
        T* const out = static_cast<T*>(p.out[m]) + token * right.outputs;
        each_block(*tiles[m], tokens, right, 0, right.panels(), sums,
                   [&](int64_t first, int64_t count, int64_t output, int64_t width) {
                     write(out + first * right.outputs + output, right.outputs, count, width, streaming,
                           [from = sums.rows()](int64_t t, int64_t c) { return get(from.row(t) + c); });
                   });
      }
    });
    streaming_fence();
  });
}

template <class T>
void element_of(const ElementLinear& p, ParallelFor loop) {
  const Weight& w = p.weight;
  pack<T>(w, loop);
  const T *receptance = static_cast<const T*>(p.receptance), *value = static_cast<const T*>(p.value);
  const bool streaming = use_streaming<T>(p.tokens, w.outputs);
  parallel(loop, p.tokens, tile_tokens, [&](int64_t begin, int64_t end) {
    const MatrixUnit unit;
    const int64_t width = w.inputs < slice ? w.inputs : slice;
    const int64_t tile_size = tokens_of_tile<T>(width, w.outputs, w.inputs * w.outputs);
    const Tile<T> left(tile_size, width);
    const Tile<float> sums(tile_size, w.outputs);
    for (int64_t token = begin; token < end; token += tile_size) {
      const int64_t tokens = end - token < tile_size ? end - token : tile_size;
      for (int64_t s = 0; s < w.inputs; s += slice) {
        const int64_t depth = w.inputs - s < slice ? w.inputs - s : slice;
        const int64_t from = token * w.inputs + s;
        // zero-padded up to the granularity of the product
        write(left.row(0), left.stride, tokens, round_up(depth, Granularity<T>::inputs), false,
              [&](int64_t t, int64_t c) {
                const int64_t at = from + t * w.inputs + c, n = depth - c;
                const F v = n > 0 ? get(value + at, n) : F{};
                if (receptance == nullptr) return relu(v) * relu(v);
                return n > 0 ? sigmoid(get(receptance + at, n)) * v : v;
              });
        multiply(left, tokens, packed<T>(w), s, depth, sums);
      }
      write(static_cast<T*>(p.out) + token * w.outputs, w.outputs, tokens, w.outputs, streaming,
            [from = sums.rows()](int64_t t, int64_t c) { return get(from.row(t) + c); });
    }
    streaming_fence();
  });
}

template <class T>
void spatial_mix_of(const SpatialMix& p, ParallelFor loop) {
  const Parameters<T> a(p.shift);
  pack<T>(p.receptance, loop), pack<T>(p.output, loop);
  const int64_t channels = p.shift.channels;
  const T *x = static_cast<const T*>(p.shift.x), *readout = static_cast<const T*>(p.readout);
  const bool streaming = use_streaming<T>(total_rows(p.shift) * p.shift.width, channels);
  parallel(loop, total_rows(p.shift), min_rows(p.shift), [&](int64_t begin, int64_t end) {
    const MatrixUnit unit;
    const int64_t tile_size = tokens_of_tile<T>(2 * channels, panel, 2 * channels * channels);
    const Tile<T> factor(tile_size, channels), gated(tile_size, channels);
    const Tile<float> sums(Granularity<T>::block, panel);
    const PrefetchPlan<T> plan{readout, {streaming ? nullptr : static_cast<const T*>(p.out)}};
    const Packed<T> receptance = packed<T>(p.receptance), output = packed<T>(p.output);
    each_tile<T>(a, begin, end, {&factor, nullptr, nullptr}, tile_size, plan, [&](int64_t token, int64_t tokens) {
      each_block(factor, tokens, receptance, 0, receptance.panels(), sums,
                 [&](int64_t first, int64_t count, int64_t channel, int64_t width) {
                   const T* const values = readout + (token + first) * channels + channel;
                   write(gated.row(first) + channel, gated.stride, count, width, false,
                         [=, gates = sums.rows()](int64_t t, int64_t c) {
                           return sigmoid(get(gates.row(t) + c)) * get(values + t * channels + c, width - c);
                         });
                 });
      each_block(gated, tokens, output, 0, output.panels(), sums,
                 [&](int64_t first, int64_t count, int64_t channel, int64_t width) {
                   const int64_t from = (token + first) * channels + channel;
                   write(static_cast<T*>(p.out) + from, channels, count, width, streaming,
                         [=, products = sums.rows()](int64_t t, int64_t c) {
                           return get(x + from + t * channels + c, width - c) + get(products.row(t) + c);
                         });
                 });
    });
    streaming_fence();
  });
}

template <class T>
void channel_mix_of(const ChannelMix& p, ParallelFor loop) {
  const Parameters<T> a(p.shift);
  pack<T>(p.key, loop), pack<T>(p.receptance, loop), pack<T>(p.value, loop);
  const Packed<T> key = packed<T>(p.key), receptance = packed<T>(p.receptance), value = packed<T>(p.value);
  const int64_t channels = p.shift.channels, hidden = key.outputs;
  const T* const x = static_cast<const T*>(p.shift.x);
  const bool streaming = use_streaming<T>(total_rows(p.shift) * p.shift.width, channels);
  parallel(loop, total_rows(p.shift), min_rows(p.shift), [&](int64_t begin, int64_t end) {
    const MatrixUnit unit;
    const int64_t width = hidden < slice ? hidden : slice;
    const int64_t tile_size = tokens_of_tile<T>(2 * channels + width, channels, (2 * hidden + channels) * channels);
    const Tile<T> key_tile(tile_size, channels), receptance_tile(tile_size, channels), hidden_tile(tile_size, width);
    const Tile<T>* const tiles[max_mixes] = {&key_tile, &receptance_tile, nullptr};
    const Tile<float> block_sums(Granularity<T>::block, panel), sums(tile_size, channels);
    const PrefetchPlan<T> plan{nullptr, {streaming ? nullptr : static_cast<const T*>(p.out)}};
    each_tile<T>(a, begin, end, tiles, tile_size, plan, [&](int64_t token, int64_t tokens) {
      for (int64_t s = 0; s < hidden; s += slice) {
        const int64_t depth = hidden - s < slice ? hidden - s : slice;
        each_block(key_tile, tokens, key, s / panel, (s + depth + panel - 1) / panel, block_sums,
                   [&](int64_t first, int64_t count, int64_t unit, int64_t) {
                     write(hidden_tile.row(first) + unit - s, hidden_tile.stride, count, panel, false,
                           [from = block_sums.rows()](int64_t t, int64_t c) {
                             const F k = relu(get(from.row(t) + c));
                             return k * k;
                           });
                   });
        multiply(hidden_tile, tokens, value, s, depth, sums);
      }
      each_block(receptance_tile, tokens, receptance, 0, receptance.panels(), block_sums,
                 [&](int64_t first, int64_t count, int64_t channel, int64_t width) {
                   const int64_t from = (token + first) * channels + channel;
                   const float* const values = sums.row(first) + channel;
                   write(static_cast<T*>(p.out) + from, channels, count, width, streaming,
                         [=, gates = block_sums.rows(), stride = sums.stride](int64_t t, int64_t c) {
                           const F residual = get(x + from + t * channels + c, width - c);
                           return residual + sigmoid(get(gates.row(t) + c)) * get(values + t * stride + c);
                         });
                 });
    });
    streaming_fence();
  });
}

#if defined(__AVX512BF16__)
constexpr bool has_bfloat16 = true;
#define SOLA_BY_TYPE(name, Problem)                                        \
  void name(const Problem& p, Type type, ParallelFor loop) {               \
    if (type == Type::bfloat16) return name##_of<bfloat16>(p, loop);       \
    name##_of<float>(p, loop);                                             \
  }
#else
constexpr bool has_bfloat16 = false;
#define SOLA_BY_TYPE(name, Problem) \
  void name(const Problem& p, Type, ParallelFor loop) { name##_of<float>(p, loop); }
#endif
SOLA_BY_TYPE(shift, ShiftLinear)
SOLA_BY_TYPE(element, ElementLinear)
SOLA_BY_TYPE(spatial_mix, SpatialMix)
SOLA_BY_TYPE(channel_mix, ChannelMix)
#undef SOLA_BY_TYPE

}  // namespace

#if defined(__AVX512BF16__)
extern const Linear linear = {has_bfloat16, shift, element, spatial_mix, channel_mix, &avx512::linear_backward};
#else
extern const Linear linear = {has_bfloat16, shift, element, spatial_mix, channel_mix, &linear_backward};
#endif

}  // namespace sola::SOLA_ISA
