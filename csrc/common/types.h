// What crosses the border to Python: dtype codes and the view of a dense tensor.
#pragma once
#include <cstdint>

namespace dfq {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum Activation : int {
  kIdentity = 0, kReLU = 1, kReLU6 = 2, kHardTanh = 3, kLeakyReLU = 4, kHardSigmoid = 5, kHardSwish = 6
};

// A dense tensor in memory order: element i belongs to channel (i / inner) % channels. One scale for the whole tensor
// is channels = 1, inner = size. NCHW: inner = H * W; channels-last: inner = 1.
struct View {
  int64_t size;
  int64_t channels;
  int64_t inner;
};

}  // namespace dfq
