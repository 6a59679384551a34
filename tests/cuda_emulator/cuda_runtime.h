// CUDA kernels as C++: every thread of a block is a fiber on one processor, blocks run one after another.
//
// It shows what a kernel computes, its indices and its barriers, on a machine without a GPU; never how fast it is, nor
// what another schedule of its threads would do. Arithmetic is IEEE fp32 without contraction, as -fmad=false gives.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(threads)
#define DFQ_DYNAMIC_SHARED(name) uint32_t* name = dfq_emulator::dynamic_shared()

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration"; }
inline cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

namespace dfq_emulator {

__device__ void barrier();                                       // __syncthreads
__device__ uint32_t from_lane_below(uint32_t value, int distance);  // __shfl_down_sync of a whole warp
__device__ uint32_t from_first_lane(uint32_t value);  // __shfl_sync of a whole warp, from lane 0
__device__ uint32_t* dynamic_shared();
cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);

}  // namespace dfq_emulator

__device__ inline void __syncthreads() { dfq_emulator::barrier(); }
__device__ inline uint32_t __shfl_down_sync(unsigned, uint32_t value, int distance) {
  return dfq_emulator::from_lane_below(value, distance);
}
__device__ inline uint32_t __shfl_sync(unsigned, uint32_t value, int) { return dfq_emulator::from_first_lane(value); }
__device__ inline void __threadfence() {}  // blocks run one after another
__device__ inline unsigned atomicAdd(unsigned* to, unsigned value) { return (*to += value) - value; }
template <class T>
__device__ T __ldcg(const T* from) { return *from; }
using std::isfinite;
__device__ inline float __fdividef(float a, float b) { return a / b; }


template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Parameters... arguments) {
  return dfq_emulator::run(*config, [=] { kernel(arguments...); });
}
