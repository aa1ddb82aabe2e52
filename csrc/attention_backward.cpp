// SPDX-License-Identifier: Apache-2.0
// The backward of softmax attention. Weights come again from queries, keys and the forward's log-sum-exp:
//
//   P' = exp(K Q' - lse),  dP' = V dO',  dS' = P' (dP' - delta),  delta_i = o_i . do_i
//   dQ' = K' dS',  dK = dS' Q,  dV = P' dO
//
// for a panel of queries by a block of keys at a time, as in the forward. A thread takes a head, so that gradients of
// keys and values add up in one order.
#include "attention.h"

#include "heads.h"

namespace sola::SOLA_ISA {
namespace {

struct Workspace {
  int64_t tall, broad;  // head_dim in whole tiles, and in whole rows of them
  Memory memory;
  float *keys, *values, *of_keys, *of_values;            // [tokens, broad], and their gradients
  float *queries, *grads, *query_rows, *grad_rows;       // [dim, panel] twice, [panel, broad] twice
  float *weights, *of_scores, *of_queries, *lse, *delta;  // [block, panel] twice, [tall, panel], [panel] twice

  Workspace(int64_t tokens, int64_t dim)
      : tall(up(dim, rows)),
        broad(up(dim, panel)),
        memory(4 * up(tokens, block) * broad + panel * (2 * dim + 2 * broad + 2 * block + tall + 2), 13) {
    float** const by_token[] = {&keys, &values, &of_keys, &of_values};
    for (float** piece : by_token) *piece = memory.take(up(tokens, block) * broad);
    queries = memory.take(dim * panel), grads = memory.take(dim * panel);
    query_rows = memory.take(panel * broad), grad_rows = memory.take(panel * broad);
    weights = memory.take(block * panel), of_scores = memory.take(block * panel);
    of_queries = memory.take(tall * panel), lse = memory.take(panel), delta = memory.take(panel);
  }
};

// weights and gradients of scores, of a block of keys by the panel
void differentiate(const Workspace& space, int64_t first, int64_t keys, int64_t dim) {
  const float *key = space.keys + first * space.broad, *value = space.values + first * space.broad;
  float *const weights = space.weights, *const of_scores = space.of_scores;
  for (int64_t j = 0; j < keys; j += rows) {
    F sums[rows][wide] = {};
    multiply(sums, key + j * space.broad, space.broad, 1, space.queries, panel, dim);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < wide; ++v) narrow(weights + (j + r) * panel + v * W, sums[r][v]);
    }
  }
  const Reference one(F{});
  for (int v = 0; v < wide; ++v) {
    const F lse = widen(space.lse + v * W);
#pragma GCC unroll 4
    for (float *at = weights + v * W, *const end = at + up(keys, rows) * panel; at < end; at += panel) {
      const F below = widen(at) - lse;  // above zero by rounding only, and where there is no key
      narrow(at, power(below > 0.0f ? F{} : below, one));
    }
  }
  const F delta[wide] = {widen(space.delta), widen(space.delta + W)};
  for (int64_t j = 0; j < keys; j += rows) {
    F sums[rows][wide] = {};
    multiply(sums, value + j * space.broad, space.broad, 1, space.grads, panel, dim);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < wide; ++v) {
        const int64_t at = (j + r) * panel + v * W;
        narrow(of_scores + at, widen(weights + at) * (sums[r][v] - delta[v]));
      }
    }
  }
}

// a panel of queries by all keys
template <class T>
void add_panel(const Head<T>& h, const Workspace& space, int64_t first, int64_t count, U& of_queries, U& of_grads) {
  const float scale = h.scale();
  const T *query = h.query + first * h.stride, *grad = h.grad + first * h.out_stride, *out = h.out + first * h.out_stride;
  gather_panel(query, h.stride, count, h.dim, scale * log2_e, space.queries);
  gather_panel(grad, h.out_stride, count, h.dim, 1.0f, space.grads);
  const int64_t there = count < panel ? count : panel;
  of_queries = larger(of_queries, copy_rows(query, h.stride, there, h.dim, scale, panel, space.broad, space.query_rows));
  of_grads = larger(of_grads, copy_rows(grad, h.out_stride, there, h.dim, 1.0f, panel, space.broad, space.grad_rows));
  for (int64_t q = 0; q < panel; ++q) {
    F sum{};
    for (int64_t d = 0; d < h.dim && q < there; d += W) {
      sum += load(out + q * h.out_stride + d, at_most_W(h.dim - d)) * widen(space.grad_rows + q * space.broad + d);
    }
    float delta = 0.0f;
    for (int i = 0; i < W; ++i) delta += sum[i];
    space.delta[q] = delta;
    space.lse[q] = q < there ? h.lse[first + q] * log2_e : 0.0f;
  }
  for (int64_t i = 0; i < space.tall * panel; ++i) space.of_queries[i] = 0.0f;
  for (int64_t k = 0; k < h.tokens; k += block) {
    const int64_t keys = h.tokens - k < block ? h.tokens - k : block;
    differentiate(space, k, keys, h.dim);
    for (int64_t d = 0; d < space.tall; d += rows) {
      multiply_onto(space.of_queries + d * panel, panel, space.keys + k * space.broad + d, 1, space.broad, space.of_scores,
                    panel, keys);
    }
    for (int64_t j = 0; j < keys; j += rows) {
      for (int64_t d = 0; d < space.broad; d += panel) {
        const int64_t at = (k + j) * space.broad + d;
        multiply_onto(space.of_keys + at, space.broad, space.of_scores + j * panel, panel, 1, space.query_rows + d,
                      space.broad, panel);
        multiply_onto(space.of_values + at, space.broad, space.weights + j * panel, panel, 1, space.grad_rows + d,
                      space.broad, panel);
      }
    }
  }
  Lanes factor[wide];
  for (int v = 0; v < wide; ++v) factor[v] = splat(scale);
  scatter_panel(space.of_queries, factor, h.stride, count, h.dim, h.to_query + first * h.stride);
}

// false: the numbers do not fit, and what was written is nonsense
template <class T>
bool fast(const Head<T>& h, const Workspace& space) {
  const int64_t padded = up(h.tokens, block);
  const U keys = copy_rows(h.key, h.stride, h.tokens, h.dim, 1.0f, padded, space.broad, space.keys);
  const U values = copy_rows(h.value, h.stride, h.tokens, h.dim, 1.0f, padded, space.broad, space.values);
  for (int64_t i = 0; i < padded * space.broad; ++i) space.of_keys[i] = space.of_values[i] = 0.0f;
  U queries{}, grads{};
  for (int64_t q = 0; q < h.tokens; q += panel) add_panel(h, space, q, h.tokens - q, queries, grads);
  if (!fits(queries, keys, h.dim, largest_score) || !fits(grads, values, h.dim, largest)) return false;
  for (int64_t i = 0; i < h.tokens; ++i) {
    for (int64_t d = 0; d < h.dim; d += W) {
      const int64_t from = i * space.broad + d;
      store(h.to_key + i * h.stride + d, widen(space.of_keys + from), at_most_W(h.dim - d));
      store(h.to_value + i * h.stride + d, widen(space.of_values + from), at_most_W(h.dim - d));
    }
  }
  return true;
}

template <class T>
void robust(const Head<T>& h) {
  const int64_t n = h.tokens, dim = h.dim, size = n * dim;
  const double scale = 1.0 / __builtin_sqrt(static_cast<double>(dim));
  Doubles memory(7 * size + 2 * n);
  double *const query = memory.take(size), *const keys = memory.take(size), *const values = memory.take(size),
                *const grads = memory.take(size), *const of_query = memory.take(size),
                *const of_keys = memory.take(size), *const of_values = memory.take(size);
  double *const weights = memory.take(n), *const of_weights = memory.take(n);
  to_doubles(h.query, h.stride, n, dim, query);
  to_doubles(h.key, h.stride, n, dim, keys);
  to_doubles(h.value, h.stride, n, dim, values);
  to_doubles(h.grad, h.out_stride, n, dim, grads);
  for (int64_t i = 0; i < n; ++i) {
    weights_of(query + i * dim, keys, n, dim, weights);
    const double* const grad = grads + i * dim;
    double delta = 0.0;
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0.0;
      for (int64_t d = 0; d < dim; ++d) {
        sum += grad[d] * values[j * dim + d];
        of_values[j * dim + d] += weights[j] * grad[d];
      }
      of_weights[j] = sum;
      delta += weights[j] * sum;
    }
    for (int64_t j = 0; j < n; ++j) {
      const double of_score = weights[j] * (of_weights[j] - delta) * scale;
      for (int64_t d = 0; d < dim; ++d) {
        of_query[i * dim + d] += of_score * keys[j * dim + d];
        of_keys[j * dim + d] += of_score * query[i * dim + d];
      }
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t d = 0; d < dim; ++d) {
      from_double(h.to_query + i * h.stride + d, of_query[i * dim + d]);
      from_double(h.to_key + i * h.stride + d, of_keys[i * dim + d]);
      from_double(h.to_value + i * h.stride + d, of_values[i * dim + d]);
    }
  }
}

template <class T>
void backward(const Attention& a, ParallelFor loop) {
  parallel(loop, a.batch * a.heads, 1, [&a](int64_t begin, int64_t end) {
    const FlushSubnormals keep(false);
    const Workspace space(a.tokens, a.head_dim);
    for (int64_t i = begin; i < end; ++i) {
      const Head<T> head(a, i);
      if (!fast(head, space)) robust(head);
    }
  });
}

}  // namespace

void attention_backward(const Attention& a, Type type, ParallelFor loop) {
  if (type == Type::bfloat16) return backward<bfloat16>(a, loop);
  if (type == Type::float16) return backward<float16>(a, loop);
  backward<float>(a, loop);
}

}  // namespace sola::SOLA_ISA
