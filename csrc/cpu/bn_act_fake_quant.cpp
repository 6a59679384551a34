// bn_act_fake_quant: a student's batch norm, activation, range update and fake quantization.
//   math     y = act((x - mean) * (weight * inv_std) + bias), inv_std = 1 / sqrt(var + eps); range and values from y
//   traffic  forward: x read for statistics and extremes (not where both are given), x read, out written;
//            backward: grad_out and x read for the sums, in training once more, grad_x written
//   block    chunks of about 2048
//   order    sums as reduce.h says, of gradients times centred values, normalized when they are summed; a batch norm is
//            monotone per channel, so the extremes of x give those of y, exactly
#include "statistics.h"

namespace dfq {
namespace DFQ_ISA {

namespace {

template <class T>
bool channel_holds_nan(const View& view, const T* x, int64_t channel) {
  for (int64_t at = channel * view.inner; at < view.size; at += view.channels * view.inner)
    if (holds_nan(x + at, view.inner)) return true;
  return false;
}

// Statistics of x if training, and the least and largest x of every channel if observed; a NaN makes them NaN.
template <class T, bool training, bool observe>
void look_at(const BnActFakeQuantForward& a, std::vector<float>& least, std::vector<float>& most) {
  constexpr int sums = training ? 2 : 1, count = sums + (observe ? 2 : 0);
  const Chunks chunks(a.view);
  Fold folds[count];
  std::fill(folds, folds + count, Fold::kSum);
  if (observe) folds[count - 2] = Fold::kLeast, folds[count - 1] = Fold::kMost;
  std::vector<double> total;
  const bool ahead = reads_ahead();
  const auto pass = [&](const float* shift) {
    total = reduce<T, 1, count, 1>(chunks, a.threads, {shift}, folds, [&](auto& work) {
      const T* x = work.gather(0, a.x);
      work.run([=](int64_t i, const Vec* k, Vec* at) DFQ_INLINE {
        const Vec value = load_ahead(x + i, ahead);
        const Vec distance = training ? value - k[0] : value;
        at[0] = at[0] + distance;
        if (training) at[1] = at[1] + distance * distance;
        if (observe) {
          at[count - 2] = min_keeping_nan(value, at[count - 2]);
          at[count - 1] = max_keeping_nan(value, at[count - 1]);
        }
      });
    });
    return total;
  };
  if (training) measure<T>(a.view, a.x, a.threads, a.mean, a.var, pass);
  else pass(a.mean);
  for (int64_t c = 0; observe && c < a.view.channels; ++c) {
    const double* const found = &total[c];
    const bool nan = !std::isfinite(found[0]) && channel_holds_nan(a.view, static_cast<const T*>(a.x), c);
    least[c] = nan ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(found[(count - 2) * a.view.channels]);
    most[c] = nan ? least[c] : static_cast<float>(found[(count - 1) * a.view.channels]);
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
  const Vec inv = broadcast(reciprocal(*a.range.scale)), scale = broadcast(*a.range.scale);
  const Vec zero_point = broadcast(*a.range.zero_point);
  // rounding is monotone, so the activation's bounds can wait until everything is rounded: they are integers then
  const Activation activation(a.activation);
  const Vec least = broadcast(a.range.quant_min), most = broadcast(a.range.quant_max);
  const Vec low = clamp(rne(activation(-broadcast(kInfinity)) * inv + zero_point), least, most);
  const Vec high = clamp(rne(activation(broadcast(kInfinity)) * inv + zero_point), least, most);
  const float* const constants[] = {a.mean, factor.data(), bias.data()};
  const bool ahead = reads_ahead();
  for_chunks<T, 3, 2>(Chunks(a.view), a.threads, constants, [&](auto& work) {
    const T* x = work.gather(0, a.x);
    T* out = work.place(1, a.out);
    work.run([=](int64_t i, const Vec* k, Vec*) DFQ_INLINE {
      const Vec affine = (load_ahead(x + i, ahead) - k[0]) * k[1] + k[2];
      store_vec(out + i, (clamp(rne(affine * inv + zero_point), low, high) - zero_point) * scale);
    });
    work.scatter(1, a.out);
  });
}

template <class T>
void forward(const BnActFakeQuantForward& a) {
  const int64_t channels = a.view.channels;
  std::vector<float> least(static_cast<size_t>(channels), kInfinity);
  std::vector<float> most(static_cast<size_t>(channels), -kInfinity);
  if (!a.training) {
    std::copy(a.running_mean, a.running_mean + channels, a.mean);
    std::copy(a.running_var, a.running_var + channels, a.var);
  }
  if (a.training && a.observe) look_at<T, true, true>(a, least, most);
  else if (a.training) look_at<T, true, false>(a, least, most);
  else if (a.observe) look_at<T, false, true>(a, least, most);
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
    float low = kInfinity, high = -low;
    range_of_outputs(a, factor, bias, least, most, low, high);
    move_range(a.range, low, high);
  }
  a.used[0] = *a.range.scale, a.used[1] = *a.range.zero_point;
  quantize<T>(a, factor, bias);
}

// What the gradient of a learned range needs.
struct Range {
  Vec inv, zero_point;
  Rounding rounding;
  Activation activation;

  explicit Range(const BnActFakeQuantBackward& a)
      : inv(broadcast(reciprocal(*a.scale))), zero_point(broadcast(*a.zero_point)), rounding(a.quant_min, a.quant_max),
        activation(a.activation) {}
};

// One layer's backward: sums, and in training a second pass for the gradient that they enter.
template <class T, bool learned>
class Backward {
 public:
  static constexpr int kSums = learned ? 4 : 2;
  using Sums = Workspace<T, 3, kSums, 3>;

  explicit Backward(const BnActFakeQuantBackward& a)
      : a_(a), chunks_(a.view), passing_(a.activation, *a.scale, *a.zero_point, a.quant_min, a.quant_max), range_(a),
        inv_std_(inverse_deviations(a.var, a.eps, a.view.channels)),
        factor_(products(a.weight, inv_std_)), bias_(or_zeros(a.bias, a.view.channels)) {}

  void run() {
    const int64_t channels = a_.view.channels;
    const float* const constants[] = {a_.mean, factor_.data(), bias_.data()};
    const std::vector<double> total =
        reduce<T, 3, kSums, 3>(chunks_, a_.threads, constants, kFolds, [&](Sums& work) { add(work); });
    if (a_.training) finish(total);
    for (int64_t c = 0; c < channels; ++c) {
      a_.grad_bias[c] = static_cast<float>(total[c]);
      a_.grad_weight[c] = static_cast<float>(total[channels + c] * static_cast<double>(inv_std_[c]));
    }
    if (!learned) return;
    double grad_scale = 0, outside = 0;
    for (int64_t c = 0; c < channels; ++c) {
      grad_scale += total[2 * channels + c];
      outside += total[3 * channels + c];
    }
    *a_.grad_scale = static_cast<float>(grad_scale);
    *a_.grad_zero_point = static_cast<float>(-outside) * *a_.scale;
  }

 private:
  static constexpr Fold kFolds[kSums] = {};  // sums

  // The sums over a chunk; where statistics are frozen its gradient, too.
  void add(Sums& work) const {
    const T* x = work.gather(0, a_.x);
    const T* grad_out = work.gather(1, a_.grad_out);
    T* out = work.place(2, a_.grad_x);
    const bool training = a_.training, ahead = reads_ahead();
    work.run([=, passing = passing_, range = range_](int64_t i, const Vec* k, Vec* sums) DFQ_INLINE {
      const Vec centred = load_ahead(x + i, ahead) - k[0], affine = centred * k[1] + k[2];
      const Vec grad = load_ahead(grad_out + i, ahead);
      const Vec inner = keep(passing(affine), grad);
      sums[0] = sums[0] + inner;
      sums[1] = sums[1] + inner * centred;
      if (learned) {
        const LearnedGradient g =
            learned_gradient(range.activation(affine), grad, range.inv, range.zero_point, range.rounding);
        sums[kSums - 2] = sums[kSums - 2] + g.scale;
        sums[kSums - 1] = sums[kSums - 1] + g.outside;
      }
      if (!training) store_vec(out + i, inner * k[1]);
    });
    if (!a_.training) work.scatter(2, a_.grad_x);
  }

  // The gradient of x in training: (inner - mean(inner) - normalized mean(inner normalized)) factor.
  void finish(const std::vector<double>& total) {
    const int64_t channels = a_.view.channels;
    const float count = static_cast<float>(a_.view.size / channels);
    std::vector<float> mean_grad(static_cast<size_t>(channels)), slope(mean_grad);  // slope: of centred values
    for (int64_t c = 0; c < channels; ++c) {
      mean_grad[c] = static_cast<float>(total[c]) / count;
      slope[c] = static_cast<float>(total[channels + c] * static_cast<double>(inv_std_[c])) / count * inv_std_[c];
    }
    const float* const constants[] = {a_.mean, factor_.data(), bias_.data(), mean_grad.data(), slope.data()};
    const bool ahead = reads_ahead();
    for_chunks<T, 5, 3>(chunks_, a_.threads, constants, [&](auto& work) {
      const T* x = work.gather(0, a_.x);
      const T* grad_out = work.gather(1, a_.grad_out);
      T* out = work.place(2, a_.grad_x);
      work.run([=, passing = passing_](int64_t i, const Vec* k, Vec*) DFQ_INLINE {
        const Vec centred = load_ahead(x + i, ahead) - k[0];
        const Vec inner = keep(passing(centred * k[1] + k[2]), load_ahead(grad_out + i, ahead));
        store_vec(out + i, (inner - k[3] - centred * k[4]) * k[1]);
      });
      work.scatter(2, a_.grad_x);
    });
  }

  const BnActFakeQuantBackward& a_;
  Chunks chunks_;
  Passing passing_;
  Range range_;
  std::vector<float> inv_std_, factor_, bias_;
};

}  // namespace

void bn_act_fake_quant_forward(const BnActFakeQuantForward& a) {
  with_type(a.dtype, [&](auto type) { forward<decltype(type)>(a); });
}

void bn_act_fake_quant_backward(const BnActFakeQuantBackward& a) {
  with_type(a.dtype, [&](auto type) {
    if (a.grad_scale) Backward<decltype(type), true>(a).run();
    else Backward<decltype(type), false>(a).run();
  });
}

}  // namespace DFQ_ISA
}  // namespace dfq
