// The depthwise 7x7 convolution of a ConvNeXt block on bfloat16 features with channels last, and the
// sums that the normalisation after it needs.
//
// A block of threads computes a tile of pixels for 32 channels. Its input, with a border of three
// pixels, lies in shared memory; a thread keeps the 49 weights of two channels in registers and
// computes 4x4 pixels at a time, so that a value read serves up to 28 products. Instructions are what
// bounds this kernel, not memory, so both channels are multiplied by one: in float16, which keeps
// eight times as much of a product as bfloat16 does. Nothing overflows, because the absolute weights
// of a channel add up to no more than 1; they are scaled back in float32.
//
// CHANNELS, a multiple of 8, is defined by whoever compiles this: most addresses are then constants.

#include "bfloat16.cuh"

constexpr int kTaps = 7, kBorder = 3;
constexpr int kFlushAfter = 3;                // the tap whose row ends the first sum in float16
constexpr int kPatch = 4;                     // rows and columns that a thread computes at a time
constexpr int kInput = kPatch + kTaps - 1;    // rows and columns that these depend on
constexpr int kPairs = 16;                    // lanes across the channels, two each
constexpr int kChannels = 2 * kPairs;
constexpr int kThreads = 128;
constexpr int kPatches = kThreads / kPairs;   // computed at a time by the block
constexpr int kTileRows = 16;
constexpr int kAllChannels = CHANNELS;
constexpr int kChannelGroups = (kAllChannels + kChannels - 1) / kChannels;

// Values beyond what float16 can hold become the largest that it can; NaN stays.
__device__ __forceinline__ u32 to_float16(u32 bfloat16_pair) {
  constexpr u32 kMost = 0x7bff7bffu, kLeast = 0xfbfffbffu;
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;"
      : "=r"(pair)
      : "f"(high(bfloat16_pair)), "f"(low(bfloat16_pair)));
  asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(kMost));
  asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(kLeast));
  return pair;
}

__device__ __forceinline__ float2 to_floats(u32 float16_pair) {
  float2 values;
  asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
      : "=f"(values.x), "=f"(values.y)
      : "r"(float16_pair));
  return values;
}

__device__ __forceinline__ void multiply_add(u32& sum, u32 a, u32 b) {
  asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
}

// Where a pixel of a row lies. The two halves of a warp work on patches four columns apart; swapping
// neighbours in every other four columns lets them read different banks.
__device__ __forceinline__ int place(int column) { return column ^ ((column >> 2) & 1); }

// Adds up each of 32 values over the 16 lanes of half a warp. Lane l is left with the sums of values
// 16 * (l >> 3) + 2 * (l & 7) and the next.
template <int kKept = 16>
__device__ __forceinline__ void sum_over_lanes(float (&value)[32]) {
  constexpr int kStep = kKept / 2;
  const bool upper = threadIdx.x & kStep;
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const float given = upper ? value[i] : value[i + kKept];
    const float own = upper ? value[i + kKept] : value[i];
    value[i] = own + __shfl_xor_sync(0xffffffffu, given, kStep);
  }
  if constexpr (kStep > 1) sum_over_lanes<kStep>(value);
}

// x, out: (N, H, W, C) bfloat16; weight: (49, C) float16; scale, bias: (C) float32; sums: (C / 32
// rounded up, 2, N * H * W) float32. Grid: tiles times groups of channels; panels.
template <int kTileColumns>
__device__ __forceinline__ void convolve(const u16* __restrict__ x, const u16* __restrict__ weight,
                                         const float* __restrict__ scale,
                                         const float* __restrict__ bias, u16* __restrict__ out,
                                         float* __restrict__ sums, int height, int width) {
  constexpr int kRows = kTileRows + kTaps - 1, kColumns = kTileColumns + kTaps - 1;
  static_assert(kColumns % 2 == 0, "place() swaps neighbours");
  extern __shared__ __align__(16) u32 tile[];  // [kRows][kColumns][kPairs]

  const int tiles_across = (width + kTileColumns - 1) / kTileColumns;
  // Groups of channels of one tile follow each other: together they read whole rows of memory.
  const int group = blockIdx.x % kChannelGroups;
  const int tile_index = blockIdx.x / kChannelGroups;
  const int first_row = tile_index / tiles_across * kTileRows;
  const int first_column = tile_index % tiles_across * kTileColumns;
  const int first_channel = group * kChannels;
  const i64 panel = blockIdx.y;
  const i64 panel_pixels = (i64)height * width;
  x += panel * panel_pixels * kAllChannels;

  const int pair = threadIdx.x % kPairs;
  const int channel = first_channel + 2 * pair;
  const bool is_channel = kAllChannels % kChannels == 0 || channel < kAllChannels;
  u32 w[kTaps * kTaps];
#pragma unroll
  for (int tap = 0; tap < kTaps * kTaps; ++tap) {
    w[tap] = is_channel ? *(const u32*)(weight + tap * kAllChannels + channel) : 0;
  }
  const float2 factor = is_channel ? *(const float2*)(scale + channel) : make_float2(0, 0);
  const float2 b = is_channel ? *(const float2*)(bias + channel) : make_float2(0, 0);

  // Four threads read 32 channels of a pixel, the others the next pixels of its row.
  const int part = threadIdx.x % 4;
  const bool is_part = first_channel + 8 * part < kAllChannels;
#pragma unroll 1
  for (int row = threadIdx.x / 32; row < kRows; row += kThreads / 32) {
    const int y = first_row + row - kBorder;
    const u16* from = x + ((i64)y * width + first_column - kBorder) * kAllChannels + first_channel;
    constexpr int kSteps = (kColumns + 7) / 8;
    uint4 values[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int column = 8 * step + threadIdx.x % 32 / 4;
      const int at = first_column + column - kBorder;
      const bool inside =
          column < kColumns && y >= 0 && y < height && at >= 0 && at < width && is_part;
      values[step] = inside ? *(const uint4*)(from + column * kAllChannels + 8 * part)
                            : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int column = 8 * step + threadIdx.x % 32 / 4;
      if (kColumns % 8 != 0 && column >= kColumns) break;
      const uint4 v = values[step];
      *(uint4*)(tile + (row * kColumns + place(column)) * kPairs + 4 * part) =
          make_uint4(to_float16(v.x), to_float16(v.y), to_float16(v.z), to_float16(v.w));
    }
  }
  __syncthreads();

  out += panel * panel_pixels * kAllChannels + channel;
  sums += ((i64)group * 2 + (pair >> 3)) * gridDim.y * panel_pixels + panel * panel_pixels;
  constexpr int kAcross = kTileColumns / kPatch;
#pragma unroll 1
  for (int patch = threadIdx.x / kPairs; patch < kAcross * (kTileRows / kPatch); patch += kPatches) {
    const int row = patch / kAcross * kPatch, column = patch % kAcross * kPatch;
    // The rows of taps are added up in two sums of float16, and these in float32.
    u32 sum[kPatch][kPatch];
    float2 first_sum[kPatch][kPatch];
#pragma unroll
    for (int i = 0; i < kPatch * kPatch; ++i) sum[i / kPatch][i % kPatch] = 0;
    const u32* at = tile + (row * kColumns + column) * kPairs + pair;
    // Whether neighbours have changed places in the first four columns; in the next four it is the
    // other way round, see `place`.
    const int swapped = column >> 2 & 1;
#pragma unroll
    for (int r = 0; r < kInput; ++r) {
#pragma unroll
      for (int c = 0; c < kInput; ++c) {
        const int swap = swapped ^ (c >> 2 & 1);
        const u32 v = at[(r * kColumns + (c ^ swap)) * kPairs];
#pragma unroll
        for (int o = 0; o < kPatch; ++o) {
          const int dy = r - o;
          if (dy < 0 || dy >= kTaps) continue;
#pragma unroll
          for (int q = 0; q < kPatch; ++q) {
            const int dx = c - q;
            if (dx < 0 || dx >= kTaps) continue;
            multiply_add(sum[o][q], w[dy * kTaps + dx], v);
          }
        }
      }
#pragma unroll
      for (int o = 0; o < kPatch; ++o) {
        if (r - o != kFlushAfter) continue;
#pragma unroll
        for (int q = 0; q < kPatch; ++q) {
          first_sum[o][q] = to_floats(sum[o][q]);
          sum[o][q] = 0;
        }
      }
    }

    const int y = first_row + row, left = first_column + column;
    const bool is_whole = y + kPatch <= height && left + kPatch <= width;
    float total[2 * kPatch * kPatch];
#pragma unroll
    for (int o = 0; o < kPatch; ++o) {
      u16* const to = out + ((i64)(y + o) * width + left) * kAllChannels;
#pragma unroll
      for (int q = 0; q < kPatch; ++q) {
        const float2 rest = to_floats(sum[o][q]), most = first_sum[o][q];
        const float2 v = make_float2(fmaf(most.x + rest.x, factor.x, b.x),
                                     fmaf(most.y + rest.y, factor.y, b.y));
        total[o * kPatch + q] = v.x + v.y;
        total[kPatch * kPatch + o * kPatch + q] = v.x * v.x + v.y * v.y;
        if ((is_whole || (y + o < height && left + q < width)) && is_channel) {
          *(u32*)(to + q * kAllChannels) = to_pair(v.x, v.y);
        }
      }
    }
    // Lanes beyond the last channel have no weights and add nothing.
    sum_over_lanes(total);
    const int index = 2 * (pair & 7);
    const int sums_row = y + index / kPatch, sums_column = left + index % kPatch;
    float* const to = sums + (i64)sums_row * width + sums_column;
    if (sums_row < height && sums_column < width) to[0] = total[0];
    if (sums_row < height && sums_column + 1 < width) to[1] = total[1];
  }
}

#define DEPTHWISE(columns)                                                                       \
  extern "C" __global__ void __launch_bounds__(kThreads, 4) peaknet_depthwise_##columns(         \
      const u16* x, const u16* weight, const float* scale, const float* bias, u16* out,          \
      float* sums, int height, int width) {                                                      \
    convolve<columns>(x, weight, scale, bias, out, sums, height, width);                         \
  }

DEPTHWISE(16)
DEPTHWISE(32)

// sums: (groups, 2, pixels) as above; moments: (pixels) of 1 / std and -mean / std over the channels.
extern "C" __global__ void __launch_bounds__(256)
    peaknet_moments(const float* __restrict__ sums, float2* __restrict__ moments, i64 pixels,
                    float eps) {
  const i64 pixel = (i64)blockIdx.x * 256 + threadIdx.x;
  if (pixel >= pixels) return;
  float total = 0.f, squares = 0.f;
#pragma unroll 4
  for (int group = 0; group < kChannelGroups; ++group) {
    total += sums[2 * group * pixels + pixel];
    squares += sums[(2 * group + 1) * pixels + pixel];
  }
  const float mean = total / kAllChannels;
  const float factor = rsqrtf(fmaxf(squares / kAllChannels - mean * mean, 0.f) + eps);
  moments[pixel] = make_float2(factor, -mean * factor);
}
