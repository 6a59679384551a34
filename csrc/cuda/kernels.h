// The CUDA kernels: the same arguments as on the CPU, and where to run. No torch, no CUDA headers.
#pragma once
#include "../common/arguments.h"

namespace dfq {

// A device, a stream of it, and a workspace of at least workspace_bytes(): all on that device.
struct Queue {
  int device;
  void* stream;
  void* workspace;
};

struct CudaKernels {
#define DFQ_FIELD(name, arguments) void (*name)(const arguments&, const Queue&);
  DFQ_KERNELS(DFQ_FIELD)
#undef DFQ_FIELD
  int64_t (*workspace_bytes)(const View& view);  // of any kernel on a tensor of this view
};

// The table, or null in a module that was built without nvcc.
const CudaKernels* cuda_kernels();

}  // namespace dfq
