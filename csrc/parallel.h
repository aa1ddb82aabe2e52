// SPDX-License-Identifier: Apache-2.0
// A parallel loop over torch's threads, with any callable as its body.
#pragma once
#include "wkv.h"

namespace sola::SOLA_ISA {
namespace {

template <class Work>
void parallel(ParallelFor loop, int64_t count, int64_t grain, const Work& work) {
  if (count == 0) return;
  loop(count, grain,
       [](int64_t begin, int64_t end, void* context) { (*static_cast<const Work*>(context))(begin, end); },
       const_cast<Work*>(&work));
}

}  // namespace
}  // namespace sola::SOLA_ISA
