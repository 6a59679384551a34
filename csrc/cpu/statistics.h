// Mean and variance of channels in one read of memory: sums of x - shift and of its squares, where the shift is near the
// channel's mean. It comes from a few elements of the channel; where they turn out to be more than two deviations away
// from the mean, or squares overflow, the mean itself takes their place and memory is read once more. So squares exceed the variance at most
// five times, and no digits are lost where the mean is far from 0.
//   Source: Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance", shifted data.
#pragma once
#include "channels.h"

namespace dfq {
namespace DFQ_ISA {

// The mean of at most 16 elements of every channel, from up to four images.
template <class T>
static std::vector<float> sampled_means(const View& view, const void* from, int threads) {
  const T* const x = static_cast<const T*>(from);
  const int64_t outer = view.size / (view.channels * view.inner), beside = view.inner < 4 ? 1 : 4;
  const int64_t apart = std::min(outer, 16 / beside);
  std::vector<float> means(static_cast<size_t>(view.channels));
  parallel_for(view.channels, 256, threads, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      double total = 0;
      for (int64_t i = 0; i < apart; ++i) {
        const T* values = x + (i * outer / apart * view.channels + c) * view.inner + (view.inner - beside) / 2;
        for (int64_t j = 0; j < beside; ++j) total += static_cast<double>(to_float(values[j]));
      }
      const float mean = static_cast<float>(total / static_cast<double>(apart * beside));
      means[c] = std::isfinite(mean) ? mean : 0.0f;
    }
  });
  return means;
}

// Mean and biased variance of every channel. pass(shift) gives the sums of x - shift, and behind them of its squares.
template <class T, class Pass>
static void measure(const View& view, const void* x, int threads, float* mean, float* var, const Pass& pass) {
  const double count = static_cast<double>(view.size / view.channels);
  std::vector<float> shift = sampled_means<T>(view, x, threads);
  for (int round = 0; round < 2; ++round) {
    const std::vector<double> total = pass(shift.data());
    bool far = false;
    for (int64_t c = 0; c < view.channels; ++c) {
      const double distance = total[c] / count, squares = total[view.channels + c] / count;
      const double variance = squares - distance * distance;
      far = far || !(distance * distance <= 4 * variance) || !std::isfinite(variance);
      mean[c] = static_cast<float>(static_cast<double>(shift[c]) + distance);
      var[c] = static_cast<float>(variance < 0 ? 0 : variance);
    }
    if (!far) return;
    for (int64_t c = 0; c < view.channels; ++c)
      shift[c] = std::isfinite(mean[c]) ? mean[c] : 0.0f;
  }
}

}  // namespace DFQ_ISA
}  // namespace dfq
