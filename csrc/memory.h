// SPDX-License-Identifier: Apache-2.0
// A kernel's own memory, from a cache line on. What cannot be had is an error of the call, not the end of the process.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "wkv.h"

namespace sola::SOLA_ISA {
namespace {

class Block {
  void* memory_;

 public:
  explicit Block(size_t bytes) : memory_(malloc(bytes + 63)) {
    if (memory_ == nullptr) out_of_memory(bytes);
  }
  template <class T>
  T* begin() const {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_) + 63) & ~uintptr_t{63});
  }
  ~Block() { free(memory_); }
  Block(const Block&) = delete;
};

// zeros
template <class T>
class Buffer {
  Block block_;

 public:
  T* data;
  explicit Buffer(int64_t count) : block_(static_cast<size_t>(count) * sizeof(T)), data(block_.begin<T>()) {
    memset(static_cast<void*>(data), 0, static_cast<size_t>(count) * sizeof(T));
  }
};

}  // namespace
}  // namespace sola::SOLA_ISA
