// From what a network gives to one bit per pixel: is this pixel part of a peak?
//
// A bit mask is 1/64 of float32 logits and is all that the labelling reads; a panel of 512 x 512
// pixels takes 32 KiB. Rows are padded with zeros to whole 32-bit words. Bit i of byte j of a row
// is pixel x = 8 j + i, so that a word holds its 32 pixels with the leftmost in the lowest bit. The
// words of two rows alternate, as label.cu reads them together; nobody writes a missing last row.
//
// Every thread makes whole bytes and no thread needs another: no warp primitives, no shared memory.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};

__device__ inline float widen(float value) {
    return value;
}
__device__ inline float widen(bf16 value) {
    return __uint_as_float(static_cast<u32>(value.bits) << 16);
}
__device__ inline float widen(f16 value) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
}

// round_to<T>: what is left of a float32 once torch has stored it as a T (nearest, ties to even).
template <typename T> __device__ float round_to(float value);
template <> __device__ inline float round_to<float>(float value) {
    return value;
}
template <> __device__ inline float round_to<bf16>(float value) {
    if (value != value) return value;  // the carry below could turn a NaN into a number
    const u32 bits = __float_as_uint(value);
    return __uint_as_float((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}
template <> __device__ inline float round_to<f16>(float value) {
    f16 narrow;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
    return widen(narrow);
}

// Two logits of a pixel, as torch has stored them: one instruction for both where there is one.
template <typename T> __device__ inline void round_both(float& a, float& b) {
    a = round_to<T>(a);
    b = round_to<T>(b);
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <> __device__ inline void round_both<bf16>(float& a, float& b) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(b), "f"(a));
    a = __uint_as_float(both << 16);
    b = __uint_as_float(both & 0xffff0000u);
}
#endif

// The class map is defined as logits.softmax(1).argmax(1) != 0, computed in the dtype T of the
// logits. Two probabilities that round to the same T tie, and argmax gives a tie to the lower
// index, the background. So a peak needs more than the larger logit. Of two classes that are `lead`
// apart the background has the probability 1/2 - lead/4 + ..., and it parts from 1/2 by rounding
// where lead/4 exceeds half a step of T below 1/2: beyond a lead of 2^-8 in bfloat16, 2^-11 in
// float16.
//
// That border is only as sharp as the float32 arithmetic of the softmax. Near it, and for float32
// itself, the softmax is carried out to the letter as torch's CUDA kernel does: exponentials in
// float32, added up in the order of the classes, one division, one rounding to T.
//
// kTied, kApart: up to and beyond which lead two classes surely tie and surely do not.
// kApartOfMany: the same beyond for any number of classes: exp(lead) is several steps of T above 1.
template <typename T> struct Rule;
template <> struct Rule<bf16> {
    static constexpr float kTied = (1.0f - 1.0f / 64) / (1 << 8);
    static constexpr float kApart = (1.0f + 1.0f / 64) / (1 << 8);
    static constexpr float kApartOfMany = 1.0f / (1 << 5);
};
template <> struct Rule<f16> {
    static constexpr float kTied = (1.0f - 1.0f / 64) / (1 << 11);
    static constexpr float kApart = (1.0f + 1.0f / 64) / (1 << 11);
    static constexpr float kApartOfMany = 1.0f / (1 << 8);
};
template <> struct Rule<float> {
    static constexpr float kTied = 0.0f;
    static constexpr float kApart = 1.0f / (1 << 19);
    static constexpr float kApartOfMany = kApart;
};

constexpr float kLargestFloat = 3.402823466e38f;

// `sum` of exp(logit - best) over all classes; the best class is not the background.
template <typename T> __device__ bool beats_background(float best, float background, float sum) {
    return round_to<T>(1.0f / sum) > round_to<T>(expf(background - best) / sum);
}

template <typename T> __device__ bool is_peak(float background, float peak) {
    const float lead = peak - background;
    // NaN fails every comparison. An infinite logit makes softmax NaN in all classes, and argmax
    // gives class 0, whereas -inf for the background alone makes a certain peak.
    if (!(lead > Rule<T>::kTied) || peak > kLargestFloat) return false;
    if (lead > Rule<T>::kApart) return true;
    return beats_background<T>(peak, background, expf(background - peak) + 1.0f);
}

// Eight neighbours as one aligned block: read with the widest loads there are.
template <typename T>
struct alignas(sizeof(T) >= 2 ? 16 : 8) Eight {
    T pixels[8];
};

enum Layout {
    kPlanar,       // pixels of a row adjoin, every group of eight aligned: 16-byte loads
    kInterleaved,  // two classes side by side (channels_last), likewise aligned
    kStrided,      // anything else
};

struct Place {
    u32 panel, y, byte;
};

__device__ inline bool place_of_thread(u32 panels, u32 rows, u32 row_bytes, Place* place) {
    const u32 thread = blockIdx.x * blockDim.x + threadIdx.x;  // the host checks that this fits
    const u32 row = thread / row_bytes;
    place->byte = thread - row * row_bytes;
    place->panel = row / rows;
    place->y = row - place->panel * rows;
    return place->panel < panels;
}

__device__ inline void store(u8* mask, u32 height, u32 row_bytes, const Place& place, u32 bits) {
    const i64 strip = static_cast<i64>(place.panel) * ((height + 1) / 2) + place.y / 2;
    const u32 word = place.byte / 4 * 2 + place.y % 2;
    mask[strip * 2 * row_bytes + word * 4 + place.byte % 4] = bits;
}

// Clears the bits of pixels that are not valid. Peaks are rare: reads next to nothing.
struct Valid {
    const u8* base;
    i64 stride_n, stride_h, stride_w;

    __device__ u32 keep(u32 bits, const Place& place) const {
        if (!base || !bits) return bits;
        const u8* row = base + place.panel * stride_n + place.y * stride_h;
        for (u32 left = bits; left; left &= left - 1) {
            const u32 i = __ffs(left) - 1;
            if (!row[(place.byte * 8 + i) * stride_w]) bits &= ~(1u << i);
        }
        return bits;
    }
};

template <typename T>
__device__ bool is_peak_of_many(const T* logits, i64 stride_c, int classes) {
    const float background = widen(logits[0]);
    float best = widen(logits[stride_c]);
    for (int c = 1; c < classes; ++c) {
        const float logit = widen(logits[c * stride_c]);
        if (!(logit <= kLargestFloat)) return false;  // infinite or NaN: see is_peak
        best = fmaxf(best, logit);
    }
    const float lead = best - background;
    if (!(lead > 0.0f)) return false;
    if (lead > Rule<T>::kApartOfMany) return true;
    float sum = 0.0f;
    for (int c = 0; c < classes; ++c) sum += expf(widen(logits[c * stride_c]) - best);
    return beats_background<T>(best, background, sum);
}

template <typename T, Layout kLayout>
__device__ void pack_logits(const T* logits, i64 stride_n, i64 stride_c, i64 stride_h, i64 stride_w,
                            int classes, u32 panels, u32 height, u32 width, u32 row_bytes,
                            const Valid& valid, u8* mask) {
    Place at;
    if (!place_of_thread(panels, height, row_bytes, &at)) return;
    const u32 x = at.byte * 8;
    const T* first = logits + at.panel * stride_n + at.y * stride_h + x * stride_w;
    u32 bits = 0;
    if (kLayout != kStrided && classes == 2 && x + 8 <= width) {
        const Eight<T> low = *reinterpret_cast<const Eight<T>*>(first);
        const Eight<T> high =
            *reinterpret_cast<const Eight<T>*>(first + (kLayout == kPlanar ? stride_c : 8));
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (kLayout == kPlanar) {
                bits |= is_peak<T>(widen(low.pixels[i]), widen(high.pixels[i])) << i;
            } else {
                const Eight<T>& half = i < 4 ? low : high;
                const int pair = 2 * (i & 3);
                bits |= is_peak<T>(widen(half.pixels[pair]), widen(half.pixels[pair + 1])) << i;
            }
        }
    } else {
        for (u32 i = 0; i < 8 && x + i < width; ++i) {
            bits |= static_cast<u32>(is_peak_of_many(first + i * stride_w, stride_c, classes)) << i;
        }
    }
    store(mask, height, row_bytes, at, valid.keep(bits, at));
}

template <typename T, Layout kLayout>
__device__ void pack_classes(const T* classes, i64 stride_n, i64 stride_h, i64 stride_w, u32 panels,
                             u32 height, u32 width, u32 row_bytes, const Valid& valid, u8* mask) {
    Place at;
    if (!place_of_thread(panels, height, row_bytes, &at)) return;
    const u32 x = at.byte * 8;
    const T* first = classes + at.panel * stride_n + at.y * stride_h + x * stride_w;
    u32 bits = 0;
    if (kLayout == kPlanar && x + 8 <= width) {
        const Eight<T> eight = *reinterpret_cast<const Eight<T>*>(first);
#pragma unroll
        for (int i = 0; i < 8; ++i) bits |= (eight.pixels[i] != 0) << i;
    } else {
        for (u32 i = 0; i < 8 && x + i < width; ++i) bits |= (first[i * stride_w] != 0) << i;
    }
    store(mask, height, row_bytes, at, valid.keep(bits, at));
}

// One factor of the bilinear interpolation. Written out as the compiler contracts torch's
// `w0 * a + w1 * b`, so that float32 results agree to the last bit.
__device__ inline float lerp(float a, float b, float w1) {
    return __fmaf_rn(1.0f - w1, a, __fmul_rn(w1, b));
}

// Four times as many pixels a row: the eight pixels of cells 1 and 2 of `cells` 0..3. Pixel centres
// on halves put the four pixels of a cell at -3/8, -1/8, 1/8 and 3/8 of it. Torch clamps positions
// left of the first centre to it, which gives its right neighbour the weight 0.
__device__ inline void widen_row(const float (&cells)[4], bool at_left, float (&pixels)[8]) {
    const float a = at_left ? cells[1] : cells[0];
    const float b = at_left ? cells[2] : cells[1];
    pixels[0] = lerp(a, b, at_left ? 0.0f : 0.625f);
    pixels[1] = lerp(a, b, at_left ? 0.0f : 0.875f);
    pixels[2] = lerp(cells[1], cells[2], 0.125f);
    pixels[3] = lerp(cells[1], cells[2], 0.375f);
    pixels[4] = lerp(cells[1], cells[2], 0.625f);
    pixels[5] = lerp(cells[1], cells[2], 0.875f);
    pixels[6] = lerp(cells[2], cells[3], 0.125f);
    pixels[7] = lerp(cells[2], cells[3], 0.375f);
}

// The cell before `next`, or the nearest one there is.
__device__ inline int inside(u32 next, u32 cells) {
    return min(max(static_cast<int>(next) - 1, 0), static_cast<int>(cells) - 1);
}

// A thread makes one byte of each of four rows: two cells of the low resolution.
template <typename T>
__device__ void pack_upsampled(const T* logits, i64 stride_n, i64 stride_c, i64 stride_h,
                               i64 stride_w, u32 panels, u32 cells_high, u32 cells_wide,
                               u32 row_bytes, const Valid& valid, u8* mask) {
    Place at;
    if (!place_of_thread(panels, cells_high, row_bytes, &at)) return;
    u32 bits[4] = {0, 0, 0, 0};
    float cells[2][3][4];
    bool any = false;
    if (at.byte * 2 < cells_wide) {
#pragma unroll
        for (int dy = 0; dy < 3; ++dy) {
            const int y = inside(at.y + dy, cells_high);
#pragma unroll
            for (int dx = 0; dx < 4; ++dx) {
                const int x = inside(at.byte * 2 + dx, cells_wide);
                const T* cell = logits + at.panel * stride_n + y * stride_h + x * stride_w;
                cells[0][dy][dx] = widen(cell[0]);
                cells[1][dy][dx] = widen(cell[stride_c]);
                any |= cells[1][dy][dx] > cells[0][dy][dx];
            }
        }
    }
    // Rounding is monotonic: where the background leads in every cell around, it leads in every
    // pixel between them, to the last bit. That settles nearly all pixels of a detector image.
    if (any) {
        float rows[2][3][8];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
#pragma unroll
            for (int dy = 0; dy < 3; ++dy) widen_row(cells[c][dy], at.byte == 0, rows[c][dy]);
        }
        const bool at_top = at.y == 0;  // as at the left
        const float weights[4] = {at_top ? 0.0f : 0.625f, at_top ? 0.0f : 0.875f, 0.125f, 0.375f};
        const u32 width = min(8u, 4 * (cells_wide - at.byte * 2));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int x = 0; x < 8; ++x) {
                float logit[2];
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const float upper = i < 2 && !at_top ? rows[c][0][x] : rows[c][1][x];
                    const float lower = i < 2 && !at_top ? rows[c][1][x] : rows[c][2][x];
                    logit[c] = lerp(upper, lower, weights[i]);
                }
                round_both<T>(logit[0], logit[1]);
                bits[i] |= is_peak<T>(logit[0], logit[1]) << x;
            }
            bits[i] &= (1u << width) - 1;
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const Place pixel = {at.panel, at.y * 4 + i, at.byte};
        store(mask, cells_high * 4, row_bytes, pixel, valid.keep(bits[i], pixel));
    }
}

// The kernels by name: the parameters that all share, then one kernel for each dtype and layout.
#define MASK                                                                                    \
    u32 panels, u32 height, u32 width, u32 row_bytes, const u8 *valid, i64 valid_n, i64 valid_h, \
        i64 valid_w, u8 *mask
#define VALID \
    Valid { valid, valid_n, valid_h, valid_w }

#define LOGITS(NAME, T, LAYOUT)                                                             \
    extern "C" __global__ void __launch_bounds__(256) NAME(                                 \
        const T* logits, i64 n, i64 c, i64 h, i64 w, int classes, MASK) {                   \
        pack_logits<T, LAYOUT>(logits, n, c, h, w, classes, panels, height, width, row_bytes, \
                               VALID, mask);                                                \
    }
LOGITS(peaknet_pack_logits_bfloat16_planar, bf16, kPlanar)
LOGITS(peaknet_pack_logits_bfloat16_interleaved, bf16, kInterleaved)
LOGITS(peaknet_pack_logits_bfloat16_strided, bf16, kStrided)
LOGITS(peaknet_pack_logits_float16_planar, f16, kPlanar)
LOGITS(peaknet_pack_logits_float16_interleaved, f16, kInterleaved)
LOGITS(peaknet_pack_logits_float16_strided, f16, kStrided)
LOGITS(peaknet_pack_logits_float32_planar, float, kPlanar)
LOGITS(peaknet_pack_logits_float32_interleaved, float, kInterleaved)
LOGITS(peaknet_pack_logits_float32_strided, float, kStrided)

#define UPSAMPLED(NAME, T)                                                                       \
    extern "C" __global__ void __launch_bounds__(256)                                            \
        NAME(const T* logits, i64 n, i64 c, i64 h, i64 w, MASK) {                                \
        pack_upsampled<T>(logits, n, c, h, w, panels, height / 4, width / 4, row_bytes, VALID,   \
                          mask);                                                                 \
    }
UPSAMPLED(peaknet_pack_upsampled_bfloat16, bf16)
UPSAMPLED(peaknet_pack_upsampled_float16, f16)
UPSAMPLED(peaknet_pack_upsampled_float32, float)

// Whether an integer is zero does not depend on its sign: by size, not by type.
#define CLASSES(NAME, T, LAYOUT)                                                                 \
    extern "C" __global__ void __launch_bounds__(256)                                            \
        NAME(const T* classes, i64 n, i64 h, i64 w, MASK) {                                      \
        pack_classes<T, LAYOUT>(classes, n, h, w, panels, height, width, row_bytes, VALID, mask); \
    }
CLASSES(peaknet_pack_classes_1_planar, u8, kPlanar)
CLASSES(peaknet_pack_classes_1_strided, u8, kStrided)
CLASSES(peaknet_pack_classes_2_planar, u16, kPlanar)
CLASSES(peaknet_pack_classes_2_strided, u16, kStrided)
CLASSES(peaknet_pack_classes_4_planar, u32, kPlanar)
CLASSES(peaknet_pack_classes_4_strided, u32, kStrided)
CLASSES(peaknet_pack_classes_8_planar, u64, kPlanar)
CLASSES(peaknet_pack_classes_8_strided, u64, kStrided)
