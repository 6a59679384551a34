// The last step of the statistics: a warp per channel joins the parts, in order and in double.
#include "statistics.cuh"

namespace dfq {
namespace cuda {

namespace {

__global__ void finish(const Moments* parts, int slices, int64_t channels, float* mean, float* var) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (c >= channels) return;
  const Moments::Wide total = total_of(parts, slices, channels, c);
  if (threadIdx.x % 32 != 0) return;
  mean[c] = static_cast<float>(total.mean);
  var[c] = static_cast<float>(total.squares / total.count);
}

}  // namespace

void finish_moments(const Layout& l, float* mean, float* var, const Launch& launch) {
  run(finish, static_cast<unsigned>(ceil_div(l.channels, 4)), 128, 0, launch, static_cast<const Moments*>(launch.workspace), l.slices, l.channels, mean, var);
}

}  // namespace cuda
}  // namespace dfq
