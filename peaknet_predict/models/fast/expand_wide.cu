// What `expand.cu` does, for so many channels that the weights do not fit into shared memory.
//
// A block computes 64 pixels for each of its two groups of four warps, and kColumns columns. Slices of
// the features and of the weights pass through a ring of kStages stages in shared memory.
//
// Whoever compiles this defines CHANNELS, a multiple of 64.

#include "hopper.cuh"

constexpr int kInner = CHANNELS;  // of the product
constexpr int kColumns = 256;     // of the result, in a block
constexpr int kRows = 64;         // pixels of a group
constexpr int kGroups = 2;
constexpr int kThreads = 128 * kGroups;
constexpr int kStages = 4;
constexpr int kSlice = 64;
constexpr int kSlices = kInner / kSlice;
constexpr int kPart = 64;  // columns that a warp stages at a time

using S = Slices<kSlice>;

constexpr int kTileBytes = kRows * S::kPitch;
constexpr int kWeightBytes = kColumns * S::kPitch;
constexpr int kStageBytes = kGroups * kTileBytes + kWeightBytes;
constexpr int kStagingBytes = 2 * 16 * kPart;  // of a warp
constexpr int kTermsAt = kStages * kStageBytes;
// Once the products are done, the stages hold what the warps stage, and behind it their sums.
constexpr int kSquaresAt = 4 * kGroups * kStagingBytes;

// x: (M, CHANNELS) and weight: (size, CHANNELS) bfloat16; moments: (M) of 1 / std and -mean / std;
// column_sums, bias: (size); hidden: (M, size) bfloat16; energy: (M / 128, size). M is a multiple of 128,
// size of kColumns. Grid: blocks of columns, first, times tiles of 128 pixels.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    peaknet_expand_wide(const u16* __restrict__ x, const float2* __restrict__ moments,
                        const u16* __restrict__ weight, const float* __restrict__ column_sums,
                        const float* __restrict__ bias, u16* __restrict__ hidden,
                        float* __restrict__ energy, int size) {
  extern __shared__ unsigned char raw[];
  const SharedMemory memory = aligned_memory(raw);
  const int blocks = size / kColumns;
  const int first_column = blockIdx.x % blocks * kColumns;
  const i64 strip = blockIdx.x / blocks;

  // The same in all lanes of a warp, which the compiler cannot know.
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
  const int warp = thread / 32, lane = thread % 32, quad = lane % 4;
  const i64 first = (strip * kGroups + group) * kRows;
  const u16* const source = x + first * kInner;
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

  // For each pair of columns: the sums of the weights, and half of the bias.
  float4* const terms = (float4*)(memory.bytes + kTermsAt);
  if (threadIdx.x < kColumns / 2) {
    const float2 sums = ((const float2*)(column_sums + first_column))[threadIdx.x];
    const float2 b = ((const float2*)(bias + first_column))[threadIdx.x];
    terms[threadIdx.x] = make_float4(sums.x, sums.y, 0.5f * b.x, 0.5f * b.y);
  }
  // Factor and offset of the normalisation of this thread's two rows, halved.
  float factor[2], offset[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float2 m = moments[first + 16 * warp + lane / 4 + 8 * i];
    factor[i] = 0.5f * m.x;
    offset[i] = 0.5f * m.y;
  }

  float sum[128];
#pragma unroll 1
  for (int slice = 0; slice < kSlices; ++slice) {
    wait_for_copies<kStages - 3>();
    // All have this slice, and are done with the slice two before: its stage can be filled again.
    __syncthreads();
    copy_slice(slice + kStages - 2);
    const u32 stage = memory.address + slice % kStages * kStageBytes;
    const u64 a = S::descriptor(stage + group * kTileBytes);
    const u64 b = S::descriptor(stage + kGroups * kTileBytes);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < kSlice / 16; ++k) multiply(sum, a + 2 * k, b + 2 * k, slice == 0 && k == 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    wait_for_products<1>();
  }
  wait_for_products<0>();
  hold(sum);
  wait_for_copies<0>();
  __syncthreads();  // the stages are free

  unsigned char* const staging = memory.bytes + threadIdx.x / 32 * kStagingBytes;
  const u32 staging_address = memory.address + threadIdx.x / 32 * kStagingBytes;
  float* const squares_of_warps = (float*)(memory.bytes + kSquaresAt);
  TermsAhead terms_ahead(terms + quad);
#pragma unroll
  for (int part = 0; part < kColumns / kPart; ++part) {
#pragma unroll
    for (int block = 0; block < 8; block += 2) {
      u32 pairs[4];
      float4 terms_of[2];
      terms_ahead.take<kColumns / 8>(terms_of, 8 * part + block);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int j = 8 * part + block + i;
        const float4 term = terms_of[i];
        float value[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float sum_of_column = k % 2 ? term.y : term.x, half_bias = k % 2 ? term.w : term.z;
          value[k] = gelu_of_double(fmaf(sum[4 * j + k], factor[k / 2],
                                         fmaf(offset[k / 2], sum_of_column, half_bias)));
        }
        // Over the rows of the warp, always in the same order.
        float squares[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          squares[k] = fmaf(value[k], value[k], value[k + 2] * value[k + 2]);
          squares[k] += __shfl_xor_sync(0xffffffffu, squares[k], 4);
          squares[k] += __shfl_xor_sync(0xffffffffu, squares[k], 8);
          squares[k] += __shfl_xor_sync(0xffffffffu, squares[k], 16);
        }
        if (lane < 4) {
          ((float2*)(squares_of_warps + threadIdx.x / 32 * kColumns))[4 * j + quad] =
              make_float2(squares[0], squares[1]);
        }
        pairs[2 * i] = to_pair(value[0], value[1]);
        pairs[2 * i + 1] = to_pair(value[2], value[3]);
      }
      store_block(staging_address, pairs, block, lane);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 4 * i + lane / 8, unit = lane % 8;
      *(uint4*)(hidden + (first + 16 * warp + row) * size + first_column + part * kPart + 8 * unit) =
          load_row_unit(staging, row, unit);
    }
    __syncwarp();
  }
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < 4 * kGroups; ++i) total += squares_of_warps[i * kColumns + threadIdx.x];
  energy[strip * size + first_column + threadIdx.x] = total;
}
