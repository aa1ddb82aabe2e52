// SPDX-License-Identifier: Apache-2.0
// Softmax attention with no scores in memory beyond a block of keys, compiled once for each instruction set.
//
// Queries are lanes: scores of a block of keys by a panel of queries are S' = K Q', results O' = V' P', so that rows of
// keys and values are read as they are, maxima and sums over keys go lane by lane, and only a panel's queries and results
// are transposed. The maximum follows the blocks (online softmax). The order of sums depends on neither threads nor
// batch. Infinities, NaN and numbers too large for scores in float32 take plain loops in float64.
#include "attention.h"

#include "operands.h"

namespace sola::SOLA_ISA {
namespace {

constexpr float none = -1e30f;  // the score of a key that is not there

struct Workspace {
  int64_t tall;  // head_dim in whole tiles
  Memory memory;
  float *keys, *values, *scores, *queries, *results;  // [block, tall] twice, [block, panel], [panels, tall, panel] twice
  Lanes (*most)[wide], (*total)[wide], (*divisor)[wide];  // of each panel

  Workspace(int64_t dim, int64_t panels)
      : tall(up(dim, rows)),
        memory(2 * block * tall + block * panel + panels * panel * (2 * tall + 3), 8),
        keys(memory.take(block * tall)),
        values(memory.take(block * tall)),
        scores(memory.take(block * panel)),
        queries(memory.take(panels * panel * tall)),
        results(memory.take(panels * panel * tall)),
        most(reinterpret_cast<Lanes(*)[wide]>(memory.take(panels * panel))),
        total(reinterpret_cast<Lanes(*)[wide]>(memory.take(panels * panel))),
        divisor(reinterpret_cast<Lanes(*)[wide]>(memory.take(panels * panel))) {}
};

// weights of a block of keys in place of its scores, relative to an integer near the maximum; what was summed before is
// brought to a new one
template <class T>
void score(const Workspace& space, int64_t p, int64_t keys, int64_t dim, float factor) {
  using Of = Operands<T>;
  const float* const queries = space.queries + p * panel * space.tall;
  float* const scores = space.scores;
  F most[wide] = {splat(none), splat(none)};
  for (int64_t j = 0; j < keys; j += rows) {
    F sums[rows][wide] = {};
    multiply<typename Of::Kind>(sums, space.keys + j * Of::across(dim), Of::across(dim), 1, queries, panel, Of::depth(dim));
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < wide; ++v) {
        const F s = j + r >= keys ? splat(none) : Of::scaled ? sums[r][v] : sums[r][v] * factor;
        most[v] = larger(most[v], s);
        narrow(scores + (j + r) * panel + v * W, s);
      }
    }
  }
  for (int v = 0; v < wide; ++v) {
    const F before = space.most[p][v], now = larger(before, whole(most[v]));
    const Reference reference(now);
    const F kept = power(before, reference);
    space.most[p][v] = now;
    const Total total = Of::weigh(scores + v * W, keys, reference);
    space.total[p][v] = F(space.total[p][v]) * kept + total.exact;
    space.divisor[p][v] = F(space.divisor[p][v]) * kept + total.rounded;
    if (memcmp(&before, &now, sizeof now) == 0) continue;
    float* const results = space.results + p * panel * space.tall + v * W;
    for (int64_t d = 0; d < space.tall; ++d) narrow(results + d * panel, widen(results + d * panel) * kept);
  }
}

// some queries of a head, panel by panel; false: the numbers do not fit, and nothing was written
template <class T>
bool fast(const Head<T>& h, int64_t first, int64_t queries, const Workspace& space) {
  using Of = Operands<T>;
  const int64_t panels = (queries + panel - 1) / panel, tall = space.tall;
  const float factor = h.scale() * log2_e;
  U of_queries{}, of_keys{}, of_values{};
  for (int64_t p = 0; p < panels; ++p) {
    const T* const from = h.query + (first + p * panel) * h.stride;
    float* const to = space.queries + p * panel * tall;
    of_queries = larger(of_queries, Of::queries(from, h.stride, queries - p * panel, h.dim, factor, to));
    for (int v = 0; v < wide; ++v) space.most[p][v] = splat(none), space.total[p][v] = space.divisor[p][v] = F{};
  }
  for (int64_t i = 0; i < panels * tall * panel; ++i) space.results[i] = 0.0f;
  for (int64_t k = 0; k < h.tokens; k += block) {
    const int64_t keys = h.tokens - k < block ? h.tokens - k : block;
    of_keys = larger(of_keys, Of::keys(h.key + k * h.stride, h.stride, keys, h.dim, space.keys));
    of_values = larger(of_values, Of::values(h.value + k * h.stride, h.stride, keys, h.dim, space.values));
    for (int64_t p = 0; p < panels; ++p) {
      score<T>(space, p, keys, h.dim, factor);
      for (int64_t d = 0; d < tall; d += rows) {
        float* const results = space.results + (p * tall + d) * panel;
        multiply_onto<typename Of::Kind>(results, panel, space.values + d, 1, tall, space.scores, panel, Of::over(keys));
      }
    }
  }
  // the factor is at most 1.5
  const float most = Of::scaled ? largest_score : largest_score / 1.5f;
  if (!fits(of_queries, of_keys, h.dim, most) || !fits(of_values, largest)) return false;
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t at = first + p * panel, left = queries - p * panel;
    Lanes share[wide];
    for (int v = 0; v < wide; ++v) share[v] = 1.0f / F(space.divisor[p][v]);
    scatter_panel(space.results + p * panel * tall, share, h.out_stride, left, h.dim, h.to_out + at * h.out_stride);
    for (int64_t q = 0; q < panel && q < left; ++q) {
      const float most = space.most[p][q / W].at[q % W], total = space.total[p][q / W].at[q % W];
      h.lse[at + q] = most / log2_e + __builtin_logf(total);
    }
  }
  return true;
}

template <class T>
void robust(const Head<T>& h, int64_t first, int64_t queries) {
  const int64_t n = h.tokens, dim = h.dim;
  Doubles memory((queries + 2 * n) * dim + n);
  double *const query = memory.take(queries * dim), *const keys = memory.take(n * dim),
                *const values = memory.take(n * dim), *const weights = memory.take(n);
  to_doubles(h.query + first * h.stride, h.stride, queries, dim, query);
  to_doubles(h.key, h.stride, n, dim, keys);
  to_doubles(h.value, h.stride, n, dim, values);
  for (int64_t i = 0; i < queries; ++i) {
    h.lse[first + i] = static_cast<float>(weights_of(query + i * dim, keys, n, dim, weights));
    double* const sums = query + i * dim;  // which is read no more
    for (int64_t d = 0; d < dim; ++d) sums[d] = 0.0;
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t d = 0; d < dim; ++d) sums[d] += weights[j] * values[j * dim + d];
    }
    for (int64_t d = 0; d < dim; ++d) from_double(h.to_out + (first + i) * h.out_stride + d, sums[d]);
  }
}

// How a head's queries are divided into tasks, which share a copy of its keys and values, whose rows lie far apart: as
// many panels as fit the second-level cache, queries and results, or fewer, so that all threads have some tasks; but not
// less than 256 queries, which are worth the copy.
struct Division {
  int64_t panels, tasks;  // of a task, of a head

  explicit Division(const Attention& a) {
    constexpr int64_t cache = 512 << 10, tasks_of_thread = 4, least = 256 / panel;
    const int64_t all = pieces(a.tokens, panel);
    const int64_t fit = cache / (panel * (a.head_dim + up(a.head_dim, rows)) * static_cast<int64_t>(sizeof(float)));
    const int64_t fewest = pieces(all, fit > least ? fit : least), most = pieces(all, least);
    const int64_t wanted = pieces(tasks_of_thread * a.threads, a.batch * a.heads);
    panels = pieces(all, wanted < fewest ? fewest : wanted > most ? most : wanted);
    tasks = pieces(all, panels);
  }
  static int64_t pieces(int64_t count, int64_t each) { return (count + each - 1) / each; }
};

template <class T>
void forward(const Attention& a, ParallelFor loop) {
  if (a.batch * a.tokens * a.heads == 0) return;
  const Division division(a);
  parallel(loop, a.batch * a.heads * division.tasks, 1, [&a, division](int64_t begin, int64_t end) {
    const FlushSubnormals keep(false);
    const Workspace space(a.head_dim, division.panels);
    for (int64_t i = begin; i < end; ++i) {
      const Head<T> head(a, i / division.tasks);
      const int64_t each = division.panels * panel, first = i % division.tasks * each;
      const int64_t queries = a.tokens - first < each ? a.tokens - first : each;
      if (!fast(head, first, queries, space)) robust(head, first, queries);
    }
  });
}

#if defined(__AVX512BF16__)
// with pairs of bfloat16; all else is what it is without them
void attention(const Attention& a, Type type, ParallelFor loop) {
  if (type == Type::bfloat16) return forward<bfloat16>(a, loop);
  avx512::attend.forward(a, type, loop);
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

const Attend attend = {attention, attention_backward};

}  // namespace sola::SOLA_ISA
