// A whole integer network as a list of steps over planes in one arena: what dfq/engine/native.py made of a graph.
//
// A plane is one image's value, height x width x channels of bytes, with a frame around it that holds the zero point, so
// that convolutions read padding like everything else. Channels lie together, their number rounded up to 4. A signed
// integer q is stored as q + 128: kernels multiply unsigned activations by signed weights.
//
// A plane may be a slice of another one, some of its channels: the same rows and pixels, of which it owns `room` bytes.
// Whoever writes a plane writes no other byte of a pixel; whoever reads one may read a few beyond, and ignores them.
#pragma once
#include <atomic>
#include <cstdint>
#include <limits>
#include <vector>

namespace dfq {

constexpr int kMostOuts = 4, kMostChained = 4;  // results of one step, steps that are chained to it
constexpr int kCodes = 256;                     // integers of a byte
constexpr int kMostSources = 512;               // planes that one move reads

struct Plane {
  int64_t offset = 0;  // of the frame's first byte in the arena
  int32_t height = 0, width = 0, channels = 0, stride = 0;  // stride: bytes from one pixel to the next
  int32_t room = 0;    // bytes of a pixel that are this plane's own
  bool kept = true;    // false: no memory; only chained steps read it, out of registers
  int32_t frame_y = 0, frame_x = 0;
  float scale = 1, inverse = 1;  // inverse: 1 / scale
  int32_t zero_point = 0, quant_min = 0, quant_max = 0;
  int32_t shift = 0;  // 128 if signed

  int64_t row_bytes() const { return int64_t(width + 2 * frame_x) * stride; }
  int64_t bytes() const { return row_bytes() * (height + 2 * frame_y); }
  int32_t stored_zero() const { return zero_point + shift; }
  int32_t whole_groups() const { return (channels + 3) / 4 * 4; }  // channels that dense convolutions multiply
};

enum StepKind : int {
  kQuantize = 0, kConvolve = 1, kRescale = 2, kAdd = 3, kAveragePool = 4, kMaxPool = 5, kTable = 6, kMultiply = 7,
  kMove = 8, kResize = 9
};

// Neighbouring channels that a move takes from one of its sources to its result. source < 0: it fills them.
struct Run {
  int32_t source, from, to, length;
};

// Bytes of a move's result, 64 neighbours from `to` on, that come from 64 neighbours of one source: byte i, where bit i
// of `there` is set, is number codes[i] of those from `from` on.
struct Pick {
  int32_t source, from, to;
  uint64_t there;
  uint8_t codes[64];
};

struct Step {
  int kind = 0, activation = 0;
  float a = -std::numeric_limits<float>::infinity(), b = -a;  // of the activation: bounds of a clamp, else its numbers
  int x = -1, other = -1;      // planes that are read; other: a residual, or the second side of an addition or product
  std::vector<int> outs;       // planes that are written; empty: real results
  int real = 0;                // which of the program's real results it makes
  std::vector<Step> chained;   // steps whose x is one of `outs`: they run where its integers are in registers
  int32_t out_height = 1, out_width = 1, out_channels = 1;
  int32_t kernel_y = 1, kernel_x = 1, stride_y = 1, stride_x = 1, pad_y = 0, pad_x = 0, dilation_y = 1, dilation_x = 1;
  int32_t groups = 1;
  std::vector<int8_t> weight;          // [out, kernel_y, kernel_x, in / groups]
  std::vector<float> mult, bias, mean, slope;  // per channel, and 16 more; average pool: mult per window
  float scale = 1;                     // of a product, or of a resized map
  std::vector<int32_t> windows;        // pools, resize: begin and end (two neighbours) of every row's, then every column's
  std::vector<float> weights;          // resize: of every row's second neighbour, then of every column's
  std::vector<float> values;           // table: t of every stored byte
  std::vector<int> sources;            // move: x and the other planes that it reads
  std::vector<int32_t> channels, pixels, index;  // move: where results come from, as dfq/engine/graph.py says; may be empty
  int32_t fill = 0;                    // move: the byte of what comes from nowhere
  // made by the level that runs it
  std::vector<uint8_t> packed;
  std::vector<int32_t> start;  // accumulators before the first product: minus stored_zero * sum of weights
  std::vector<uint8_t> tables;         // table: of every result, [256]; quantize: of every result and channel
  std::vector<Run> runs;               // move by channels; in their order. Empty: by index
  std::vector<Pick> picks;             // move by channels, where they are short; those of one `to` together
  std::vector<uint32_t> places;        // move by pixels: y << 16 | x, or kNowhere; by index: bytes of the arena
};

constexpr uint32_t kNowhere = 0xFFFFFFFF;

struct Program {
  std::vector<Plane> planes;
  std::vector<Step> steps;
  std::vector<int> inputs, outputs;  // planes that a call brings and takes away
  int64_t arena_bytes = 0;
  int32_t image_channels = 0, image_height = 0, image_width = 0;
  std::vector<float> pixel_values;  // [image_channels, 256]: what a byte of an image stands for; may be empty
};

// One call of a program. images: fp32 [count, C, H, W], or pixels: the same in bytes; reals: of every real result fp32
// [count, H, W, C]; inputs and outputs: bytes [count, H, W, C], a signed integer as it is; arenas: one for each thread.
struct ProgramRun {
  const Program* program;
  int64_t count;
  const float* images;
  const uint8_t* pixels;
  float* const* reals;
  const uint8_t* const* inputs;
  uint8_t* const* outputs;
  uint8_t* const* arenas;
  int threads;
  std::atomic<bool>* has_nan;  // set where an image does
};

}  // namespace dfq
