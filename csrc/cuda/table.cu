// The CUDA kernels as a table.
#include "declarations.cuh"
#include "sweep.cuh"

namespace dfq {

namespace {

// Parts of the largest kind for either number of lanes.
int64_t workspace_bytes(const View& view) {
  const cuda::Layout few = cuda::layout_of(view, 4);
  return static_cast<int64_t>(few.slices) * few.channels * static_cast<int64_t>(sizeof(cuda::MomentsAndExtremes));
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
