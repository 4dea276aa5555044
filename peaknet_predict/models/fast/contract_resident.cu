// What `contract.cu` does, for so few channels that the weights stay in shared memory.
//
// A block stays on its multiprocessor, and each of its groups of four warps takes its share of all
// tiles of 64 pixels by itself. Slices of the hidden features pass through a ring in shared memory, on
// from one tile to the next, so that memory is never waited for in between.

#include "hopper.cuh"

constexpr int kChannels = 96;
constexpr int kInner = 4 * kChannels;
constexpr int kRows = 64;  // pixels of a tile
constexpr int kGroups = 3;
constexpr int kThreads = 128 * kGroups;
constexpr int kStages = 4;
constexpr int kSlice = 64;
constexpr int kSlices = kInner / kSlice;
constexpr int kSteps = kSlice / 16;  // of a product
static_assert(kSlices % 2 == 0, "a tile begins with the same registers as the one before");

using S = Slices<kSlice>;

constexpr int kTileBytes = kRows * S::kPitch;
constexpr int kWeightBytes = 2 * kChannels * kInner;
constexpr int kUnits = kChannels / 8;              // of 16 bytes, of a pixel of the result
constexpr int kStagedPitch = 16 * (kUnits + 1);    // bytes; the same unit of eight rows meets no bank twice
constexpr int kStagingBytes = 16 * kStagedPitch;   // of a warp
constexpr int kRingAt = kWeightBytes;
constexpr int kStagingAt = kRingAt + kGroups * kStages * kTileBytes;
constexpr int kScaleAt = kStagingAt + 4 * kGroups * kStagingBytes;

// hidden: (M, kInner), weight: (kChannels, kInner), residual, out: (M, kChannels) bfloat16; scale:
// (N, kInner), bias: (kChannels) float32; M = N * pixels, pixels a multiple of 64. Grid: as many blocks
// as it takes if each group takes `share` tiles.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    peaknet_contract_resident(const u16* __restrict__ hidden, const float* __restrict__ scale,
                              const u16* __restrict__ weight, const float* __restrict__ bias,
                              const u16* __restrict__ residual, u16* __restrict__ out, i64 rows,
                              int pixels, int share) {
  extern __shared__ unsigned char raw[];
  const SharedMemory memory = aligned_memory(raw);

  // The same in all lanes of a warp, which the compiler cannot know.
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
  const int warp = thread / 32, lane = thread % 32, quad = lane % 4;
  const u32 ring = memory.address + kRingAt + group * kStages * kTileBytes;
  unsigned char* const staging = memory.bytes + kStagingAt + threadIdx.x / 32 * kStagingBytes;
  const u32 staging_address = memory.address + kStagingAt + threadIdx.x / 32 * kStagingBytes;
  float* const scales = (float*)(memory.bytes + kScaleAt) + group * kInner;

  const i64 tiles = rows / kRows;
  i64 tile = ((i64)blockIdx.x * kGroups + group) * share;
  const i64 last = min(tile + share, tiles);
  S::copy<kThreads, kChannels, kInner, false>(memory.address, weight, 0, threadIdx.x);

  // The slices of all tiles follow each other.
  const u16* source = hidden + tile * kRows * kInner;
  const u16* const end = hidden + last * kRows * kInner;
  int source_slice = 0, stage_to_fill = 0;
  auto copy_next_slice = [&] {
    if (source < end) {
      S::copy_slice<128, kRows>(ring + stage_to_fill * kTileBytes, source + source_slice * kSlice,
                                kInner, thread);
    }
    asm volatile("cp.async.commit_group;");
    stage_to_fill = (stage_to_fill + 1) % kStages;
    if (++source_slice == kSlices) {
      source_slice = 0;
      source += kRows * kInner;
    }
  };
#pragma unroll
  for (int slice = 0; slice < kStages - 2; ++slice) copy_next_slice();
  wait_for_copies<kStages - 2>();
  __syncthreads();
  if (tile >= last) return;

  i64 panel = -1;
  int stage = 0;
  u32 left[2][kSteps][4];
  // Waits for a slice and makes the left operand of it. Then all four warps are done with the slice
  // two before, and its stage can be filled again; the slice before may still be in use.
  auto prepare = [&](int slice, u32(&a)[kSteps][4]) {
    wait_for_copies<kStages - 3>();
    wait_for_group(group);
    copy_next_slice();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      load_left(a[k], ring + stage * kTileBytes, 16 * warp, 2 * k, lane);
      const float* const factors = scales + slice * kSlice + 16 * k + 2 * quad;
      scale_pairs(a[k], *(const float2*)factors, *(const float2*)(factors + 8));
    }
    stage = (stage + 1) % kStages;
  };
  // Sees to it that the scales are those of a tile's panel.
  auto load_scales = [&](i64 of_tile) {
    const i64 wanted = of_tile * kRows / pixels;
    if (wanted == panel) return;
    panel = wanted;
    wait_for_group(group);
    for (int i = 4 * thread; i < kInner; i += 512) {
      *(float4*)(scales + i) = *(const float4*)(scale + panel * kInner + i);
    }
    wait_for_group(group);
  };

  load_scales(tile);
  prepare(0, left[0]);
  float sum[kChannels / 2];
  for (; tile < last; ++tile) {
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      const u64 b = S::descriptor(memory.address + slice * kChannels * S::kPitch);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        multiply_left(sum, left[slice % 2][k], b + 2 * k, slice == 0 && k == 0);
      }
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      // The slice before is done, and its operand may be overwritten; this one goes on meanwhile.
      wait_for_products<1>();
      if (slice + 1 < kSlices) prepare(slice + 1, left[(slice + 1) % 2]);
    }
    const i64 row0 = tile * kRows + 16 * warp;
    uint4 added[kUnits / 2];
#pragma unroll
    for (int i = 0; i < kUnits / 2; ++i) {
      added[i] = ((const uint4*)(residual + row0 * kChannels))[32 * i + lane];
    }
    if (tile + 1 < last) {
      load_scales(tile + 1);
      prepare(0, left[0]);
    }
    wait_for_products<0>();
    hold(sum);

#pragma unroll
    for (int unit = 0; unit < kUnits; unit += 2) {
      const float* const of = sum + 4 * unit;
      const u32 pairs[4] = {to_pair(of[0], of[1]), to_pair(of[2], of[3]), to_pair(of[4], of[5]),
                            to_pair(of[6], of[7])};
      store_matrices(staging_address + lane % 16 * kStagedPitch + 16 * (unit + lane / 16), pairs);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kUnits / 2; ++i) {
      const int row = (32 * i + lane) / kUnits, unit = (32 * i + lane) % kUnits;
      float result[8];
      *(float4*)result = *(const float4*)(bias + 8 * unit);
      *(float4*)(result + 4) = *(const float4*)(bias + 8 * unit + 4);
      add(result, *(const uint4*)(staging + row * kStagedPitch + 16 * unit), 1.f);
      add(result, added[i], 1.f);
      ((uint4*)(out + row0 * kChannels))[32 * i + lane] = to_values(result);
    }
    __syncwarp();
  }
}
