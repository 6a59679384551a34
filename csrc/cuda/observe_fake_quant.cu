// observe_fake_quant: the batch's range moves the running one, parameters follow, values are fake-quantized.
//   math     as arguments.h's MovingRange and fake_quant
//   traffic  x read for its range, read again (from the second-level cache if it fits), out written, a bit per element
//   grid     sweep.cuh, then one warp for the range, then flat.cuh
//   order    minimum and maximum are exact in any order; parameters on one thread
#include "declarations.cuh"
#include "flat.cuh"

namespace dfq {
namespace cuda {

namespace {

template <class T>
struct Observe : Operator<T, 1, false, Extremes> {
  struct Constants {};
  __device__ Constants constants(int64_t, const Layout&) const { return {}; }
  template <int N>
  __device__ void each(const Constants&, Extremes& extremes, const float (&in)[1][N], int n, float (&)[N]) const {
    extremes.add(in[0], n);
  }
};

__global__ void move(const Extremes* parts, int slices, const MovingRange range) {
  const Extremes total = total_of(parts, slices, 1, 0);
  if (threadIdx.x == 0) move_range(range, total.low, total.high);
}

}  // namespace

void observe_fake_quant_forward(const ObserveFakeQuantForward& a, const Queue& queue) {
  const Launch launch(queue);
  const View view{a.size, 1, a.size};
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    Observe<T> op;
    op.in[0] = static_cast<const T*>(a.x);
    const Layout l = sweep(op, view, launch);
    const Extremes* parts = parts_in<Extremes>(launch.workspace);
    run(move, 1, 32, 0, launch, parts, l.slices, a.range);
  });
  fake_quant_flat(a.dtype, view, a.x, a.range.scale, a.range.zero_point, {a.range.quant_min, a.range.quant_max}, a.out,
                  a.mask, launch);
}

}  // namespace cuda
}  // namespace dfq
