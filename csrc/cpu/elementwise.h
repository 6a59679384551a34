// The driver of kernels that touch every element once: blocks of memory order, each with its channel's constants.
#pragma once
#include <vector>

#include "../common/parallel.h"
#include "storage.h"

namespace dfq {
namespace DFQ_ISA {

constexpr int64_t kGrain = 32768;  // elements for which a second thread pays

// K constants per channel. In rows that vectors divide they are the same for a whole loop; a pattern of short rows is
// written out once, so that the constants of neighbours are neighbours; else they are written out block by block.
template <int K>
class ChannelConstants {
 public:
  ChannelConstants(const View& view, const float* const (&values)[K]) : view_(view) {
    for (int k = 0; k < K; ++k) values_[k] = values[k];
    uniform_ = view.channels == 1 || view.inner % kWidth == 0;
    if (uniform_ || view.inner >= 32) return;
    period_ = view.channels * view.inner;
    table_.resize(static_cast<size_t>(K * (period_ + kBlock)));
    for (int k = 0; k < K; ++k) spread(k, 0, period_ + kBlock, table_.data() + k * (period_ + kBlock));
  }

  // Calls step(constants, begin, end) for parts of the block [start, start + n); begin and end are multiples of kWidth,
  // the last end the next multiple behind n. constants.template get<k>(j): the k-th constant of elements j, j + 1, ...
  template <class Step>
  void block(int64_t start, int64_t n, const Step& step) const {
    const int64_t padded = (n + kWidth - 1) / kWidth * kWidth;
    if (uniform_) {
      for (int64_t begin = 0; begin < n;) {
        const int64_t row = view_.channels == 1 ? 0 : (start + begin) / view_.inner;
        const int64_t row_end = view_.channels == 1 ? padded : (row + 1) * view_.inner - start;
        const int64_t end = row_end < padded ? row_end : padded;
        Uniform constants;
        for (int k = 0; k < K; ++k) constants.value[k] = broadcast(values_[k][row % view_.channels]);
        step(constants, begin, end);
        begin = end;
      }
      return;
    }
    Pattern constants;
    alignas(64) float scratch[K][kBlock];
    for (int k = 0; k < K; ++k) {
      if (period_ > 0) {
        constants.at[k] = table_.data() + k * (period_ + kBlock) + start % period_;
      } else {
        spread(k, start, padded, scratch[k]);
        constants.at[k] = scratch[k];
      }
    }
    step(constants, int64_t(0), padded);
  }

 private:
  struct Uniform {
    Vec value[K];
    template <int k>
    Vec get(int64_t) const { return value[k]; }
  };
  struct Pattern {
    const float* at[K];
    template <int k>
    Vec get(int64_t j) const { return load_vec(at[k] + j); }
  };

  // The k-th constant of the elements [start, start + n).
  void spread(int k, int64_t start, int64_t n, float* to) const {
    int64_t row = start / view_.inner, left = view_.inner - start % view_.inner;
    for (int64_t i = 0; i < n; ++row, left = view_.inner) {
      const float value = values_[k][row % view_.channels];
      const int64_t end = i + left < n ? i + left : n;
      for (; i < end; ++i) to[i] = value;
    }
  }

  View view_;
  const float* values_[K];
  bool uniform_;
  int64_t period_ = 0;
  std::vector<float> table_;
};

// Stores the bits of elements [begin, end) of the block at `start`, which `bits(j)` gives for j, j + 1, ... a vector each:
// 64 at a time, because a store of one or two bytes per vector is slower than the arithmetic.
template <class Bits>
static inline void store_mask(uint8_t* mask, int64_t start, int64_t begin, int64_t end, const Bits& bits) {
  int64_t j = begin;
  for (; j + 64 <= end; j += 64) {
    uint64_t word = 0;
#pragma GCC unroll 8
    for (int i = 0; i < 64; i += kWidth) word |= static_cast<uint64_t>(bits(j + i)) << i;
    std::memcpy(mask + (start + j) / 8, &word, 8);
  }
  for (; j < end; j += kWidth) store_bits(mask, start + j, bits(j));
}

// No bits behind the last element of a mask, which has whole pairs of bytes: short vectors do not write the second.
static inline void clear_behind(uint8_t* mask, int64_t size) {
  if (size % 16 == 0) return;
  uint16_t word;
  std::memcpy(&word, mask + size / 16 * 2, 2);
  word &= static_cast<uint16_t>((1u << size % 16) - 1);
  std::memcpy(mask + size / 16 * 2, &word, 2);
}

// Calls body(start, n) for every block of the tensor, in memory order: what prefetchers follow, even where a pass before
// this one has left the tensor's end in the cache. `past`: results are written past the caches.
template <class Body>
static void for_blocks(int64_t size, int threads, bool past, const Body& body) {
  const int64_t blocks = (size + kBlock - 1) / kBlock, step = past ? kBlockPastCaches : kBlock;
  parallel_for(blocks, kGrain / kBlock, threads, [&](int64_t begin, int64_t end) {
    const int64_t last = end * kBlock < size ? end * kBlock : size;
    for (int64_t start = begin * kBlock; start < last; start += step) body(start, last - start < step ? last - start : step);
    if (past) written_past_caches();
  });
}

}  // namespace DFQ_ISA
}  // namespace dfq
