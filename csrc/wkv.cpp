// SPDX-License-Identifier: Apache-2.0
// Bi-WKV forward and backward on a CPU, compiled once per instruction set (SOLA_ISA is its name).
//
// With d = w / N, lam = exp(-d), e_t = exp(k_t), x_t = e_t v_t, equation 9 of the paper is
//     y_t = (A^x_t + R^x_t + e^u x_t) / (A^e_t + R^e_t + e^u e_t) = num_t / D_t
// with two exclusive scans over the pair s = (x, e), from the left and from the right:
//     A_{t+1} = lam A_t + s_t        R_{t-1} = lam R_t + s_t
// The corresponding mixing matrix S (lam^(|t-i|-1), diagonal e^u) is symmetric, so the backward consists of the same
// scans. With h = g / D, q = h y, F and B the left and right scans of the pair (h, q), H = S h, Q = S q:
//     gv = e H      gk = x H - e Q      gu = e^u sum_t (h x - q e)
//     gw = -lam / N sum_t (A^x B^h - A^e B^q + R^x F^h - R^e F^q)
//
// Tokens are divided into chunks of L, channels are the lanes of a register, and an operator is a list of phases:
//     sums        A and R of each chunk in isolation, starting from zero         parallel over chunks
//     carry       the states at the edges of the chunks, in float64              parallel over registers
//     output      the scans inside a chunk, starting from its carries            parallel over chunks
// The backward does the same for F and B. It starts from the forward's states at the edges of the chunks, which
// training keeps: 4 numbers per L tokens. Values inside a chunk that a phase shares with an earlier one are recomputed.
// scheduling.h distributes the work over threads; every number is computed by the same operations either way, so the
// result does not depend on the number of threads.
//
// Accuracy. Multiplying n times by lam rounded to float32 accumulates n rounding errors of the same sign. Instead, step
// j uses step[j % 4] = fl(lam^(j+1) / (step[0] ... step[j-1])), where each factor corrects the rounding of the previous
// ones, and chunks are joined in float64 with lam^L computed in float64.
//
// Range. Float32 without running maxima is accurate as long as nothing over- or underflows. The sums phase records the
// range of k and v, the adjoint phase the largest |g| and D; registers outside the bounds below are computed by
// robust.h.
#include "wkv.h"

#include <cstring>

#include "attention.h"
#include "exponential.h"
#include "linear.h"
#include "passes.h"
#include "robust.h"
#include "scheduling.h"

namespace sola::SOLA_ISA {
namespace {

constexpr int L = chunk_tokens;
constexpr int period = 4;  // of the decay factors

// The bounds of the fast path. Sums stay below float32's maximum of 3e38: exp(44 + 20) 2^20 1e3 = 7e36, and products of
// weights and values above its minimum of 1e-38: exp(-44) 1e-4 = 8e-24. The tokens of a chunk have weights of at least
// lam^31, which must not underflow while lam^31 exp(2 * 44) is significant, unless the weights of all tokens but the
// neighbours underflow. A single chunk only multiplies by lam.
constexpr double bonus_limit = 20.0, decay_min = -20.0, step_limit = 2.8, step_limit_alone = 80.0, step_zero = 140.0;
constexpr float value_limit = 1e3f, value_min = 1e-4f;
constexpr int64_t tokens_limit = 1 << 20;

// The results of a chunk: sums, which carry replaces in place with the states that enter the chunk, and range checks.
enum Slot { AX, AE, RX, RE, KEY_BITS, MAX_VALUE, slots };
enum BackwardSlot { FH, FQ, BH, BQ, MAX_GRAD, MAX_DENOMINATOR };
constexpr int SUM_DECAY = MAX_GRAD, SUM_BONUS = MAX_DENOMINATOR;  // reused after the range checks

struct Pair {
  F a = {}, b = {};

  // One step of a scan: decay, then add (x, y).
  void decay_and_add(F step, F x, F y) {
    a = a * step + x;
    b = b * step + y;
  }
  void add(F weight, F x, F y) {
    a += weight * x;
    b += weight * y;
  }
};

// One register of channels of one image: its parameters, and the slots with the results of its chunks.
struct alignas(64) Register {
  Lanes step[period];            // lam, rounded such that products of them stay accurate
  Lanes power[L];                // lam^j, the weight of a token j steps from the start of its chunk
  Lanes gain;                    // e^u
  Wide lam, lam_chunk;           // lam^1, lam^L
  Lanes* slots;                  // [chunks][slots of the operator]
  int64_t image, channel;
  int n;                         // the number of channels, W except in the last register
  bool fast, grows;              // float32 is sufficient; some decay is negative

  void prepare(const Problem& p, int64_t index);
};

void Register::prepare(const Problem& p, int64_t index) {
  const int64_t columns = (p.channels + W - 1) / W;
  image = index / columns;
  channel = index % columns * W;
  n = static_cast<int>(p.channels - channel < W ? p.channels - channel : W);
  alignas(64) double w[W] = {}, u[W] = {};
  memcpy(w, p.decay + channel, sizeof(double) * static_cast<size_t>(n));
  memcpy(u, p.bonus + channel, sizeof(double) * static_cast<size_t>(n));
  const double tokens = static_cast<double>(p.tokens), rate = 1.0 / tokens;
  const double decay_limit = tokens * (p.tokens <= L ? step_limit_alone : step_limit), zero_limit = tokens * step_zero;
  int outside = 0, negative = 0;  // branch-free: NaN counts as outside
  for (int i = 0; i < W; ++i) {
    outside |= !(w[i] >= decay_min) | !((w[i] <= decay_limit) | (w[i] >= zero_limit));
    outside |= !(u[i] <= bonus_limit) | !(u[i] >= -bonus_limit);
    negative |= w[i] < 0.0;
    w[i] = w[i] < zero_limit ? w[i] * rate : 2000.0;
  }
  fast = outside == 0 && p.tokens <= tokens_limit;
  grows = negative != 0;
  if (!fast) return;
  const Wide d = Wide::of(w);
  Wide::of(u).exp().round_to(gain);
  lam = (Wide::of(0.0) - d).exp();  // 3e-308 for a weight of zero, which rounds to zero in float32
  const Wide inverse = d.exp();
  Wide powers[period], ratio = Wide::of(1.0), period_power = Wide::of(1.0);
  for (int j = 0; j < period; ++j) {
    (lam * ratio).round_to(step[j]);
    ratio = ratio * (Wide::of(2.0) - Wide::of(step[j]) * inverse);  // lam / step, which differ by rounding only
    powers[j] = period_power;
    period_power = period_power * lam;
  }
  for (int j = 0; j < L; ++j) {
    powers[j % period].round_to(power[j]);
    powers[j % period] = powers[j % period] * period_power;
  }
  lam_chunk = powers[0];
}

// The tokens of one chunk of one register. Full: L tokens and W channels, which holds for nearly all chunks and lets
// the compiler generate code without branches.
template <class T, bool Full>
struct Tokens {
  T* data;
  int64_t stride;
  int n;

  Tokens(const Array& a, const Register& r, int64_t start)
      : data(static_cast<T*>(a.data) + r.image * a.batch_stride + start * a.row_stride + r.channel),
        stride(a.row_stride),
        n(Full ? W : r.n) {}
  F operator[](int64_t j) const { return load(data + j * stride, n); }
  // prefetches a line for writing: a store that misses the cache would stall all later stores
  void prefetch_for_write(int64_t j) const { __builtin_prefetch(data + j * stride, 1); }
  void set(int64_t j, F f) const { store(data + j * stride, f, n); }
};

template <bool Full>
int chunk_length(const Problem& p, int64_t start) {
  return Full || p.tokens - start > L ? L : static_cast<int>(p.tokens - start);
}

// ---- sums: A and R of a chunk in isolation, and the range of its keys and values

template <class T, bool Full, class Prefetcher>
void sums(const Problem& p, const Register& r, int64_t start, Lanes* slot, Prefetcher& prefetcher) {
  const int len = chunk_length<Full>(p, start);
  const Tokens<T, Full> key(p.key, r, start), value(p.value, r, start);
  Prefetcher local = prefetcher;  // a local copy that the compiler keeps in registers
  U key_bits = {};
  F max_value = {};
  Pair left, right;
#pragma GCC unroll 4
  for (int j = 0; j < len; ++j) {
    const F v = value[j], e = exp(key[j], key_bits), x = e * v;
    max_value = max_abs(max_value, v);
    left.decay_and_add(r.step[j % period], x, e);
    right.add(r.power[j], x, e);
    local.template issue<2, 0>(j);
  }
  prefetcher = local;
  slot[AX] = left.a, slot[AE] = left.b, slot[RX] = right.a, slot[RE] = right.b;
  slot[KEY_BITS] = as_float(key_bits), slot[MAX_VALUE] = max_value;
}

// ---- carry: replaces the sums of chunks, in the first two slots (from the left) and the next two (from the right),
// with the states that enter each chunk from that side

void carry(const Problem& p, const Register& r) {
  const int64_t chunks = (p.tokens + L - 1) / L;
  const auto pass = [&](Lanes* slot, Wide& running) SOLA_FORCED {
    const Wide sum = Wide::of(*slot);
    running.round_to(*slot);
    running = running * r.lam_chunk + sum;
  };
  Wide first = Wide::of(0.0), second = first;
  for (int64_t c = 0; c < chunks; ++c) {
    pass(r.slots + c * slots, first);
    pass(r.slots + c * slots + 1, second);
  }
  first = second = Wide::of(0.0);
  for (int64_t c = chunks - 1; c >= 0; --c) {  // only the last chunk can be short, and no state passes through it
    pass(r.slots + c * slots + 2, first);
    pass(r.slots + c * slots + 3, second);
  }
}

// the largest |number| in a slot over all chunks
Lanes slot_maximum(const Problem& p, const Register& r, int s) {
  F result = {};
  for (int64_t c = 0; c < (p.tokens + L - 1) / L; ++c) result = max_abs(result, r.slots[c * slots + s]);
  Lanes lanes;
  lanes = result;
  return lanes;
}

// true if the keys and values of this register are within the range of the float32 path
bool inputs_in_range(const Problem& p, const Register& r) {
  U key_bits = {};
  for (int64_t c = 0; c < (p.tokens + L - 1) / L; ++c) key_bits |= as_bits(r.slots[c * slots + KEY_BITS]);
  const Lanes max_values = slot_maximum(p, r, MAX_VALUE);
  int outside = 0;
  for (int i = 0; i < W; ++i) {
    outside |= key_bits[i] >= exp_range;
    outside |= !((max_values.at[i] <= value_limit) & ((max_values.at[i] >= value_min) | is_zero(max_values.at[i])));
  }
  return outside == 0;
}

// ---- states: the states that enter a chunk, kept for the backward. Registers computed by robust.h store NaN, which
// would make their gradients NaN and select robust.h there as well; has_valid_states selects it without computing them.

float* states_of(const Problem& p, const Register& r, int64_t start) {
  const int64_t chunks = (p.tokens + L - 1) / L;
  return p.states + (r.image * chunks + start / L) * 4 * p.channels + r.channel;
}

template <bool Full>
void write_states(const Problem& p, const Register& r, int64_t start, const Lanes* slot) {
  float* const states = states_of(p, r, start);
  for (int i = AX; i <= RE; ++i) store(states + i * p.channels, F(slot[i]), Full ? W : r.n);
}

template <bool Full>
Pair read_states(const Problem& p, const Register& r, int64_t start, Slot first) {
  const float* const states = states_of(p, r, start) + first * p.channels;
  return {load(states, Full ? W : r.n), load(states + p.channels, Full ? W : r.n)};
}

void write_nan_states(const Problem& p, const Register& r) {
  for (int64_t start = 0; start < p.tokens; start += L) {
    float* const states = states_of(p, r, start);
    for (int i = AX; i <= RE; ++i) {
      for (int j = 0; j < r.n; ++j) states[i * p.channels + j] = __builtin_nanf("");
    }
  }
}

bool has_valid_states(const Problem& p, const Register& r) {
  const float* const states = states_of(p, r, 0);
  int missing = 0;
  for (int i = 0; i < r.n; ++i) missing |= states[i] != states[i];
  return missing == 0;
}

// ---- output: both scans inside a chunk, starting from the states that enter it

template <class T, bool Full, class Prefetcher>
void output(const Problem& p, const Register& r, int64_t start, Lanes* slot, Prefetcher& prefetcher) {
  const int len = chunk_length<Full>(p, start);
  const Tokens<T, Full> key(p.key, r, start), value(p.value, r, start), out(p.output, r, start);
  const F gain = r.gain;
  struct {
    F x, e, num, den;
  } token[L];
  Prefetcher local = prefetcher;
  Pair right{slot[RX], slot[RE]}, left{slot[AX], slot[AE]};
#pragma GCC unroll 4
  for (int j = len - 1; j >= 0; --j) {
    const F e = exp(key[j]), x = e * value[j];
    token[j] = {x, e, right.a + gain * x, right.b + gain * e};
    right.decay_and_add(r.step[j % period], x, e);
    local.template issue<2, 1>(j);
  }
  prefetcher = local;
#pragma GCC unroll 4
  for (int j = 0; j < len; ++j) {
    out.set(j, (left.a + token[j].num) * reciprocal(left.b + token[j].den));
    left.decay_and_add(r.step[j % period], token[j].x, token[j].e);
  }
  if (p.states != nullptr) write_states<Full>(p, r, start, slot);
}

// ---- backward: the recomputed forward that both later phases share. After the right scan of a chunk, calls each(j,
// token, left, h, q, g, D) from its first token to its last.

struct Token {
  F x, e, rx, re;
};

template <class T, bool Full, int writes, class Prefetcher, class Each>
inline void replay(const Problem& p, const Register& r, int64_t start, Token* tokens, Prefetcher& prefetcher,
                   const Each& each) {
  const int len = chunk_length<Full>(p, start);
  const Tokens<T, Full> key(p.key, r, start), value(p.value, r, start), grad(p.grad, r, start);
  const F gain = r.gain;
  Prefetcher local = prefetcher;
  Pair right = read_states<Full>(p, r, start, RX), left = read_states<Full>(p, r, start, AX);
#pragma GCC unroll 4
  for (int j = len - 1; j >= 0; --j) {
    const F e = exp(key[j]), x = e * value[j];
    tokens[j] = {x, e, right.a, right.b};
    right.decay_and_add(r.step[j % period], x, e);
    local.template issue<3, writes>(j);
  }
  prefetcher = local;
#pragma GCC unroll 4
  for (int j = 0; j < len; ++j) {
    const Token& t = tokens[j];
    const F g = grad[j], den = left.b + t.re + gain * t.e, inverse = reciprocal(den);
    const F h = g * inverse, q = h * ((left.a + t.rx + gain * t.x) * inverse);
    each(j, t, left, h, q, g, den);
    left.decay_and_add(r.step[j % period], t.x, t.e);
  }
}

// ---- adjoint sums: F and B of a chunk in isolation, and the largest |g| and D

template <class T, bool Full, class Prefetcher>
void adjoint_sums(const Problem& p, const Register& r, int64_t start, Lanes* slot, Prefetcher& prefetcher) {
  Token tokens[L];
  Pair before, after;
  F max_grad = {}, max_den = {};
  replay<T, Full, 0>(p, r, start, tokens, prefetcher, [&](int j, const Token&, const Pair&, F h, F q, F g, F den) {
    max_grad = max_abs(max_grad, g);
    max_den = den > max_den ? den : max_den;
    before.decay_and_add(r.step[j % period], h, q);
    after.add(r.power[j], h, q);
  });
  slot[FH] = before.a, slot[FQ] = before.b, slot[BH] = after.a, slot[BQ] = after.b;
  slot[MAX_GRAD] = max_grad, slot[MAX_DENOMINATOR] = max_den;
}

// true if the gradients of this register are within the range of the float32 path. h = g / D and h y must not overflow:
// the bound is g exp(44) times the largest y, the N terms of a sum and their growth for w < 0; for N = 1, D depends on
// the bonus alone. The part of h that is lost below 1e-38 contributes at most D 1e-38 per token, which must be
// negligible compared with g.
bool gradients_in_range(const Problem& p, const Register& r) {
  const Lanes grads = slot_maximum(p, r, MAX_GRAD), dens = slot_maximum(p, r, MAX_DENOMINATOR);
  const double tokens = static_cast<double>(p.tokens);
  const double weight = exp_limit + (p.tokens == 1 ? bonus_limit : 0.0) - (r.grows ? decay_min : 0.0);
  const double grad_limit = 1e37 / (exp(weight) * tokens * value_limit), grad_to_denominator = tokens * 1.2e-32;
  int outside = 0;
  for (int i = 0; i < W; ++i) {
    const double g = grads.at[i];
    outside |= !(g <= grad_limit) | !((g >= dens.at[i] * grad_to_denominator) | is_zero(grads.at[i]));
  }
  return outside == 0;
}

// ---- gradients: all four scans inside a chunk; leaves the chunk's contributions to gw and gu in its slots

template <class T, bool Full, class Prefetcher>
void gradients(const Problem& p, const Register& r, int64_t start, Lanes* slot, Prefetcher& prefetcher) {
  const Tokens<T, Full> grad_key(p.grad_key, r, start), grad_value(p.grad_value, r, start);
  Token tokens[L];
  struct {
    F h, q, mixed_h, mixed_q, ax, ae;
  } adjoint[L];
  const F gain = r.gain;
  F decay = {}, bonus = {};
  Pair before{slot[FH], slot[FQ]}, after{slot[BH], slot[BQ]};
  replay<T, Full, 2>(p, r, start, tokens, prefetcher, [&](int j, const Token& t, const Pair& left, F h, F q, F, F) {
    if (sizeof(Prefetcher) < 8) grad_key.prefetch_for_write(j), grad_value.prefetch_for_write(j);
    adjoint[j] = {h, q, before.a + gain * h, before.b + gain * q, left.a, left.b};
    decay += t.rx * before.a;
    decay -= t.re * before.b;
    bonus += h * t.x;
    bonus -= q * t.e;
    before.decay_and_add(r.step[j % period], h, q);
  });
#pragma GCC unroll 4
  for (int j = chunk_length<Full>(p, start) - 1; j >= 0; --j) {
    const Token& t = tokens[j];
    const auto& a = adjoint[j];
    const F h = a.mixed_h + after.a, q = a.mixed_q + after.b;
    grad_value.set(j, t.e * h);
    grad_key.set(j, t.x * h - t.e * q);
    decay += a.ax * after.a;
    decay -= a.ae * after.b;
    after.decay_and_add(r.step[j % period], a.h, a.q);
  }
  slot[SUM_DECAY] = decay;
  slot[SUM_BONUS] = gain * bonus;
}

// Return false if a chunk's contribution to gw has overflowed: lam is multiplied last, and its factor R F may be as
// large as |g v| / lam.
bool parameter_gradients(const Problem& p, const Register& r) {
  double decay[W] = {}, bonus[W] = {};
  for (int64_t c = 0; c < (p.tokens + L - 1) / L; ++c) {
    const Lanes* slot = r.slots + c * slots;
    for (int i = 0; i < W; ++i) decay[i] += slot[SUM_DECAY].at[i];
    for (int i = 0; i < W; ++i) bonus[i] += slot[SUM_BONUS].at[i];
  }
  int outside = 0;
  for (int i = 0; i < r.n; ++i) {
    const int64_t at = r.image * p.channels + r.channel + i;
    outside |= !(decay[i] - decay[i] == 0.0);
    p.grad_decay[at] = -decay[i] * r.lam[i] / static_cast<double>(p.tokens);
    p.grad_bonus[at] = bonus[i];
  }
  return outside == 0;
}

// ---- the two operators as lists of phases; a phase runs per chunk or per register

template <class T>
struct Forward {
  using Element = T;
  using Register = SOLA_ISA::Register;
  static constexpr int length = L, arrays = 3, slots = SOLA_ISA::slots, phases = 3;
  static constexpr bool by_chunk[phases] = {true, false, true};

  static void prepare(const Problem& p, Register& r, int64_t index) { r.prepare(p, index); }
  static void per_register(const Problem& p, Register& r, int) {
    r.fast = r.fast && inputs_in_range(p, r);
    if (r.fast) return carry(p, r);
    robust::forward<T>(p, r.image, r.channel, r.n);
    if (p.states != nullptr) write_nan_states(p, r);
  }
  template <bool Full, class Prefetcher>
  static void chunk(const Problem& p, const Register& r, int phase, int64_t start, Lanes* slot,
                    Prefetcher& prefetcher) {
    phase == 0 ? sums<T, Full>(p, r, start, slot, prefetcher) : output<T, Full>(p, r, start, slot, prefetcher);
  }
};

template <class T>
struct Backward {
  using Element = T;
  using Register = SOLA_ISA::Register;
  static constexpr int length = L, arrays = 5, slots = SOLA_ISA::slots, phases = 4;
  static constexpr bool by_chunk[phases] = {true, false, true, false};

  static void prepare(const Problem& p, Register& r, int64_t index) {
    r.prepare(p, index);
    r.fast = r.fast && has_valid_states(p, r);
  }
  static void per_register(const Problem& p, Register& r, int phase) {
    const bool done = phase > 1 && !r.fast;  // already written by robust.h
    if (done) return;
    r.fast = r.fast && (phase == 1 ? gradients_in_range(p, r) : parameter_gradients(p, r));
    if (!r.fast) return robust::backward<T>(p, r.image, r.channel, r.n);
    if (phase == 1) carry(p, r);
  }
  template <bool Full, class Prefetcher>
  static void chunk(const Problem& p, const Register& r, int phase, int64_t start, Lanes* slot,
                    Prefetcher& prefetcher) {
    phase == 0 ? adjoint_sums<T, Full>(p, r, start, slot, prefetcher)
               : gradients<T, Full>(p, r, start, slot, prefetcher);
  }
};

void forward(const Problem& p, Type type, ParallelFor loop) {
  switch (type) {
    case Type::float64: return run_robust<robust::forward<double>>(p, loop);
    case Type::float32: return run<Forward<float>>(p, loop);
    case Type::bfloat16: return run<Forward<bfloat16>>(p, loop);
    case Type::float16: return run<Forward<float16>>(p, loop);
  }
}

void backward(const Problem& p, Type type, ParallelFor loop) {
  switch (type) {
    case Type::float64: return run_robust<robust::backward<double>>(p, loop);
    case Type::float32: return run<Backward<float>>(p, loop);
    case Type::bfloat16: return run<Backward<bfloat16>>(p, loop);
    case Type::float16: return run<Backward<float16>>(p, loop);
  }
}

#define SOLA_TEXT(name) SOLA_TEXT_(name)
#define SOLA_TEXT_(name) #name

}  // namespace

extern const Kernel kernel = {SOLA_TEXT(SOLA_ISA), W, forward, backward, &passes, &attention_kernels, &linear};

}  // namespace sola::SOLA_ISA
