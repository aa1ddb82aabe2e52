// SPDX-License-Identifier: Apache-2.0
// Which thread does what when: an operator's phases over registers of channels and chunks of tokens.
//
// An operator Op says its phases, and which of them have a part for each chunk (by_chunk); `length` tokens make a chunk.
// Op::chunk does a part, Op::whole a phase that has none, for one Op::Register. Where there are registers enough for all
// threads a thread takes its registers through all phases; else, and where long images are fewer than threads, phases are
// parallel regions.
#pragma once
#include <cstdlib>

#include "lanes.h"
#include "parallel.h"
#include "wkv.h"

namespace sola::SOLA_ISA {
namespace {

// registers and their slots in one piece of memory
template <class Register>
class Workspace {
  void* memory_;

 public:
  Register* registers;

  Workspace(int64_t count, int64_t slots) {
    const size_t each = sizeof(Register) + sizeof(Lanes) * static_cast<size_t>(slots);
    memory_ = malloc(each * static_cast<size_t>(count) + 64);
    if (!memory_) abort();
    registers = reinterpret_cast<Register*>((reinterpret_cast<uintptr_t>(memory_) + 63) & ~uintptr_t{63});
    for (int64_t i = 0; i < count; ++i) registers[i].slots = reinterpret_cast<Lanes*>(registers + count) + i * slots;
  }
  ~Workspace() { free(memory_); }
  Workspace(const Workspace&) = delete;
};

template <class Op>
void chunk_phase(const Problem& p, const typename Op::Register& r, int phase, int64_t c) {
  if (!r.fast) return;
  const bool whole = r.n == W && (c + 1) * Op::length <= p.tokens;
  (whole ? Op::template chunk<true> : Op::template chunk<false>)(p, r, phase, c * Op::length, r.slots + c * Op::slots);
}

// Asks for rows begin to end of an image, of as many bytes from a channel on, in the order of memory.
// The processor foresees runs of addresses, but not the steps from row to row in which a register takes them. Inlined by
// force: GCC drops calls of a function that has no effect but this one.
__attribute__((always_inline)) inline void fetch(const Problem& p, int64_t image, int64_t channel, int64_t begin,
                                                 int64_t end, int64_t element, int64_t bytes) {
  const Array* const arrays[] = {&p.key, &p.value, &p.grad};
  for (const Array* a : arrays) {
    if (a->data == nullptr) continue;
    const char* from = static_cast<const char*>(a->data) + (image * a->batch_stride + channel) * element;
    for (int64_t t = begin; t < end && t < p.tokens; ++t) {
      for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(from + t * a->row_stride * element + b, 0, 2);
    }
  }
}

// One chunk of some registers side by side, and the next one on its way.
template <class Op>
void chunk_of_registers(const Problem& p, const typename Op::Register* registers, int64_t count, int phase, int64_t c,
                        int64_t next, bool streamed) {
  constexpr int64_t element = sizeof(typename Op::Element), L = Op::length;
  for (int64_t i = 0; i < count; ++i) {
    if (streamed && next >= 0) {
      fetch(p, registers[0].image, registers[0].channel, next * L + L * i / count, next * L + L * (i + 1) / count,
            element, count * W * element);
    }
    chunk_phase<Op>(p, registers[i], phase, c);
  }
}

// Calls take(k, step) for the chunks from begin to end of `count` registers. Phases with a part for each chunk, every
// second one, go through them from alternate ends: what one has read last is still in the cache when the next one begins.
// Not so where that would be little of all: upwards the processor asks for memory ahead.
template <class Op, class Take>
void in_turn(int phase, int64_t begin, int64_t end, int64_t count, const Take& take) {
  constexpr int64_t bytes = Op::length * W * sizeof(typename Op::Element) * Op::arrays, most = 16 << 20;
  if (phase % 4 == 2 && (end - begin) * count * bytes <= most) {
    for (int64_t k = end - 1; k >= begin; --k) take(k, -1);
  } else {
    for (int64_t k = begin; k < end; ++k) take(k, 1);
  }
}

// A thread takes its registers, `tile` at a time, through all phases. Streamed: their tokens do not stay in the cache
// between two phases.
template <class Op>
void by_register(const Problem& p, int64_t begin, int64_t end, int64_t tile, bool streamed, int64_t chunks) {
  const FlushSubnormals flush(true);
  const Workspace<typename Op::Register> space(tile < end - begin ? tile : end - begin, chunks * Op::slots);
  const int64_t columns = (p.channels + W - 1) / W;
  for (int64_t first = begin, count = 0; first < end; first += count) {
    const int64_t rest = columns - first % columns;  // a tile stays within its image
    count = rest < tile ? rest : tile;
    count = end - first < count ? end - first : count;
    for (int64_t i = 0; i < count; ++i) space.registers[i].prepare(p, first + i);
    for (int phase = 0; phase < Op::phases; ++phase) {
      if (!Op::by_chunk[phase]) {
        for (int64_t i = 0; i < count; ++i) Op::whole(p, space.registers[i], phase);
        continue;
      }
      in_turn<Op>(phase, 0, chunks, count, [&](int64_t c, int64_t step) {
        chunk_of_registers<Op>(p, space.registers, count, phase, c, c + step, streamed);
      });
    }
  }
}

// Every phase is a parallel region: a thread takes a part of all chunks, whole rows of them, or of the registers.
template <class Op>
void by_part(const Problem& p, int64_t count, bool streamed, int64_t chunks, ParallelFor loop) {
  const Workspace<typename Op::Register> space(count, chunks * Op::slots);
  for (int64_t i = 0; i < count; ++i) space.registers[i].prepare(p, i);
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
        const int64_t image = k / chunks, c = k % chunks;
        chunk_of_registers<Op>(p, space.registers + image * columns, columns, phase, c, c + step, streamed);
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
  const int64_t cache = 3 << 19, widest = 8;
  const bool streamed = (columns < widest ? columns : widest) * p.tokens * register_bytes * Op::arrays > cache;
  const bool few = count < 2 * p.threads || (streamed && p.batch < p.threads);
  if (p.threads > 1 && few && chunks >= 8) return by_part<Op>(p, count, streamed, chunks, loop);
  parallel(loop, count, 1 + 1024 / p.tokens,
           [&](int64_t begin, int64_t end) { by_register<Op>(p, begin, end, widest, streamed, chunks); });
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
