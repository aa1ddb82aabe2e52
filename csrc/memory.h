// SPDX-License-Identifier: Apache-2.0
// Scratch memory of the kernels, aligned to cache lines. A failed allocation raises an error instead of ending the
// process.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "wkv.h"

namespace sola::SOLA_ISA {
namespace {

class AlignedMemory {
  void* memory_;

 public:
  explicit AlignedMemory(size_t bytes) : memory_(malloc(bytes + 63)) {
    if (memory_ == nullptr) out_of_memory(bytes);
  }
  template <class T>
  T* begin() const {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_) + 63) & ~uintptr_t{63});
  }
  ~AlignedMemory() { free(memory_); }
  AlignedMemory(const AlignedMemory&) = delete;
};

// zero-initialised
template <class T>
class Buffer {
  AlignedMemory memory_;

 public:
  T* data;
  explicit Buffer(int64_t count) : memory_(static_cast<size_t>(count) * sizeof(T)), data(memory_.begin<T>()) {
    memset(static_cast<void*>(data), 0, static_cast<size_t>(count) * sizeof(T));
  }
};

}  // namespace
}  // namespace sola::SOLA_ISA
