// The second layer of a ConvNeXt block's perceptron on Hopper: scale the hidden channels by GRN's
// factors, multiply, and add bias and residual.
//
// A block computes 64 pixels for each of its groups of four warps, and kColumns columns. Slices of the
// hidden features and of the weights pass through a ring of kStages stages in shared memory. A group
// scales its part of a slice in registers, where the tensor cores take their left operand from, while
// they still work on the slice before.
//
// Whoever compiles this defines CHANNELS of the result, COLUMNS of them in a block, GROUPS and STAGES.

#include "hopper.cuh"

constexpr int kChannels = CHANNELS;
constexpr int kInner = 4 * kChannels;
constexpr int kColumns = COLUMNS;
constexpr int kRows = 64;  // pixels of a group
constexpr int kGroups = GROUPS;
constexpr int kThreads = 128 * kGroups;
constexpr int kStages = STAGES;
constexpr int kSlice = 64;
constexpr int kSlices = kInner / kSlice;

using S = Slices<kSlice>;

constexpr int kTileBytes = kRows * S::kPitch;
constexpr int kWeightBytes = kColumns * S::kPitch;
constexpr int kStageBytes = kGroups * kTileBytes + kWeightBytes;
constexpr int kScaleAt = kStages * kStageBytes;  // kInner float32 of each group's panel

// hidden: (M, kInner), weight: (kChannels, kInner), residual, out: (M, kChannels) bfloat16; scale:
// (N, kInner), bias: (kChannels) float32; M = N * pixels, pixels a multiple of 64. Grid: blocks of
// columns, first, times tiles of kGroups * 64 pixels.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    peaknet_contract(const u16* __restrict__ hidden, const float* __restrict__ scale,
                     const u16* __restrict__ weight, const float* __restrict__ bias,
                     const u16* __restrict__ residual, u16* __restrict__ out, i64 rows,
                     int pixels) {
  extern __shared__ unsigned char raw[];
  const SharedMemory memory = aligned_memory(raw);
  constexpr int kBlocks = kChannels / kColumns;
  const int first_column = blockIdx.x % kBlocks * kColumns;

  // The same in all lanes of a warp, which the compiler cannot know.
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
  const int warp = thread / 32, lane = thread % 32, quad = lane % 4;
  // A group beyond the last row repeats the last tile and stores nothing.
  const i64 wanted = ((i64)(blockIdx.x / kBlocks) * kGroups + group) * kRows;
  const i64 first = wanted < rows ? wanted : rows - kRows;
  const u16* const source = hidden + first * kInner;
  const u16* const columns = weight + (i64)first_column * kInner;

  // One slice of this group's pixels and, by all groups together, of the weights.
  auto copy_slice = [&](int slice) {
    if (slice < kSlices) {
      const u32 stage = memory.address + slice % kStages * kStageBytes;
      S::copy_slice<128, kRows>(stage + group * kTileBytes, source + slice * kSlice, kInner, thread);
      S::copy_slice<kThreads, kColumns>(stage + kGroups * kTileBytes, columns + slice * kSlice,
                                        kInner, threadIdx.x);
    }
    asm volatile("cp.async.commit_group;");
  };
#pragma unroll
  for (int slice = 0; slice < kStages - 2; ++slice) copy_slice(slice);
  float* const scales = (float*)(memory.bytes + kScaleAt) + group * kInner;
  const float* const panel_scale = scale + first / pixels * kInner;
  for (int i = 4 * thread; i < kInner; i += 512) {
    *(float4*)(scales + i) = *(const float4*)(panel_scale + i);
  }

  u32 left[2][kSlice / 16][4];
  // Waits for a slice and makes this group's left operand of it. Then all groups are done with the
  // slice two before, and its stage can be filled again; the slice before may still be in use.
  auto prepare = [&](int slice, u32 (&a)[kSlice / 16][4]) {
    wait_for_copies<kStages - 3>();
    __syncthreads();
    copy_slice(slice + kStages - 2);
    const u32 tile = memory.address + slice % kStages * kStageBytes + group * kTileBytes;
#pragma unroll
    for (int k = 0; k < kSlice / 16; ++k) {
      load_left(a[k], tile, 16 * warp, 2 * k, lane);
      const float* const factors = scales + slice * kSlice + 16 * k + 2 * quad;
      scale_pairs(a[k], *(const float2*)factors, *(const float2*)(factors + 8));
    }
  };
  prepare(0, left[0]);
  float sum[kColumns / 2];
  // Two slices a round, so that registers are indexed by constants.
#pragma unroll 1
  for (int pair = 0; pair < kSlices; pair += 2) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int slice = pair + odd;
      const u64 b = S::descriptor(memory.address + slice % kStages * kStageBytes +
                                  kGroups * kTileBytes);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int k = 0; k < kSlice / 16; ++k) {
        multiply_left(sum, left[odd][k], b + 2 * k, slice == 0 && k == 0);
      }
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      // The slice before is done, and its operand may be overwritten; this one goes on meanwhile.
      wait_for_products<1>();
      if (slice + 1 < kSlices) prepare(slice + 1, left[1 - odd]);
    }
  }
  // All that is added, so that it is waited for once.
  const i64 row0 = first + 16 * warp;
  uint4 added[kColumns / 64][4];
#pragma unroll
  for (int part = 0; part < kColumns / 64; ++part) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      added[part][i] = *(const uint4*)(residual + (row0 + 4 * i + lane / 8) * kChannels +
                                       first_column + 64 * part + lane % 8 * 8);
    }
  }
  wait_for_products<0>();
  hold(sum);
  wait_for_copies<0>();
  __syncthreads();  // the stages are free: each warp stages its result in them

  unsigned char* const staging = memory.bytes + threadIdx.x / 32 * (16 * S::kPitch);
  const u32 staging_address = memory.address + threadIdx.x / 32 * (16 * S::kPitch);
#pragma unroll
  for (int part = 0; part < kColumns / 64; ++part) {
#pragma unroll
    for (int block = 0; block < 8; block += 2) {
      u32 pairs[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int j = 8 * part + block + i;
        pairs[2 * i] = to_pair(sum[4 * j], sum[4 * j + 1]);
        pairs[2 * i + 1] = to_pair(sum[4 * j + 2], sum[4 * j + 3]);
      }
      store_block(staging_address, pairs, block, lane);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 4 * i + lane / 8, unit = lane % 8;
      const int column = first_column + 64 * part + 8 * unit;
      float result[8];
      *(float4*)result = *(const float4*)(bias + column);
      *(float4*)(result + 4) = *(const float4*)(bias + column + 4);
      add(result, load_row_unit(staging, row, unit), 1.f);
      add(result, added[part][i], 1.f);
      if (wanted < rows) *(uint4*)(out + (row0 + row) * kChannels + column) = to_values(result);
    }
    __syncwarp();
  }
}
