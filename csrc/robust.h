// SPDX-License-Identifier: Apache-2.0
// Bi-WKV for any key, decay, bonus and value: in float64 and the log domain, one register of channels at a time.
//
// A state is a decayed sum relative to its largest weight: sum_t exp(a_t - m) (p_t, q_t) with m = max a_t. A step of
// decay is m -= d, and adding a token rescales the smaller of the two sides, so nothing overflows for any a and d, and
// the rounding of m only matters between tokens of comparable weights, which are few steps apart. Let m_i be the log
// reference of row i's denominator D = exp(m_i) D'. The adjoint h = g / D = exp(-m_i) g / D' is then a token of log
// weight -m_i, and the two scans of the backward are those of the forward with other inputs. Every exponent formed from
// them is at most zero up to rounding, because m_i bounds every weight of its row.
//
// States at the edges of chunks are stored and those inside are recomputed, so no array has the size of the inputs.
#pragma once
#include "lanes.h"
#include "memory.h"
#include "wkv.h"

namespace sola::SOLA_ISA::robust {

constexpr int L = 32;
constexpr double lowest = -1e300;  // the reference of an empty sum; finite, because infinity minus infinity is NaN
// The limit of the decay per step. Beyond it a token's weight is negligible or dominant, but the rounding errors of
// sums of such steps would turn exponents of zero into large ones.
constexpr double max_decay = 1e8;

struct alignas(64) Vector {
  double at[W];
};

struct State {
  Vector p, q, m;

  void clear() {
    for (int i = 0; i < W; ++i) p.at[i] = q.at[i] = 0.0, m.at[i] = lowest;
  }

  // Decay by one step, then add a token (log weight a, values b and c).
  void decay_and_add(const Vector& decay, const Vector& a, const Vector& b, const Vector& c) {
    for (int i = 0; i < W; ++i) {
      const double old = m.at[i] - decay.at[i], gap = a.at[i] - old;
      const double ratio = exp(gap > 0.0 ? -gap : gap);
      const double keep = gap > 0.0 ? ratio : 1.0, take = gap > 0.0 ? 1.0 : ratio;
      p.at[i] = p.at[i] * keep + b.at[i] * take;
      q.at[i] = q.at[i] * keep + c.at[i] * take;
      m.at[i] = gap > 0.0 ? a.at[i] : old;
    }
  }
};

// a row of the mixing matrix applied to the values: log reference m, D' = exp(-m) D, output y
struct Row {
  Vector m, denominator, y;

  void read(const State& left, const State& right, const Vector& key, const Vector& value, const Vector& bonus) {
    for (int i = 0; i < W; ++i) {
      const double self = key.at[i] + bonus.at[i], side = left.m.at[i] > right.m.at[i] ? left.m.at[i] : right.m.at[i];
      const double top = self > side ? self : side;
      const double a = exp(left.m.at[i] - top), r = exp(right.m.at[i] - top), s = exp(self - top);
      const double sum = a * left.q.at[i] + r * right.q.at[i] + s;
      const double d = top > lowest / 2 ? sum : __builtin_nan("");  // all keys are -inf: 0 / 0, as in the definition
      m.at[i] = top;
      denominator.at[i] = d;
      y.at[i] = (a * left.p.at[i] + r * right.p.at[i] + s * value.at[i]) / d;
    }
  }
};

struct Token {
  Vector key, value;
};

// one register of channels of one image
template <class T>
struct Channels {
  const Problem& problem;
  int64_t image, channel;
  int n;
  Vector decay, bonus, one;

  Channels(const Problem& p, int64_t b, int64_t c, int lanes) : problem(p), image(b), channel(c), n(lanes) {
    for (int i = 0; i < W; ++i) {
      const double d = i < n ? p.decay[c + i] / static_cast<double>(p.tokens) : 0.0;
      decay.at[i] = d > max_decay ? max_decay : d < -max_decay ? -max_decay : d;
      bonus.at[i] = i < n ? p.bonus[c + i] : 0.0;
      one.at[i] = 1.0;
    }
  }

  T* at(const Array& a, int64_t t) const {
    return static_cast<T*>(a.data) + image * a.batch_stride + t * a.row_stride + channel;
  }

  void read(Token& token, int64_t t) const {
    load(at(problem.key, t), n, token.key.at);
    load(at(problem.value, t), n, token.value.at);
    for (int i = 0; i < W; ++i) token.key.at[i] = token.key.at[i] < lowest ? lowest : token.key.at[i];  // -inf: masked
  }

  void decay_and_add(State& state, const Token& token) const {
    state.decay_and_add(decay, token.key, token.value, one);
  }

  // right[j] = the state to the right of token start + j, given the state to the right of the chunk
  void scan_right(State state, State* right, Token* tokens, int64_t start, int len) const {
    for (int j = len - 1; j >= 0; --j) {
      read(tokens[j], start + j);
      right[j] = state;
      decay_and_add(state, tokens[j]);
    }
  }

  // edges[c] = the state to the right of chunk c
  void right_edges(State* edges) const {
    State state;
    state.clear();
    Token token;
    for (int64_t t = problem.tokens - 1; t >= 0; --t) {
      if (t % L == L - 1 || t == problem.tokens - 1) edges[t / L] = state;
      read(token, t);
      decay_and_add(state, token);
    }
  }
};

template <class T>
void forward(const Problem& problem, int64_t image, int64_t channel, int n) {
  const FlushSubnormals keep(false);
  const Channels<T> x(problem, image, channel, n);
  const int64_t chunks = (problem.tokens + L - 1) / L;
  const AlignedMemory memory(chunks * sizeof(State));
  State* const right_edges = memory.begin<State>();
  x.right_edges(right_edges);
  State left, right[L];
  Token tokens[L];
  Row row;
  left.clear();
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t start = c * L;
    const int len = static_cast<int>(problem.tokens - start < L ? problem.tokens - start : L);
    x.scan_right(right_edges[c], right, tokens, start, len);
    for (int j = 0; j < len; ++j) {
      row.read(left, right[j], tokens[j].key, tokens[j].value, x.bonus);
      store(x.at(problem.output, start + j), row.y.at, n);
      x.decay_and_add(left, tokens[j]);
    }
  }
}

// the adjoint of a row as a token: log weight -m, values h' = g / D' and q' = h' y
struct Adjoint {
  Vector weight, h, q;

  void read(const Row& row, const Vector& grad) {
    for (int i = 0; i < W; ++i) {
      weight.at[i] = -row.m.at[i];
      h.at[i] = grad.at[i] / row.denominator.at[i];
      q.at[i] = h.at[i] * row.y.at[i];
    }
  }
};

struct Sums {
  Vector decay, bonus;
};

// the gradients of token i: H and Q are the sums of both scans and of the token itself, each times exp(key)
inline void gradients(const Token& token, const Adjoint& self_adjoint, const State& before, const State& after,
                      const State& left, const State& right, const Vector& decay, const Vector& bonus, Vector& grad_key,
                      Vector& grad_value, Sums& sums) {
  for (int i = 0; i < W; ++i) {
    const double key = token.key.at[i], value = token.value.at[i], d = decay.at[i];
    const double f = exp(key + before.m.at[i]), b = exp(key + after.m.at[i]);
    const double s = exp(key + bonus.at[i] + self_adjoint.weight.at[i]);
    const double h = f * before.p.at[i] + b * after.p.at[i] + s * self_adjoint.h.at[i];
    const double q = f * before.q.at[i] + b * after.q.at[i] + s * self_adjoint.q.at[i];
    grad_value.at[i] = h;
    grad_key.at[i] = h * value - q;
    sums.bonus.at[i] += s * (self_adjoint.h.at[i] * value - self_adjoint.q.at[i]);
    const double down = exp(left.m.at[i] + after.m.at[i] - d), up = exp(right.m.at[i] + before.m.at[i] - d);
    sums.decay.at[i] -= down * (left.p.at[i] * after.p.at[i] - left.q.at[i] * after.q.at[i]) +
                        up * (right.p.at[i] * before.p.at[i] - right.q.at[i] * before.q.at[i]);
  }
}

template <class T>
void backward(const Problem& problem, int64_t image, int64_t channel, int n) {
  const FlushSubnormals keep(false);
  const Channels<T> x(problem, image, channel, n);
  const int64_t chunks = (problem.tokens + L - 1) / L;
  const AlignedMemory memory(3 * chunks * sizeof(State));
  State *right_edges = memory.begin<State>(), *left_edges = right_edges + chunks, *before_edges = left_edges + chunks;
  x.right_edges(right_edges);

  State left, before, after, lefts[L], rights[L], befores[L];
  Token tokens[L];
  Adjoint adjoints[L];
  Row row;
  Vector grad, grad_key, grad_value;
  Sums sums = {};
  // Recompute a chunk except for the scan from the right (`after`); advances `left` and `before` to its end.
  const auto replay = [&](int64_t start, int len) {
    x.scan_right(right_edges[start / L], rights, tokens, start, len);
    for (int j = 0; j < len; ++j) {
      lefts[j] = left;
      befores[j] = before;
      row.read(left, rights[j], tokens[j].key, tokens[j].value, x.bonus);
      load(x.at(problem.grad, start + j), n, grad.at);
      adjoints[j].read(row, grad);
      x.decay_and_add(left, tokens[j]);
      before.decay_and_add(x.decay, adjoints[j].weight, adjoints[j].h, adjoints[j].q);
    }
  };
  const auto length = [&](int64_t start) {
    return static_cast<int>(problem.tokens - start < L ? problem.tokens - start : L);
  };

  left.clear(), before.clear(), after.clear();
  for (int64_t c = 0; c < chunks; ++c) {
    left_edges[c] = left;
    before_edges[c] = before;
    replay(c * L, length(c * L));
  }
  for (int64_t c = chunks - 1; c >= 0; --c) {
    const int64_t start = c * L;
    left = left_edges[c];
    before = before_edges[c];
    replay(start, length(start));
    for (int j = length(start) - 1; j >= 0; --j) {
      gradients(tokens[j], adjoints[j], befores[j], after, lefts[j], rights[j], x.decay, x.bonus, grad_key, grad_value,
                sums);
      store(x.at(problem.grad_key, start + j), grad_key.at, n);
      store(x.at(problem.grad_value, start + j), grad_value.at, n);
      after.decay_and_add(x.decay, adjoints[j].weight, adjoints[j].h, adjoints[j].q);
    }
  }
  for (int i = 0; i < n; ++i) {
    problem.grad_decay[image * problem.channels + channel + i] = sums.decay.at[i] / static_cast<double>(problem.tokens);
    problem.grad_bonus[image * problem.channels + channel + i] = sums.bonus.at[i];
  }
}

}  // namespace sola::SOLA_ISA::robust
