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
//     sums        A and R of each chunk by itself, starting from zero            parallel over registers and chunks
//     carry       the states at the chunks' edges from these, in float64         parallel over registers
//     output      the scans inside a chunk from its carries                      parallel over registers and chunks
// The backward has two more between the last two, for F and B. Only carries are kept (4 numbers in L tokens and their
// maxima in the forward, 8 in the backward); what a phase needs of an earlier one inside a chunk it computes again.
// When there are registers enough for all threads a thread takes its registers through all phases; else phases are
// parallel regions. Every number is computed by the same operations either way, so the result does not depend on the
// number of threads.
//
// Accuracy. Rounding lam to float32 once and multiplying by it n times is wrong by n roundings, always to the same
// side. Here step j uses step[j % 8] = fl(lam^(j+1) / (step[0] ... step[j-1])), each factor repairing the rounding of
// those before it, and chunks are joined in float64 with lam^L from float64.
//
// Range. Float32 without running maxima is exact while nothing over- or underflows. The sums phase takes the largest
// |k| and |v| along, the adjoint phase the largest |g| and D; a register outside of the bounds below is left to
// robust.h, before anything else has been written for it.
#include "wkv.h"

#include <cstdlib>

#include "lanes.h"
#include "robust.h"

namespace sola::SOLA_ISA {
namespace {

constexpr int L = 32;     // tokens in a chunk
constexpr int period = 8; // of the decay's factors

// Bounds of the fast path. exp(50 + 20 + ln 65536) * 1e3 stays below float32's 3e38, exp(-50) * 1e-4 far above its
// 1e-38; beyond 65536 tokens the bound on |k| shrinks by ln(N / 65536). With 80 < d < 140 lam^n is below 1e-38 while
// lam^n exp(100) may still count; with more decay it counts no longer.
constexpr double key_limit = 50.0, bonus_limit = 20.0, decay_least = -20.0, step_limit = 80.0, step_zero = 140.0;
constexpr float value_limit = 1e3f, value_least = 1e-4f;

// What a chunk hands over. The sums are turned into carries in place; once A and R are carries the two maxima of the
// sums phase are spent, and their slots serve the next ones.
enum Slot { AX, AE, RX, RE, MAX_KEY, MAX_VALUE, forward_slots, FH = forward_slots, FQ, BH, BQ, backward_slots };
constexpr int MAX_GRAD = MAX_KEY, MAX_DENOMINATOR = MAX_VALUE;    // written by the adjoint phase
constexpr int SUM_DECAY = MAX_KEY, SUM_BONUS = MAX_VALUE;         // written by the gradients phase

struct Pair {
  F a = {}, b = {};

  // one step of a scan: decay, then take (x, y) in
  void absorb(F step, F x, F y) {
    a = a * step + x;
    b = b * step + y;
  }
};

// One register of channels of one image: its parameters, and where its chunks hand over.
struct alignas(64) Register {
  F step[period];
  F gain;                        // e^u
  double lam[W], lam_chunk[W];   // lam^1, lam^L
  double growth;                 // the largest exp(max|k| - min(w, 0)) of the lanes, in the backward
  F* slots;                      // [chunks][slots of the operator]
  int64_t image, channel;
  int n;                         // channels in it, W but for the last
  bool fast;

  void prepare(const Problem& p, int64_t index);
};

void Register::prepare(const Problem& p, int64_t index) {
  const int64_t columns = (p.channels + W - 1) / W;
  image = index / columns;
  channel = index % columns * W;
  n = static_cast<int>(p.channels - channel < W ? p.channels - channel : W);
  fast = true;
  double ratio[W], inverse[W], bonus[W];
  for (int i = 0; i < W; ++i) {
    const double w = i < n ? p.decay[channel + i] : 0.0, u = i < n ? p.bonus[channel + i] : 0.0;
    const double d = w / static_cast<double>(p.tokens);
    fast = fast && w >= decay_least && (d <= step_limit || d >= step_zero) && u <= bonus_limit && u >= -bonus_limit;
    lam[i] = d <= step_limit ? -d : -1e9;
    bonus[i] = u;
  }
  if (!fast) return;
  for (int i = 0; i < W; ++i) {
    inverse[i] = exp(-lam[i]);
    lam[i] = lam[i] < -step_limit ? 0.0 : exp(lam[i]);
    bonus[i] = exp(bonus[i]);
    ratio[i] = 1.0;
  }
  for (int j = 0; j < period; ++j) {
    for (int i = 0; i < W; ++i) {
      step[j][i] = static_cast<float>(lam[i] * ratio[i]);
      ratio[i] *= 2.0 - step[j][i] * inverse[i];  // lam / step, for they differ by a rounding only
    }
  }
  for (int i = 0; i < W; ++i) {
    gain[i] = static_cast<float>(bonus[i]);
    lam_chunk[i] = lam[i];
  }
  for (int power = 1; power < L; power *= 2) {
    for (int i = 0; i < W; ++i) lam_chunk[i] *= lam_chunk[i];
  }
}

// One token after another of one chunk of one register.
template <class T>
struct Tokens {
  const T* data;
  int64_t stride;
  int n;

  Tokens(const Array& a, const Register& r, int64_t start)
      : data(static_cast<const T*>(a.data) + r.image * a.batch_stride + start * a.row_stride + r.channel),
        stride(a.row_stride),
        n(r.n) {}
  F operator[](int64_t j) const { return load(data + j * stride, n); }
  void set(int64_t j, F f) const { store(const_cast<T*>(data) + j * stride, f, n); }
};

int chunk_length(const Problem& p, int64_t start) {
  return static_cast<int>(p.tokens - start < L ? p.tokens - start : L);
}

// ---- sums: A and R of a chunk from zero, the largest |k| and |v|

template <class T>
void sums(const Problem& p, const Register& r, int64_t start, F* slot) {
  const int len = chunk_length(p, start);
  const Tokens<T> key(p.key, r, start), value(p.value, r, start);
  F x[L], e[L], max_key = {}, max_value = {};
  Pair left, right;
  for (int j = 0; j < len; ++j) {
    const F k = key[j], v = value[j];
    max_key = max_abs(max_key, k);
    max_value = max_abs(max_value, v);
    e[j] = exp(k);
    x[j] = e[j] * v;
    left.absorb(r.step[j % period], x[j], e[j]);
  }
  for (int j = len - 1; j >= 0; --j) right.absorb(r.step[j % period], x[j], e[j]);
  slot[AX] = left.a, slot[AE] = left.b, slot[RX] = right.a, slot[RE] = right.b;
  slot[MAX_KEY] = max_key, slot[MAX_VALUE] = max_value;
}

// ---- carry: sums of chunks, in slots s and s + 1 (from the left) and s + 2 and s + 3 (from the right), become the
// states that enter each chunk from there

void carry(const Problem& p, const Register& r, int slots, int s) {
  const int64_t chunks = (p.tokens + L - 1) / L;
  double state[4][W] = {};
  const auto pass = [&](F* slot, double* running) {
    for (int i = 0; i < W; ++i) {
      const double sum = (*slot)[i];
      (*slot)[i] = static_cast<float>(running[i]);
      running[i] = running[i] * r.lam_chunk[i] + sum;
    }
  };
  for (int64_t c = 0; c < chunks; ++c) {
    pass(r.slots + c * slots + s, state[0]);
    pass(r.slots + c * slots + s + 1, state[1]);
  }
  for (int64_t c = chunks - 1; c >= 0; --c) {  // a short chunk is the last, and nothing passes through it
    pass(r.slots + c * slots + s + 2, state[2]);
    pass(r.slots + c * slots + s + 3, state[3]);
  }
}

F largest(const Problem& p, const Register& r, int slots, int s) {
  F most = {};
  for (int64_t c = 0; c < (p.tokens + L - 1) / L; ++c) most = max_abs(most, r.slots[c * slots + s]);
  return most;
}

// may this register stay in float32, as far as keys and values tell? NaN, by max_abs, is larger than any bound
bool within(const Problem& p, Register& r, int slots) {
  const F max_key = largest(p, r, slots, MAX_KEY), max_value = largest(p, r, slots, MAX_VALUE);
  float most = 0.0f;
  bool good = true;
  for (int i = 0; i < r.n; ++i) {
    const float v = max_value[i];
    good = good && (v == 0.0f ? as_bits(max_value)[i] == 0 : v >= value_least && v <= value_limit);
    good = good && max_key[i] <= key_limit;
    most = max_key[i] > most ? max_key[i] : most;
  }
  if (!good) return false;
  r.growth = exp(static_cast<double>(most));
  return p.tokens <= 65536 || r.growth * static_cast<double>(p.tokens) <= exp(key_limit) * 65536.0;
}

// ---- output: both scans inside a chunk, from its carries

template <class T>
void output(const Problem& p, const Register& r, int64_t start, F* slot) {
  const int len = chunk_length(p, start);
  const Tokens<T> key(p.key, r, start), value(p.value, r, start), out(p.output, r, start);
  F x[L], e[L], num[L], den[L];
  Pair right{slot[RX], slot[RE]}, left{slot[AX], slot[AE]};
  for (int j = len - 1; j >= 0; --j) {
    e[j] = exp(key[j]);
    x[j] = e[j] * value[j];
    num[j] = right.a + r.gain * x[j];
    den[j] = right.b + r.gain * e[j];
    right.absorb(r.step[j % period], x[j], e[j]);
  }
  for (int j = 0; j < len; ++j) {
    out.set(j, (left.a + num[j]) / (left.b + den[j]));
    left.absorb(r.step[j % period], x[j], e[j]);
  }
}

// ---- backward: what both later phases need of a chunk of the forward

struct Replay {
  F x[L], e[L], rx[L], re[L], ax[L], ae[L], h[L], q[L];
  F max_grad = {}, max_den = {};

  template <class T>
  void run(const Problem& p, const Register& r, int64_t start, const F* slot) {
    const int len = chunk_length(p, start);
    const Tokens<T> key(p.key, r, start), value(p.value, r, start), grad(p.grad, r, start);
    Pair right{slot[RX], slot[RE]}, left{slot[AX], slot[AE]};
    for (int j = len - 1; j >= 0; --j) {
      e[j] = exp(key[j]);
      x[j] = e[j] * value[j];
      rx[j] = right.a, re[j] = right.b;
      right.absorb(r.step[j % period], x[j], e[j]);
    }
    for (int j = 0; j < len; ++j) {
      const F g = grad[j], den = left.b + re[j] + r.gain * e[j], inverse = 1.0f / den;
      h[j] = g * inverse;
      q[j] = h[j] * ((left.a + rx[j] + r.gain * x[j]) * inverse);
      ax[j] = left.a, ae[j] = left.b;
      left.absorb(r.step[j % period], x[j], e[j]);
      max_grad = max_abs(max_grad, g);
      max_den = den > max_den ? den : max_den;
    }
  }
};

// ---- adjoint sums: F and B of a chunk from zero, the largest |g| and D

template <class T>
void adjoint_sums(const Problem& p, const Register& r, int64_t start, F* slot) {
  const int len = chunk_length(p, start);
  Replay f;
  f.run<T>(p, r, start, slot);
  Pair before, after;
  for (int j = 0; j < len; ++j) before.absorb(r.step[j % period], f.h[j], f.q[j]);
  for (int j = len - 1; j >= 0; --j) after.absorb(r.step[j % period], f.h[j], f.q[j]);
  slot[FH] = before.a, slot[FQ] = before.b, slot[BH] = after.a, slot[BQ] = after.b;
  slot[MAX_GRAD] = f.max_grad, slot[MAX_DENOMINATOR] = f.max_den;
}

// May this register stay in float32, as far as gradients tell? h = g / D must not overflow: g exp(max|k|) times the
// N terms of a sum and their growth for w < 0; for N = 1 the bonus alone makes D. And what h loses below 1e-38 counts
// at most D 1e-38 a token, which must be nothing beside g.
bool adjoint_within(const Problem& p, const Register& r) {
  const F max_grad = largest(p, r, backward_slots, MAX_GRAD), max_den = largest(p, r, backward_slots, MAX_DENOMINATOR);
  const double tokens = static_cast<double>(p.tokens);
  for (int i = 0; i < r.n; ++i) {
    const double g = max_grad[i], w = p.decay[r.channel + i], grows = w < 0.0 ? exp(-w) : 1.0;
    const double most = g * r.growth * grows * tokens * (p.tokens == 1 ? exp(bonus_limit) : 1.0);
    if (g == 0.0 && as_bits(max_grad)[i] == 0) continue;
    if (!(most <= 1e37 && g >= max_den[i] * tokens * 1.2e-32)) return false;
  }
  return true;
}

// ---- gradients: all four scans inside a chunk; leaves the chunk's shares of gw and gu in its slots

template <class T>
void gradients(const Problem& p, const Register& r, int64_t start, F* slot) {
  const int len = chunk_length(p, start);
  const Tokens<T> grad_key(p.grad_key, r, start), grad_value(p.grad_value, r, start);
  Replay f;
  f.run<T>(p, r, start, slot);
  F H[L], Q[L], decay = {}, bonus = {};
  Pair before{slot[FH], slot[FQ]}, after{slot[BH], slot[BQ]};
  for (int j = 0; j < len; ++j) {
    const F h = f.h[j], q = f.q[j];
    H[j] = before.a + r.gain * h;
    Q[j] = before.b + r.gain * q;
    decay += f.rx[j] * before.a - f.re[j] * before.b;
    bonus += h * f.x[j] - q * f.e[j];
    before.absorb(r.step[j % period], h, q);
  }
  for (int j = len - 1; j >= 0; --j) {
    const F h = H[j] + after.a, q = Q[j] + after.b;
    grad_value.set(j, f.e[j] * h);
    grad_key.set(j, f.x[j] * h - f.e[j] * q);
    decay += f.ax[j] * after.a - f.ae[j] * after.b;
    after.absorb(r.step[j % period], f.h[j], f.q[j]);
  }
  slot[SUM_DECAY] = decay;
  slot[SUM_BONUS] = r.gain * bonus;
}

void parameter_gradients(const Problem& p, const Register& r) {
  double decay[W] = {}, bonus[W] = {};
  for (int64_t c = 0; c < (p.tokens + L - 1) / L; ++c) {
    const F* slot = r.slots + c * backward_slots;
    for (int i = 0; i < W; ++i) decay[i] += slot[SUM_DECAY][i];
    for (int i = 0; i < W; ++i) bonus[i] += slot[SUM_BONUS][i];
  }
  for (int i = 0; i < r.n; ++i) {
    const int64_t at = r.image * p.channels + r.channel + i;
    p.grad_decay[at] = -decay[i] * r.lam[i] / static_cast<double>(p.tokens);
    p.grad_bonus[at] = bonus[i];
  }
}

// ---- the two operators as lists of phases; a phase has a part for each chunk, or one for the register

template <class T>
struct Forward {
  static constexpr int slots = forward_slots, phases = 3;
  static constexpr bool by_chunk[phases] = {true, false, true};

  static void whole(const Problem& p, Register& r, int) {
    if (r.fast && within(p, r, slots)) return carry(p, r, slots, AX);
    r.fast = false;
    robust::forward<T>(p, r.image, r.channel, r.n);
  }
  static void chunk(const Problem& p, const Register& r, int phase, int64_t start, F* slot) {
    phase == 0 ? sums<T>(p, r, start, slot) : output<T>(p, r, start, slot);
  }
};

template <class T>
struct Backward {
  static constexpr int slots = backward_slots, phases = 6;
  static constexpr bool by_chunk[phases] = {true, false, true, false, true, false};

  static void whole(const Problem& p, Register& r, int phase) {
    if (phase == 1 && r.fast && within(p, r, slots)) return carry(p, r, slots, AX);
    if (phase == 3 && r.fast && adjoint_within(p, r)) return carry(p, r, slots, FH);
    if (phase == 5 && r.fast) return parameter_gradients(p, r);
    if (phase == (r.fast ? 3 : 1) || (phase == 1)) {
      r.fast = false;
      robust::backward<T>(p, r.image, r.channel, r.n);
    }
  }
  static void chunk(const Problem& p, const Register& r, int phase, int64_t start, F* slot) {
    phase == 0   ? sums<T>(p, r, start, slot)
    : phase == 2 ? adjoint_sums<T>(p, r, start, slot)
                 : gradients<T>(p, r, start, slot);
  }
};

// ---- scheduling

template <class Work>
void parallel(ParallelFor loop, int64_t count, int64_t grain, const Work& work) {
  loop(count, grain,
       [](int64_t begin, int64_t end, void* context) { (*static_cast<const Work*>(context))(begin, end); },
       const_cast<Work*>(&work));
}

// registers and their slots in one piece of memory
class Workspace {
  void* memory_;

 public:
  Register* registers;

  Workspace(int64_t count, int64_t slots) {
    const size_t each = sizeof(Register) + sizeof(F) * static_cast<size_t>(slots);
    memory_ = malloc(each * static_cast<size_t>(count) + 64);
    if (!memory_) abort();
    registers = reinterpret_cast<Register*>((reinterpret_cast<uintptr_t>(memory_) + 63) & ~uintptr_t{63});
    for (int64_t i = 0; i < count; ++i) registers[i].slots = reinterpret_cast<F*>(registers + count) + i * slots;
  }
  ~Workspace() { free(memory_); }
  Workspace(const Workspace&) = delete;
};

template <class Op>
void chunk_phase(const Problem& p, const Register& r, int phase, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end && r.fast; ++c) Op::chunk(p, r, phase, c * L, r.slots + c * Op::slots);
}

// a thread takes its registers, `tile` at a time, through all phases
template <class Op>
void by_register(const Problem& p, int64_t begin, int64_t end, int64_t tile, int64_t chunks) {
  const FlushSubnormals flush(true);
  const Workspace space(tile < end - begin ? tile : end - begin, chunks * Op::slots);
  for (int64_t first = begin; first < end; first += tile) {
    const int64_t count = end - first < tile ? end - first : tile;
    for (int64_t i = 0; i < count; ++i) space.registers[i].prepare(p, first + i);
    for (int phase = 0; phase < Op::phases; ++phase) {
      if (!Op::by_chunk[phase]) {
        for (int64_t i = 0; i < count; ++i) Op::whole(p, space.registers[i], phase);
        continue;
      }
      for (int64_t c = 0; c < chunks; ++c) {
        for (int64_t i = 0; i < count; ++i) chunk_phase<Op>(p, space.registers[i], phase, c, c + 1);
      }
    }
  }
}

// every phase is a parallel region over the registers' segments
template <class Op>
void by_segment(const Problem& p, int64_t count, int64_t segments, int64_t chunks, ParallelFor loop) {
  const Workspace space(count, chunks * Op::slots);
  for (int64_t i = 0; i < count; ++i) space.registers[i].prepare(p, i);
  for (int phase = 0; phase < Op::phases; ++phase) {
    const int64_t parts = Op::by_chunk[phase] ? segments : 1;
    parallel(loop, count * parts, 1, [&](int64_t begin, int64_t end) {
      const FlushSubnormals flush(true);
      for (int64_t k = begin; k < end; ++k) {
        Register& r = space.registers[k / parts];
        const int64_t part = k % parts;
        if (!Op::by_chunk[phase]) {
          Op::whole(p, r, phase);
        } else {
          chunk_phase<Op>(p, r, phase, chunks * part / parts, chunks * (part + 1) / parts);
        }
      }
    });
  }
}

template <class Op>
void run(const Problem& p, ParallelFor loop) {
  const int64_t count = p.batch * ((p.channels + W - 1) / W), chunks = (p.tokens + L - 1) / L;
  const int64_t wanted = (4 * p.threads + count - 1) / count, most = chunks / 4;
  const int64_t segments = p.threads == 1 || count >= 2 * p.threads ? 1 : wanted < most ? wanted : most;
  if (segments > 1) return by_segment<Op>(p, count, segments, chunks, loop);
  constexpr int64_t tile = 4;
  parallel(loop, count, 1 + 1024 / p.tokens,
           [&](int64_t begin, int64_t end) { by_register<Op>(p, begin, end, tile, chunks); });
}

// float64 inputs always take the robust path, which is float64 throughout
template <void (*function)(const Problem&, int64_t, int64_t, int)>
void run_robust(const Problem& p, ParallelFor loop) {
  const int64_t columns = (p.channels + W - 1) / W;
  parallel(loop, p.batch * columns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t channel = i % columns * W, rest = p.channels - channel;
      function(p, i / columns, channel, static_cast<int>(rest < W ? rest : W));
    }
  });
}

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

extern const Kernel kernel = {SOLA_TEXT(SOLA_ISA), W, forward, backward};

}  // namespace sola::SOLA_ISA
