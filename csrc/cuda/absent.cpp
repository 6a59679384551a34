// Stands for table.cu where the module is built without nvcc.
#include "kernels.h"

namespace dfq {
const CudaKernels* cuda_kernels() { return nullptr; }
}  // namespace dfq
