// SPDX-License-Identifier: Apache-2.0
// Softmax attention that never stores more scores than one block of keys, compiled once per instruction set.
//
// Queries are lanes: the scores of a block of keys by a panel of queries are S' = K Q', the results O' = V' P'. Rows of
// keys and values are therefore read without a transposition, maxima and sums over keys are computed lane by lane, and
// only the queries and results of a panel are transposed. The maximum is updated per block (online softmax). The
// summation order depends on neither the number of threads nor the batch size. Heads with infinities, NaN or scores too
// large for float32 are computed by scalar loops in float64.
#include "attention.h"

#include "operands.h"

namespace sola::SOLA_ISA {
namespace {

struct Workspace {
  int64_t padded_dim;  // head_dim, rounded up to whole tiles
  Arena memory;
  float *keys, *values, *scores, *queries, *results;         // [block, padded_dim] x 2, [block, panel], rest per panel
  Lanes (*maximum)[cols], (*total)[cols], (*divisor)[cols];  // per panel

  Workspace(int64_t dim, int64_t panels, int64_t step)
      : padded_dim(round_up(dim, step)),
        memory(2 * block * padded_dim + block * panel + panels * panel * (2 * padded_dim + 3), 8),
        keys(memory.allocate(block * padded_dim)),
        values(memory.allocate(block * padded_dim)),
        scores(memory.allocate(block * panel)),
        queries(memory.allocate(panels * panel * padded_dim)),
        results(memory.allocate(panels * panel * padded_dim)),
        maximum(reinterpret_cast<Lanes(*)[cols]>(memory.allocate(panels * panel))),
        total(reinterpret_cast<Lanes(*)[cols]>(memory.allocate(panels * panel))),
        divisor(reinterpret_cast<Lanes(*)[cols]>(memory.allocate(panels * panel))) {}
};

// Replace the scores of a block of keys with softmax weights, relative to an integer near the running maximum. Earlier
// results and sums are rescaled when the maximum changes.
template <class T>
void update_weights(const Workspace& space, int64_t p, int64_t keys, int64_t dim, float factor) {
  using Ops = Operands<T>;
  const float* const queries = space.queries + p * panel * space.padded_dim;
  float* const scores = space.scores;
  F maximum[cols] = {splat(masked_score), splat(masked_score)};
  Ops::scores(space.keys, queries, keys, dim, scores, maximum);
  const F remaining = splat(Ops::scaled ? 1.0f : factor);
  for (int v = 0; v < cols; ++v) {
    const F before = space.maximum[p][v], now = larger(before, round_to_integer(maximum[v] * remaining));
    const F rescale = power(before, Reference(now));
    space.maximum[p][v] = now;
    const Total total = Ops::exponentiate(scores + v * W, keys, Reference(now, remaining));
    space.total[p][v] = F(space.total[p][v]) * rescale + total.exact;
    space.divisor[p][v] = F(space.divisor[p][v]) * rescale + total.rounded;
    if (memcmp(&before, &now, sizeof now) == 0) continue;
    float* const results = space.results + p * panel * space.padded_dim + v * W;
    for (int64_t d = 0; d < space.padded_dim; ++d) narrow(results + d * panel, widen(results + d * panel) * rescale);
  }
}

// Compute some queries of a head, panel by panel. Return false, without writing results, if a magnitude exceeds the
// range of float32.
template <class T>
bool fast(const Head<T>& h, int64_t first, int64_t queries, const Workspace& space) {
  using Ops = Operands<T>;
  const int64_t panels = (queries + panel - 1) / panel, padded_dim = space.padded_dim;
  const float factor = h.scale() * log2_e;
  U query_bits{}, key_bits{}, value_bits{};
  for (int64_t p = 0; p < panels; ++p) {
    const T* const from = h.query + (first + p * panel) * h.stride;
    float* const to = space.queries + p * panel * padded_dim;
    query_bits = larger(query_bits, Ops::queries(from, h.stride, queries - p * panel, h.dim, factor, to));
    for (int v = 0; v < cols; ++v) {
      space.maximum[p][v] = splat(masked_score), space.total[p][v] = space.divisor[p][v] = F{};
    }
  }
  for (int64_t i = 0; i < panels * padded_dim * panel; ++i) space.results[i] = 0.0f;
  for (int64_t k = 0; k < h.tokens; k += block) {
    const int64_t keys = h.tokens - k < block ? h.tokens - k : block;
    key_bits = larger(key_bits, Ops::keys(h.key + k * h.stride, h.stride, keys, h.dim, space.keys));
    value_bits = larger(value_bits, Ops::values(h.value + k * h.stride, h.stride, keys, h.dim, space.values));
    for (int64_t p = 0; p < panels; ++p) {
      update_weights<T>(space, p, keys, h.dim, factor);
      Ops::add(space.results + p * padded_dim * panel, space.values, space.scores, keys, padded_dim);
    }
  }
  // unscaled queries lack the factor of the scores, which is at most 1.5
  const float limit = Ops::scaled ? score_limit : score_limit / 1.5f;
  if (!fits(query_bits, key_bits, h.dim, limit) || !fits(value_bits, value_limit)) return false;
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t at = first + p * panel, left = queries - p * panel;
    Lanes inverse[cols];
    for (int v = 0; v < cols; ++v) inverse[v] = 1.0f / F(space.divisor[p][v]);
    scatter_panel(space.results + p * panel * padded_dim, inverse, h.out_stride, left, h.dim,
                  h.to_out + at * h.out_stride);
    for (int64_t q = 0; q < panel && q < left; ++q) {
      const float maximum = space.maximum[p][q / W].at[q % W], total = space.total[p][q / W].at[q % W];
      h.lse[at + q] = maximum / log2_e + __builtin_logf(total);
    }
  }
  return true;
}

template <class T>
void robust(const Head<T>& h, int64_t first, int64_t queries) {
  const int64_t n = h.tokens, dim = h.dim;
  DoubleArena memory((queries + 2 * n) * dim + n);
  double *const query = memory.allocate(queries * dim), *const keys = memory.allocate(n * dim),
                *const values = memory.allocate(n * dim), *const weights = memory.allocate(n);
  load_doubles(h.query + first * h.stride, h.stride, queries, dim, query);
  load_doubles(h.key, h.stride, n, dim, keys);
  load_doubles(h.value, h.stride, n, dim, values);
  for (int64_t i = 0; i < queries; ++i) {
    h.lse[first + i] = static_cast<float>(softmax_weights(query + i * dim, keys, n, dim, weights));
    double* const sums = query + i * dim;  // reuses the memory of the query, which is no longer needed
    for (int64_t d = 0; d < dim; ++d) sums[d] = 0.0;
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t d = 0; d < dim; ++d) sums[d] += weights[j] * values[j * dim + d];
    }
    for (int64_t d = 0; d < dim; ++d) store_double(h.to_out + (first + i) * h.out_stride + d, sums[d]);
  }
}

// The partition of a head's queries into tasks. The queries of a task share one packed copy of the keys and values,
// whose rows are far apart in memory. A task has as many panels as fit the second-level cache (queries and results), or
// fewer if some threads would otherwise be idle, but at least 256 queries to amortise the copy.
struct Partition {
  int64_t panels, tasks;  // panels per task, tasks per head

  Partition(const Attention& a, int64_t step) {
    constexpr int64_t cache = 512 << 10, tasks_per_thread = 4, min_panels = 256 / panel;
    const int64_t all_panels = ceil_div(a.tokens, panel);
    const int64_t cached_panels =
        cache / (panel * (a.head_dim + round_up(a.head_dim, step)) * static_cast<int64_t>(sizeof(float)));
    const int64_t min_tasks = ceil_div(all_panels, cached_panels > min_panels ? cached_panels : min_panels),
                  max_tasks = ceil_div(all_panels, min_panels);
    const int64_t target_tasks = ceil_div(tasks_per_thread * a.threads, a.batch * a.heads);
    panels = ceil_div(all_panels, target_tasks < min_tasks   ? min_tasks
                                  : target_tasks > max_tasks ? max_tasks
                                                             : target_tasks);
    tasks = ceil_div(all_panels, panels);
  }
  static int64_t ceil_div(int64_t count, int64_t each) { return (count + each - 1) / each; }
};

template <class T>
void forward(const Attention& a, ParallelFor loop) {
  if (a.batch * a.tokens * a.heads == 0) return;
  const Partition partition(a, Operands<T>::step);
  parallel(loop, a.batch * a.heads * partition.tasks, 1, [&a, partition](int64_t begin, int64_t end) {
    const FlushSubnormals keep_subnormals(false);
    const MatrixUnit unit;
    const Workspace space(a.head_dim, partition.panels, Operands<T>::step);
    for (int64_t i = begin; i < end; ++i) {
      const Head<T> head(a, i / partition.tasks);
      const int64_t each = partition.panels * panel, first = i % partition.tasks * each;
      const int64_t queries = a.tokens - first < each ? a.tokens - first : each;
      if (!fast(head, first, queries, space)) robust(head, first, queries);
    }
  });
}

#if defined(__AVX512BF16__)
// bfloat16 is multiplied in pairs; all other types use the AVX-512 kernels
void attention(const Attention& a, Type type, ParallelFor loop) {
  if (type == Type::bfloat16) return forward<bfloat16>(a, loop);
  avx512::attention_kernels.forward(a, type, loop);
}
using avx512::attention_backward;
#else
void attention(const Attention& a, Type type, ParallelFor loop) {
  if (type == Type::bfloat16) return forward<bfloat16>(a, loop);
  if (type == Type::float16) return forward<float16>(a, loop);
  forward<float>(a, loop);
}
#endif

}  // namespace

const AttentionKernels attention_kernels = {attention, attention_backward};

}  // namespace sola::SOLA_ISA
