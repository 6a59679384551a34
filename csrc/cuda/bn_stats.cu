// bn_stats: mean and biased variance of every channel.
//   math     mean = sum(x) / n, var = sum((x - mean)^2) / n; grad_x = (x - mean) (2 / n grad_var) + grad_mean / n
//   traffic  forward: x read; backward: x read, grad_x written
//   grid     sweep.cuh; a warp per channel joins the parts
//   order    parts joined in order, in double
#include "declarations.cuh"
#include "statistics.cuh"

namespace dfq {
namespace cuda {

namespace {

template <class T>
struct Measure : Operator<T, 1, false, Moments> {
  struct Constants {
    float pivot;
  };
  __device__ Constants constants(int64_t c, const Layout& l) const { return {pivot_of(this->in[0], l, c)}; }
  template <int N>
  __device__ void each(const Constants& k, Moments& moments, const float (&in)[1][N], int n, float (&)[N]) const {
    moments.add(in[0], n, k.pivot);
  }
};

template <class T>
struct Backward : Operator<T, 1, true, Nothing> {
  StatisticsGradient gradient;

  using Constants = StatisticsGradient::Constants;
  __device__ Constants constants(int64_t c, const Layout&) const { return gradient.constants(c); }
  template <int N>
  __device__ void each(const Constants& k, Nothing&, const float (&in)[1][N], int, float (&out)[N]) const {
    for (int e = 0; e < N; ++e) out[e] = k.of(in[0][e]);
  }
};

}  // namespace

void bn_stats_forward(const BnStatsForward& a, const Queue& queue) {
  const Launch launch(queue);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    Measure<T> op;
    op.in[0] = static_cast<const T*>(a.x);
    finish_moments(op.in[0], sweep(op, a.view, launch), a.mean, a.var, launch);
  });
}

void bn_stats_backward(const BnStatsBackward& a, const Queue& queue) {
  const Launch launch(queue);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    Backward<T> op;
    op.in[0] = static_cast<const T*>(a.x);
    op.out = static_cast<T*>(a.grad_x);
    op.gradient = {a.mean, a.grad_mean, a.grad_var, static_cast<float>(a.view.size / a.view.channels)};
    sweep(op, a.view, launch);
  });
}

}  // namespace cuda
}  // namespace dfq
