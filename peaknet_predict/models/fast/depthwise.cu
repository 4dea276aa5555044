// The depthwise 7x7 convolution of a ConvNeXt block on bfloat16 features with channels last, and the
// sums that the normalisation after it needs.
//
// A block of threads computes a tile of pixels for 32 channels. Its input, with a border of three
// pixels, lies in shared memory; a thread keeps the 49 weights of two channels in registers and
// computes 4x4 pixels at a time, so that a value read serves up to 28 products. Arithmetic is in
// float32: this is what bounds the kernel, not memory.
//
// CHANNELS, a multiple of 8, is defined by whoever compiles this: most addresses are then constants.

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

constexpr int kTaps = 7, kBorder = 3;
constexpr int kPatch = 4;                     // rows and columns that a thread computes at a time
constexpr int kInput = kPatch + kTaps - 1;    // rows and columns that these depend on
constexpr int kPairs = 16;                    // lanes across the channels, two each
constexpr int kChannels = 2 * kPairs;
constexpr int kThreads = 128;
constexpr int kPatches = kThreads / kPairs;   // computed at a time by the block
constexpr int kTileRows = 16;
constexpr int kAllChannels = CHANNELS;
constexpr int kChannelGroups = (kAllChannels + kChannels - 1) / kChannels;

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ u32 to_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
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

// x, out: (N, H, W, C) bfloat16; weight: (49, C) and bias: (C) float32; sums: (C / 32, 2, N * H * W)
// float32. Grid: tiles times groups of channels; panels.
template <int kTileColumns>
__device__ __forceinline__ void convolve(const u16* __restrict__ x, const float* __restrict__ weight,
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

  // Four threads copy 32 channels of a pixel, the others the next pixels of its row.
  const u32 tile_address = (u32)__cvta_generic_to_shared(tile);
  const int part = threadIdx.x % 4;
  const bool is_part = first_channel + 8 * part < kAllChannels;
#pragma unroll 1
  for (int row = threadIdx.x / 32; row < kRows; row += kThreads / 32) {
    const int y = first_row + row - kBorder;
    const u16* from = x + ((i64)y * width + first_column - kBorder) * kAllChannels + first_channel;
#pragma unroll
    for (int step = 0; step < kColumns; step += 8) {
      const int column = step + threadIdx.x % 32 / 4;
      if (kColumns % 8 != 0 && column >= kColumns) break;
      const int at = first_column + column - kBorder;
      const bool inside = y >= 0 && y < height && at >= 0 && at < width && is_part;
      const u16* source = inside ? from + column * kAllChannels + 8 * part : x;
      const u32 target = tile_address + ((row * kColumns + place(column)) * kPairs + 4 * part) * 4;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
                   "r"(inside ? 16 : 0));
    }
  }
  asm volatile("cp.async.commit_group;");

  const int pair = threadIdx.x % kPairs;
  const int channel = first_channel + 2 * pair;
  const bool is_channel = kAllChannels % kChannels == 0 || channel < kAllChannels;
  float2 w[kTaps * kTaps];
#pragma unroll
  for (int tap = 0; tap < kTaps * kTaps; ++tap) {
    w[tap] = is_channel ? *(const float2*)(weight + tap * kAllChannels + channel)
                        : make_float2(0, 0);
  }
  const float2 b = is_channel ? *(const float2*)(bias + channel) : make_float2(0, 0);
  asm volatile("cp.async.wait_all;");
  __syncthreads();

  out += panel * panel_pixels * kAllChannels + channel;
  sums += ((i64)group * 2 + (pair >> 3)) * gridDim.y * panel_pixels + panel * panel_pixels;
  constexpr int kAcross = kTileColumns / kPatch;
#pragma unroll 1
  for (int patch = threadIdx.x / kPairs; patch < kAcross * (kTileRows / kPatch); patch += kPatches) {
    const int row = patch / kAcross * kPatch, column = patch % kAcross * kPatch;
    float2 sum[kPatch][kPatch];
#pragma unroll
    for (int i = 0; i < kPatch * kPatch; ++i) sum[i / kPatch][i % kPatch] = b;
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
            sum[o][q].x += w[dy * kTaps + dx].x * low(v);
            sum[o][q].y += w[dy * kTaps + dx].y * high(v);
          }
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
        const float2 v = sum[o][q];
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

#define DEPTHWISE(columns)                                                                    \
  extern "C" __global__ void __launch_bounds__(kThreads, 3) peaknet_depthwise_##columns(      \
      const u16* x, const float* weight, const float* bias, u16* out, float* sums, int height, \
      int width) {                                                                            \
    convolve<columns>(x, weight, bias, out, sums, height, width);                             \
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
