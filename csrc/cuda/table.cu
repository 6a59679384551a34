// The CUDA kernels as a table.
#include <algorithm>

#include "declarations.cuh"
#include "sweep.cuh"

namespace dfq {

namespace {

// Parts of the largest kind for any number of lanes.
int64_t workspace_bytes(const View& view) {
  const int slices = std::max(cuda::layout_of(view, 4).slices, cuda::layout_of(view, 8).slices);
  return cuda::kPartsAt + slices * view.channels * static_cast<int64_t>(sizeof(cuda::MomentsAndExtremes));
}

const CudaKernels table = {
#define DFQ_ENTRY(name, arguments) cuda::name,
    DFQ_KERNELS(DFQ_ENTRY)
#undef DFQ_ENTRY
    workspace_bytes,
};

}  // namespace

const CudaKernels* cuda_kernels() { return &table; }

}  // namespace dfq
