// Where a kernel runs: the one place that chooses between the tables of the CPU and of CUDA.
#pragma once
#include <stdexcept>

#include "cpu/kernels.h"
#include "cuda/kernels.h"

namespace dfq {

#ifdef DFQ_CUDA_EMULATED
constexpr bool kEmulated = true;  // CUDA kernels on the CPU and its memory, for tests
#else
constexpr bool kEmulated = false;
#endif

// Codes that kernels take apart without looking twice: what is no activation would be some activation to them.
template <class Arguments>
auto check_activation(const Arguments& a, int) -> decltype(static_cast<void>(a.activation)) {
  if (a.activation < kIdentity || a.activation > kReLU6) throw std::invalid_argument("no such activation");
}
template <class Arguments>
void check_activation(const Arguments&, long) {}

// device -1: the CPU
template <class Arguments>
void run(const Queue& queue, void (*CpuKernels::*cpu)(const Arguments&),
         void (*CudaKernels::*cuda)(const Arguments&, const Queue&), const Arguments& arguments) {
  check_activation(arguments, 0);
  if (queue.device < 0) return (cpu_kernels().*cpu)(arguments);
  if (!cuda_kernels()) throw std::runtime_error("this module was built without CUDA kernels");
  (cuda_kernels()->*cuda)(arguments, queue);
}

}  // namespace dfq
