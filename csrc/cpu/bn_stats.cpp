// bn_stats: mean and biased variance of every channel.
//   math     mean = sum(x) / n, var = sum((x - mean)^2) / n; grad_x = (x - mean) (2 / n grad_var) + grad_mean / n
//   traffic  forward: x read; backward: x read, grad_x written
//   block    chunks of about 2048
//   order    as reduce.h says, about a shift as statistics.h says
#include "statistics.h"

namespace dfq {
namespace DFQ_ISA {

namespace {

template <class T>
void forward(const BnStatsForward& a) {
  const Chunks chunks(a.view);
  const bool ahead = reads_ahead();
  measure<T>(a.view, a.x, a.threads, a.mean, a.var, [&](const float* shift) {
    return reduce<T, 1, 2, 1>(chunks, a.threads, {shift}, {Fold::kSum, Fold::kSum}, [&](auto& work) {
      const T* x = work.gather(0, a.x);
      work.run([=](int64_t i, const Vec* k, Vec* total) DFQ_INLINE {
        const Vec distance = load_ahead(x + i, ahead) - k[0];
        total[0] = total[0] + distance;
        total[1] = total[1] + distance * distance;
      });
    });
  });
}

template <class T>
void backward(const BnStatsBackward& a) {
  const int64_t channels = a.view.channels;
  const float count = static_cast<float>(a.view.size / channels);
  std::vector<float> slope(static_cast<size_t>(channels)), shift(slope);
  for (int64_t c = 0; c < channels; ++c) {
    slope[c] = 2.0f / count * a.grad_var[c];
    shift[c] = a.grad_mean[c] / count;
  }
  const bool ahead = reads_ahead();
  for_chunks<T, 3, 2>(Chunks(a.view), a.threads, {a.mean, slope.data(), shift.data()}, [&](auto& work) {
    const T* x = work.gather(0, a.x);
    T* out = work.place(1, a.grad_x);
    work.run([=](int64_t i, const Vec* k, Vec*) DFQ_INLINE {
      store_vec(out + i, (load_ahead(x + i, ahead) - k[0]) * k[1] + k[2]);
    });
    work.scatter(1, a.grad_x);
  });
}

}  // namespace

void bn_stats_forward(const BnStatsForward& a) {
  with_type(a.dtype, [&](auto type) { forward<decltype(type)>(a); });
}

void bn_stats_backward(const BnStatsBackward& a) {
  with_type(a.dtype, [&](auto type) { backward<decltype(type)>(a); });
}

}  // namespace DFQ_ISA
}  // namespace dfq
