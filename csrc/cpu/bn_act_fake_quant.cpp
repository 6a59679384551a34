// bn_act_fake_quant: a student's batch norm, activation, range update and fake quantization.
//   math     y = act((x - mean) * (weight * inv_std) + bias), inv_std = 1 / sqrt(var + eps); range and values from y
//   traffic  forward: x read for statistics and extremes (not where both are given), x read, out written;
//            backward: grad_out and x read for the sums, in training once more, grad_x written
//   block    chunks of 4096; values 512
//   order    sums as reduce.h says; a batch norm is monotone per channel, so the extremes of x give those of y, exactly
#include "statistics.h"

namespace dfq {
namespace DFQ_ISA {

namespace {

// Statistics of x if training, and the least and largest x of every channel.
template <class T>
void look_at(const BnActFakeQuantForward& a, std::vector<float>& least, std::vector<float>& most) {
  const Chunks chunks(a.view);
  const int64_t each = chunks.sums_per_chunk();
  Moments moments(chunks, a.view);
  std::vector<float> lows(static_cast<size_t>(chunks.count() * each), std::numeric_limits<float>::infinity());
  std::vector<float> highs(lows.size(), -std::numeric_limits<float>::infinity());
  parallel_for(chunks.count(), chunks.grain(), a.threads, [&](int64_t begin, int64_t end) {
    Workspace<1, 1, 1> work(chunks, {nullptr});
    Moments::Scratch scratch = moments.scratch();
    std::vector<Extremes> lanes(static_cast<size_t>(chunks.lanes() / kWidth + 1));
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const float* x = chunks.gather(chunk, static_cast<const T*>(a.x), work.buffer(0));
      const int64_t n = chunks.rows(chunk, [](int64_t, int64_t, int64_t) {});
      if (a.training) moments.measure(work, scratch, chunk, x, n);
      if (a.observe) channel_extremes(chunks, x, n, lanes, &lows[chunk * each], &highs[chunk * each]);
    }
  });
  if (a.training) moments.finish(a.mean, a.var);
  for (int64_t chunk = 0; a.observe && chunk < chunks.count(); ++chunk)
    for (int64_t i = 0; i < each; ++i) {
      const int64_t c = chunks.by_channel() ? chunks.channel(chunk) : i;
      const float low = lows[chunk * each + i], high = highs[chunk * each + i];
      if (low != low) least[c] = most[c] = low;
      least[c] = low < least[c] ? low : least[c];
      most[c] = high > most[c] ? high : most[c];
    }
}

// The range of y over all channels.
void range_of_outputs(const BnActFakeQuantForward& a, const std::vector<float>& factor, const std::vector<float>& bias,
                      const std::vector<float>& least, const std::vector<float>& most, float& low, float& high) {
  for (int64_t c = 0; c < a.view.channels; ++c)
    for (const float x : {least[c], most[c]}) {
      const float y = activate((x - a.mean[c]) * factor[c] + bias[c], a.activation);
      if (y != y) {
        low = high = y;
        return;
      }
      low = y < low ? y : low;
      high = y > high ? y : high;
    }
}

template <class T>
void quantize(const BnActFakeQuantForward& a, const std::vector<float>& factor, const std::vector<float>& bias) {
  const ChannelConstants<3> constants(a.view, {a.mean, factor.data(), bias.data()});
  const Vec inv = broadcast(1.0f / *a.range.scale), scale = broadcast(*a.range.scale);
  const Vec zero_point = broadcast(*a.range.zero_point);
  const Vec low = broadcast(a.range.quant_min), high = broadcast(a.range.quant_max);
  for_blocks(a.view.size, a.threads, [&](int64_t start, int64_t n) {
    Reader<T> reader;
    Writer<T> writer;
    T* to = static_cast<T*>(a.out) + start;
    const float* x = reader.at(static_cast<const T*>(a.x) + start, n);
    float* out = writer.at(to, n);
    constants.block(start, n, [&](const auto& k, int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; j += kWidth) {
        const Vec affine = (load_vec(x + j) - k.template get<0>(j)) * k.template get<1>(j) + k.template get<2>(j);
        const Vec q = clamp(rne(activate(affine, a.activation) * inv + zero_point), low, high);
        store_vec(out + j, (q - zero_point) * scale);
      }
    });
    writer.done(to, n);
  });
}

template <class T>
void forward(const BnActFakeQuantForward& a) {
  const int64_t channels = a.view.channels;
  std::vector<float> least(static_cast<size_t>(channels), std::numeric_limits<float>::infinity());
  std::vector<float> most(static_cast<size_t>(channels), -std::numeric_limits<float>::infinity());
  if (a.training || a.observe) look_at<T>(a, least, most);
  if (a.training) {
    const double count = static_cast<double>(a.view.size / channels);
    for (int64_t c = 0; c < channels; ++c) {
      const float unbiased = a.var[c] * static_cast<float>(count / (count - 1));
      a.running_mean[c] += a.momentum * (a.mean[c] - a.running_mean[c]);
      a.running_var[c] += a.momentum * (unbiased - a.running_var[c]);
    }
  }
  const std::vector<float> factor = products(a.weight, inverse_deviations(a.var, a.eps, channels));
  const std::vector<float> bias = or_zeros(a.bias, channels);
  if (a.observe) {
    float low = std::numeric_limits<float>::infinity(), high = -low;
    range_of_outputs(a, factor, bias, least, most, low, high);
    move_range(a.range, low, high);
  }
  quantize<T>(a, factor, bias);
}

// grad behind fake quantization and activation, and what it is made from, for one vector.
struct Inner {
  Vec grad, normalized, grad_scale, outside;
};

struct Layer {
  Rounding rounding;
  Vec inv, zero_point;
  int activation;

  explicit Layer(const BnActFakeQuantBackward& a)
      : rounding(a.quant_min, a.quant_max), inv(broadcast(1.0f / *a.scale)), zero_point(broadcast(*a.zero_point)),
        activation(a.activation) {}

  // k: mean, inv_std, weight * inv_std, bias
  Inner at(Vec x, Vec grad_out, Vec mean, Vec inv_std, Vec factor, Vec bias) const {
    const Vec centred = x - mean;
    const Vec y = activate(centred * factor + bias, activation);
    const LearnedGradient g = learned_gradient(y, grad_out, inv, zero_point, rounding);
    return {activation_gradient(g.x, y, activation), centred * inv_std, g.scale, g.outside};
  }
};

template <class T>
void backward(const BnActFakeQuantBackward& a) {
  const int64_t channels = a.view.channels;
  const std::vector<float> inv_std = inverse_deviations(a.var, a.eps, channels);
  const std::vector<float> factor = products(a.weight, inv_std), bias = or_zeros(a.bias, channels);
  const Chunks chunks(a.view);
  const int64_t each = chunks.sums_per_chunk();
  const Layer layer(a);
  std::vector<double> parts(static_cast<size_t>(chunks.count() * 4 * each));
  parallel_for(chunks.count(), chunks.grain(), a.threads, [&](int64_t begin, int64_t end) {
    Workspace<4, 4, 3> work(chunks, {a.mean, inv_std.data(), factor.data(), bias.data()});
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      work.start(chunk);
      const float* x = chunks.gather(chunk, static_cast<const T*>(a.x), work.buffer(0));
      const float* grad_out = chunks.gather(chunk, static_cast<const T*>(a.grad_out), work.buffer(1));
      float* out = work.buffer(2);
      const int64_t n = chunks.rows(chunk, [](int64_t, int64_t, int64_t) {});
      work.run(n, [&](int64_t i, const Vec* k, Vec* sums) {
        const Inner inner = layer.at(load_vec(x + i), load_vec(grad_out + i), k[0], k[1], k[2], k[3]);
        sums[0] = inner.grad;
        sums[1] = inner.grad * inner.normalized;
        sums[2] = inner.grad_scale;
        sums[3] = inner.outside;
        if (!a.training) store_vec(out + i, inner.grad * k[2]);
      });
      if (!a.training) chunks.scatter(chunk, out, static_cast<T*>(a.grad_x));
      work.fold(&parts[static_cast<size_t>(chunk * 4 * each)]);
    }
  });
  std::vector<double> total(static_cast<size_t>(4 * channels));
  combine(chunks, a.view, 4, parts, total.data());
  double grad_scale = 0, outside = 0;
  for (int64_t c = 0; c < channels; ++c) {
    a.grad_bias[c] = static_cast<float>(total[c]);
    a.grad_weight[c] = static_cast<float>(total[channels + c]);
    grad_scale += total[2 * channels + c];
    outside += total[3 * channels + c];
  }
  *a.grad_scale = static_cast<float>(grad_scale);
  *a.grad_zero_point = static_cast<float>(-outside) * *a.scale;
  if (!a.training) return;
  const float count = static_cast<float>(a.view.size / channels);
  std::vector<float> mean_grad(static_cast<size_t>(channels)), mean_product(mean_grad);
  for (int64_t c = 0; c < channels; ++c) {
    mean_grad[c] = a.grad_bias[c] / count;
    mean_product[c] = a.grad_weight[c] / count;
  }
  const ChannelConstants<6> constants(
      a.view, {a.mean, inv_std.data(), factor.data(), bias.data(), mean_grad.data(), mean_product.data()});
  for_blocks(a.view.size, a.threads, [&](int64_t start, int64_t n) {
    Reader<T> x_reader, grad_reader;
    Writer<T> writer;
    T* to = static_cast<T*>(a.grad_x) + start;
    const float* x = x_reader.at(static_cast<const T*>(a.x) + start, n);
    const float* grad_out = grad_reader.at(static_cast<const T*>(a.grad_out) + start, n);
    float* out = writer.at(to, n);
    constants.block(start, n, [&](const auto& k, int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; j += kWidth) {
        const Vec multiplier = k.template get<2>(j);
        const Inner inner = layer.at(load_vec(x + j), load_vec(grad_out + j), k.template get<0>(j), k.template get<1>(j),
                                     multiplier, k.template get<3>(j));
        store_vec(out + j, (inner.grad - k.template get<4>(j) - inner.normalized * k.template get<5>(j)) * multiplier);
      }
    });
    writer.done(to, n);
  });
}

}  // namespace

void bn_act_fake_quant_forward(const BnActFakeQuantForward& a) {
  with_type(a.dtype, [&](auto type) { forward<decltype(type)>(a); });
}

void bn_act_fake_quant_backward(const BnActFakeQuantBackward& a) {
  with_type(a.dtype, [&](auto type) { backward<decltype(type)>(a); });
}

}  // namespace DFQ_ISA
}  // namespace dfq
