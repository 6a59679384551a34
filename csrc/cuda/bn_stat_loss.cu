// bn_stat_loss: Gaussian KL between batch statistics and stored ones, all layers.
//   math     ((mean - m)^2 + var) / (2 v) - log(var / v) / 2 - 1 / 2, var and v at least eps; gradients (mean - m) / v and
//            1 / (2 v) - 1 / (2 var), 0 where var is below eps
//   traffic  a few numbers per channel
//   grid     one block of 1,024, forward (a network has thousands of channels); a block per layer, backward
//   order    summed in order, in double
#include "declarations.cuh"
#include "sweep.cuh"

namespace dfq {
namespace cuda {

namespace {

constexpr int kLayers = 48;  // of one launch: their addresses travel in its arguments
constexpr int kLossThreads = 1024;
static_assert(kLossThreads / 32 == 32, "one warp adds up what the warps have");

struct Lists {
  int layers;
  int64_t channels[kLayers];
  const float *mean[kLayers], *var[kLayers], *running_mean[kLayers], *running_var[kLayers];
  float *grad_mean[kLayers], *grad_var[kLayers];
  float eps[kLayers];
};

// The channels of all layers in a row: a thread waits for its loads as often as it has channels, not layers.
__global__ void __launch_bounds__(kLossThreads) forward(const Lists lists, int64_t channels, float* loss, bool first) {
  double sum = 0;
  int layer = 0;
  int64_t begin = 0;  // of the layer
  for (int64_t i = threadIdx.x; i < channels; i += kLossThreads) {
    while (i - begin >= lists.channels[layer]) begin += lists.channels[layer++];
    const int64_t c = i - begin;
    const float eps = lists.eps[layer], var = lists.var[layer][c], running_var = lists.running_var[layer][c];
    const float batch = var < eps ? eps : var, stored = running_var < eps ? eps : running_var;
    const float distance = lists.mean[layer][c] - lists.running_mean[layer][c];
    sum += static_cast<double>((distance * distance + batch) / (2.0f * stored) - 0.5f * logf(batch / stored) - 0.5f);
  }
  __shared__ double warps[kLossThreads / 32];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = warp_sum(warps[threadIdx.x]);
  if (threadIdx.x == 0) *loss = static_cast<float>(first ? sum : static_cast<double>(*loss) + sum);
}

__global__ void __launch_bounds__(kThreads) backward(const Lists lists, const float* grad_out) {
  const int layer = static_cast<int>(blockIdx.x);
  const float eps = lists.eps[layer], grad = *grad_out;
  for (int64_t c = threadIdx.x; c < lists.channels[layer]; c += kThreads) {
    const float var = lists.var[layer][c], running_var = lists.running_var[layer][c];
    const float batch = var < eps ? eps : var, stored = running_var < eps ? eps : running_var;
    lists.grad_mean[layer][c] = grad * (lists.mean[layer][c] - lists.running_mean[layer][c]) / stored;
    lists.grad_var[layer][c] = var >= eps ? grad * (1.0f / (2.0f * stored) - 1.0f / (2.0f * batch)) : 0.0f;
  }
}

const float* floats(int64_t address) { return reinterpret_cast<const float*>(address); }
float* floats_out(int64_t address) { return reinterpret_cast<float*>(address); }

}  // namespace

void bn_stat_loss(const BnStatLoss& a, const Queue& queue) {
  const Launch launch(queue);
  for (int64_t first = 0; first < a.layers; first += kLayers) {
    Lists lists{};
    int64_t channels = 0;
    lists.layers = static_cast<int>(at_most(kLayers, a.layers - first));
    for (int i = 0; i < lists.layers; ++i) {
      const int64_t layer = first + i;
      lists.channels[i] = a.channels[layer];
      channels += a.channels[layer];
      lists.mean[i] = floats(a.means[layer]), lists.var[i] = floats(a.vars[layer]);
      lists.running_mean[i] = floats(a.running_means[layer]), lists.running_var[i] = floats(a.running_vars[layer]);
      lists.eps[i] = static_cast<float>(a.eps[layer]);
      if (!a.grad_out) continue;
      lists.grad_mean[i] = floats_out(a.grad_means[layer]), lists.grad_var[i] = floats_out(a.grad_vars[layer]);
    }
    if (a.grad_out) run(backward, lists.layers, kThreads, 0, launch, lists, a.grad_out);
    else run(forward, 1, kLossThreads, 0, launch, lists, channels, a.loss, first == 0);
  }
}

}  // namespace cuda
}  // namespace dfq
