// The depthwise 7x7 convolution of a ConvNeXt block on bfloat16 features with channels last, and the
// sums that the normalisation after it needs.
//
// The tensor cores compute it. Of one channel, eight pixels side by side depend on 14 in each of
// seven rows: for each row of taps they are a product of 16 pixels with a 16x8 matrix that has the
// taps along its diagonal. 16 such spans of eight pixels are the rows of one instruction, and what
// has been read of a row of pixels serves the seven rows of output that depend on it. More than half
// of the products are with zeros; still, seven instructions do what takes 98 of two float16 each.
//
// A block of threads computes a tile of pixels for 32 channels. Its input, with a border, is laid out in
// shared memory in one plane for each channel. A warp takes four channels, and leaves its output in
// their planes. From there pixels are stored with their channels side by side again.
//
// The factors are float16, which keeps eight times as much of a weight as bfloat16 does; sums are
// float32. A NaN spreads to all the spans that it is multiplied with, though by zeros.
//
// CHANNELS, a multiple of 8, is defined by whoever compiles this: most addresses are then constants.

#include "bfloat16.cuh"

constexpr int kTaps = 7, kBorder = 3;
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kChannels = 32;
constexpr int kWarpChannels = kChannels / kWarps;
constexpr int kSpan = 8;    // pixels side by side that a row of an instruction computes
constexpr int kSpans = 16;  // rows of an instruction
constexpr int kMargin = 4;  // columns before a tile that lie in its planes: the border, and an even number
constexpr int kAllChannels = CHANNELS;
constexpr int kChannelGroups = (kAllChannels + kChannels - 1) / kChannels;

// Seven taps of a row in pairs, from the first on, then from the place before the first on, then zeros.
constexpr int kTapPairs = 9, kNoTaps = 8;

// kAcross spans side by side, and strips of kStripRows rows one below the other.
template <int kSpansAcross, int kRowsOfStrip>
struct Tile {
  static constexpr int kAcross = kSpansAcross, kStripRows = kRowsOfStrip;
  static constexpr int kColumns = kSpan * kAcross, kRows = kStripRows * kSpans / kAcross;
  static constexpr int kInputRows = kRows + kTaps - 1;
  // A word of a plane is two pixels side by side.
  static constexpr int kPitch = (kColumns + 2 * kMargin) / 2, kPairs = kInputRows * kPitch;
  static constexpr int kStrip = kStripRows * kPitch;
  static_assert(kPitch % 4 == 0, "rows are read in 16 bytes");
  static_assert(kStrip % 32 == 4 * kAcross || kStrip % 32 == 32 - 4 * kAcross,
                "the spans of an instruction lie in different banks");
  // So do, by the distance of planes, the eight rows of a matrix that `store_pixels` loads, and what
  // the four parts of a pixel's channels store in `lay_out`.
  static constexpr int kPlane = (kPairs + 3) / 8 * 8 + 4, kPart = 8 * kPlane + 8;
  // Threads copy the input pair by pair of pixels, a quarter of its channels each, to where the
  // planes will be.
  static constexpr int kPairsAtATime = kThreads / 4;
  static constexpr int kCopies = (kPairs + kPairsAtATime - 1) / kPairsAtATime;
  static constexpr int kCopyWords = kCopies * kThreads * 8, kPlaneWords = kChannels / 8 * kPart;
  static constexpr int kWords = kCopyWords > kPlaneWords ? kCopyWords : kPlaneWords;

  static __device__ __forceinline__ int plane(int channel) {
    return channel / 8 * kPart + channel % 8 * kPlane;
  }
};

// Two float16 from floats. Values beyond what it can hold become the largest that it can; NaN stays.
__device__ __forceinline__ u32 to_float16(float low, float high) {
  u32 pair;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// a · b + sum: 16x8 = 16x16 · 16x8. With q = lane % 4 and g = lane / 4, `a` holds columns 2q and 2q + 1
// of row g and of row g + 8, then columns 2q + 8 and 2q + 9 of both; `b` rows 2q and 2q + 1, then 2q + 8
// and 2q + 9, of column g; `sum` columns 2q and 2q + 1 of row g, then of row g + 8.
#define MULTIPLY(name, type)                                                                      \
  __device__ __forceinline__ float4 name(u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1,          \
                                         float4 sum) {                                            \
    float4 d;                                                                                     \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, "          \
        "{%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                                       \
        : "=f"(d.x), "=f"(d.y), "=f"(d.z), "=f"(d.w)                                              \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(sum.x), "f"(sum.y),           \
          "f"(sum.z), "f"(sum.w));                                                                \
    return d;                                                                                     \
  }
MULTIPLY(multiply_float16, "f16")
MULTIPLY(multiply_bfloat16, "bf16")

// Four 8x8 matrices of 16 bits, transposed: lane l gives where row l % 8 of matrix l / 8 lies, and gets
// rows 2q and 2q + 1 of column g of each.
__device__ __forceinline__ void load_transposed(u32 (&value)[4], const u32* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(value[0]), "=r"(value[1]), "=r"(value[2]), "=r"(value[3])
               : "r"((u32)__cvta_generic_to_shared(row))
               : "memory");
}

// Where in the table of a row of taps the pair is that begins with tap `first`.
__device__ __forceinline__ int pair_index(int first) {
  if (first < -1 || first >= kTaps) return kNoTaps;
  return first % 2 == 0 ? first / 2 : 4 + (first + 1) / 2;
}

// The taps of 32 channels in pairs: table[kChannels][kTaps][kTapPairs].
__device__ __forceinline__ void prepare_taps(const u16* weight, u32* table, int first_channel) {
  const int channel = threadIdx.x % kChannels, row = threadIdx.x / kChannels;
  if (row >= kTaps) return;
  const bool is_channel = first_channel + channel < kAllChannels;
  const u16* const from = weight + row * kTaps * kAllChannels + first_channel + channel;
  u32 tap[kTaps + 2];
  tap[0] = tap[kTaps + 1] = 0;
#pragma unroll
  for (int i = 0; i < kTaps; ++i) tap[i + 1] = is_channel ? from[i * kAllChannels] : 0;
  u32* const to = table + (channel * kTaps + row) * kTapPairs;
#pragma unroll
  for (int i = 0; i < kTaps + 1; ++i) {
    const int first = i < 4 ? 2 * i + 1 : 2 * (i - 4);
    to[i] = tap[first] | tap[first + 1] << 16;
  }
  to[kNoTaps] = 0;
}

// Copies 16 bytes, or zeros, to shared memory. They go past the first cache, which has room for much
// less under way: it keeps a line of 128 bytes for the 64 of a pixel.
__device__ __forceinline__ void copy(uint4* to, const void* from, bool is_any) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   (u32)__cvta_generic_to_shared(to)),
               "l"(from), "r"(is_any ? 16 : 0)
               : "memory");
}

// Asks for the tile's input.
template <class T>
__device__ __forceinline__ void begin_copies(const u16* panel, uint4* copies, int first_row,
                                             int first_column, int first_channel, int height,
                                             int width) {
  const int part = threadIdx.x % 4;
  const bool is_part = first_channel + 8 * part < kAllChannels;
  int row = threadIdx.x / 4 / T::kPitch, column = threadIdx.x / 4 % T::kPitch;
  panel += first_channel + 8 * part;
  asm("" : "+l"(panel));  // so that it is not computed anew for every copy
#pragma unroll
  for (int k = 0; k < T::kCopies; ++k) {
    const int y = first_row - kBorder + row, x = first_column - kMargin + 2 * column;
    const bool is_row = row < T::kInputRows && is_part && (u32)y < (u32)height;
    // A panel has less than 2**31 values.
    const u16* const from = panel + (y * width + x) * kAllChannels;
    copy(copies + 2 * k * kThreads + threadIdx.x, from, is_row && (u32)x < (u32)width);
    copy(copies + (2 * k + 1) * kThreads + threadIdx.x, from + kAllChannels,
         is_row && (u32)(x + 1) < (u32)width);
    row += T::kPairsAtATime / T::kPitch;
    column += T::kPairsAtATime % T::kPitch;
    if (column >= T::kPitch) {
      column -= T::kPitch;
      ++row;
    }
  }
}

// Lays out in planes what has been copied.
template <class T>
__device__ __forceinline__ void lay_out(u32* planes, const uint4* copies) {
  uint4 copied[T::kCopies][2];
  asm volatile("cp.async.wait_all;" ::: "memory");
#pragma unroll
  for (int k = 0; k < 2 * T::kCopies; ++k) {
    copied[k / 2][k % 2] = copies[k * kThreads + threadIdx.x];
  }
  __syncthreads();
  planes += threadIdx.x % 4 * T::kPart;
#pragma unroll
  for (int k = 0; k < T::kCopies; ++k) {
    const int pair = k * T::kPairsAtATime + threadIdx.x / 4;
    if (pair >= T::kPairs) break;
    const uint4 left = copied[k][0], right = copied[k][1];
    const u32 of_left[4] = {left.x, left.y, left.z, left.w};
    const u32 of_right[4] = {right.x, right.y, right.z, right.w};
#pragma unroll
    for (int c = 0; c < 8; c += 2) {
      const u32 l = of_left[c / 2], r = of_right[c / 2];
      planes[c * T::kPlane + pair] = to_float16(low(l), low(r));
      planes[(c + 1) * T::kPlane + pair] = to_float16(high(l), high(r));
    }
  }
}

// Convolves two planes and leaves the output, in bfloat16, in their first rows and columns.
template <class T>
__device__ __forceinline__ void convolve_planes(u32* planes, const u32* table, const float2 factor,
                                                const float2 bias) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  // Rows g and g + 8 of an instruction are spans of two strips.
  const int span = g / T::kAcross * T::kStrip + g % T::kAcross * (kSpan / 2) + q;
  constexpr int kLower = 8 / T::kAcross * T::kStrip;

  // Row i of column g of the matrix of taps is tap i - g - 1: the first pixel is one before the border.
  const int first_tap = 2 * q - g - 1;
  const int one = pair_index(first_tap), next = pair_index(first_tap + 8);
  u32 taps[2][kTaps][2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
#pragma unroll
    for (int row = 0; row < kTaps; ++row) {
      taps[c][row][0] = table[(c * kTaps + row) * kTapPairs + one];
      taps[c][row][1] = table[(c * kTaps + row) * kTapPairs + next];
    }
  }

  float4 sum[2][T::kStripRows];
  u32 out[2][T::kStripRows][2];
#pragma unroll
  for (int r = 0; r < T::kStripRows + kTaps - 1; ++r) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const u32* const at = planes + c * T::kPlane + span + r * T::kPitch;
      const u32 a0 = at[0], a1 = at[kLower], a2 = at[kSpan / 2], a3 = at[kLower + kSpan / 2];
#pragma unroll
      for (int row = 0; row < kTaps; ++row) {
        const int to = r - row;
        if (to < 0 || to >= T::kStripRows) continue;
        sum[c][to] = multiply_float16(a0, a1, a2, a3, taps[c][row][0], taps[c][row][1],
                                      row == 0 ? make_float4(0, 0, 0, 0) : sum[c][to]);
      }
      const int done = r - (kTaps - 1);
      if (done < 0) continue;
      const float f = c == 0 ? factor.x : factor.y, b = c == 0 ? bias.x : bias.y;
      const float4 v = sum[c][done];
      out[c][done][0] = to_pair(fmaf(v.x, f, b), fmaf(v.y, f, b));
      out[c][done][1] = to_pair(fmaf(v.z, f, b), fmaf(v.w, f, b));
    }
  }
  __syncwarp();  // no other warp reads these planes
#pragma unroll
  for (int i = 0; i < 2 * T::kStripRows; ++i) {
    const int c = i / T::kStripRows, r = i % T::kStripRows;
    u32* const to = planes + c * T::kPlane + span + r * T::kPitch;
    to[0] = out[c][r][0];
    to[kLower] = out[c][r][1];
  }
}

// Stores 16 pixels of a row, and the sums over their channels. A lane holds eight channels of two pixels.
template <class T>
__device__ __forceinline__ void store_pixels(const u32* planes, u16* out, float* sums, i64 pixels,
                                             bool is_part, bool is_first, bool is_second) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  // Row i of matrix j is a channel such that a lane gets eight in their order.
  const u32* const row = planes + lane % 8 / 2 * T::kPart + (lane / 8 * 2 + lane % 2) * T::kPlane;
  u32 first[4], second[4];
  load_transposed(first, row);
  load_transposed(second, row + kSpan / 2);
  out += (i64)g * kAllChannels + 8 * q;
  if (is_first && is_part) *(uint4*)out = make_uint4(first[0], first[1], first[2], first[3]);
  if (is_second && is_part) {
    *(uint4*)(out + 8 * kAllChannels) = make_uint4(second[0], second[1], second[2], second[3]);
  }
  // Sums of squares are the diagonals of the products of eight pixels with themselves.
  constexpr u32 kOnes = 0x3f803f80u;
  float4 total = {}, of_first = {}, of_second = {};
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    const u32 a0 = first[j], a1 = second[j], a2 = first[j + 1], a3 = second[j + 1];
    total = multiply_bfloat16(a0, a1, a2, a3, kOnes, kOnes, total);
    of_first = multiply_bfloat16(a0, a1, a2, a3, a0, a2, of_first);
    of_second = multiply_bfloat16(a0, a1, a2, a3, a1, a3, of_second);
  }
  if (q != g / 2) return;  // who holds the diagonal
  sums += g;
  if (is_first) {
    sums[0] = total.x;
    sums[pixels] = g % 2 == 0 ? of_first.x : of_first.y;
  }
  if (is_second) {
    sums[8] = total.z;
    sums[pixels + 8] = g % 2 == 0 ? of_second.z : of_second.w;
  }
}

// x, out: (N, H, W, C) bfloat16; weight: (49, C) float16; scale, bias: (C) float32; sums: (C / 32
// rounded up, 2, N * H * W) float32, of what is stored. Grid: tiles times groups of channels; panels.
template <int kAcross, int kStripRows>
__device__ __forceinline__ void convolve(const u16* __restrict__ x, const u16* __restrict__ weight,
                                         const float* __restrict__ scale,
                                         const float* __restrict__ bias, u16* __restrict__ out,
                                         float* __restrict__ sums, int height, int width) {
  using T = Tile<kAcross, kStripRows>;
  extern __shared__ __align__(16) u32 planes[];
  u32* const table = planes + T::kWords;

  const int tiles_across = (width + T::kColumns - 1) / T::kColumns;
  // Groups of channels of one tile follow each other: together they read whole rows of memory.
  const int group = blockIdx.x % kChannelGroups;
  const int tile = blockIdx.x / kChannelGroups;
  const int first_row = tile / tiles_across * T::kRows;
  const int first_column = tile % tiles_across * T::kColumns;
  const int first_channel = group * kChannels;
  const i64 panel_pixels = (i64)height * width, pixels = gridDim.y * panel_pixels;
  const i64 before = blockIdx.y * panel_pixels;

  begin_copies<T>(x + before * kAllChannels, (uint4*)planes, first_row, first_column, first_channel,
                  height, width);
  prepare_taps(weight, table, first_channel);
  lay_out<T>(planes, (uint4*)planes);
  __syncthreads();

  const int warp = threadIdx.x / 32;
#pragma unroll 1
  for (int c = warp * kWarpChannels; c < (warp + 1) * kWarpChannels; c += 2) {
    const bool is_channel = first_channel + c < kAllChannels;
    const float2 none = make_float2(0, 0);
    convolve_planes<T>(planes + T::plane(c), table + c * kTaps * kTapPairs,
                       is_channel ? *(const float2*)(scale + first_channel + c) : none,
                       is_channel ? *(const float2*)(bias + first_channel + c) : none);
  }
  __syncthreads();

  const int q = threadIdx.x % 4, g = threadIdx.x % 32 / 4;
  sums += group * 2 * pixels;
  constexpr int kPieces = T::kColumns / 16;
#pragma unroll 2
  for (int piece = warp; piece < T::kRows * kPieces; piece += kWarps) {
    const int row = piece / kPieces, column = piece % kPieces * 16;
    const int y = first_row + row, left = first_column + column;
    const i64 pixel = before + (i64)y * width + left;
    store_pixels<T>(planes + row * T::kPitch + column / 2, out + pixel * kAllChannels + first_channel,
                    sums + pixel, pixels, first_channel + 8 * q < kAllChannels,
                    y < height && left + g < width, y < height && left + 8 + g < width);
  }
}

// The shared memory that a launch gives, BYTES_16 or BYTES_32, is defined by whoever compiles this.
#define DEPTHWISE(columns, strip_rows, blocks)                                                    \
  static_assert(BYTES_##columns == 4 * (Tile<columns / kSpan, strip_rows>::kWords +               \
                                        kChannels * kTaps * kTapPairs),                           \
                "shared memory of a launch");                                                     \
  extern "C" __global__ void __launch_bounds__(kThreads, blocks) peaknet_depthwise_##columns(     \
      const u16* x, const u16* weight, const float* scale, const float* bias, u16* out,           \
      float* sums, int height, int width) {                                                       \
    convolve<columns / kSpan, strip_rows>(x, weight, scale, bias, out, sums, height, width);      \
  }

// Both compute 16 rows.
DEPTHWISE(16, 2, 4)
DEPTHWISE(32, 4, 3)

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
