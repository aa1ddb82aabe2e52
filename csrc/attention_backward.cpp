// SPDX-License-Identifier: Apache-2.0
// The backward of softmax attention. The weights are recomputed from queries, keys and the forward's log-sum-exp:
//
//   P' = exp(K Q' - lse),  dP' = V dO',  dS' = P' (dP' - delta),  delta_i = o_i . do_i
//   dQ' = K' dS',  dK = dS' Q,  dV = P' dO
//
// for a panel of queries by a block of keys at a time, as in the forward. A head is computed by a single thread, so the
// gradients of keys and values are always summed in the same order.
#include "attention.h"

#include "heads.h"

namespace sola::SOLA_ISA {
namespace {

struct Workspace {
  int64_t padded_dim, row_stride;  // head_dim, rounded up to whole tiles and to whole panels
  Arena memory;
  float *keys, *values, *grad_keys, *grad_values;          // [tokens, row_stride], and their gradients
  float *queries, *grads, *query_rows, *grad_rows;           // [dim, panel] x 2, [panel, row_stride] x 2
  float *weights, *grad_scores, *grad_queries, *lse, *delta;  // [block, panel] x 2, [padded_dim, panel], [panel] x 2

  Workspace(int64_t tokens, int64_t dim)
      : padded_dim(round_up(dim, rows)),
        row_stride(round_up(dim, panel)),
        memory(4 * round_up(tokens, block) * row_stride +
                   panel * (2 * dim + 2 * row_stride + 2 * block + padded_dim + 2),
               13) {
    float** const by_token[] = {&keys, &values, &grad_keys, &grad_values};
    for (float** piece : by_token) *piece = memory.allocate(round_up(tokens, block) * row_stride);
    queries = memory.allocate(dim * panel), grads = memory.allocate(dim * panel);
    query_rows = memory.allocate(panel * row_stride), grad_rows = memory.allocate(panel * row_stride);
    weights = memory.allocate(block * panel), grad_scores = memory.allocate(block * panel);
    grad_queries = memory.allocate(padded_dim * panel), lse = memory.allocate(panel), delta = memory.allocate(panel);
  }
};

// Compute the weights and the gradients of the scores for a block of keys by a panel of queries.
void differentiate(const Workspace& space, int64_t first, int64_t keys, int64_t dim) {
  const float *key = space.keys + first * space.row_stride, *value = space.values + first * space.row_stride;
  float *const weights = space.weights, *const grad_scores = space.grad_scores;
  for (int64_t j = 0; j < keys; j += rows) {
    F sums[rows][cols] = {};
    multiply(sums, key + j * space.row_stride, space.row_stride, 1, space.queries, panel, dim);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < cols; ++v) narrow(weights + (j + r) * panel + v * W, sums[r][v]);
    }
  }
  const Reference one(F{});
  for (int v = 0; v < cols; ++v) {
    const F lse = widen(space.lse + v * W);
#pragma GCC unroll 4
    for (float *at = weights + v * W, *const end = at + round_up(keys, rows) * panel; at < end; at += panel) {
      const F exponent = widen(at) - lse;  // positive only by rounding, and for padding keys
      narrow(at, power(exponent > 0.0f ? F{} : exponent, one));
    }
  }
  const F delta[cols] = {widen(space.delta), widen(space.delta + W)};
  for (int64_t j = 0; j < keys; j += rows) {
    F sums[rows][cols] = {};
    multiply(sums, value + j * space.row_stride, space.row_stride, 1, space.grads, panel, dim);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < cols; ++v) {
        const int64_t at = (j + r) * panel + v * W;
        narrow(grad_scores + at, widen(weights + at) * (sums[r][v] - delta[v]));
      }
    }
  }
}

// Add the gradients of a panel of queries by all keys.
template <class T>
void add_panel(const Head<T>& h, const Workspace& space, int64_t first, int64_t count, U& query_bits, U& grad_bits) {
  const float scale = h.scale();
  const T *query = h.query + first * h.stride, *grad = h.grad + first * h.out_stride, *out = h.out + first * h.out_stride;
  gather_panel(query, h.stride, count, h.dim, scale * log2_e, space.queries);
  gather_panel(grad, h.out_stride, count, h.dim, 1.0f, space.grads);
  const int64_t valid = count < panel ? count : panel;
  query_bits =
      larger(query_bits, copy_rows(query, h.stride, valid, h.dim, scale, panel, space.row_stride, space.query_rows));
  grad_bits =
      larger(grad_bits, copy_rows(grad, h.out_stride, valid, h.dim, 1.0f, panel, space.row_stride, space.grad_rows));
  for (int64_t q = 0; q < panel; ++q) {
    F sum{};
    for (int64_t d = 0; d < h.dim && q < valid; d += W) {
      sum += load(out + q * h.out_stride + d, active_lanes(h.dim - d)) *
             widen(space.grad_rows + q * space.row_stride + d);
    }
    float delta = 0.0f;
    for (int i = 0; i < W; ++i) delta += sum[i];
    space.delta[q] = delta;
    space.lse[q] = q < valid ? h.lse[first + q] * log2_e : 0.0f;
  }
  for (int64_t i = 0; i < space.padded_dim * panel; ++i) space.grad_queries[i] = 0.0f;
  for (int64_t k = 0; k < h.tokens; k += block) {
    const int64_t keys = h.tokens - k < block ? h.tokens - k : block;
    differentiate(space, k, keys, h.dim);
    for (int64_t d = 0; d < space.padded_dim; d += rows) {
      multiply_onto(space.grad_queries + d * panel, panel, space.keys + k * space.row_stride + d, 1, space.row_stride,
                    space.grad_scores, panel, keys);
    }
    for (int64_t j = 0; j < keys; j += rows) {
      for (int64_t d = 0; d < space.row_stride; d += panel) {
        const int64_t at = (k + j) * space.row_stride + d;
        multiply_onto(space.grad_keys + at, space.row_stride, space.grad_scores + j * panel, panel, 1,
                      space.query_rows + d, space.row_stride, panel);
        multiply_onto(space.grad_values + at, space.row_stride, space.weights + j * panel, panel, 1,
                      space.grad_rows + d, space.row_stride, panel);
      }
    }
  }
  Lanes factor[cols];
  for (int v = 0; v < cols; ++v) factor[v] = splat(scale);
  scatter_panel(space.grad_queries, factor, h.stride, count, h.dim, h.to_query + first * h.stride);
}

// Return false if a magnitude exceeds the range of float32; the gradients written so far are then invalid.
template <class T>
bool fast(const Head<T>& h, const Workspace& space) {
  const int64_t padded = round_up(h.tokens, block);
  const U keys = copy_rows(h.key, h.stride, h.tokens, h.dim, 1.0f, padded, space.row_stride, space.keys);
  const U values = copy_rows(h.value, h.stride, h.tokens, h.dim, 1.0f, padded, space.row_stride, space.values);
  for (int64_t i = 0; i < padded * space.row_stride; ++i) space.grad_keys[i] = space.grad_values[i] = 0.0f;
  U queries{}, grads{};
  for (int64_t q = 0; q < h.tokens; q += panel) add_panel(h, space, q, h.tokens - q, queries, grads);
  if (!fits(queries, keys, h.dim, score_limit) || !fits(grads, values, h.dim, value_limit)) return false;
  for (int64_t i = 0; i < h.tokens; ++i) {
    for (int64_t d = 0; d < h.dim; d += W) {
      const int64_t from = i * space.row_stride + d;
      store(h.to_key + i * h.stride + d, widen(space.grad_keys + from), active_lanes(h.dim - d));
      store(h.to_value + i * h.stride + d, widen(space.grad_values + from), active_lanes(h.dim - d));
    }
  }
  return true;
}

template <class T>
void robust(const Head<T>& h) {
  const int64_t n = h.tokens, dim = h.dim, size = n * dim;
  const double scale = 1.0 / __builtin_sqrt(static_cast<double>(dim));
  DoubleArena memory(7 * size + 2 * n);
  double *const query = memory.allocate(size), *const keys = memory.allocate(size),
                *const values = memory.allocate(size), *const grads = memory.allocate(size),
                *const grad_query = memory.allocate(size), *const grad_keys = memory.allocate(size),
                *const grad_values = memory.allocate(size);
  double *const weights = memory.allocate(n), *const grad_weights = memory.allocate(n);
  load_doubles(h.query, h.stride, n, dim, query);
  load_doubles(h.key, h.stride, n, dim, keys);
  load_doubles(h.value, h.stride, n, dim, values);
  load_doubles(h.grad, h.out_stride, n, dim, grads);
  for (int64_t i = 0; i < n; ++i) {
    softmax_weights(query + i * dim, keys, n, dim, weights);
    const double* const grad = grads + i * dim;
    double delta = 0.0;
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0.0;
      for (int64_t d = 0; d < dim; ++d) {
        sum += grad[d] * values[j * dim + d];
        grad_values[j * dim + d] += weights[j] * grad[d];
      }
      grad_weights[j] = sum;
      delta += weights[j] * sum;
    }
    for (int64_t j = 0; j < n; ++j) {
      const double grad_score = weights[j] * (grad_weights[j] - delta) * scale;
      for (int64_t d = 0; d < dim; ++d) {
        grad_query[i * dim + d] += grad_score * keys[j * dim + d];
        grad_keys[j * dim + d] += grad_score * query[i * dim + d];
      }
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t d = 0; d < dim; ++d) {
      store_double(h.to_query + i * h.stride + d, grad_query[i * dim + d]);
      store_double(h.to_key + i * h.stride + d, grad_keys[i * dim + d]);
      store_double(h.to_value + i * h.stride + d, grad_values[i * dim + d]);
    }
  }
}

template <class T>
void backward(const Attention& a, ParallelFor loop) {
  parallel(loop, a.batch * a.heads, 1, [&a](int64_t begin, int64_t end) {
    const FlushSubnormals keep_subnormals(false);
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
