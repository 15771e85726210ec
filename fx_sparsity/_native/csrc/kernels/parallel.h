// torch's thread pool, through its C interface: kernels know nothing else of torch, since its
// headers take longer to compile than they do.
#pragma once

#include <cstdint>

#include "fail.h"

// As torch/csrc/stable/c/shim.h declares it, whose other headers take longer to compile than most
// kernels; files that include both would not compile if the two differed.
extern "C" __attribute__((visibility("default"))) int32_t torch_parallel_for(
    int64_t begin, int64_t end, int64_t grain, void (*work)(int64_t, int64_t, void*),
    void* context);

namespace fx {

// Calls `work(begin, end)` for ranges that make up [begin, end), in parallel where they would be
// longer than `grain`.
template <class Work>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Work& work) {
  const auto call = [](int64_t from, int64_t to, void* context) {
    (*static_cast<const Work*>(context))(from, to);
  };
  void* const context = const_cast<Work*>(&work);
  if (torch_parallel_for(begin, end, grain, call, context)) {
    fail("a kernel failed in one of its threads");
  }
}

}  // namespace fx
