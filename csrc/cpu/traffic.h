// How kernels help memory.
//
// Large results are written past the caches. An ordinary store reads the line that it is about to overwrite: a third of a
// copy's traffic. Whoever reads a small result next finds it in a second-level cache, which is worth more than that; of a
// large one hardly anything is left there (docs/LOG.md has both measurements).
//
// Passes over a tensor ask for a page ahead: prefetchers stop at its end. Measured on Intel, and done there alone.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace dfq {
namespace DFQ_ISA {

constexpr int64_t kLargeResult = 4 << 20;  // bytes written by each thread: twice a second-level cache of 2 MB

// Whether a result of so many bytes, which so many threads share, is written past the caches.
static inline bool past_caches(int64_t bytes, int threads) {
#if defined(__SSE2__)
  return bytes >= kLargeResult * (threads > 1 ? threads : 1);
#else
  return static_cast<void>(bytes), static_cast<void>(threads), false;
#endif
}

// memcpy past the caches, whole lines of it. `written_past_caches` before anybody else reads.
static inline void copy_past_caches(void* to, const void* from, int64_t bytes) {
#if defined(__SSE2__)
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  int64_t head = -reinterpret_cast<intptr_t>(out) & 63;
  if (head > bytes) head = bytes;
  std::memcpy(out, in, head);
  const char* const last = in + head + ((bytes - head) & ~int64_t(63));
  for (in += head, out += head; in < last; in += 64, out += 64) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), _mm512_loadu_si512(in));
#elif defined(__AVX2__)
    for (int i = 0; i < 64; i += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i)));
#else
    for (int i = 0; i < 64; i += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i)));
#endif
  }
  std::memcpy(out, in, (bytes - head) & 63);
#else
  std::memcpy(to, from, bytes);
#endif
}

static inline void written_past_caches() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

constexpr int64_t kAhead = 4096;  // bytes

static inline bool reads_ahead() {
#if defined(__x86_64__)
  static const bool intel = __builtin_cpu_is("intel");
  return intel;
#else
  return false;
#endif
}

}  // namespace DFQ_ISA
}  // namespace dfq
