// The tile instructions of csrc/cpu/amx.h in plain C++, with the processor's rules: for machines without them.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx {

struct Registers {
  int rows[8], bytes[8];
  uint8_t data[8][16][64];
};
static thread_local Registers registers;

static inline void rule(bool kept, const char* text) {
  if (kept) return;
  std::fprintf(stderr, "AMX: %s\n", text);
  std::abort();
}

}  // namespace amx

template <class Shapes>
static inline void set_tiles(const Shapes& shapes) {
  amx::rule(shapes.palette == 1 && shapes.start_row == 0, "the palette is 1");
  for (int tile = 0; tile < 8; ++tile) {
    amx::rule(shapes.rows[tile] <= 16 && shapes.row_bytes[tile] <= 64, "16 rows of 64 bytes");
    amx::registers.rows[tile] = shapes.rows[tile], amx::registers.bytes[tile] = shapes.row_bytes[tile];
  }
  std::memset(amx::registers.data, 0, sizeof amx::registers.data);
}
static inline void release_tiles() { std::memset(&amx::registers, 0, sizeof amx::registers); }

template <int kTile>
static inline void load_tile(const void* from, int64_t stride) {
  amx::rule(amx::registers.rows[kTile] > 0, "tiles are set before they are loaded");
  std::memset(amx::registers.data[kTile], 0, sizeof amx::registers.data[kTile]);
  for (int row = 0; row < amx::registers.rows[kTile]; ++row)
    std::memcpy(amx::registers.data[kTile][row], static_cast<const uint8_t*>(from) + row * stride, amx::registers.bytes[kTile]);
}
template <int kTile>
static inline void store_tile(void* to, int64_t stride) {
  for (int row = 0; row < amx::registers.rows[kTile]; ++row)
    std::memcpy(static_cast<uint8_t*>(to) + row * stride, amx::registers.data[kTile][row], amx::registers.bytes[kTile]);
}

template <int kSums, int kPixels, int kWeights>
static inline void multiply_tiles() {
  amx::Registers& r = amx::registers;
  amx::rule(r.rows[kSums] == r.rows[kPixels] && r.bytes[kSums] == r.bytes[kWeights] && r.bytes[kPixels] % 4 == 0 &&
                r.bytes[kPixels] / 4 == r.rows[kWeights],
            "shapes of a product fit");
  for (int m = 0; m < r.rows[kSums]; ++m)
    for (int n = 0; n < r.bytes[kSums] / 4; ++n) {
      uint32_t sum;  // wraps around
      std::memcpy(&sum, &r.data[kSums][m][4 * n], 4);
      for (int k = 0; k < r.bytes[kPixels]; ++k)
        sum += static_cast<uint32_t>(r.data[kPixels][m][k] * static_cast<int8_t>(r.data[kWeights][k / 4][4 * n + k % 4]));
      std::memcpy(&r.data[kSums][m][4 * n], &sum, 4);
    }
}
