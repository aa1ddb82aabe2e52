// SPDX-License-Identifier: Apache-2.0
// Scheduling: how the phases of an operator are distributed over threads, registers of channels and chunks of tokens.
//
// An operator Op declares its phases and which of them are split by chunk (by_chunk); a chunk has Op::length tokens.
// Op::chunk runs a phase for one chunk, Op::per_register a phase that is not split, each for one Op::Register. If there
// are enough registers for all threads, a thread takes its registers through all phases. Otherwise, and if there are
// fewer images than threads and the images are long, each phase is a parallel region.
#pragma once
#include "lanes.h"
#include "memory.h"
#include "parallel.h"
#include "wkv.h"

namespace sola::SOLA_ISA {
namespace {

// the registers and their slots in one allocation
template <class Register>
class Workspace {
  AlignedMemory memory_;

 public:
  Register* registers;

  Workspace(int64_t count, int64_t slots)
      : memory_((sizeof(Register) + sizeof(Lanes) * static_cast<size_t>(slots)) * static_cast<size_t>(count)),
        registers(memory_.begin<Register>()) {
    for (int64_t i = 0; i < count; ++i) registers[i].slots = reinterpret_cast<Lanes*>(registers + count) + i * slots;
  }
};

// Prefetches the next chunk while the current one is computed, one cache line at a time in memory order. The hardware
// prefetcher follows sequential addresses, but not the strides between rows in which a register is read; and issuing
// many prefetches at once would delay the loads of the current chunk.
template <class T>
class Prefetch {
  struct Run {
    const char* at;
    int64_t to_next_row;  // from the last line of a row to the next row
  };
  Run runs_[5];                // of the arrays that are read, then of those that are written
  int64_t lines_, remaining_;  // cache lines per row, and those of the current row not yet prefetched

 public:
  static constexpr int tokens = 64 / (W * static_cast<int>(sizeof(T)));  // of a register per cache line

  // prefetches `registers` registers, starting at `index`, from `token` on
  Prefetch(const Problem& p, int64_t index, int64_t registers, int64_t token)
      : lines_((registers + tokens - 1) / tokens), remaining_(lines_) {
    constexpr int64_t size = sizeof(T);
    const int64_t columns = (p.channels + W - 1) / W;
    const Array* const forward[] = {&p.key, &p.value, &p.output};
    const Array* const backward[] = {&p.key, &p.value, &p.grad, &p.grad_key, &p.grad_value};
    const bool has_grad = p.grad.data != nullptr;
    for (int i = 0; i < (has_grad ? 5 : 3); ++i) {
      const Array& a = has_grad ? *backward[i] : *forward[i];
      const int64_t first = index / columns * a.batch_stride + token * a.row_stride + index % columns * W;
      runs_[i] = {static_cast<const char*>(a.data) + first * size, a.row_stride * size - (lines_ - 1) * 64};
    }
  }

  // Called after every token j of a register: prefetches the next lines whenever a whole line has been consumed.
  template <int reads, int writes>
  SOLA_FORCED void issue(int j) {
    if (j % tokens != 0) return;
    const bool last = --remaining_ == 0;
    remaining_ = last ? lines_ : remaining_;
    for (int i = 0; i < reads + writes; ++i) {
      i < reads ? __builtin_prefetch(runs_[i].at, 0, 2) : __builtin_prefetch(runs_[i].at, 1);
      runs_[i].at += last ? runs_[i].to_next_row : 64;
    }
  }
};

struct NoPrefetch {
  template <int reads, int writes>
  SOLA_FORCED void issue(int) {}
};

// Run a phase on chunk c of adjacent registers.
template <class Op, class Prefetcher>
void chunk_of_registers(const Problem& p, const typename Op::Register* registers, int64_t count, int phase, int64_t c,
                        Prefetcher prefetcher) {
  for (int64_t i = 0; i < count; ++i) {
    const typename Op::Register& r = registers[i];
    if (!r.fast) continue;
    const bool full = r.n == W && (c + 1) * Op::length <= p.tokens;
    const auto chunk = full ? Op::template chunk<true, Prefetcher> : Op::template chunk<false, Prefetcher>;
    chunk(p, r, phase, c * Op::length, r.slots + c * Op::slots, prefetcher);
  }
}

// Call visit(k, step) for the chunks from `begin` to `end` of `count` registers. Later phases run in the opposite
// direction of the first one, because the chunks that were read last are still in the cache. If those are only a small
// part of all, every phase runs in increasing order, which the hardware prefetcher supports best.
template <class Op, class Visit>
void alternate_direction(int phase, int64_t begin, int64_t end, int64_t count, const Visit& visit) {
  constexpr int64_t bytes = Op::length * W * sizeof(typename Op::Element) * Op::arrays, limit = 16 << 20;
  if (phase > 0 && (end - begin) * count * bytes <= limit) {
    for (int64_t k = end - 1; k >= begin; --k) visit(k, -1);
  } else {
    for (int64_t k = begin; k < end; ++k) visit(k, 1);
  }
}

// Where tokens are read from. cache: all arrays fit the caches of the threads; memory_once: the first phase reads from
// memory, later ones hit the cache; memory: every phase reads from memory.
enum class Source { cache, memory_once, memory };

// A thread takes its registers through all phases, `tile` registers at a time.
template <class Op>
void by_register(const Problem& p, int64_t begin, int64_t end, int64_t tile, Source source, int64_t chunks) {
  using Prefetch = SOLA_ISA::Prefetch<typename Op::Element>;
  const FlushSubnormals flush(true);
  const Workspace<typename Op::Register> space(tile < end - begin ? tile : end - begin, chunks * Op::slots);
  const int64_t columns = (p.channels + W - 1) / W;
  const auto size = [&](int64_t first) {  // a tile does not cross images
    const int64_t rest = columns - first % columns, available = end - first < tile ? end - first : tile;
    return rest < available ? rest : available;
  };
  for (int64_t first = begin, count = 0; first < end; first += count) {
    count = size(first);
    const int64_t next_first = first + count;
    for (int64_t i = 0; i < count; ++i) Op::prepare(p, space.registers[i], first + i);
    for (int phase = 0; phase < Op::phases; ++phase) {
      if (!Op::by_chunk[phase]) {
        for (int64_t i = 0; i < count; ++i) Op::per_register(p, space.registers[i], phase);
        continue;
      }
      const bool prefetching = source == Source::memory || (source == Source::memory_once && phase == 0);
      alternate_direction<Op>(phase, 0, chunks, count, [&](int64_t c, int64_t step) {
        const int64_t next = c + step;
        if (prefetching && next >= 0 && next < chunks) {
          chunk_of_registers<Op>(p, space.registers, count, phase, c, Prefetch(p, first, count, next * Op::length));
        } else if (prefetching && phase == 0 && next_first < end) {
          chunk_of_registers<Op>(p, space.registers, count, phase, c, Prefetch(p, next_first, size(next_first), 0));
        } else {
          chunk_of_registers<Op>(p, space.registers, count, phase, c, NoPrefetch());
        }
      });
    }
  }
}

// Every phase is a parallel region: a thread processes some of the chunks (for all registers of an image) or registers.
template <class Op>
void by_phase(const Problem& p, int64_t count, Source source, int64_t chunks, ParallelFor loop) {
  using Prefetch = SOLA_ISA::Prefetch<typename Op::Element>;
  const Workspace<typename Op::Register> space(count, chunks * Op::slots);
  for (int64_t i = 0; i < count; ++i) Op::prepare(p, space.registers[i], i);
  const int64_t columns = count / p.batch;
  for (int phase = 0; phase < Op::phases; ++phase) {
    if (!Op::by_chunk[phase]) {
      parallel(loop, count, 1, [&](int64_t begin, int64_t end) {
        const FlushSubnormals flush(true);
        for (int64_t i = begin; i < end; ++i) Op::per_register(p, space.registers[i], phase);
      });
      continue;
    }
    parallel(loop, p.batch * chunks, 4, [&](int64_t begin, int64_t end) {
      const FlushSubnormals flush(true);
      alternate_direction<Op>(phase, begin, end, columns, [&](int64_t k, int64_t step) {
        const int64_t first = k / chunks * columns, c = k % chunks, next = c + step;
        if (source == Source::memory && next >= 0 && next < chunks) {
          chunk_of_registers<Op>(p, space.registers + first, columns, phase, c,
                                 Prefetch(p, first, columns, next * Op::length));
        } else {
          chunk_of_registers<Op>(p, space.registers + first, columns, phase, c, NoPrefetch());
        }
      });
    });
  }
}

template <class Op>
void run(const Problem& p, ParallelFor loop) {
  const int64_t columns = (p.channels + W - 1) / W, count = p.batch * columns;
  const int64_t chunks = (p.tokens + Op::length - 1) / Op::length;
  // Adjacent registers are processed together, so that long runs of a row are read at once. If an image stays in the
  // cache between phases, those are all registers of a row, up to max_tile. Otherwise rows are streamed, also max_tile
  // registers at a time, which gives the best memory bandwidth. If there are fewer images than threads, a tile has as
  // many registers as fit a core's private cache, provided that these are at least two and that threads get about equal
  // numbers of them.
  const int64_t cache = 3 << 19, private_cache = 3 << 18, max_tile = 8,
                bytes_per_register = p.tokens * register_bytes * Op::arrays;
  const bool fits_cache = (columns < max_tile ? columns : max_tile) * bytes_per_register <= cache;
  const int64_t max_per_thread = (count + p.threads - 1) / p.threads;  // registers per thread
  const bool balanced = count >= 2 * p.threads && 5 * count >= 4 * max_per_thread * p.threads;
  const bool narrow_tile = !fits_cache && p.batch < p.threads && balanced && 2 * bytes_per_register <= private_cache;
  const int64_t tile = narrow_tile ? private_cache / bytes_per_register : max_tile;
  const Source source = !fits_cache && !narrow_tile                    ? Source::memory
                        : count * bytes_per_register > cache * p.threads ? Source::memory_once
                                                                         : Source::cache;
  const bool split_phases = count < 2 * p.threads || (source == Source::memory && p.batch < p.threads);
  if (p.threads > 1 && split_phases && chunks >= 8) return by_phase<Op>(p, count, source, chunks, loop);
  parallel(loop, count, 1 + 1024 / p.tokens,
           [&](int64_t begin, int64_t end) { by_register<Op>(p, begin, end, tile, source, chunks); });
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

}  // namespace
}  // namespace sola::SOLA_ISA
