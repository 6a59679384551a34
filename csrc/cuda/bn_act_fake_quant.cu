// bn_act_fake_quant: a student's batch norm, activation, range update and fake quantization.
//   math     y = act((x - mean) * (weight * inv_std) + bias), inv_std = 1 / sqrt(var + eps); range and values from y
//   traffic  forward: x read for statistics and extremes (not where both are given), x read, out written;
//            backward: grad_out and x read for the sums, in training once more, grad_x written
//   grid     sweep.cuh; a warp per channel joins the parts and moves the stored statistics, the last block the range;
//            sweep.cuh again
//   order    parts joined in order, in double; a batch norm is monotone per channel, so the extremes of x give those of y
#include "declarations.cuh"
#include "statistics.cuh"

namespace dfq {
namespace cuda {

namespace {

constexpr int kJoinWarps = 4, kJoinThreads = 32 * kJoinWarps;

template <class T>
struct LookAt : Operator<T, 1, false, MomentsAndExtremes> {
  struct Constants {
    float pivot;
  };
  __device__ Constants constants(int64_t c, const Layout& l) const { return {pivot_of(this->in[0], l, c)}; }
  template <int N>
  __device__ void each(const Constants& k, MomentsAndExtremes& part, const float (&in)[1][N], int n, float (&)[N]) const {
    part.add(in[0], n, k.pivot);
  }
};

__host__ __device__ inline Normalization normalization(const BnActFakeQuantForward& a) {
  const float* const mean = a.training ? a.mean : a.running_mean;
  return {mean, a.training ? a.var : a.running_var, a.weight, a.bias, a.eps, a.activation};
}

template <class T>
struct Quantize : Operator<T, 1, true, Nothing> {
  Normalization norm;
  const float *scale, *zero_point;  // one number each
  float low, high;
  float *mean, *var;  // copies of what normalises; null: it is not what is stored
  float* used;

  struct Constants {
    Normalization::Constants norm;
    float scale, inv, zero_point;
  };
  __device__ Constants constants(int64_t c, const Layout&) const {
    if (mean) mean[c] = norm.mean[c], var[c] = norm.var[c];  // every thread of the channel writes the same
    if (c == 0) used[0] = *scale, used[1] = *zero_point;
    return {norm.constants(c), *scale, reciprocal(*scale), *zero_point};
  }
  template <int N>
  __device__ void each(const Constants& k, Nothing&, const float (&in)[1][N], int, float (&out)[N]) const {
    for (int e = 0; e < N; ++e) {
      const float y = activate(k.norm.affine(in[0][e]), norm.activation);
      out[e] = (clamp(rintf(y * k.inv + k.zero_point), low, high) - k.zero_point) * k.scale;
    }
  }
};

// A warp per channel: statistics, stored statistics and the range of y, left in the channel's first part; the last
// block moves the range.
template <class T>
__global__ void __launch_bounds__(kJoinThreads) join(void* workspace, const Layout l, const BnActFakeQuantForward a) {
  MomentsAndExtremes* const parts = parts_in<MomentsAndExtremes>(workspace);
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kJoinWarps + threadIdx.x / 32;
  if (c < l.channels) {
    Moments::Wide moments{};
    if (a.training) moments = moments_of(parts, l.slices, l.channels, c);
    Extremes extremes;
    for (int s = threadIdx.x % 32; s < l.slices; s += 32) extremes.merge(parts[s * l.channels + c].extremes);
    for (int distance = 16; distance > 0; distance /= 2) extremes.merge(shuffled(extremes, distance));
    if (threadIdx.x % 32 == 0) {
      if (a.training) {
        const double n = moments.count;
        const float mean = static_cast<float>(pivot_of(static_cast<const T*>(a.x), l, c) + moments.mean);
        const float var = static_cast<float>(moments.squares / n);
        const float unbiased = var * static_cast<float>(n / (n - 1));
        a.mean[c] = mean;
        a.var[c] = var;
        a.running_mean[c] += a.momentum * (mean - a.running_mean[c]);
        a.running_var[c] += a.momentum * (unbiased - a.running_var[c]);
      }
      const Normalization norm = normalization(a);
      const Normalization::Constants k = norm.constants(c);
      const float one = activate(k.affine(extremes.low), a.activation);
      const float other = activate(k.affine(extremes.high), a.activation);
      Extremes range;
      range.take(one, one);
      range.take(other, other);
      parts[c].extremes = range;
    }
  }
  if (!a.observe || !is_last_block(workspace)) return;
  Extremes range;
  for (int64_t i = threadIdx.x; i < l.channels; i += kJoinThreads)
    range.take(__ldcg(&parts[i].extremes.low), __ldcg(&parts[i].extremes.high));
  for (int distance = 16; distance > 0; distance /= 2) range.merge(shuffled(range, distance));
  __shared__ Extremes warps[kJoinWarps];
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = range;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kJoinWarps; ++w) range.merge(warps[w]);
  move_range(a.range, range.low, range.high);
}

// The layer's gradients for one element, behind fake quantization and activation.
struct Layer {
  Normalization norm;
  const float *scale, *zero_point;
  float low, high;

  struct Constants {
    Normalization::Constants norm;
    float inv, zero_point;
  };
  struct Inner {
    float grad, normalized, grad_scale, outside;
  };
  __device__ Constants constants(int64_t c, const Layout&) const { return {norm.constants(c), reciprocal(*scale), *zero_point}; }
  __device__ Inner at(const Constants& k, float x, float grad_out) const {
    const float y = activate(k.norm.affine(x), norm.activation);
    const LearnedGradient g = learned_gradient(y, grad_out, k.inv, k.zero_point, low, high);
    return {activation_gradient(g.x, y, norm.activation), (x - k.norm.mean) * k.norm.inv_std, g.scale, g.outside};
  }
};

// Sums of one channel; with stored statistics the gradient of x too.
template <class T, bool kWrites>
struct Gather : Operator<T, 2, kWrites, Sums<4>> {
  Layer layer;

  using Constants = Layer::Constants;
  __device__ Constants constants(int64_t c, const Layout& l) const { return layer.constants(c, l); }
  template <int N>
  __device__ void each(const Constants& k, Sums<4>& sums, const float (&in)[2][N], int n, float (&out)[N]) const {
    for (int e = 0; e < N; ++e) {
      const Layer::Inner inner = layer.at(k, in[0][e], in[1][e]);
      const float terms[4] = {inner.grad, inner.grad * inner.normalized, inner.grad_scale, inner.outside};
      for (int t = 0; t < 4; ++t) sums.value[t] += e < n ? terms[t] : 0.0f;
      if (kWrites) out[e] = inner.grad * k.norm.factor;
    }
  }
};

// The gradient of x where the batch's own statistics normalised.
template <class T>
struct Spread : Operator<T, 2, true, Nothing> {
  Layer layer;
  const float *grad_weight, *grad_bias;
  float count;

  struct Constants {
    Layer::Constants layer;
    float mean_grad, mean_product;
  };
  __device__ Constants constants(int64_t c, const Layout& l) const {
    return {layer.constants(c, l), grad_bias[c] / count, grad_weight[c] / count};
  }
  template <int N>
  __device__ void each(const Constants& k, Nothing&, const float (&in)[2][N], int, float (&out)[N]) const {
    for (int e = 0; e < N; ++e) {
      const Layer::Inner inner = layer.at(k.layer, in[0][e], in[1][e]);
      out[e] = (inner.grad - k.mean_grad - inner.normalized * k.mean_product) * k.layer.norm.factor;
    }
  }
};

// What a channel adds to the gradients of scale and zero point, in the place of its first part.
struct OfRange {
  double scale, outside;
};
static_assert(sizeof(OfRange) <= sizeof(Sums<4>) && kPartsAt % sizeof(double) == 0, "it fits the part's place");

// A warp per channel: gradients of weight and bias; the last block adds up those of scale and zero point, in order.
__global__ void __launch_bounds__(kJoinThreads) join_gradients(void* workspace, int slices, int64_t channels,
                                                               const BnActFakeQuantBackward a) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kJoinWarps + threadIdx.x / 32;
  OfRange* const of_range = parts_in<OfRange>(workspace);
  if (c < channels) {
    const Sums<4>::Wide total = total_of(parts_in<const Sums<4>>(workspace), slices, channels, c);
    if (threadIdx.x % 32 == 0) {
      a.grad_bias[c] = static_cast<float>(total.value[0]);
      a.grad_weight[c] = static_cast<float>(total.value[1]);
      of_range[c] = {total.value[2], total.value[3]};
    }
  }
  if (!a.grad_scale || !is_last_block(workspace)) return;
  Sums<2>::Wide sum;
  for (int64_t i = threadIdx.x; i < channels; i += kJoinThreads) {
    sum.value[0] += __ldcg(&of_range[i].scale);
    sum.value[1] += __ldcg(&of_range[i].outside);
  }
  for (int distance = 16; distance > 0; distance /= 2) sum.merge(shuffled(sum, distance));
  __shared__ double warps[kJoinWarps][2];
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32][0] = sum.value[0], warps[threadIdx.x / 32][1] = sum.value[1];
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kJoinWarps; ++w) sum.value[0] += warps[w][0], sum.value[1] += warps[w][1];
  *a.grad_scale = static_cast<float>(sum.value[0]);
  *a.grad_zero_point = static_cast<float>(-sum.value[1]) * *a.scale;
}

unsigned join_blocks(const Layout& l) { return static_cast<unsigned>(ceil_div(l.channels, kJoinWarps)); }

template <class T, class Op>
Op with_operands(const BnActFakeQuantBackward& a) {
  Op op;
  op.in[0] = static_cast<const T*>(a.x);
  op.in[1] = static_cast<const T*>(a.grad_out);
  op.out = static_cast<T*>(a.grad_x);
  op.layer = {{a.mean, a.var, a.weight, a.bias, a.eps, a.activation}, a.scale, a.zero_point, a.quant_min, a.quant_max};
  return op;
}

}  // namespace

void bn_act_fake_quant_forward(const BnActFakeQuantForward& a, const Queue& queue) {
  const Launch launch(queue);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    if (a.training || a.observe) {
      LookAt<T> look;
      look.in[0] = static_cast<const T*>(a.x);
      const Layout l = sweep(look, a.view, launch);
      run(join<T>, join_blocks(l), kJoinThreads, 0, launch, launch.workspace, l, a);
    }
    Quantize<T> op;
    op.in[0] = static_cast<const T*>(a.x);
    op.out = static_cast<T*>(a.out);
    op.norm = normalization(a);
    op.mean = a.training ? nullptr : a.mean, op.var = a.var, op.used = a.used;
    op.scale = a.range.scale, op.zero_point = a.range.zero_point;
    op.low = a.range.quant_min, op.high = a.range.quant_max;
    sweep(op, a.view, launch);
  });
}

void bn_act_fake_quant_backward(const BnActFakeQuantBackward& a, const Queue& queue) {
  const Launch launch(queue);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const Layout l = a.training ? sweep(with_operands<T, Gather<T, false>>(a), a.view, launch)
                                : sweep(with_operands<T, Gather<T, true>>(a), a.view, launch);
    run(join_gradients, join_blocks(l), kJoinThreads, 0, launch, launch.workspace, l.slices, l.channels, a);
    if (!a.training) return;
    Spread<T> op = with_operands<T, Spread<T>>(a);
    op.grad_weight = a.grad_weight, op.grad_bias = a.grad_bias;
    op.count = static_cast<float>(a.view.size / a.view.channels);
    sweep(op, a.view, launch);
  });
}

}  // namespace cuda
}  // namespace dfq
