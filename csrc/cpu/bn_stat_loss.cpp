// bn_stat_loss: Gaussian KL between batch statistics and stored ones, all layers.
//   math     ((mean - m)^2 + var) / (2 v) - log(var / v) / 2 - 1 / 2, var and v at least eps; gradients (mean - m) / v and
//            1 / (2 v) - 1 / (2 var), 0 where var is below eps
//   traffic  a few numbers per channel
//   block    one thread: a network has thousands of channels, not millions
//   order    summed in order, in double
#include <cmath>

#include "kernels.h"

namespace dfq {
namespace DFQ_ISA {

void bn_stat_loss(const BnStatLoss& a) {
  double total = 0;
  for (int64_t layer = 0; layer < a.layers; ++layer) {
    const float* mean = reinterpret_cast<const float*>(a.means[layer]);
    const float* var = reinterpret_cast<const float*>(a.vars[layer]);
    const float* running_mean = reinterpret_cast<const float*>(a.running_means[layer]);
    const float* running_var = reinterpret_cast<const float*>(a.running_vars[layer]);
    float* grad_mean = a.grad_out ? reinterpret_cast<float*>(a.grad_means[layer]) : nullptr;
    float* grad_var = a.grad_out ? reinterpret_cast<float*>(a.grad_vars[layer]) : nullptr;
    const float eps = static_cast<float>(a.eps[layer]);
    for (int64_t c = 0; c < a.channels[layer]; ++c) {
      const float batch = var[c] < eps ? eps : var[c], stored = running_var[c] < eps ? eps : running_var[c];
      const float distance = mean[c] - running_mean[c];
      if (a.grad_out) {
        grad_mean[c] = *a.grad_out * distance / stored;
        grad_var[c] = var[c] >= eps ? *a.grad_out * (1.0f / (2.0f * stored) - 1.0f / (2.0f * batch)) : 0.0f;
      } else {
        total += static_cast<double>((distance * distance + batch) / (2.0f * stored) -
                                     0.5f * std::log(batch / stored) - 0.5f);
      }
    }
  }
  if (!a.grad_out) *a.loss = static_cast<float>(total);
}

}  // namespace DFQ_ISA
}  // namespace dfq
