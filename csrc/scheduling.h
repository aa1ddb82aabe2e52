// SPDX-License-Identifier: Apache-2.0
// Which thread does what when: an operator's phases over registers of channels and chunks of tokens.
//
// An operator Op says its phases, and which of them have a part for each chunk (by_chunk); `length` tokens make a chunk.
// Op::chunk does a part, Op::whole a phase that has none, for one Op::Register. Where there are registers enough for all
// threads a thread takes its registers through all phases; else, and where long images are fewer than threads, phases are
// parallel regions.
#pragma once
#include "lanes.h"
#include "memory.h"
#include "parallel.h"
#include "wkv.h"

namespace sola::SOLA_ISA {
namespace {

// registers and their slots in one piece of memory
template <class Register>
class Workspace {
  Block memory_;

 public:
  Register* registers;

  Workspace(int64_t count, int64_t slots)
      : memory_((sizeof(Register) + sizeof(Lanes) * static_cast<size_t>(slots)) * static_cast<size_t>(count)),
        registers(memory_.begin<Register>()) {
    for (int64_t i = 0; i < count; ++i) registers[i].slots = reinterpret_cast<Lanes*>(registers + count) + i * slots;
  }
};

// A chunk that comes next is asked for a line at a time, in the order of memory, while another one is computed. The
// processor foresees runs of addresses, but not the steps from row to row in which a register takes them; and many lines
// asked for at once hold up what is read meanwhile.
template <class T>
class Ahead {
  struct Run {
    const char* at;
    int64_t to_next_row;  // from the last line of a row
  };
  Run runs_[5];           // of what is read, then of what is written
  int64_t lines_, left_;  // of a row: all, and those that have not been asked for

 public:
  static constexpr int tokens = 64 / (W * static_cast<int>(sizeof(T)));  // of a register in a line

  // of `registers` from this one on, from a token on
  Ahead(const Problem& p, int64_t index, int64_t registers, int64_t token)
      : lines_((registers + tokens - 1) / tokens), left_(lines_) {
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

  // after every token j of a register: the next lines, when it has used up one
  template <int reads, int writes>
  SOLA_FORCED void ask(int j) {
    if (j % tokens != 0) return;
    const bool last = --left_ == 0;
    left_ = last ? lines_ : left_;
    for (int i = 0; i < reads + writes; ++i) {
      i < reads ? __builtin_prefetch(runs_[i].at, 0, 2) : __builtin_prefetch(runs_[i].at, 1);
      runs_[i].at += last ? runs_[i].to_next_row : 64;
    }
  }
};

struct NothingAhead {
  template <int reads, int writes>
  SOLA_FORCED void ask(int) {}
};

// One chunk c of some registers side by side.
template <class Op, class Next>
void chunk_of_registers(const Problem& p, const typename Op::Register* registers, int64_t count, int phase, int64_t c,
                        Next next) {
  for (int64_t i = 0; i < count; ++i) {
    const typename Op::Register& r = registers[i];
    if (!r.fast) continue;
    const bool whole = r.n == W && (c + 1) * Op::length <= p.tokens;
    const auto chunk = whole ? Op::template chunk<true, Next> : Op::template chunk<false, Next>;
    chunk(p, r, phase, c * Op::length, r.slots + c * Op::slots, next);
  }
}

// Calls take(k, step) for the chunks from begin to end of `count` registers. The last phase goes through them from the
// other end than the first: what that has read last is still in the cache.
// Not so where that would be little of all: upwards the processor asks for memory ahead.
template <class Op, class Take>
void in_turn(int phase, int64_t begin, int64_t end, int64_t count, const Take& take) {
  constexpr int64_t bytes = Op::length * W * sizeof(typename Op::Element) * Op::arrays, most = 16 << 20;
  if (phase > 0 && (end - begin) * count * bytes <= most) {
    for (int64_t k = end - 1; k >= begin; --k) take(k, -1);
  } else {
    for (int64_t k = begin; k < end; ++k) take(k, 1);
  }
}

// Where tokens are read from: the first phase brings them into the cache, and they stay there; or nothing but streams.
enum class Source { cache, memory_once, memory };

// A thread takes its registers, `tile` at a time, through all phases.
template <class Op>
void by_register(const Problem& p, int64_t begin, int64_t end, int64_t tile, Source source, int64_t chunks) {
  using Ahead = SOLA_ISA::Ahead<typename Op::Element>;
  const FlushSubnormals flush(true);
  const Workspace<typename Op::Register> space(tile < end - begin ? tile : end - begin, chunks * Op::slots);
  const int64_t columns = (p.channels + W - 1) / W;
  const auto size = [&](int64_t first) {  // a tile stays within its image
    const int64_t rest = columns - first % columns, most = end - first < tile ? end - first : tile;
    return rest < most ? rest : most;
  };
  for (int64_t first = begin, count = 0; first < end; first += count) {
    count = size(first);
    const int64_t then = first + count;
    for (int64_t i = 0; i < count; ++i) Op::prepare(p, space.registers[i], first + i);
    for (int phase = 0; phase < Op::phases; ++phase) {
      if (!Op::by_chunk[phase]) {
        for (int64_t i = 0; i < count; ++i) Op::whole(p, space.registers[i], phase);
        continue;
      }
      const bool asks = source == Source::memory || (source == Source::memory_once && phase == 0);
      in_turn<Op>(phase, 0, chunks, count, [&](int64_t c, int64_t step) {
        const int64_t next = c + step;
        if (asks && next >= 0 && next < chunks) {
          chunk_of_registers<Op>(p, space.registers, count, phase, c, Ahead(p, first, count, next * Op::length));
        } else if (asks && phase == 0 && then < end) {
          chunk_of_registers<Op>(p, space.registers, count, phase, c, Ahead(p, then, size(then), 0));
        } else {
          chunk_of_registers<Op>(p, space.registers, count, phase, c, NothingAhead());
        }
      });
    }
  }
}

// Every phase is a parallel region: a thread takes a part of all chunks, whole rows of them, or of the registers.
template <class Op>
void by_part(const Problem& p, int64_t count, Source source, int64_t chunks, ParallelFor loop) {
  using Ahead = SOLA_ISA::Ahead<typename Op::Element>;
  const Workspace<typename Op::Register> space(count, chunks * Op::slots);
  for (int64_t i = 0; i < count; ++i) Op::prepare(p, space.registers[i], i);
  const int64_t columns = count / p.batch;
  for (int phase = 0; phase < Op::phases; ++phase) {
    if (!Op::by_chunk[phase]) {
      parallel(loop, count, 1, [&](int64_t begin, int64_t end) {
        const FlushSubnormals flush(true);
        for (int64_t i = begin; i < end; ++i) Op::whole(p, space.registers[i], phase);
      });
      continue;
    }
    parallel(loop, p.batch * chunks, 4, [&](int64_t begin, int64_t end) {
      const FlushSubnormals flush(true);
      in_turn<Op>(phase, begin, end, columns, [&](int64_t k, int64_t step) {
        const int64_t first = k / chunks * columns, c = k % chunks, next = c + step;
        if (source == Source::memory && next >= 0 && next < chunks) {
          chunk_of_registers<Op>(p, space.registers + first, columns, phase, c, Ahead(p, first, columns, next * Op::length));
        } else {
          chunk_of_registers<Op>(p, space.registers + first, columns, phase, c, NothingAhead());
        }
      });
    });
  }
}

template <class Op>
void run(const Problem& p, ParallelFor loop) {
  const int64_t columns = (p.channels + W - 1) / W, count = p.batch * columns;
  const int64_t chunks = (p.tokens + Op::length - 1) / Op::length;
  // Registers side by side, so that long pieces of a row are read at once: all of a row's where an image stays in the
  // cache from one phase to the next; else the rows are streamed, whole ones as well, which memory delivers fastest.
  // Where images are fewer than threads, as many registers as stay in a core's own cache, if these are at least two and
  // threads have about the same number of them.
  const int64_t cache = 3 << 19, own = 3 << 18, widest = 8, of_register = p.tokens * register_bytes * Op::arrays;
  const bool fits = (columns < widest ? columns : widest) * of_register <= cache;
  const int64_t most = (count + p.threads - 1) / p.threads;  // registers of a thread
  const bool even = count >= 2 * p.threads && 5 * count >= 4 * most * p.threads;
  const bool narrow = !fits && p.batch < p.threads && even && 2 * of_register <= own;
  const int64_t tile = narrow ? own / of_register : widest;
  const Source source = !fits && !narrow                          ? Source::memory
                        : count * of_register > cache * p.threads ? Source::memory_once
                                                                  : Source::cache;
  const bool few = count < 2 * p.threads || (source == Source::memory && p.batch < p.threads);
  if (p.threads > 1 && few && chunks >= 8) return by_part<Op>(p, count, source, chunks, loop);
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
