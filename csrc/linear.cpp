// SPDX-License-Identifier: Apache-2.0
// Matrix products with the passes before and after them, compiled once for each instruction set (see linear.h).
//
// A thread takes tokens a tile at a time: it makes a factor of them, multiplies it by one panel of a weight after the
// other, and uses the sums while they are in its cache. Neither tiles nor threads change the order of a sum.
#include "linear.h"

#include "parallel.h"
#include "products.h"
#include "shift.h"

namespace sola::SOLA_ISA {
namespace {

constexpr int64_t bytes_of_tiles = 1024 << 10;    // of a thread, so that they stay in its second-level cache
constexpr int64_t bytes_of_weights = 2048 << 10;  // more than that do not, and come from further away for every tile

// Tokens of a tile, where each takes so many numbers of T and of float32, and meets so many weights.
template <class T>
int64_t tokens_of_tile(int64_t numbers, int64_t of_float32, int64_t weights) {
  constexpr int64_t least = sizeof(T) == 4 ? 2 * together : 32, size = sizeof(T);
  const int64_t wanted = weights * size > bytes_of_weights ? 2 * tile_tokens : tile_tokens;
  const int64_t most = bytes_of_tiles / (numbers * size + of_float32 * int64_t{sizeof(float)} + 1) / least * least;
  return most < least ? least : most < wanted ? most : wanted;
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

// sums (+)= left right^T with `depth` inputs of the weight from `begin` on; left begins with that input
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

// left right^T, a panel at a time in `sums`: use(first output, how many of them)
template <class T, class Use>
void each_panel(const Tile<T>& left, int64_t tokens, const Packed<T>& right, const Tile<float>& sums, const Use& use) {
  for (int64_t p = 0; p < right.panels(); ++p) {
    const int64_t rest = right.outputs - p * panel;
    multiply_panel<false>(left.row(0), left.stride, tokens, right.at(p), right.inputs, sums.row(0), sums.stride);
    use(p * panel, rest < panel ? rest : panel);
  }
}

// Arrays [tokens, channels] that a tile is used with: where a map is larger than the second-level cache they are asked for
// while tokens are mixed, and come during products, as does the row that is normalised next.
template <class T>
struct Asked {
  const T* read = nullptr;
  const T* written[most_mixes] = {};
};

// Rows `begin` to `end` of all images, normalised and shifted, a tile of tokens at a time: use(first token, tokens).
template <class T, class Use>
void each_tile(const Parameters<T>& a, int64_t begin, int64_t end, const Tile<T>* const (&tiles)[most_mixes],
               int64_t tokens_of_tile, const Asked<T>& asked, const Use& use) {
  const Shift& p = a.p;
  const T* const x = static_cast<const T*>(p.x);
  const Ring<T> ring(p.width * a.padded);
  const Buffer<float> zero(a.padded);
  const bool asks = p.images * p.height * p.width * p.channels * static_cast<int64_t>(sizeof(T)) > int64_t{4} << 20;
  int64_t filled = 0;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t h = r % p.height;
    const auto compute = [&](int64_t row) {  // of the image
      if (row < 0 || row >= p.height) return;
      normalise<T>(a, x + (r - h + row) * p.width * p.channels, ring[row], nullptr, nullptr);
    };
    if (r == begin || h == 0) compute(h - 1), compute(h);
    compute(h + 1);
    const Neighbours<T> near{h > 0 ? ring[h - 1] : nullptr, ring[h], h + 1 < p.height ? ring[h + 1] : nullptr,
                             zero.data, p.width, a.padded};
    const int64_t rows_ahead = h + 2 < p.height ? 2 : 0;
    const auto ask = [&](int64_t token, int64_t c) SOLA_FORCED {
      if (!asks || c * static_cast<int64_t>(sizeof(T)) % 64 != 0) return;
      const int64_t at = token * p.channels + c;
      __builtin_prefetch(x + at + rows_ahead * p.width * p.channels, 0, 2);
      if (asked.read != nullptr) __builtin_prefetch(asked.read + at, 0, 2);
      for (const T* written : asked.written) {
        if (written != nullptr) __builtin_prefetch(written + at, 1);
      }
    };
    for (int64_t w = 0; w < p.width; ++w) {
      const float* from[5];
      near.of(w, from);
      for (int64_t i = 0, c = 0; i < a.registers; ++i, c += W) {
        ask(r * p.width + w, c);
        const F s = a.shifted(from, i), difference = get(from[4] + c) - s;
        for (int64_t m = 0; m < p.mixes; ++m) put(tiles[m]->row(filled) + c, s + get(a.mix(m) + c) * difference);
      }
      if (++filled == tokens_of_tile) {
        use(r * p.width + w + 1 - filled, filled);
        filled = 0;
      }
    }
  }
  if (filled > 0) use(end * p.width - filled, filled);
}

// [tokens, width] with rows of a stride at `to`, of registers that element(t, c) gives; past the caches if streamed
template <class T, class Element>
void write(T* to, int64_t stride, int64_t tokens, int64_t width, bool streamed, const Element& element) {
  if (streamed && in_registers(to, stride, width)) {
    for (int64_t t = 0; t < tokens; ++t, to += stride) {
      for (int64_t c = 0; c < width; c += W) stream(to + c, element(t, c));
    }
    return;
  }
  for (int64_t t = 0; t < tokens; ++t, to += stride) {
    for (int64_t c = 0; c < width; c += W) put(to + c, element(t, c), width - c);
  }
}

int64_t rows_of(const Shift& s) { return s.images * s.height; }
int64_t fewest_rows(const Shift& s) { return (tile_tokens + s.width - 1) / s.width; }

template <class T>
void shift_of(const ShiftLinear& p, ParallelFor loop) {
  const Parameters<T> a(p.shift);
  const int64_t mixes = p.shift.mixes, channels = p.shift.channels;
  int64_t outputs = 0;
  for (int64_t m = 0; m < mixes; ++m) pack<T>(p.weights[m], loop), outputs += p.weights[m].outputs;
  const bool past = streamed<T>(rows_of(p.shift) * p.shift.width, outputs);
  parallel(loop, rows_of(p.shift), fewest_rows(p.shift), [&](int64_t begin, int64_t end) {
    const MatrixUnit unit;
    const int64_t most = tokens_of_tile<T>(mixes * channels, panel, outputs * channels);
    const Tile<T> first(most, channels), second(mixes > 1 ? most : 0, channels), third(mixes > 2 ? most : 0, channels);
    const Tile<T>* const tiles[most_mixes] = {&first, &second, &third};
    const Tile<float> sums(most, panel);
    Asked<T> asked;
    for (int64_t m = 0; m < mixes && !past; ++m) {
      if (p.weights[m].outputs == channels) asked.written[m] = static_cast<const T*>(p.out[m]);
    }
    each_tile<T>(a, begin, end, tiles, most, asked, [&](int64_t token, int64_t tokens) {
      for (int64_t m = 0; m < mixes; ++m) {
        const Packed<T> right = packed<T>(p.weights[m]);
        T* const out = static_cast<T*>(p.out[m]) + token * right.outputs;
        each_panel(*tiles[m], tokens, right, sums, [&](int64_t output, int64_t width) {
          write(out + output, right.outputs, tokens, width, past,
                [&](int64_t t, int64_t c) { return get(sums.row(t) + c); });
        });
      }
    });
    streams_are_done();
  });
}

template <class T>
void element_of(const ElementLinear& p, ParallelFor loop) {
  const Weight& w = p.weight;
  pack<T>(w, loop);
  const T *receptance = static_cast<const T*>(p.receptance), *value = static_cast<const T*>(p.value);
  const bool past = streamed<T>(p.tokens, w.outputs);
  parallel(loop, p.tokens, tile_tokens, [&](int64_t begin, int64_t end) {
    const MatrixUnit unit;
    const int64_t width = w.inputs < slice ? w.inputs : slice;
    const int64_t most = tokens_of_tile<T>(width, w.outputs, w.inputs * w.outputs);
    const Tile<T> left(most, width);
    const Tile<float> sums(most, w.outputs);
    for (int64_t token = begin; token < end; token += most) {
      const int64_t tokens = end - token < most ? end - token : most;
      for (int64_t s = 0; s < w.inputs; s += slice) {
        const int64_t depth = w.inputs - s < slice ? w.inputs - s : slice;
        const int64_t from = token * w.inputs + s;
        // zero up to where a product reads on
        write(left.row(0), left.stride, tokens, up(depth, Step<T>::inputs), false, [&](int64_t t, int64_t c) {
          const int64_t at = from + t * w.inputs + c, n = depth - c;
          const F v = n > 0 ? get(value + at, n) : F{};
          if (receptance == nullptr) return positive(v) * positive(v);
          return n > 0 ? sigmoid(get(receptance + at, n)) * v : v;
        });
        multiply(left, tokens, packed<T>(w), s, depth, sums);
      }
      write(static_cast<T*>(p.out) + token * w.outputs, w.outputs, tokens, w.outputs, past,
            [&](int64_t t, int64_t c) { return get(sums.row(t) + c); });
    }
    streams_are_done();
  });
}

template <class T>
void spatial_mix_of(const SpatialMix& p, ParallelFor loop) {
  const Parameters<T> a(p.shift);
  pack<T>(p.receptance, loop), pack<T>(p.output, loop);
  const int64_t channels = p.shift.channels;
  const T *x = static_cast<const T*>(p.shift.x), *readout = static_cast<const T*>(p.readout);
  const bool past = streamed<T>(rows_of(p.shift) * p.shift.width, channels);
  parallel(loop, rows_of(p.shift), fewest_rows(p.shift), [&](int64_t begin, int64_t end) {
    const MatrixUnit unit;
    const int64_t most = tokens_of_tile<T>(channels, channels, 2 * channels * channels);
    const Tile<T> factor(most, channels);
    const Tile<float> sums(most, channels);
    const Asked<T> asked{readout, {past ? nullptr : static_cast<const T*>(p.out)}};
    each_tile<T>(a, begin, end, {&factor, nullptr, nullptr}, most, asked, [&](int64_t token, int64_t tokens) {
      multiply(factor, tokens, packed<T>(p.receptance), 0, channels, sums);
      write(factor.row(0), factor.stride, tokens, channels, false, [&](int64_t t, int64_t c) {
        return sigmoid(get(sums.row(t) + c)) * get(readout + (token + t) * channels + c, channels - c);
      });
      multiply(factor, tokens, packed<T>(p.output), 0, channels, sums);
      write(static_cast<T*>(p.out) + token * channels, channels, tokens, channels, past, [&](int64_t t, int64_t c) {
        return get(x + (token + t) * channels + c, channels - c) + get(sums.row(t) + c);
      });
    });
    streams_are_done();
  });
}

template <class T>
void channel_mix_of(const ChannelMix& p, ParallelFor loop) {
  const Parameters<T> a(p.shift);
  pack<T>(p.key, loop), pack<T>(p.receptance, loop), pack<T>(p.value, loop);
  const Packed<T> key = packed<T>(p.key), receptance = packed<T>(p.receptance), value = packed<T>(p.value);
  const int64_t channels = p.shift.channels, hidden = key.outputs;
  const T* const x = static_cast<const T*>(p.shift.x);
  const bool past = streamed<T>(rows_of(p.shift) * p.shift.width, channels);
  parallel(loop, rows_of(p.shift), fewest_rows(p.shift), [&](int64_t begin, int64_t end) {
    const MatrixUnit unit;
    const int64_t width = hidden < slice ? hidden : slice;
    const int64_t most = tokens_of_tile<T>(2 * channels + width, channels, (2 * hidden + channels) * channels);
    const Tile<T> of_key(most, channels), of_receptance(most, channels), units(most, width);
    const Tile<T>* const tiles[most_mixes] = {&of_key, &of_receptance, nullptr};
    const Tile<float> some(most, panel), sums(most, channels);
    const Asked<T> asked{nullptr, {past ? nullptr : static_cast<const T*>(p.out)}};
    each_tile<T>(a, begin, end, tiles, most, asked, [&](int64_t token, int64_t tokens) {
      for (int64_t s = 0; s < hidden; s += slice) {
        const int64_t depth = hidden - s < slice ? hidden - s : slice;
        for (int64_t q = s / panel; q * panel < s + depth; ++q) {
          multiply_panel<false>(of_key.row(0), of_key.stride, tokens, key.at(q), channels, some.row(0), some.stride);
          write(units.row(0) + q * panel - s, units.stride, tokens, panel, false, [&](int64_t t, int64_t c) {
            const F k = positive(get(some.row(t) + c));
            return k * k;
          });
        }
        multiply(units, tokens, value, s, depth, sums);
      }
      each_panel(of_receptance, tokens, receptance, some, [&](int64_t channel, int64_t width) {
        const int64_t from = token * channels + channel;
        write(static_cast<T*>(p.out) + from, channels, tokens, width, past, [&](int64_t t, int64_t c) {
          const F before = get(x + from + t * channels + c, width - c);
          return before + sigmoid(get(some.row(t) + c)) * get(sums.row(t) + channel + c);
        });
      });
    });
    streams_are_done();
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
