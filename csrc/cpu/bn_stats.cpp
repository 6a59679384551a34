// bn_stats: mean and biased variance of every channel.
//   math     mean = sum(x) / n, var = sum((x - mean)^2) / n; grad_x = (x - mean) (2 / n grad_var) + grad_mean / n
//   traffic  forward: x read; backward: x read, grad_x written
//   block    chunks of 4096; backward 1024
//   order    as reduce.h says, about a shift as statistics.h says
#include "statistics.h"

namespace dfq {
namespace DFQ_ISA {

namespace {

template <class T>
void forward(const BnStatsForward& a) {
  const Chunks chunks(a.view);
  measure<T>(a.view, a.x, a.threads, a.mean, a.var, [&](const float* shift) {
    return reduce<T, 1, 2, 1>(chunks, a.threads, {shift}, {Fold::kSum, Fold::kSum}, [&](auto& work) {
      const T* x = work.gather(0, a.x);
      work.run([&](int64_t i, const Vec* k, Vec* total) DFQ_INLINE {
        const Vec distance = load_vec(x + i) - k[0];
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
  const ChannelConstants<3> constants(a.view, {a.mean, slope.data(), shift.data()});
  for_blocks(a.view.size, a.threads, [&](int64_t start, int64_t n) {
    Reader<T> reader;
    Writer<T> writer;
    T* to = static_cast<T*>(a.grad_x) + start;
    const T* x = reader.at(static_cast<const T*>(a.x) + start, n);
    T* out = writer.at(to, n);
    constants.block(start, n, [=](const auto& k, int64_t begin, int64_t end) DFQ_INLINE {
      for (int64_t j = begin; j < end; j += kWidth)
        store_vec(out + j, (load_vec(x + j) - k.template get<0>(j)) * k.template get<1>(j) + k.template get<2>(j));
    });
    writer.done(to, n);
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
