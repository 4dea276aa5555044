// The finest node of the BiFPN's way down with 256 features on Hopper, the adapter before it included:
// from the backbone's normalised features and the level above, already multiplied, in one pass over
// memory.
//
// A block keeps both matrices in shared memory and stays until all tiles are done. Each of its groups of
// four warps takes tiles of 64 pixels by itself. The level above, enlarged, is what the sums of the first
// product start from; the second product is added to the node's result where that lies, in registers.
//
// Whoever compiles this defines CHANNELS of the backbone's features, a multiple of 32, and EPS, the
// normalisation's.

#include "hopper.cuh"

constexpr int kFeatures = 256;
constexpr int kInner = CHANNELS;  // of the products
constexpr int kRows = 64;         // pixels of a tile
constexpr int kWarpRows = 16;
constexpr int kGroups = 3;
constexpr int kThreads = 128 * kGroups;
constexpr float kEps = EPS;
constexpr int kSlice = kInner % 64 == 0 ? 64 : 32;  // of kInner, side by side in shared memory
constexpr int kHalf = kFeatures / 2;                // features that a warp stages at a time

using S = Slices<kSlice>;
using Staged = Slices<64>;

constexpr int kWeightBytes = 2 * kFeatures * kInner;
constexpr int kTileBytes = 2 * kRows * kInner;
constexpr int kStagingBytes = 2 * kWarpRows * kHalf;  // of a warp
constexpr int kTilesAt = 2 * kWeightBytes;            // two of each group
constexpr int kStagingAt = kTilesAt + 2 * kGroups * kTileBytes;
constexpr int kTermsAt = kStagingAt + 4 * kGroups * kStagingBytes;

// Of a warp's staging: where eight features of one of its 16 rows lie, those of `lane` % 16.
__device__ __forceinline__ int staged(int row, int lane) {
  return lane % 16 / 8 * (kWarpRows * Staged::kPitch) + Staged::place(row, lane % 8);
}

// Enlarges eight features of eight pixels of a row, the first at an even column `x`, and stages them as
// rows from `row` on. Bilinear with aligned pixel areas: the nearest row and column count three quarters,
// the next one quarter. `near` and `far` are rows of the coarser level.
__device__ __forceinline__ void enlarge(unsigned char* staging, int row, int lane, const u16* near,
                                        const u16* far, int x, int coarse_width) {
  constexpr int kColumns = 6;  // on which eight pixels depend
  uint4 upper[kColumns], lower[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    // Only the first and the last can lie outside.
    const int beyond = i == 0 ? x == 0 : i == kColumns - 1 ? -(x / 2 + 4 == coarse_width) : 0;
    const int offset = (x / 2 - 1 + beyond) * kFeatures;
    upper[i] = *(const uint4*)(near + offset + i * kFeatures);
    lower[i] = *(const uint4*)(far + offset + i * kFeatures);
  }
  float blended[3][8];  // of three columns: before, at and after
  auto blend = [&](int i) {
    float(&sum)[8] = blended[i % 3];
#pragma unroll
    for (int k = 0; k < 8; ++k) sum[k] = 0.f;
    add(sum, upper[i], 0.75f);
    add(sum, lower[i], 0.25f);
  };
  blend(0);
  blend(1);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    blend(i + 2);
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      float pixel[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        pixel[k] = 0.75f * blended[(i + 1) % 3][k] + 0.25f * blended[(i + 2 * odd) % 3][k];
      }
      *(uint4*)(staging + staged(row + 2 * i + odd, lane)) = to_values(pixel);
    }
  }
}

// x: (N, height, width, CHANNELS), coarse: (N, height / 2, width / 2, 256), inner, outer:
// (256, CHANNELS), out: (N, height, width, 256) bfloat16; scale, shift, added: (256) float32. The width is
// a multiple of 16 and the height of 4. Grid: as many blocks as there are multiprocessors.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    peaknet_base_node(const u16* __restrict__ x, const u16* __restrict__ coarse,
                      const u16* __restrict__ inner, const u16* __restrict__ outer,
                      const float* __restrict__ scale, const float* __restrict__ shift,
                      const float* __restrict__ added, u16* __restrict__ out, int panels, int height,
                      int width) {
  extern __shared__ unsigned char raw[];
  const SharedMemory memory = aligned_memory(raw);

  // The same in all lanes of a warp, which the compiler cannot know.
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
  const int warp = thread / 32, lane = thread % 32, quad = lane % 4;
  const u32 tiles = memory.address + kTilesAt + 2 * group * kTileBytes;
  unsigned char* const staging = memory.bytes + kStagingAt + (4 * group + warp) * kStagingBytes;
  const u32 staging_address = memory.address + kStagingAt + (4 * group + warp) * kStagingBytes;

  S::copy<kThreads, kFeatures, kInner, false>(memory.address, inner, 0, threadIdx.x);
  S::copy<kThreads, kFeatures, kInner, false>(memory.address + kWeightBytes, outer, 0, threadIdx.x);
  // For each pair of columns: halves of scale and shift; what is added behind GELU.
  float4* const terms = (float4*)(memory.bytes + kTermsAt);
  float2* const addends = (float2*)(terms + kFeatures / 2);
  if (threadIdx.x < kFeatures / 2) {
    const float2 a = ((const float2*)scale)[threadIdx.x], b = ((const float2*)shift)[threadIdx.x];
    terms[threadIdx.x] = make_float4(0.5f * a.x, 0.5f * a.y, 0.5f * b.x, 0.5f * b.y);
    addends[threadIdx.x] = ((const float2*)added)[threadIdx.x];
  }
  const i64 count = (i64)panels * height * width / kRows;
  const i64 stride = (i64)gridDim.x * kGroups;
  i64 index = (i64)blockIdx.x * kGroups + group;
  if (index < count) S::copy<128, kRows, kInner, false>(tiles, x + index * kRows * kInner, 0, thread);
  wait_for_copies<0>();
  __syncthreads();

  const int coarse_height = height / 2, coarse_width = width / 2;
  for (int buffer = 0; index < count; index += stride, buffer ^= 1) {
    const u32 tile = tiles + buffer * kTileBytes;
    if (index + stride < count) {
      S::copy<128, kRows, kInner, false>(tiles + (buffer ^ 1) * kTileBytes,
                                         x + (index + stride) * kRows * kInner, 0, thread);
    }

    // This warp's 16 pixels lie in one row.
    const i64 first = index * kRows + kWarpRows * warp;
    const i64 line = first / width;
    const int column = (int)(first % width) + lane / 16 * 8;
    const i64 panel = line / height;
    const int y = (int)(line % height);
    const int y_far = min(max(y / 2 + 2 * (y & 1) - 1, 0), coarse_height - 1);
    const u16* const level = coarse + panel * coarse_height * coarse_width * kFeatures;
    float sum[128];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u16* const features = level + half * kHalf + lane % 16 * 8;
      enlarge(staging, lane / 16 * 8, lane, features + (i64)(y / 2) * coarse_width * kFeatures,
              features + (i64)y_far * coarse_width * kFeatures, column, coarse_width);
      __syncwarp();
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        u32 a[4];
        load_left(a, staging_address + k / 4 * (kWarpRows * Staged::kPitch), 0, k % 4 * 2, lane);
        // As `multiply` has its sums.
        float* const of = sum + 64 * half + 8 * k;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          of[2 * i] = low(a[i]);
          of[2 * i + 1] = high(a[i]);
        }
      }
      __syncwarp();
    }
    // Features are normalised around zero: the matrices leave no mean.
    multiply_tile<kSlice, kInner, kFeatures, true>(sum, tile, memory.address);
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // In four parts, so that an addition need not wait for the one before.
      float squares[4] = {};
#pragma unroll
      for (int j = 0; j < 64; ++j) {
        const float value = sum[4 * (j / 2) + 2 * i + j % 2];
        squares[j % 4] = fmaf(value, value, squares[j % 4]);
      }
      factor[i] = rsqrtf(over_quad(sum_of(squares)) / kFeatures + kEps);
    }
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      const float4 term = terms[4 * j + quad];
      const float2 addend = addends[4 * j + quad];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float normed = sum[4 * j + k] * factor[k / 2];
        sum[4 * j + k] = gelu_of_double(fmaf(normed, k % 2 ? term.y : term.x, k % 2 ? term.w : term.z)) +
                         (k % 2 ? addend.y : addend.x);
      }
    }
    multiply_tile<kSlice, kInner, kFeatures, true>(sum, tile, memory.address + kWeightBytes);
    wait_for_copies<0>();
    wait_for_group(group);  // all four warps have read this tile, and the next is there

#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float* const of = sum + 64 * half + 8 * k;
        const u32 pairs[4] = {to_pair(of[0], of[1]), to_pair(of[2], of[3]), to_pair(of[4], of[5]),
                              to_pair(of[6], of[7])};
        store_block(staging_address + k / 4 * (kWarpRows * Staged::kPitch), pairs, k % 4 * 2, lane);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = 2 * i + lane / 16;
        *(uint4*)(out + (first + row) * kFeatures + half * kHalf + lane % 16 * 8) =
            *(const uint4*)(staging + staged(row, lane));
      }
      __syncwarp();
    }
  }
}
