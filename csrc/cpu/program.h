// A whole integer network as a list of steps over planes in one arena: what dfq/engine/native.py made of a graph.
//
// A plane is one image's value, height x width x channels of bytes, with a frame around it that holds the zero point, so
// that convolutions read padding like everything else. Channels lie together, their number rounded up to 4. A signed
// integer q is stored as q + 128: kernels multiply unsigned activations by signed weights.
#pragma once
#include <atomic>
#include <cstdint>
#include <vector>

namespace dfq {

constexpr int kMostOuts = 4, kMostChained = 4;  // results of one step, steps that are chained to it

struct Plane {
  int64_t offset = 0;  // of the frame's first byte in the arena
  int32_t height = 0, width = 0, channels = 0, stride = 0;  // stride: bytes of one pixel
  int32_t frame_y = 0, frame_x = 0;
  float scale = 1, inverse = 1;  // inverse: 1 / scale
  int32_t zero_point = 0, quant_min = 0, quant_max = 0;
  int32_t shift = 0;  // 128 if signed

  int64_t row_bytes() const { return int64_t(width + 2 * frame_x) * stride; }
  int64_t bytes() const { return row_bytes() * (height + 2 * frame_y); }
  int32_t stored_zero() const { return zero_point + shift; }
};

enum StepKind : int { kQuantize = 0, kConvolve = 1, kRescale = 2, kAdd = 3, kAveragePool = 4, kMaxPool = 5 };

struct Step {
  int kind = 0, activation = 0;
  int x = -1, other = -1;        // planes that are read; other: a residual, or an addition's second side
  std::vector<int> outs;         // planes that are written; empty: the logits
  std::vector<Step> chained;     // rescale steps whose x is one of `outs`: they run where its integers are in registers
  int32_t out_height = 1, out_width = 1, out_channels = 1;
  int32_t kernel_y = 1, kernel_x = 1, stride_y = 1, stride_x = 1, pad_y = 0, pad_x = 0, dilation_y = 1, dilation_x = 1;
  int32_t groups = 1;
  std::vector<int8_t> weight;          // [out, kernel_y, kernel_x, in / groups]
  std::vector<float> mult, bias, mean;  // per channel, and 16 more; average pool: mult per window
  std::vector<int32_t> windows;        // average pool: begin and end of every row's, then of every column's
  // made by the level that runs it
  std::vector<uint8_t> packed;
  std::vector<int32_t> start;  // accumulators before the first product: minus stored_zero * sum of weights
};

struct Program {
  std::vector<Plane> planes;
  std::vector<Step> steps;
  std::vector<int> inputs, outputs;  // planes that a call brings and takes away
  int64_t arena_bytes = 0;
  int32_t image_channels = 0, image_height = 0, image_width = 0;
  int32_t classes = 0, logit_pixels = 1;  // real results, per pixel and image
};

// One call of a program. images: fp32 [count, C, H, W]; logits: fp32 [count, logit_pixels, classes]; inputs and outputs:
// bytes [count, H, W, C], a signed integer as it is; arenas: one for each thread.
struct ProgramRun {
  const Program* program;
  int64_t count;
  const float* images;
  float* logits;
  const uint8_t* const* inputs;
  uint8_t* const* outputs;
  uint8_t* const* arenas;
  int threads;
  std::atomic<bool>* has_nan;  // set where an image does
};

}  // namespace dfq
