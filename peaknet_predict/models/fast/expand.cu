// The first layer of a ConvNeXt block's perceptron on Hopper: normalise, multiply, add, GELU, and the
// sums of squares that GRN needs, in one pass over memory.
//
// A block keeps kColumns rows of the weights in shared memory and passes over a strip of a panel.
// Each group of four warps takes every kGroups-th tile of 64 pixels by itself: while one group
// multiplies, others apply GELU (of the same block or of another on the multiprocessor), so that tensor
// cores and arithmetic units work side by side. The next tile is copied while GELU is applied.
//
// Whoever compiles this defines CHANNELS, a multiple of 32; GROUPS of warps in a block; BLOCKS that a
// multiprocessor holds at once; EVEN, whether all tiles are whole.

#include "hopper.cuh"

constexpr int kInner = CHANNELS;              // of the product
constexpr int kColumns = 128;                 // of the result, in a block
constexpr int kRows = 64;                     // pixels of a tile
constexpr int kGroups = GROUPS;               // of four warps
constexpr int kThreads = 128 * kGroups;
constexpr bool kEven = EVEN;
constexpr int kSlice = kInner % 64 == 0 ? 64 : 32;  // of kInner, side by side in shared memory
constexpr int kHalf = kColumns / 2;           // columns stored at a time

using S = Slices<kSlice>;

constexpr int kWeightBytes = 2 * kColumns * kInner;
constexpr int kTileBytes = 2 * kRows * kInner;
constexpr int kStagingBytes = 2 * 16 * kHalf;  // of a warp
constexpr int kTilesAt = kWeightBytes;
constexpr int kStagingAt = kTilesAt + kGroups * kTileBytes;
constexpr int kTermsAt = kStagingAt + 4 * kGroups * kStagingBytes;

struct Row {
  float factor, offset;  // of the normalisation, halved
};

__device__ __forceinline__ Row load_row(const float2* moments, int row, int last) {
  const float2 m = moments[min(row, last - 1)];
  return {0.5f * m.x, 0.5f * m.y};
}

// x: (N, pixels, CHANNELS) and weight: (size, CHANNELS) bfloat16; moments: (N, pixels) of 1 / std and
// -mean / std; column_sums, bias: (size); hidden: (N, pixels, size) bfloat16; energy: (N, strips,
// size). Grid: size / kColumns; strips of `strip` pixels; N.
extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS)
    peaknet_expand(const u16* __restrict__ x, const float2* __restrict__ moments,
                   const u16* __restrict__ weight, const float* __restrict__ column_sums,
                   const float* __restrict__ bias, u16* __restrict__ hidden,
                   float* __restrict__ energy, int pixels, int size, int strip) {
  extern __shared__ unsigned char raw[];
  const SharedMemory memory = aligned_memory(raw);
  const u32 base = memory.address;

  const int first_column = blockIdx.x * kColumns;
  const i64 panel = blockIdx.z;
  const int first = blockIdx.y * strip, last = min(first + strip, pixels);
  x += panel * pixels * kInner;
  moments += panel * pixels;
  hidden += panel * pixels * size + first_column;

  // The same in all lanes of a warp, which the compiler cannot know.
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
  const int warp = thread / 32, lane = thread % 32, quad = lane % 4;
  const u32 tile = base + kTilesAt + group * kTileBytes;
  unsigned char* const staging = memory.bytes + kStagingAt + threadIdx.x / 32 * kStagingBytes;
  const u32 staging_address = base + kStagingAt + threadIdx.x / 32 * kStagingBytes;

  S::copy<kThreads, kColumns, kInner, false>(base, weight + (i64)first_column * kInner, 0,
                                             threadIdx.x);
  int start = first + kRows * group;
  if (start < last) {
    S::copy<128, kRows, kInner, !kEven>(tile, x + (i64)start * kInner, last - start, thread);
  }
  // For each pair of columns: the sums of the weights, and half of the bias.
  float4* const terms = (float4*)(memory.bytes + kTermsAt);
  if (threadIdx.x < kColumns / 2) {
    const float2 sums = ((const float2*)(column_sums + first_column))[threadIdx.x];
    const float2 b = ((const float2*)(bias + first_column))[threadIdx.x];
    terms[threadIdx.x] = make_float4(sums.x, sums.y, 0.5f * b.x, 0.5f * b.y);
  }
  wait_for_copies<0>();
  __syncthreads();

  float squares[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) squares[i] = 0.f;

  for (bool is_first = true; start < last; start += kRows * kGroups, is_first = false) {
    if (!is_first) {
      wait_for_copies<0>();
      wait_for_group(group);
    }
    const int row = start + 16 * warp + lane / 4;
    const Row upper = load_row(moments, row, last), lower = load_row(moments, row + 8, last);
    float sum[64];
    multiply_tile<kSlice, kInner, kColumns>(sum, tile, base);
    wait_for_group(group);  // all four warps have read the tile
    const int next = start + kRows * kGroups;
    if (next < last) {
      S::copy<128, kRows, kInner, !kEven>(tile, x + (i64)next * kInner, last - next, thread);
    }

    TermsAhead terms_ahead(terms + quad);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int block = 0; block < 8; block += 2) {
        float4 terms_of[2];
        terms_ahead.take<kColumns / 8>(terms_of, 8 * half + block);
        u32 pairs[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int j = 8 * half + block + i;
          const float4 term = terms_of[i];
          float value[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const Row& of = k < 2 ? upper : lower;
            const float sum_of_column = k % 2 ? term.y : term.x, b = k % 2 ? term.w : term.z;
            value[k] =
                gelu_of_double(fmaf(sum[4 * j + k], of.factor, fmaf(of.offset, sum_of_column, b)));
          }
          if (!kEven) {
#pragma unroll
            for (int k = 0; k < 4; ++k) value[k] = row + 8 * (k / 2) < last ? value[k] : 0.f;
          }
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            squares[2 * j + k % 2] = fmaf(value[k], value[k], squares[2 * j + k % 2]);
          }
          pairs[2 * i] = to_pair(value[0], value[1]);
          pairs[2 * i + 1] = to_pair(value[2], value[3]);
        }
        store_block(staging_address, pairs, block, lane);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int from_row = 4 * i + lane / 8, unit = lane % 8;
        const uint4 values = load_row_unit(staging, from_row, unit);
        const int to = start + 16 * warp + from_row;
        if (to < last) *(uint4*)(hidden + (i64)to * size + half * kHalf + 8 * unit) = values;
      }
      __syncwarp();
    }
  }

  // Over the rows of each warp, then over the warps, always in the same order.
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    squares[i] += __shfl_xor_sync(0xffffffffu, squares[i], 4);
    squares[i] += __shfl_xor_sync(0xffffffffu, squares[i], 8);
    squares[i] += __shfl_xor_sync(0xffffffffu, squares[i], 16);
  }
  if (lane < 4) {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      ((float2*)staging)[4 * j + quad] = make_float2(squares[2 * j], squares[2 * j + 1]);
    }
  }
  __syncthreads();
  if (threadIdx.x < kColumns) {
    float total = 0.f;
    for (int i = 0; i < 4 * kGroups; ++i) {
      total += ((const float*)(memory.bytes + kStagingAt + i * kStagingBytes))[threadIdx.x];
    }
    energy[(panel * gridDim.y + blockIdx.y) * size + first_column + threadIdx.x] = total;
  }
}
