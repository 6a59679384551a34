// bn_act_stats: a frozen teacher's batch norm and activation, and the batch statistics of its input.
//   math     out = act((x - running_mean) * (weight / sqrt(running_var + eps)) + bias); mean, var = bn_stats(x)
//            grad_x = act'(out) grad_out * multiplier + (x - mean) (2 / n grad_var) + grad_mean / n
//   traffic  forward: x read, out written; backward: grad_out and x read, grad_x written
//   grid     sweep.cuh; a warp per channel joins the parts
//   order    parts joined in order, in double
#include "declarations.cuh"
#include "statistics.cuh"

namespace dfq {
namespace cuda {

namespace {

template <class T>
struct Forward : Operator<T, 1, true, Moments> {
  Normalization norm;

  struct Constants {
    Normalization::Constants norm;
    float pivot;
  };
  __device__ Constants constants(int64_t c, const Layout& l) const {
    return {norm.constants(c), pivot_of(this->in[0], l, c)};
  }
  template <int N>
  __device__ void each(const Constants& k, Moments& moments, const float (&in)[1][N], int n, float (&out)[N]) const {
    moments.add(in[0], n, k.pivot);
    for (int e = 0; e < N; ++e) out[e] = activate(k.norm.affine(in[0][e]), norm.activation);
  }
};

template <class T>
struct Backward : Operator<T, 2, true, Nothing> {
  Normalization norm;
  StatisticsGradient statistics;

  struct Constants {
    Normalization::Constants norm;
    StatisticsGradient::Constants statistics;
  };
  __device__ Constants constants(int64_t c, const Layout&) const { return {norm.constants(c), statistics.constants(c)}; }
  template <int N>
  __device__ void each(const Constants& k, Nothing&, const float (&in)[2][N], int, float (&out)[N]) const {
    for (int e = 0; e < N; ++e) {
      // the activation's gradient looks at the value that the forward stored
      const float y = widen(narrow<T>(activate(k.norm.affine(in[0][e]), norm.activation)));
      out[e] = activation_gradient(in[1][e], y, norm.activation) * k.norm.factor + k.statistics.of(in[0][e]);
    }
  }
};

}  // namespace

void bn_act_stats_forward(const BnActStatsForward& a, const Queue& queue) {
  const Launch launch(queue);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    Forward<T> op;
    op.in[0] = static_cast<const T*>(a.x);
    op.out = static_cast<T*>(a.out);
    op.norm = {a.running_mean, a.running_var, a.weight, a.bias, a.eps, a.activation};
    finish_moments(op.in[0], sweep(op, a.view, launch), a.mean, a.var, launch);
  });
}

void bn_act_stats_backward(const BnActStatsBackward& a, const Queue& queue) {
  const Launch launch(queue);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    Backward<T> op;
    op.in[0] = static_cast<const T*>(a.x);
    op.in[1] = static_cast<const T*>(a.grad_out);
    op.out = static_cast<T*>(a.grad_x);
    op.norm = {a.running_mean, a.running_var, a.weight, a.bias, a.eps, a.activation};
    op.statistics = {a.batch_mean, a.grad_mean, a.grad_var, static_cast<float>(a.view.size / a.view.channels)};
    sweep(op, a.view, launch);
  });
}

}  // namespace cuda
}  // namespace dfq
