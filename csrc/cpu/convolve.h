// Convolutions and linear layers of a program: dense by tiles of products (dot.h), by channel, or one by one.
#pragma once
#include "amx.h"
#include "tile_end.h"

namespace dfq {
namespace DFQ_ISA {
namespace {

bool depthwise(const Program& p, const Step& s) {
  return s.groups > 1 && s.groups == s.out_channels && s.groups == p.planes[s.x].channels;
}

bool dense(const Program& p, const Step& s) {
  return s.groups == 1 || p.planes[s.x].channels / s.groups % 4 == 0;
}

template <int kPixels, int kBlocks>
Dot dot_of() {
#if defined(__AVX512F__)
  if (has_vnni()) return dot4<kPixels, kBlocks>;
#endif
  return dot2<kPixels, kBlocks>;
}

struct Tile {
  int pixels, blocks;
  Dot dot;
};

constexpr int64_t kFirstLevel = 48 << 10;  // bytes of weights that stay in the first-level cache

// The tile that covers `width` pixels of `blocks` blocks with the least work; a last one overlaps the one before. Weights
// that come from the second-level cache for every tile cost as much as two that do not.
Tile choose_tile(int64_t width, int64_t blocks, int64_t block_bytes) {
#if defined(__AVX512F__)
  static const Tile tiles[] = {
      {16, 1, dot_of<16, 1>()}, {8, 1, dot_of<8, 1>()}, {4, 1, dot_of<4, 1>()}, {1, 1, dot_of<1, 1>()},
      {8, 2, dot_of<8, 2>()},   {4, 2, dot_of<4, 2>()}, {1, 2, dot_of<1, 2>()}, {6, 4, dot_of<6, 4>()},
      {4, 4, dot_of<4, 4>()},   {2, 4, dot_of<2, 4>()}, {1, 4, dot_of<1, 4>()},
  };
#else
  static const Tile tiles[] = {{4, 1, dot_of<4, 1>()}, {2, 1, dot_of<2, 1>()}, {1, 1, dot_of<1, 1>()}};
#endif
  const Tile* best = nullptr;
  double least = 0;
  for (const Tile& tile : tiles) {
    if (tile.pixels > width || tile.blocks > blocks) continue;
    const double count = static_cast<double>((width + tile.pixels - 1) / tile.pixels);
    const int loads = tile.pixels + tile.blocks * (tile.blocks * block_bytes > kFirstLevel ? 2 : 1);
    const double cost = count * (tile.pixels * tile.blocks + loads) / tile.blocks;
    if (!best || cost < least) best = &tile, least = cost;
  }
  return *best;
}

struct Dense {
  View2d in;
  Taps taps;
  int64_t inner, outer, blocks, block_bytes;  // channels of a group; blocks of 16 output channels, bytes of one's weights
  bool joined;  // the pixels that make neighbours are neighbours, from the end of a row to the next row, too

  explicit Dense(const Work& w) : in(w.program.planes[w.step.x], w.arena) {
    const Step& s = w.step;
    const int group = has_vnni() ? 4 : 2;
    inner = s.groups == 1 ? in.plane->whole_groups() : in.plane->channels / s.groups, outer = s.out_channels / s.groups;
    blocks = (outer + 15) / 16, block_bytes = int64_t(s.kernel_y) * s.kernel_x * (inner / group) * 64;
    taps = {s.kernel_y, s.kernel_x, static_cast<int32_t>(inner / group), s.dilation_y * in.row,
            s.dilation_x * in.pixel, s.stride_x * in.pixel};
    const bool pointwise = s.kernel_y * s.kernel_x == 1 && s.stride_y * s.stride_x == 1 && s.pad_y + s.pad_x == 0;
    joined = pointwise && in.plane->frame_x == 0;
  }
};

constexpr int64_t kHeldVectors = 128;  // of accumulators, a quarter of the first-level cache

// `lines` times `length` neighbouring pixels from row `y` on of blocks b, b + 1, ... of a group; dot(x, weight, start, acc)
// fills a tile. As many tiles as are held end together: an end costs as much as some pixels before its first one.
template <class Fill>
void convolve_blocks(const Work& w, const Dense& d, TileEnd& tile_end, int64_t group, int64_t b, int pixels,
                     int tile_blocks, int64_t y, int64_t lines, int64_t length, const Fill& dot) {
  const Step& s = w.step;
  alignas(64) int32_t acc[kHeldVectors * kLanes];
  const int64_t channel = group * d.outer + b * kLanes, channels = d.outer - b * kLanes;
  const uint8_t* weight = &s.packed[(group * d.blocks + b) * d.block_bytes];
  const int32_t* start = &s.start[(group * d.blocks + b) * kLanes];
  const int64_t most = std::min(kRowTile, kHeldVectors / tile_blocks) / pixels * pixels;
  for (; lines > 0; --lines, ++y) {
    const uint8_t* from = d.in.at(y * s.stride_y - s.pad_y, -s.pad_x) + group * d.inner;
    for (int64_t x = 0, count; x < length; x += count) {
      x = std::min<int64_t>(x, length - pixels);
      count = std::min(most, length - x);
      for (int64_t p = 0; p < count; p += pixels) {
        const int64_t place = std::min<int64_t>(p, count - pixels);
        dot(from + (x + place) * d.taps.pixel_bytes, weight, start, acc + place * tile_blocks * kLanes);
      }
      finish_tile(w, tile_end, acc, count, tile_blocks, y + x / s.out_width, x % s.out_width, channel, channels);
    }
  }
}

#ifdef DFQ_AMX
// False where AMX does not pay.
bool convolve_tiles(const Work& w, const Dense& d, int64_t y, int64_t lines, int64_t length) {
  using DotTiles = decltype(&dot_tiles<1, 1>);
  static const DotTiles dots[2][2] = {{dot_tiles<1, 1>, dot_tiles<1, 2>}, {dot_tiles<2, 1>, dot_tiles<2, 2>}};
  TileTaps tiles;
  if (!has_amx() || !tiles.choose(d.taps, length, d.blocks)) return false;
  TileEnd tile_end(w);
  tiles.set();
  for (int64_t group = 0; group < w.step.groups; ++group)
    for (int64_t b = 0; b < d.blocks; b += tiles.blocks) {
      const int blocks = static_cast<int>(std::min<int64_t>(tiles.blocks, d.blocks - b));
      const DotTiles dot = dots[tiles.groups - 1][blocks - 1];
      convolve_blocks(w, d, tile_end, group, b, tiles.groups * tiles.pixels, blocks, y, lines, length,
                      [&](const uint8_t* x, const uint8_t* weight, const int32_t* start, int32_t* acc) {
                        dot(x, d.taps, tiles, weight, d.block_bytes, start, acc);
                      });
    }
  release_tiles();
  return true;
}
#endif

void convolve_dense(const Work& w, int64_t begin, int64_t end) {
  const Dense d(w);
  const int64_t lines = d.joined ? 1 : end - begin, length = d.joined ? (end - begin) * w.step.out_width : w.step.out_width;
#ifdef DFQ_AMX
  if (convolve_tiles(w, d, begin, lines, length)) return;
#endif
  TileEnd tile_end(w);
  for (int64_t group = 0; group < w.step.groups; ++group)
    for (int64_t b = 0; b < d.blocks;) {
      const Tile tile = choose_tile(length, d.blocks - b, d.block_bytes);
      convolve_blocks(w, d, tile_end, group, b, tile.pixels, tile.blocks, begin, lines, length,
                      [&](const uint8_t* x, const uint8_t* weight, const int32_t* start, int32_t* acc) {
                        tile.dot(x, d.taps, weight, d.block_bytes, start, acc);
                      });
      b += tile.blocks;
    }
}

constexpr int64_t kScratchColumns = 256;  // of a depthwise row

inline RowTaps row_taps(const Step& s, const View2d& in) {
  return {s.kernel_y, s.kernel_x, s.dilation_y * in.row, in.pixel, s.stride_x, s.dilation_x};
}

// Whether four kernel rows are multiplied at once.
inline bool by_rows(const Step& s) {
  return has_vnni() && (s.kernel_x - 1) * int64_t(s.dilation_x) + 1 <= kScratchColumns;
}

#if defined(__AVX512F__)
void convolve_depthwise_rows(const Work& w, int64_t begin, int64_t end) {
  const Step& s = w.step;
  const View2d in(w.program.planes[s.x], w.arena);
  TileEnd tile_end(w);
  const RowTaps taps = row_taps(s, in);
  const Depthwise sum_row = depthwise_of(taps);
  const int64_t block_bytes = int64_t(s.kernel_y + 3) / 4 * s.kernel_x * 64, width = s.out_width;
  const int64_t most = std::min({width, kRowTile, (kScratchColumns - taps.columns_of(1)) / s.stride_x + 1});
  const int64_t together = most == width ? kRowTile / width : 1;  // rows
  alignas(64) uint8_t scratch[kScratchColumns * kDepthwiseScratch];
  alignas(64) int32_t acc[kRowTile * kLanes];
  for (int64_t y = begin; y < end; y += together)
    for (int64_t x = 0; x < width; x += most)
      for (int64_t c = 0; c < s.out_channels; c += kLanes) {
        const int64_t rows = std::min(together, end - y), count = std::min(most, width - x);
        const auto* weight = reinterpret_cast<const int8_t*>(&s.packed[c / kLanes * block_bytes]);
        for (int64_t row = 0; row < rows; ++row) {
          const uint8_t* from = in.at((y + row) * s.stride_y - s.pad_y, x * s.stride_x - s.pad_x) + c;
          sum_row(from, taps, weight, &s.start[c], count, acc + row * count * kLanes, scratch);
        }
        finish_tile(w, tile_end, acc, rows * count, 1, y, x, c, s.out_channels - c);
      }
}
#endif

// One input channel for each output channel: lanes are channels, weights 32-bit [position][channels].
void convolve_depthwise(const Work& w, int64_t begin, int64_t end) {
#if defined(__AVX512F__)
  if (by_rows(w.step)) return convolve_depthwise_rows(w, begin, end);
#endif
  const Step& s = w.step;
  const View2d in(w.program.planes[s.x], w.arena), residual = residual_of(w);
  const int32_t* weight = reinterpret_cast<const int32_t*>(s.packed.data());
  const int64_t padded = (s.out_channels + 15) / 16 * 16;
  each_pixel(w, begin, end, s.out_channels, [&](int64_t y, int64_t x, int64_t c) DFQ_INLINE {
    const uint8_t* from = in.at(y * s.stride_y - s.pad_y, x * s.stride_x - s.pad_x) + c;
    VecInt sum, product;
    std::memcpy(&sum, &s.start[c], sizeof sum);
    for (int64_t r = 0, tap = 0; r < s.kernel_y; ++r)
      for (int64_t k = 0; k < s.kernel_x; ++k, ++tap) {
        std::memcpy(&product, weight + tap * padded + c, sizeof product);
        sum += product * load_bytes(from + r * s.dilation_y * in.row + k * s.dilation_x * in.pixel);
      }
    return scaled(s, residual, sum, y, x, c);
  });
}

// Groups whose channels fill no register: one output at a time.
void convolve_any(const Work& w, int64_t begin, int64_t end) {
  const Step& s = w.step;
  const View2d in(w.program.planes[s.x], w.arena), residual = residual_of(w);
  const int64_t inner = in.plane->channels / s.groups, outer = s.out_channels / s.groups;
  const auto one = [&](int64_t y, int64_t x, int64_t k) {
    const int8_t* weight = &s.weight[k * s.kernel_y * s.kernel_x * inner];
    uint32_t total = 0;
    for (int64_t r = 0; r < s.kernel_y; ++r)
      for (int64_t c = 0; c < s.kernel_x; ++c) {
        const uint8_t* from = in.at(y * s.stride_y - s.pad_y + r * s.dilation_y, x * s.stride_x - s.pad_x + c * s.dilation_x);
        from += k / outer * inner;
        for (int64_t n = 0; n < inner; ++n, ++weight)
          total += static_cast<uint32_t>((from[n] - in.plane->stored_zero()) * *weight);
      }
    return static_cast<int32_t>(total);
  };
  each_pixel(w, begin, end, s.out_channels, [&](int64_t y, int64_t x, int64_t c) {
    VecInt sum{};
    for (int64_t i = 0; i < kWidth && c + i < s.out_channels; ++i) sum[i] = one(y, x, c + i);
    return scaled(s, residual, sum, y, x, c);
  });
}

// [block of 16 channels][four kernel rows][kernel column][16][4]
void pack_depthwise_rows(Step& s) {
  const int64_t blocks = (s.out_channels + 15) / 16, fours = (s.kernel_y + 3) / 4;
  s.packed.assign(static_cast<size_t>(blocks * fours * s.kernel_x * 64), 0);
  for (int64_t c = 0; c < s.out_channels; ++c)
    for (int64_t r = 0; r < s.kernel_y; ++r)
      for (int64_t k = 0; k < s.kernel_x; ++k) {
        const int64_t place = ((c / 16 * fours + r / 4) * s.kernel_x + k) * 64 + c % 16 * 4 + r % 4;
        s.packed[place] = static_cast<uint8_t>(s.weight[(c * s.kernel_y + r) * s.kernel_x + k]);
      }
}

void pack_depthwise(Step& s) {
  if (by_rows(s)) return pack_depthwise_rows(s);
  const int64_t padded = (s.out_channels + 15) / 16 * 16, taps = int64_t(s.kernel_y) * s.kernel_x;
  s.packed.assign(static_cast<size_t>(taps * padded * 4), 0);
  for (int64_t c = 0; c < s.out_channels; ++c)
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int32_t value = s.weight[c * taps + tap];
      std::memcpy(&s.packed[(tap * padded + c) * 4], &value, 4);
    }
}

// [block of 16 channels][tap][inner / kGroup][16][kGroup], in 32 bits each
template <class Value, int kGroup>
void pack_dense(const Program& program, Step& s) {
  const Plane& in = program.planes[s.x];
  const int64_t given = in.channels / s.groups, inner = s.groups == 1 ? in.whole_groups() : given;
  const int64_t outer = s.out_channels / s.groups, blocks = (outer + 15) / 16, taps = int64_t(s.kernel_y) * s.kernel_x;
  s.packed.assign(static_cast<size_t>(s.groups * blocks * taps * (inner / kGroup) * kLanes * 4), 0);
  for (int64_t k = 0; k < s.out_channels; ++k) {
    const int64_t block = k / outer * blocks + k % outer / kLanes, lane = k % outer % kLanes;
    const int8_t* from = &s.weight[k * taps * given];
    for (int64_t tap = 0; tap < taps; ++tap, from += given) {
      uint8_t* to = &s.packed[(((block * taps + tap) * (inner / kGroup)) * kLanes + lane) * 4];
      for (int64_t c = 0; c < given; c += kGroup, to += kLanes * 4) {
        Value values[kGroup] = {};
        for (int i = 0; i < kGroup && c + i < given; ++i) values[i] = from[c + i];
        std::memcpy(to, values, 4);
      }
    }
  }
}

// Accumulators start at minus stored_zero * sum of weights: unsigned integers are multiplied as they are stored.
void prepare_convolution(const Program& program, Step& s) {
  const int64_t outer = s.out_channels / s.groups, blocks = (outer + 15) / 16;
  const int64_t per = static_cast<int64_t>(s.weight.size()) / s.out_channels;
  const bool by_channel = depthwise(program, s);
  s.start.assign(static_cast<size_t>(by_channel ? (s.out_channels + 15) / 16 * 16 : s.groups * blocks * kLanes), 0);
  for (int64_t k = 0; k < s.out_channels; ++k) {
    uint32_t sum = 0;
    for (int64_t i = 0; i < per; ++i) sum += static_cast<uint32_t>(int32_t(s.weight[k * per + i]));
    const int64_t place = by_channel ? k : (k / outer * blocks + k % outer / kLanes) * kLanes + k % outer % kLanes;
    s.start[place] = static_cast<int32_t>(0u - sum * static_cast<uint32_t>(program.planes[s.x].stored_zero()));
  }
  if (by_channel) pack_depthwise(s);
  else if (dense(program, s)) has_vnni() ? pack_dense<int8_t, 4>(program, s) : pack_dense<int16_t, 2>(program, s);
}

void convolve(const Work& w, int64_t begin, int64_t end) {
  if (depthwise(w.program, w.step)) return convolve_depthwise(w, begin, end);
  return dense(w.program, w.step) ? convolve_dense(w, begin, end) : convolve_any(w, begin, end);
}

}  // namespace
}  // namespace DFQ_ISA
}  // namespace dfq
