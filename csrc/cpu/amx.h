// Tiles of integer products on AMX: a tile register holds 16 x 16 sums, or 16 pixels of up to 64 bytes, or weights of up to
// 64 input and 16 output channels; one instruction multiplies two of them in 16 cycles, where VNNI takes 128.
//
// A kernel row's taps are neighbours in memory where nothing is dilated or grouped, so that they are one run of bytes: three
// taps of 16 channels are multiplied at once. A run is cut into equal steps of at most 64 bytes, the same for all tiles.
// Weights are packed as for VNNI (dot.h): 16 of their vectors are a tile.
#pragma once
#include <algorithm>

#include "dot.h"

// The assembler knows AMX from binutils 2.35 on, which every GCC 11 has beside it.
#if defined(__AVX512F__) && (defined(DFQ_AMX_EMULATED) || (defined(__linux__) && (__GNUC__ >= 11 || defined(__clang__))))
#define DFQ_AMX
#endif

#ifdef DFQ_AMX
#ifdef DFQ_AMX_EMULATED
#include <amx_emulated.h>  // of the tests
#else
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dfq {
namespace DFQ_ISA {

// What `ldtilecfg` reads.
struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64, "the processor's layout");

#ifndef DFQ_AMX_EMULATED
static inline void set_tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
static inline void release_tiles() { asm volatile("tilerelease"); }
template <int kTile>
static inline void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
static inline void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
// sums += pixels (unsigned bytes) * weights (signed bytes)
template <int kSums, int kPixels, int kWeights>
static inline void multiply_tiles() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kPixels), "i"(kWeights));
}

// Whether the processor has it and the system lets this process use it.
static inline bool ask_for_amx() {
  const char* limit = std::getenv("DFQ_CPU");  // as in select.cpp
  if (limit && std::strcmp("v4_vnni_amx", limit) > 0) return false;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 24 & 3) != 3) return false;  // tiles, and int8 products of them
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
static inline bool ask_for_amx() { return true; }
#endif

static inline bool has_amx() {
  static const bool there = has_vnni() && ask_for_amx();  // the packing of weights is VNNI's
  return there;
}

// How a convolution's tiles read: `pixels` of a tile, `runs` of `run_bytes` in a kernel row, in steps of `step` bytes.
struct TileTaps {
  int32_t groups = 0, blocks = 0;  // of pixels and of 16 output channels, multiplied side by side
  int32_t pixels = 0, runs = 0, run_bytes = 0, step = 0;

  // False where AMX does not pay: rows or steps too short to fill a tile.
  bool choose(const Taps& taps, int64_t width, int64_t channel_blocks) {
    const int32_t inner = taps.groups * 4;
    const bool joined = taps.column_bytes == inner;
    runs = joined ? 1 : taps.columns;
    run_bytes = joined ? taps.columns * inner : inner;
    for (step = run_bytes < 64 ? run_bytes : 64; run_bytes % step != 0;) step -= 4;
    if (width < 8 || (step < 16 && step < run_bytes)) return false;
    const int64_t tiles = (width + 31) / 32, each = (width + tiles - 1) / tiles;
    groups = each > 16 ? 2 : 1;
    pixels = static_cast<int32_t>(std::min((each + groups - 1) / groups, width / groups));  // a tile is never wider than all
    blocks = channel_blocks > 1 ? 2 : 1;
    return true;
  }

  // The registers: four of sums, two of pixels, two of weights.
  void set() const {
    TileShapes shapes;
    const auto shape = [&](int tile, int32_t rows, int32_t bytes) {
      shapes.rows[tile] = static_cast<uint8_t>(rows), shapes.row_bytes[tile] = static_cast<uint16_t>(bytes);
    };
    for (int tile = 0; tile < 4; ++tile) shape(tile, pixels, 64);
    for (int tile = 4; tile < 6; ++tile) shape(tile, pixels, step);
    for (int tile = 6; tile < 8; ++tile) shape(tile, step / 4, 64);
    set_tiles(shapes);
  }
};

// acc: [groups * pixels][blocks][16], as of dot4
template <int kGroups, int kBlocks>
static void dot_tiles(const uint8_t* x, const Taps& taps, const TileTaps& tiles, const uint8_t* weight, int64_t block_bytes,
                      const int32_t* start, int32_t* acc) {
  const int64_t beside = tiles.pixels * taps.pixel_bytes, acc_bytes = kBlocks * 64;
  load_tile<0>(start, 0);  // every pixel from the same sums
  if constexpr (kBlocks == 2) load_tile<1>(start + kLanes, 0);
  if constexpr (kGroups == 2) {
    load_tile<2>(start, 0);
    if constexpr (kBlocks == 2) load_tile<3>(start + kLanes, 0);
  }
  for (int r = 0; r < taps.rows; ++r)
    for (int run = 0; run < tiles.runs; ++run) {
      const uint8_t* from = x + r * taps.row_bytes + run * taps.column_bytes;
      for (int32_t k = 0; k < tiles.run_bytes; k += tiles.step, weight += tiles.step * 16) {
        load_tile<6>(weight, 64);
        load_tile<4>(from + k, taps.pixel_bytes);
        multiply_tiles<0, 4, 6>();
        if constexpr (kBlocks == 2) {
          load_tile<7>(weight + block_bytes, 64);
          multiply_tiles<1, 4, 7>();
        }
        if constexpr (kGroups == 2) {
          load_tile<5>(from + k + beside, taps.pixel_bytes);
          multiply_tiles<2, 5, 6>();
          if constexpr (kBlocks == 2) multiply_tiles<3, 5, 7>();
        }
      }
    }
  store_tile<0>(acc, acc_bytes);
  if constexpr (kBlocks == 2) store_tile<1>(acc + kLanes, acc_bytes);
  if constexpr (kGroups == 2) {
    int32_t* const second = acc + int64_t(tiles.pixels) * kBlocks * kLanes;
    store_tile<2>(second, acc_bytes);
    if constexpr (kBlocks == 2) store_tile<3>(second + kLanes, acc_bytes);
  }
}

}  // namespace DFQ_ISA
}  // namespace dfq
#endif
