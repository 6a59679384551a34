// bn_act_stats: a frozen teacher's batch norm and activation, and the batch statistics of its input.
//   math     out = act((x - running_mean) * (weight / sqrt(running_var + eps)) + bias); mean, var = bn_stats(x)
//            grad_x = act'(out) grad_out * multiplier + (x - mean) (2 / n grad_var) + grad_mean / n
//   traffic  forward: x read, out written; backward: grad_out and x read, grad_x written
//   block    forward: chunks of 4096, normalised while they are in cache; backward 512
//   order    chunks joined in order, in double
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
  Moments moments(chunks, a.view);
  parallel_for(chunks.count(), chunks.grain(), a.threads, [&](int64_t begin, int64_t end) {
    Workspace<1, 1, 2> work(chunks, {nullptr});
    Moments::Scratch scratch = moments.scratch();
    Workspace<3, 0, 0> affine(chunks, {a.running_mean, factor.data(), bias.data()});
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      affine.start(chunk);
      const float* x = chunks.gather(chunk, static_cast<const T*>(a.x), work.buffer(0));
      const int64_t n = chunks.rows(chunk, [](int64_t, int64_t, int64_t) {});
      moments.measure(work, scratch, chunk, x, n);
      float* out = work.buffer(1);
      affine.run(n, [&](int64_t i, const Vec* k, Vec*) {
        store_vec(out + i, activate((load_vec(x + i) - k[0]) * k[1] + k[2], a.activation));
      });
      chunks.scatter(chunk, out, static_cast<T*>(a.out));
    }
  });
  moments.finish(a.mean, a.var);
}

// What the forward stored: the activation's gradient looks at the rounded value.
template <class T>
Vec stored(Vec y) {
  if (std::is_same<T, float>::value) return y;
  T rounded[kWidth];
  float values[kWidth];
  store_vec(values, y);
  store(values, rounded, kWidth);
  load(rounded, values, kWidth);
  return load_vec(values);
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
  const ChannelConstants<6> constants(
      a.view, {a.running_mean, factor.data(), bias.data(), a.batch_mean, slope.data(), shift.data()});
  for_blocks(a.view.size, a.threads, [&](int64_t start, int64_t n) {
    Reader<T> x_reader, grad_reader;
    Writer<T> writer;
    T* to = static_cast<T*>(a.grad_x) + start;
    const float* x = x_reader.at(static_cast<const T*>(a.x) + start, n);
    const float* grad_out = grad_reader.at(static_cast<const T*>(a.grad_out) + start, n);
    float* out = writer.at(to, n);
    constants.block(start, n, [&](const auto& k, int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; j += kWidth) {
        const Vec value = load_vec(x + j), multiplier = k.template get<1>(j);
        Vec grad = load_vec(grad_out + j);
        if (a.activation != kIdentity) {
          const Vec y = stored<T>(activate((value - k.template get<0>(j)) * multiplier + k.template get<2>(j), a.activation));
          grad = activation_gradient(grad, y, a.activation);
        }
        const Vec through_statistics = (value - k.template get<3>(j)) * k.template get<4>(j) + k.template get<5>(j);
        store_vec(out + j, grad * multiplier + through_statistics);
      }
    });
    writer.done(to, n);
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
