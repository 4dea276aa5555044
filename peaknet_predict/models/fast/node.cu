// A node of the BiFPN with 256 features on Hopper: fuse two or three inputs, one of them resized,
// multiply, normalise over the features, GELU, and add the first input, in one pass over memory.
//
// A block keeps the weights in shared memory and stays until all tiles are done. Each of its
// groups of four warps takes tiles of 64 pixels by itself: while one multiplies, others fuse or
// normalise.
//
// Whoever compiles this defines HAS_MIDDLE, whether there is a third input, and EPS, the
// normalisation's.

#include "hopper.cuh"

constexpr int kFeatures = 256;
constexpr int kRows = 64;  // pixels of a tile
constexpr int kGroups = 3;
constexpr int kThreads = 128 * kGroups;
constexpr bool kHasMiddle = HAS_MIDDLE;
constexpr float kEps = EPS;

using S = Slices<64>;

constexpr int kTilesAt = 2 * kFeatures * kFeatures;
constexpr int kTileBytes = 2 * kRows * kFeatures;
constexpr int kTermsAt = kTilesAt + kGroups * kTileBytes;
// Of a warp, 64 columns at a time; in the tile, once it has been multiplied.
constexpr int kStagingBytes = 2 * 16 * 64;

// Where and how much a pixel takes from the other resolution: near and far row and column.
struct Resized {
  int nn, nf, fn, ff;          // offsets in pixels
  float w_nn, w_nf, w_fn, w_ff;
};

// Bilinear with aligned pixel areas: by 2, the nearest pixel counts three quarters; by 1/2, each of the
// four counts the same. `height` and `width` are those of the other resolution.
__device__ __forceinline__ Resized resized(int y, int x, bool up, int height, int width) {
  const int y_near = up ? y >> 1 : 2 * y, x_near = up ? x >> 1 : 2 * x;
  const int y_far = up ? min(max(y_near + 2 * (y & 1) - 1, 0), height - 1) : y_near + 1;
  const int x_far = up ? min(max(x_near + 2 * (x & 1) - 1, 0), width - 1) : x_near + 1;
  const float near = up ? 0.75f : 0.5f, far = 1.f - near;
  return {y_near * width + x_near, y_near * width + x_far, y_far * width + x_near,
          y_far * width + x_far,   near * near,            near * far,
          far * near,              far * far};
}

// same, middle (or null), out: (N, height, width, 256) bfloat16; other: the same with other_height and
// other_width, half or twice as large; weight: (256, 256) bfloat16; scale, shift: (256) float32;
// reciprocal: 2^32 / width, rounded up. Grid: as many blocks as there are multiprocessors.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    peaknet_node(const u16* __restrict__ same, const u16* __restrict__ middle,
                 const u16* __restrict__ other, const u16* __restrict__ weight,
                 const float* __restrict__ scale, const float* __restrict__ shift,
                 u16* __restrict__ out, float same_factor, float middle_factor, float other_factor,
                 int panels, int height, int width, int other_height, int other_width,
                 u32 reciprocal) {
  extern __shared__ unsigned char raw[];
  const SharedMemory memory = aligned_memory(raw);

  // The same in all lanes of a warp, which the compiler cannot know.
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
  const int warp = thread / 32, lane = thread % 32, quad = lane % 4;
  const u32 tile = memory.address + kTilesAt + group * kTileBytes;
  unsigned char* const tile_bytes = memory.bytes + kTilesAt + group * kTileBytes;
  unsigned char* const staging = tile_bytes + warp * kStagingBytes;
  const u32 staging_address = tile + warp * kStagingBytes;

  S::copy<kThreads, kFeatures, kFeatures, false>(memory.address, weight, 0, threadIdx.x);
  // For each pair of columns: halves of scale and shift.
  float4* const terms = (float4*)(memory.bytes + kTermsAt);
  if (threadIdx.x < kFeatures / 2) {
    const float2 a = ((const float2*)scale)[threadIdx.x], b = ((const float2*)shift)[threadIdx.x];
    terms[threadIdx.x] = make_float4(0.5f * a.x, 0.5f * a.y, 0.5f * b.x, 0.5f * b.y);
  }
  wait_for_copies<0>();
  __syncthreads();

  const int pixels = height * width;
  const int tiles = (pixels + kRows - 1) / kRows;
  const bool up = other_height < height;
  for (i64 index = (i64)blockIdx.x * kGroups + group; index < (i64)panels * tiles;
       index += (i64)gridDim.x * kGroups) {
    const i64 panel = index / tiles;
    const int first = (int)(index % tiles) * kRows;
    const u16* const same_panel = same + panel * pixels * kFeatures;
    const u16* const middle_panel = middle + panel * pixels * kFeatures;
    const u16* const other_panel = other + panel * other_height * other_width * kFeatures;
    const int first_y = first / width, first_x = first % width;

    // A warp fuses a row at a time, each lane eight features of it. Rows beyond the last pixel repeat
    // it, so that nothing keeps the loads of several rows from being under way at once.
#pragma unroll 4
    for (int step = 0; step < kRows; step += 4) {
      const int row = step + warp;
      const int pixel = min(first + row, pixels - 1);
      const u32 x = first_x + pixel - first;
      const u32 wraps = __umulhi(x, reciprocal);
      const Resized at = resized(first_y + wraps, x - wraps * width, up, other_height, other_width);
      const u16* const from = other_panel + 8 * lane;
      const uint4 nn = *(const uint4*)(from + (i64)at.nn * kFeatures);
      const uint4 nf = *(const uint4*)(from + (i64)at.nf * kFeatures);
      const uint4 fn = *(const uint4*)(from + (i64)at.fn * kFeatures);
      const uint4 ff = *(const uint4*)(from + (i64)at.ff * kFeatures);
      const uint4 own = *(const uint4*)(same_panel + (i64)pixel * kFeatures + 8 * lane);
      uint4 mid;
      if (kHasMiddle) mid = *(const uint4*)(middle_panel + (i64)pixel * kFeatures + 8 * lane);
      float fused[8] = {};
      add(fused, own, same_factor);
      if (kHasMiddle) add(fused, mid, middle_factor);
      add(fused, nn, other_factor * at.w_nn);
      add(fused, nf, other_factor * at.w_nf);
      add(fused, fn, other_factor * at.w_fn);
      add(fused, ff, other_factor * at.w_ff);
      *(uint4*)(tile_bytes + lane / 8 * (kRows * S::kPitch) + S::place(row, lane % 8)) =
          to_values(fused);
    }
    publish_writes();
    wait_for_group(group);
    float sum[128];
    multiply_tile<64, kFeatures, kFeatures>(sum, tile, memory.address);
    wait_for_group(group);  // all four warps have read the tile

    // The two rows of this thread: mean, then variance around it.
    float factor[2], offset[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // In four parts, so that an addition need not wait for the one before.
      float totals[4] = {}, squares[4] = {};
#pragma unroll
      for (int j = 0; j < 64; ++j) totals[j % 4] += sum[4 * (j / 2) + 2 * i + j % 2];
      const float mean = over_quad(sum_of(totals)) / kFeatures;
#pragma unroll
      for (int j = 0; j < 64; ++j) {
        const float centred = sum[4 * (j / 2) + 2 * i + j % 2] - mean;
        squares[j % 4] = fmaf(centred, centred, squares[j % 4]);
      }
      factor[i] = rsqrtf(over_quad(sum_of(squares)) / kFeatures + kEps);
      offset[i] = -mean * factor[i];
    }

    TermsAhead terms_ahead(terms + quad);
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      // What is added again; asked for early.
      uint4 residual[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * warp + 4 * i + lane / 8;
        if (first + row < pixels) {
          residual[i] = *(const uint4*)(same_panel + (i64)(first + row) * kFeatures + 64 * quarter + lane % 8 * 8);
        }
      }
#pragma unroll
      for (int block = 0; block < 8; block += 2) {
        float4 terms_of[2];
        terms_ahead.take<kFeatures / 8>(terms_of, 8 * quarter + block);
        u32 pairs[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int j = 8 * quarter + block + i;
          const float4 term = terms_of[i];
          float value[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const float normed = fmaf(sum[4 * j + k], factor[k / 2], offset[k / 2]);
            value[k] = gelu_of_double(
                fmaf(normed, k % 2 ? term.y : term.x, k % 2 ? term.w : term.z));
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
        float result[8] = {};
        add(result, load_row_unit(staging, row, unit), 1.f);
        if (first + 16 * warp + row < pixels) {
          add(result, residual[i], 1.f);
          *(uint4*)(out + (panel * pixels + first + 16 * warp + row) * kFeatures + 64 * quarter +
                    8 * unit) = to_values(result);
        }
      }
      __syncwarp();
    }
    wait_for_group(group);  // the tile is free for the next
  }
}
