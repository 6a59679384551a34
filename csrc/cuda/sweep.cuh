// The drivers: how threads walk over a tensor whose channels have constants, and how they sum over channels.
//
// rows     a block per (channel, slice), where a channel's elements are rows in memory (NCHW) or the tensor has one
//          channel; a thread takes eight neighbours at a time
// columns  channels-last: a thread keeps a few neighbouring channels and walks down the elements
// flat     eight neighbours in memory whatever their channels; for bits that neighbours share
//
// The partition depends on the tensor and its alignment alone, every part has a place of its own and they are joined in
// order: the same bits at every call. Nothing is allocated and nothing waits: all of it can be captured in a CUDA graph.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "arithmetic.cuh"
#include "kernels.h"

#ifndef DFQ_DYNAMIC_SHARED  // the emulator has another
#define DFQ_DYNAMIC_SHARED(name) extern __shared__ uint32_t name[]
#endif

namespace dfq {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kGroup = 8;           // neighbours of a thread
constexpr int64_t kBlocks = 1056;   // wanted: 8 on each of 132 multiprocessors
constexpr int kRows = 4;            // columns: elements of a channel that are looked at together
constexpr int64_t kFew = 264;       // of fewer blocks each has less to do, so that no multiprocessor waits
constexpr int64_t kPartsAt = 16;    // bytes of the workspace before the parts: how many blocks of a join are done

struct Layout {
  int64_t size, channels, inner, outer;  // element (n, c, i) lies at (n * channels + c) * inner + i
  int64_t groups;                        // rows: of kGroup neighbours of a channel; columns: elements of a channel
  int slices, tiles;                     // columns: tiles of channels
  int across;                            // columns: threads side by side
  bool columns;
};

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// `lanes`: channels of a thread where they are columns.
inline Layout layout_of(const View& view, int lanes) {
  Layout l{view.size, view.channels, view.inner, view.size / (view.channels * view.inner), 0, 1, 1, 1,
           view.inner == 1 && view.channels > 1};
  if (!l.columns) {
    l.groups = ceil_div(l.outer * l.inner, kGroup);
    const int64_t useful = ceil_div(l.groups, 2 * kThreads);
    l.slices = static_cast<int>(at_most(ceil_div(kBlocks, l.channels), useful));
  } else {
    l.groups = l.outer;
    const int64_t wide = ceil_div(l.channels, lanes);
    while (l.across < wide && l.across < 64) l.across *= 2;
    l.tiles = static_cast<int>(ceil_div(wide, l.across));
    int64_t useful = 0;
    for (int each = 8; each >= 2 && useful * l.tiles < kFew; each /= 2)  // elements that a thread walks over
      useful = ceil_div(l.groups, each * (kThreads / l.across));
    l.slices = static_cast<int>(at_most(ceil_div(kBlocks / 2, l.tiles), useful));
  }
  if (l.groups >= int64_t(1) << 32 || l.slices * l.channels >= int64_t(1) << 31)
    throw std::runtime_error("a channel must have fewer than 2^32 elements on a GPU");
  return l;
}

// --- loads and stores of N neighbours -------------------------------------------------------------------------------

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T value[N];
};

template <class T, int N>
__device__ inline void load(const T* from, float (&to)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
  for (int i = 0; i < N; ++i) to[i] = widen(pack.value[i]);
}
template <class T, int N>
__device__ inline void store(T* to, const float (&from)[N]) {
  Pack<T, N> pack;
  for (int i = 0; i < N; ++i) pack.value[i] = narrow<T>(from[i]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// An operator has: inputs T* in[kInputs]; T* out if kWrites; Constants constants(channel, layout); and
// each(constants, part, float in[kInputs][N], n, float out[N]), whose n elements are of one channel.
template <class T, int kInputs_, bool kWrites_, class Part_>
struct Operator {
  using Type = T;
  using Part = Part_;
  static constexpr int kInputs = kInputs_;
  static constexpr bool kWrites = kWrites_;
  const T* in[kInputs_];
  T* out;
};

template <class Op>
constexpr bool kGathers = sizeof(typename Op::Part) >= 4;

template <class Op>
constexpr bool kOnlyLooks = kGathers<Op> && !Op::kWrites && Op::kInputs == 1;

// Where the element of position p of a channel lies.
__device__ inline int64_t place(const Layout& l, uint32_t c, int64_t p) {
  const int64_t n = p / l.inner;
  return (n * l.channels + c) * l.inner + (p - n * l.inner);
}

template <class Op, bool kWhole>
__device__ inline void row_group(const Op& op, const Layout& l, uint32_t c, const typename Op::Constants& k,
                                 typename Op::Part& part, uint32_t group) {
  const int64_t p = static_cast<int64_t>(group) * kGroup;
  float in[Op::kInputs][kGroup], out[kGroup];
  if (kWhole) {  // rows are multiples of kGroup, and so are their addresses
    const uint32_t per_row = static_cast<uint32_t>(l.inner / kGroup);
    const uint32_t n = group / per_row;
    const int64_t at = (static_cast<int64_t>(n) * l.channels + c) * l.inner + (group - n * per_row) * kGroup;
    for (int i = 0; i < Op::kInputs; ++i) load(op.in[i] + at, in[i]);
    op.each(k, part, in, kGroup, out);
    if (Op::kWrites) store(op.out + at, out);
    return;
  }
  const int64_t left = l.outer * l.inner - p;
  const int count = left < kGroup ? static_cast<int>(left) : kGroup;
  int64_t at[kGroup];
  for (int e = 0; e < kGroup; ++e) at[e] = place(l, c, e < count ? p + e : p);
  for (int i = 0; i < Op::kInputs; ++i)
    for (int e = 0; e < kGroup; ++e) in[i][e] = widen(op.in[i][at[e]]);
  op.each(k, part, in, count, out);
  if (Op::kWrites)
    for (int e = 0; e < kGroup; ++e)
      if (e < count) op.out[at[e]] = narrow<typename Op::Type>(out[e]);
}

// The part of the lane `distance` above.
template <class Part>
__device__ inline Part shuffled(const Part& part, int distance) {
  uint32_t words[sizeof(Part) / 4];
  memcpy(words, &part, sizeof(Part));
  for (uint32_t& word : words) word = __shfl_down_sync(~0u, word, distance);
  Part other;
  memcpy(&other, words, sizeof(Part));
  return other;
}

// The parts `[slices][channels]` in the workspace.
template <class Part>
__host__ __device__ inline Part* parts_in(void* workspace) {
  return reinterpret_cast<Part*>(static_cast<char*>(workspace) + kPartsAt);
}

// grid (slices * channels); the workspace is not used where nothing is gathered
template <class Op, bool kWhole>
__global__ void __launch_bounds__(kThreads) rows(const Op op, const Layout l, void* workspace) {
  const uint32_t channels = static_cast<uint32_t>(l.channels);
  const uint32_t slice = blockIdx.x / channels, c = blockIdx.x - slice * channels;
  const uint32_t from = static_cast<uint32_t>(l.groups * slice / l.slices);
  const uint32_t to = static_cast<uint32_t>(l.groups * (slice + 1) / l.slices);
  const typename Op::Constants k = op.constants(c, l);
  typename Op::Part part;
  for (uint32_t g = from + threadIdx.x; g < to; g += kThreads) row_group<Op, kWhole>(op, l, c, k, part, g);
  if constexpr (kGathers<Op>) {
    for (int distance = 16; distance > 0; distance /= 2) part.merge(shuffled(part, distance));
    __shared__ typename Op::Part warps[kThreads / 32];
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = part;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int w = 1; w < kThreads / 32; ++w) part.merge(warps[w]);
    parts_in<typename Op::Part>(workspace)[blockIdx.x] = part;
    if (blockIdx.x == 0) *static_cast<unsigned*>(workspace) = 0;
  }
}

// grid (slices, tiles), block (across, kThreads / across); a thread has kLanes neighbouring channels
template <class Op, int kLanes, bool kWhole>
__global__ void __launch_bounds__(kThreads) columns(const Op op, const Layout l, void* workspace) {
  using Part = typename Op::Part;
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kLanes;
  const uint32_t from = static_cast<uint32_t>(l.groups * blockIdx.x / l.slices);
  const uint32_t to = static_cast<uint32_t>(l.groups * (blockIdx.x + 1) / l.slices);
  const bool here = c < l.channels;
  const int lanes = !here ? 0 : l.channels - c < kLanes ? static_cast<int>(l.channels - c) : kLanes;
  typename Op::Constants k[kLanes];
  Part part[kLanes];
  for (int lane = 0; lane < kLanes; ++lane)
    if (lane < lanes) k[lane] = op.constants(c + lane, l);
  uint32_t row = from + threadIdx.y;
  if constexpr (kWhole && kOnlyLooks<Op>) {  // several rows at once: loads in flight, and one division for all of them
    for (; row + (kRows - 1) * blockDim.y < to && here; row += kRows * blockDim.y) {
      float in[kRows][kLanes];
      for (int r = 0; r < kRows; ++r) load(op.in[0] + static_cast<int64_t>(row + r * blockDim.y) * l.channels + c, in[r]);
      for (int lane = 0; lane < kLanes; ++lane) {
        float some[1][kRows], nothing[kRows];
        for (int r = 0; r < kRows; ++r) some[0][r] = in[r][lane];
        op.each(k[lane], part[lane], some, kRows, nothing);
      }
    }
  }
  for (; row < to && here; row += blockDim.y) {
    const int64_t at = static_cast<int64_t>(row) * l.channels + c;
    float in[Op::kInputs][kLanes], out[kLanes];
    for (int i = 0; i < Op::kInputs; ++i) {
      if (kWhole) load(op.in[i] + at, in[i]);
      else
        for (int lane = 0; lane < kLanes; ++lane) in[i][lane] = widen(op.in[i][at + (lane < lanes ? lane : 0)]);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      float one[Op::kInputs][1], result[1];
      for (int i = 0; i < Op::kInputs; ++i) one[i][0] = in[i][lane];
      if (kWhole || lane < lanes) op.each(k[lane], part[lane], one, 1, result);
      if (Op::kWrites) out[lane] = result[0];
    }
    if (Op::kWrites && kWhole) store(op.out + at, out);
    if (Op::kWrites && !kWhole)
      for (int lane = 0; lane < kLanes; ++lane)
        if (lane < lanes) op.out[at + lane] = narrow<typename Op::Type>(out[lane]);
  }
  if constexpr (kGathers<Op>) {
    DFQ_DYNAMIC_SHARED(memory);
    Part* shared = reinterpret_cast<Part*>(memory);
    for (int lane = 0; lane < kLanes; ++lane)
      shared[(threadIdx.y * kLanes + lane) * blockDim.x + threadIdx.x] = part[lane];
    __syncthreads();
    if (threadIdx.y != 0) return;
    if (blockIdx.x == 0 && c == 0) *static_cast<unsigned*>(workspace) = 0;
    for (int lane = 0; lane < lanes; ++lane) {
      Part sum = shared[lane * blockDim.x + threadIdx.x];
      for (unsigned y = 1; y < blockDim.y; ++y) sum.merge(shared[(y * kLanes + lane) * blockDim.x + threadIdx.x]);
      parts_in<Part>(workspace)[blockIdx.x * l.channels + c + lane] = sum;
    }
  }
}

// --- hosts ----------------------------------------------------------------------------------------------------------

// Makes the queue's device the current one while kernels are launched.
class Launch {
 public:
  explicit Launch(const Queue& queue) : stream(static_cast<cudaStream_t>(queue.stream)), workspace(queue.workspace) {
    cudaGetDevice(&before_);
    device_ = queue.device;
    if (device_ != before_) cudaSetDevice(device_);
  }
  ~Launch() {
    if (device_ != before_) cudaSetDevice(before_);
  }
  Launch(const Launch&) = delete;

  const cudaStream_t stream;
  void* const workspace;

 private:
  int before_ = 0, device_ = 0;
};

template <class... Parameters, class... Arguments>
void run(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, const Launch& launch,
         const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared, config.stream = launch.stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("a CUDA kernel cannot be launched: ") + cudaGetErrorString(error));
}

inline bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

template <class Op>
bool aligned_operands(const Op& op) {
  bool ok = !Op::kWrites || aligned(op.out);
  for (int i = 0; i < Op::kInputs; ++i) ok = ok && aligned(op.in[i]);
  return ok;
}

// 16 bytes for a thread where it keeps sums of channels, and at least 16 where it does not.
template <class Op>
constexpr int lanes_of() { return kGathers<Op> ? 16 / sizeof(typename Op::Type) : 8; }

// Walks over the tensor; what is gathered lies in the workspace, [slices][channels].
template <class Op>
Layout sweep(const Op& op, const View& view, const Launch& launch) {
  using Part = typename Op::Part;
  constexpr int kLanes = lanes_of<Op>(), kOther = kGathers<Op> ? 4 : kLanes;  // what is not whole needs registers
  const bool fits = view.channels % kLanes == 0 && aligned_operands(op);
  const Layout l = layout_of(view, fits ? kLanes : kOther);
  void* const room = launch.workspace;
  if (!l.columns) {
    const unsigned grid = static_cast<unsigned>(l.slices * l.channels);
    const bool whole = l.inner % kGroup == 0 && aligned_operands(op);
    if (whole) run(rows<Op, true>, grid, kThreads, 0, launch, op, l, room);
    else run(rows<Op, false>, grid, kThreads, 0, launch, op, l, room);
  } else {
    const dim3 grid(l.slices, l.tiles), block(l.across, kThreads / l.across);
    const size_t shared = kGathers<Op> ? sizeof(Part) * kThreads * (fits ? kLanes : kOther) : 0;
    if (fits) run(columns<Op, kLanes, true>, grid, block, shared, launch, op, l, room);
    else run(columns<Op, kOther, false>, grid, block, shared, launch, op, l, room);
  }
  return l;
}

// The channel's total, by one warp: valid in its first lane.
template <class Part>
__device__ inline typename Part::Wide total_of(const Part* parts, int slices, int64_t channels, int64_t c) {
  typename Part::Wide total;
  for (int s = threadIdx.x % 32; s < slices; s += 32) total.absorb(parts[s * channels + c]);
  for (int distance = 16; distance > 0; distance /= 2) total.merge(shuffled(total, distance));
  return total;
}

// The sum of all lanes' values, in all lanes.
__device__ inline double warp_sum(double value) {
  Sums<1>::Wide sum{{value}};
  for (int distance = 16; distance > 0; distance /= 2) sum.merge(shuffled(sum, distance));
  uint32_t words[2];
  memcpy(words, &sum, sizeof(words));
  for (uint32_t& word : words) word = __shfl_sync(~0u, word, 0);
  memcpy(&sum, words, sizeof(words));
  return sum.value[0];
}

// The channel's moments, by one warp, in all lanes: the parts are read twice, and one division is enough.
template <class Part>
__device__ inline Moments::Wide moments_of(const Part* parts, int slices, int64_t channels, int64_t c) {
  double count = 0, sum = 0, squares = 0;
  for (int s = threadIdx.x % 32; s < slices; s += 32) {
    const Moments& part = parts[s * channels + c].moments();
    count += part.count;
    sum += static_cast<double>(part.count) * part.mean;
  }
  count = warp_sum(count);
  const double mean = warp_sum(sum) / count;
  for (int s = threadIdx.x % 32; s < slices; s += 32) {
    const Moments& part = parts[s * channels + c].moments();
    const double distance = part.mean - mean;
    squares += part.squares + part.count * distance * distance;
  }
  return {count, mean, warp_sum(squares)};
}

// Whether this block is the last of its grid to get here: then it sees what all the others have written, if it reads
// past the first-level cache (`__ldcg`). Every thread of the block calls it.
__device__ inline bool is_last_block(void* workspace) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(static_cast<unsigned*>(workspace), 1) == gridDim.x - 1;
  __syncthreads();
  return last;
}

template <class Call>
void with_type(int dtype, const Call& call) {
  if (dtype == kFloat32) call(float());
  else if (dtype == kBFloat16) call(__nv_bfloat16());
  else if (dtype == kFloat16) call(__half());
  else throw std::invalid_argument("no such dtype");
}

}  // namespace cuda
}  // namespace dfq
