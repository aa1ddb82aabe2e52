// SPDX-License-Identifier: Apache-2.0
// Bi-WKV forward and backward on a CPU, compiled once for each instruction set (SOLA_ISA names it).
//
// With d = w / N, lam = exp(-d), e_t = exp(k_t), x_t = e_t v_t, equation 9 of the paper is
//     y_t = (A^x_t + R^x_t + e^u x_t) / (A^e_t + R^e_t + e^u e_t) = num_t / D_t
// with two exclusive scans over the pair s = (x, e), from the left and from the right:
//     A_{t+1} = lam A_t + s_t        R_{t-1} = lam R_t + s_t
// The mixing matrix S behind it (lam^(|t-i|-1), diagonal e^u) is symmetric, so the backward is made of the same scans.
// With h = g / D, q = h y, F and B the left and right scans of the pair (h, q), H = S h, Q = S q:
//     gv = e H      gk = x H - e Q      gu = e^u sum_t (h x - q e)
//     gw = -lam / N sum_t (A^x B^h - A^e B^q + R^x F^h - R^e F^q)
//
// Tokens are cut into chunks of L, channels lie on the lanes of a register, and an operator is a list of phases:
//     sums        A and R of each chunk by itself, starting from zero            parallel over chunks
//     carry       the states at the chunks' edges from these, in float64         parallel over registers
//     output      the scans inside a chunk from its carries                      parallel over chunks
// The backward does the same for F and B, from the forward's states at the chunks' edges, which training keeps: 4 numbers
// in L tokens. What a phase needs of an earlier one inside a chunk it computes again.
// How they are divided among threads is in scheduling.h; every number is computed by the same operations either way, so
// the result does not depend on the number of threads.
//
// Accuracy. Rounding lam to float32 once and multiplying by it n times is wrong by n roundings, always to the same
// side. Here step j uses step[j % 4] = fl(lam^(j+1) / (step[0] ... step[j-1])), each factor repairing the rounding of
// those before it, and chunks are joined in float64 with lam^L from float64.
//
// Range. Float32 without running maxima is exact while nothing over- or underflows. The sums phase takes the range of k
// and v along, the adjoint phase the largest |g| and D; a register outside of the bounds below is left to robust.h.
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
constexpr int period = 4;  // of the decay's factors

// Bounds of the fast path. Sums stay below float32's 3e38: exp(44 + 20) 2^20 1e3 = 7e36, and weights times values above
// its 1e-38: exp(-44) 1e-4 = 8e-24. A chunk's tokens are weighed by lam^31 at least, which must not vanish while
// lam^31 exp(2 * 44) may still count, unless all but neighbours vanish. A single chunk only multiplies by lam.
constexpr double bonus_limit = 20.0, decay_least = -20.0, step_limit = 2.8, step_limit_alone = 80.0, step_zero = 140.0;
constexpr float value_limit = 1e3f, value_least = 1e-4f;
constexpr int64_t tokens_limit = 1 << 20;

// What a chunk hands over: sums, which are turned into the states that enter it in place, and what the checks need.
enum Slot { AX, AE, RX, RE, SEEN_KEYS, MAX_VALUE, slots };
enum BackwardSlot { FH, FQ, BH, BQ, MAX_GRAD, MAX_DENOMINATOR };
constexpr int SUM_DECAY = MAX_GRAD, SUM_BONUS = MAX_DENOMINATOR;  // when the checks are done

struct Pair {
  F a = {}, b = {};

  // one step of a scan: decay, then take (x, y) in
  void absorb(F step, F x, F y) {
    a = a * step + x;
    b = b * step + y;
  }
  void add(F weight, F x, F y) {
    a += weight * x;
    b += weight * y;
  }
};

// One register of channels of one image: its parameters, and where its chunks hand over.
struct alignas(64) Register {
  Lanes step[period];            // lam, rounded so that their products stay exact
  Lanes power[L];                // lam^j, to weigh a chunk's tokens by their distance from its start
  Lanes gain;                    // e^u
  Wide lam, lam_chunk;           // lam^1, lam^L
  Lanes* slots;                  // [chunks][slots of the operator]
  int64_t image, channel;
  int n;                         // channels in it, W but for the last
  bool fast, grows;              // float32 will do; some decay is negative

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
  const double steep = tokens * (p.tokens <= L ? step_limit_alone : step_limit), zero = tokens * step_zero;
  int outside = 0, negative = 0;  // without branches: a NaN is outside
  for (int i = 0; i < W; ++i) {
    outside |= !(w[i] >= decay_least) | !((w[i] <= steep) | (w[i] >= zero));
    outside |= !(u[i] <= bonus_limit) | !(u[i] >= -bonus_limit);
    negative |= w[i] < 0.0;
    w[i] = w[i] < zero ? w[i] * rate : 2000.0;
  }
  fast = outside == 0 && p.tokens <= tokens_limit;
  grows = negative != 0;
  if (!fast) return;
  const Wide d = Wide::of(w);
  Wide::of(u).exp().round_to(gain);
  lam = (Wide::of(0.0) - d).exp();  // 3e-308 for no weight at all: zero as soon as it is rounded
  const Wide inverse = d.exp();
  Wide powers[period], ratio = Wide::of(1.0), of_period = Wide::of(1.0);
  for (int j = 0; j < period; ++j) {
    (lam * ratio).round_to(step[j]);
    ratio = ratio * (Wide::of(2.0) - Wide::of(step[j]) * inverse);  // lam / step: they differ by a rounding only
    powers[j] = of_period;
    of_period = of_period * lam;
  }
  for (int j = 0; j < L; ++j) {
    powers[j % period].round_to(power[j]);
    powers[j % period] = powers[j % period] * of_period;
  }
  lam_chunk = powers[0];
}

// The tokens of one chunk of one register. Whole: there are L of them and W channels, which holds for nearly all chunks,
// and the compiler makes straight code of it.
template <class T, bool Whole>
struct Tokens {
  T* data;
  int64_t stride;
  int n;

  Tokens(const Array& a, const Register& r, int64_t start)
      : data(static_cast<T*>(a.data) + r.image * a.batch_stride + start * a.row_stride + r.channel),
        stride(a.row_stride),
        n(Whole ? W : r.n) {}
  F operator[](int64_t j) const { return load(data + j * stride, n); }
  // asks for a line that will be written: one that is not in the cache holds up all later writes
  void expect(int64_t j) const { __builtin_prefetch(data + j * stride, 1); }
  void set(int64_t j, F f) const { store(data + j * stride, f, n); }
};

template <bool Whole>
int chunk_length(const Problem& p, int64_t start) {
  return Whole || p.tokens - start > L ? L : static_cast<int>(p.tokens - start);
}

// ---- sums: A and R of a chunk from zero, and what the checks need

template <class T, bool Whole, class Next>
void sums(const Problem& p, const Register& r, int64_t start, Lanes* slot, Next& next) {
  const int len = chunk_length<Whole>(p, start);
  const Tokens<T, Whole> key(p.key, r, start), value(p.value, r, start);
  Next ahead = next;  // which stays in registers
  U seen = {};
  F most = {};
  Pair left, right;
#pragma GCC unroll 4
  for (int j = 0; j < len; ++j) {
    const F v = value[j], e = exp(key[j], seen), x = e * v;
    most = max_abs(most, v);
    left.absorb(r.step[j % period], x, e);
    right.add(r.power[j], x, e);
    ahead.template ask<2, 0>(j);
  }
  next = ahead;
  slot[AX] = left.a, slot[AE] = left.b, slot[RX] = right.a, slot[RE] = right.b;
  slot[SEEN_KEYS] = as_float(seen), slot[MAX_VALUE] = most;
}

// ---- carry: sums of chunks, in the first two slots (from the left) and the next two (from the right), become the states
// that enter each chunk from there

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
  for (int64_t c = chunks - 1; c >= 0; --c) {  // a short chunk is the last, and nothing passes through it
    pass(r.slots + c * slots + 2, first);
    pass(r.slots + c * slots + 3, second);
  }
}

// over all chunks, the largest |number| in a slot
Lanes largest(const Problem& p, const Register& r, int s) {
  F most = {};
  for (int64_t c = 0; c < (p.tokens + L - 1) / L; ++c) most = max_abs(most, r.slots[c * slots + s]);
  Lanes lanes;
  lanes = most;
  return lanes;
}

// may this register stay in float32, as far as keys and values tell?
bool within(const Problem& p, const Register& r) {
  U seen = {};
  for (int64_t c = 0; c < (p.tokens + L - 1) / L; ++c) seen |= as_bits(r.slots[c * slots + SEEN_KEYS]);
  const Lanes values = largest(p, r, MAX_VALUE);
  int outside = 0;
  for (int i = 0; i < W; ++i) {
    outside |= seen[i] >= exp_range;
    outside |= !((values.at[i] <= value_limit) & ((values.at[i] >= value_least) | is_zero(values.at[i])));
  }
  return outside == 0;
}

// ---- states: what enters a chunk, for the backward. Those of a register that was left to robust.h are no numbers, and
// would make such of its gradients, which are then left to robust.h as well; has_states saves the way there.

float* states_of(const Problem& p, const Register& r, int64_t start) {
  const int64_t chunks = (p.tokens + L - 1) / L;
  return p.states + (r.image * chunks + start / L) * 4 * p.channels + r.channel;
}

template <bool Whole>
void write_states(const Problem& p, const Register& r, int64_t start, const Lanes* slot) {
  float* const states = states_of(p, r, start);
  for (int i = AX; i <= RE; ++i) store(states + i * p.channels, F(slot[i]), Whole ? W : r.n);
}

template <bool Whole>
Pair read_states(const Problem& p, const Register& r, int64_t start, Slot first) {
  const float* const states = states_of(p, r, start) + first * p.channels;
  return {load(states, Whole ? W : r.n), load(states + p.channels, Whole ? W : r.n)};
}

void write_no_states(const Problem& p, const Register& r) {
  for (int64_t start = 0; start < p.tokens; start += L) {
    float* const states = states_of(p, r, start);
    for (int i = AX; i <= RE; ++i) {
      for (int j = 0; j < r.n; ++j) states[i * p.channels + j] = __builtin_nanf("");
    }
  }
}

bool has_states(const Problem& p, const Register& r) {
  const float* const states = states_of(p, r, 0);
  int missing = 0;
  for (int i = 0; i < r.n; ++i) missing |= states[i] != states[i];
  return missing == 0;
}

// ---- output: both scans inside a chunk, from the states that enter it

template <class T, bool Whole, class Next>
void output(const Problem& p, const Register& r, int64_t start, Lanes* slot, Next& next) {
  const int len = chunk_length<Whole>(p, start);
  const Tokens<T, Whole> key(p.key, r, start), value(p.value, r, start), out(p.output, r, start);
  const F gain = r.gain;
  struct {
    F x, e, num, den;
  } token[L];
  Next ahead = next;
  Pair right{slot[RX], slot[RE]}, left{slot[AX], slot[AE]};
#pragma GCC unroll 4
  for (int j = len - 1; j >= 0; --j) {
    const F e = exp(key[j]), x = e * value[j];
    token[j] = {x, e, right.a + gain * x, right.b + gain * e};
    right.absorb(r.step[j % period], x, e);
    ahead.template ask<2, 1>(j);
  }
  next = ahead;
#pragma GCC unroll 4
  for (int j = 0; j < len; ++j) {
    out.set(j, (left.a + token[j].num) * reciprocal(left.b + token[j].den));
    left.absorb(r.step[j % period], token[j].x, token[j].e);
  }
  if (p.states != nullptr) write_states<Whole>(p, r, start, slot);
}

// ---- backward: what both later phases need of the forward. After the right scan of a chunk, each(j, token, left,
// h, q, g, D) is called from its first token to its last.

struct Token {
  F x, e, rx, re;
};

template <class T, bool Whole, int writes, class Next, class Each>
inline void replay(const Problem& p, const Register& r, int64_t start, Token* tokens, Next& next, const Each& each) {
  const int len = chunk_length<Whole>(p, start);
  const Tokens<T, Whole> key(p.key, r, start), value(p.value, r, start), grad(p.grad, r, start);
  const F gain = r.gain;
  Next ahead = next;
  Pair right = read_states<Whole>(p, r, start, RX), left = read_states<Whole>(p, r, start, AX);
#pragma GCC unroll 4
  for (int j = len - 1; j >= 0; --j) {
    const F e = exp(key[j]), x = e * value[j];
    tokens[j] = {x, e, right.a, right.b};
    right.absorb(r.step[j % period], x, e);
    ahead.template ask<3, writes>(j);
  }
  next = ahead;
#pragma GCC unroll 4
  for (int j = 0; j < len; ++j) {
    const Token& t = tokens[j];
    const F g = grad[j], den = left.b + t.re + gain * t.e, inverse = reciprocal(den);
    const F h = g * inverse, q = h * ((left.a + t.rx + gain * t.x) * inverse);
    each(j, t, left, h, q, g, den);
    left.absorb(r.step[j % period], t.x, t.e);
  }
}

// ---- adjoint sums: F and B of a chunk from zero, the largest |g| and D

template <class T, bool Whole, class Next>
void adjoint_sums(const Problem& p, const Register& r, int64_t start, Lanes* slot, Next& next) {
  Token tokens[L];
  Pair before, after;
  F max_grad = {}, max_den = {};
  replay<T, Whole, 0>(p, r, start, tokens, next, [&](int j, const Token&, const Pair&, F h, F q, F g, F den) {
    max_grad = max_abs(max_grad, g);
    max_den = den > max_den ? den : max_den;
    before.absorb(r.step[j % period], h, q);
    after.add(r.power[j], h, q);
  });
  slot[FH] = before.a, slot[FQ] = before.b, slot[BH] = after.a, slot[BQ] = after.b;
  slot[MAX_GRAD] = max_grad, slot[MAX_DENOMINATOR] = max_den;
}

// May this register stay in float32, as far as gradients tell? h = g / D and h y must not overflow: g exp(44) times the
// largest y, the N terms of a sum and their growth for w < 0; for N = 1 the bonus alone makes D. And what h loses below
// 1e-38 counts at most D 1e-38 a token, which must be nothing beside g.
bool adjoint_within(const Problem& p, const Register& r) {
  const Lanes grads = largest(p, r, MAX_GRAD), dens = largest(p, r, MAX_DENOMINATOR);
  const double tokens = static_cast<double>(p.tokens);
  const double weight = exp_limit + (p.tokens == 1 ? bonus_limit : 0.0) - (r.grows ? decay_least : 0.0);
  const double most = 1e37 / (exp(weight) * tokens * value_limit), least = tokens * 1.2e-32;
  int outside = 0;
  for (int i = 0; i < W; ++i) {
    const double g = grads.at[i];
    outside |= !(g <= most) | !((g >= dens.at[i] * least) | is_zero(grads.at[i]));
  }
  return outside == 0;
}

// ---- gradients: all four scans inside a chunk; leaves the chunk's shares of gw and gu in its slots

template <class T, bool Whole, class Next>
void gradients(const Problem& p, const Register& r, int64_t start, Lanes* slot, Next& next) {
  const Tokens<T, Whole> grad_key(p.grad_key, r, start), grad_value(p.grad_value, r, start);
  Token tokens[L];
  struct {
    F h, q, mixed_h, mixed_q, ax, ae;
  } adjoint[L];
  const F gain = r.gain;
  F decay = {}, bonus = {};
  Pair before{slot[FH], slot[FQ]}, after{slot[BH], slot[BQ]};
  replay<T, Whole, 2>(p, r, start, tokens, next, [&](int j, const Token& t, const Pair& left, F h, F q, F, F) {
    if (sizeof(Next) < 8) grad_key.expect(j), grad_value.expect(j);
    adjoint[j] = {h, q, before.a + gain * h, before.b + gain * q, left.a, left.b};
    decay += t.rx * before.a;
    decay -= t.re * before.b;
    bonus += h * t.x;
    bonus -= q * t.e;
    before.absorb(r.step[j % period], h, q);
  });
#pragma GCC unroll 4
  for (int j = chunk_length<Whole>(p, start) - 1; j >= 0; --j) {
    const Token& t = tokens[j];
    const auto& a = adjoint[j];
    const F h = a.mixed_h + after.a, q = a.mixed_q + after.b;
    grad_value.set(j, t.e * h);
    grad_key.set(j, t.x * h - t.e * q);
    decay += a.ax * after.a;
    decay -= a.ae * after.b;
    after.absorb(r.step[j % period], a.h, a.q);
  }
  slot[SUM_DECAY] = decay;
  slot[SUM_BONUS] = gain * bonus;
}

// False where a chunk's share of gw has overflowed: lam comes last, and what it multiplies, R F, may reach |g v| / lam.
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

// ---- the two operators as lists of phases; a phase has a part for each chunk, or one for the register

template <class T>
struct Forward {
  using Element = T;
  using Register = SOLA_ISA::Register;
  static constexpr int length = L, arrays = 3, slots = SOLA_ISA::slots, phases = 3;
  static constexpr bool by_chunk[phases] = {true, false, true};

  static void prepare(const Problem& p, Register& r, int64_t index) { r.prepare(p, index); }
  static void whole(const Problem& p, Register& r, int) {
    r.fast = r.fast && within(p, r);
    if (r.fast) return carry(p, r);
    robust::forward<T>(p, r.image, r.channel, r.n);
    if (p.states != nullptr) write_no_states(p, r);
  }
  template <bool Whole, class Next>
  static void chunk(const Problem& p, const Register& r, int phase, int64_t start, Lanes* slot, Next& next) {
    phase == 0 ? sums<T, Whole>(p, r, start, slot, next) : output<T, Whole>(p, r, start, slot, next);
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
    r.fast = r.fast && has_states(p, r);
  }
  static void whole(const Problem& p, Register& r, int phase) {
    const bool done = phase > 1 && !r.fast;  // robust.h has written it already
    if (done) return;
    r.fast = r.fast && (phase == 1 ? adjoint_within(p, r) : parameter_gradients(p, r));
    if (!r.fast) return robust::backward<T>(p, r.image, r.channel, r.n);
    if (phase == 1) carry(p, r);
  }
  template <bool Whole, class Next>
  static void chunk(const Problem& p, const Register& r, int phase, int64_t start, Lanes* slot, Next& next) {
    phase == 0 ? adjoint_sums<T, Whole>(p, r, start, slot, next) : gradients<T, Whole>(p, r, start, slot, next);
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

extern const Kernel kernel = {SOLA_TEXT(SOLA_ISA), W, forward, backward, &passes, &attend, &linear};

}  // namespace sola::SOLA_ISA
