// bn_act_stats: a frozen teacher's batch norm and activation, and the batch statistics of its input.
//   math     out = act((x - running_mean) * (weight / sqrt(running_var + eps)) + bias); mean, var = bn_stats(x)
//            grad_x = act'(out) grad_out * multiplier + (x - mean) (2 / n grad_var) + grad_mean / n
//   traffic  forward: x read, out written; backward: grad_out and x read, grad_x written
//   block    chunks of about 2048
//   order    as reduce.h says, about a shift as statistics.h says
#include "statistics.h"

namespace dfq {
namespace DFQ_ISA {

namespace {

template <class T>
void forward(const BnActStatsForward& a) {
  const int64_t channels = a.view.channels;
  const std::vector<float> factor = products(a.weight, inverse_deviations(a.running_var, a.eps, channels));
  const std::vector<float> bias = or_zeros(a.bias, channels);
  const Chunks chunks(a.view);
  const Activation activation(a.activation);
  const bool ahead = reads_ahead();
  measure<T>(a.view, a.x, a.threads, a.mean, a.var, [&](const float* shift) {
    const float* const constants[] = {shift, a.running_mean, factor.data(), bias.data()};
    return reduce<T, 4, 2, 2>(chunks, a.threads, constants, {Fold::kSum, Fold::kSum}, [&](auto& work) {
      const T* x = work.gather(0, a.x);
      T* out = work.place(1, a.out);
      work.run([&, activation, ahead](int64_t i, const Vec* k, Vec* total) DFQ_INLINE {
        const Vec value = load_ahead(x + i, ahead), distance = value - k[0];
        total[0] = total[0] + distance;
        total[1] = total[1] + distance * distance;
        store_vec(out + i, activation((value - k[1]) * k[2] + k[3]));
      });
      work.scatter(1, a.out);
    });
  });
}

template <class T>
void backward(const BnActStatsBackward& a) {
  const int64_t channels = a.view.channels;
  const float count = static_cast<float>(a.view.size / channels);
  const std::vector<float> factor = products(a.weight, inverse_deviations(a.running_var, a.eps, channels));
  const std::vector<float> bias = or_zeros(a.bias, channels);
  std::vector<float> slope(static_cast<size_t>(channels)), shift(slope);
  for (int64_t c = 0; c < channels; ++c) {
    slope[c] = 2.0f / count * a.grad_var[c];
    shift[c] = a.grad_mean[c] / count;
  }
  const float* const constants[] = {a.running_mean, factor.data(),  bias.data(),
                                    a.batch_mean,   slope.data(), shift.data()};
  const Activation activation(a.activation);
  const bool ahead = reads_ahead();
  for_chunks<T, 6, 3>(Chunks(a.view), a.threads, constants, [&](auto& work) {
    const T* x = work.gather(0, a.x);
    const T* grad_out = work.gather(1, a.grad_out);
    T* out = work.place(2, a.grad_x);
    work.run([=](int64_t i, const Vec* k, Vec*) DFQ_INLINE {
      const Vec value = load_ahead(x + i, ahead);
      // the activation's gradient looks at what the forward stored
      const Vec y = stored<T>(activation((value - k[0]) * k[1] + k[2]));
      const Vec grad = keep(activation.passes(y), load_ahead(grad_out + i, ahead));
      store_vec(out + i, grad * k[1] + ((value - k[3]) * k[4] + k[5]));
    });
    work.scatter(2, a.grad_x);
  });
}

}  // namespace

void bn_act_stats_forward(const BnActStatsForward& a) {
  with_type(a.dtype, [&](auto type) { forward<decltype(type)>(a); });
}

void bn_act_stats_backward(const BnActStatsBackward& a) {
  with_type(a.dtype, [&](auto type) { backward<decltype(type)>(a); });
}

}  // namespace DFQ_ISA
}  // namespace dfq
