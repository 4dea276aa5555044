// Sums and maxima of the raw pixels of components; a part of label.cu, which see.
//
// Floating-point sums depend on their order, and the order of threads is not fixed. So each
// component gets a fixed point of its own: the largest magnitude M is found first, then values are
// added as 64-bit integers in units of M 2^-62 or so, times the number of pixels. Integers of up to
// 32 bits are exact, and so are floats as long as those of one component span fewer than 2^62
// units: raw counts do. Beyond, the error is below half a unit a pixel, less than float64's own.

struct Pixels {
    const void* base;
    int dtype;
    i64 offset, stride_h, stride_w;  // in elements

    __device__ double at(u32 y, u32 x) const {
        const i64 i = offset + y * stride_h + x * stride_w;
        switch (dtype) {  // the same for all threads: a branch, not a divergence
            case 0: return static_cast<const u8*>(base)[i];
            case 1: return static_cast<const signed char*>(base)[i];
            case 2: return static_cast<const u16*>(base)[i];
            case 3: return static_cast<const short*>(base)[i];
            case 4: return static_cast<const u32*>(base)[i];
            case 5: return static_cast<const int*>(base)[i];
            case 6: return static_cast<const float*>(base)[i];
            default: return static_cast<const double*>(base)[i];
        }
    }
};

constexpr double kLargestDouble = 1.7976931348623157e308;
constexpr u64 kSign = 0x8000000000000000ull;
constexpr i64 kNotANumber = 0x7ff8000000000000ll;

// An order of unsigned integers that is the order of the doubles; 0 is below all of them.
__device__ inline u64 order_of(double value) {
    const u64 bits = __double_as_longlong(value);
    return bits & kSign ? ~bits : bits | kSign;
}
__device__ inline double value_of(u64 order) {
    return __longlong_as_double(order & kSign ? order & ~kSign : ~order);
}

// The number of binary places that num_pixels values up to `largest` leave below bit 62.
__device__ inline int binary_places(double largest, u64 num_pixels) {
    return 62 - (ilogb(largest) + 1) - (64 - __clzll(num_pixels));
}

// Barriers have made the atomic sums visible; volatile keeps an old line of the L1 cache out.
__device__ inline u64 read(const u64* sum) {
    return *static_cast<const volatile u64*>(sum);
}

// NaN and infinite pixels are left out; a component of nothing else has the sum 0, the maximum NaN.
template <typename Index>
__device__ inline void add_intensity(const Panel<Index>& panel, u32 num_occupied,
                                     const Table& table, u32 components, const Pixels& pixels) {
    Gather<Max, 2> extremes = {{table.column(4), table.largest}};
    each_part(panel, num_occupied, [&](u32 rank, u32 y, u32 x, u32 bits) {
        u64 highest = 0;
        double largest = 0.0;
#pragma unroll 1
        for (; bits; bits &= bits - 1) {
            const double value = pixels.at(y, x + __ffs(bits) - 1);
            if (!(fabs(value) <= kLargestDouble)) continue;
            highest = max(highest, order_of(value));
            largest = fmax(largest, fabs(value));
        }
        extremes.add(rank, {highest, static_cast<u64>(__double_as_longlong(largest))});
    });
    extremes.finish();
    __syncthreads();
    Gather<Add, 1> sums = {{table.column(3)}};
    each_part(panel, num_occupied, [&](u32 rank, u32 y, u32 x, u32 bits) {
        const double largest = __longlong_as_double(read(table.largest + rank));
        if (largest == 0.0) return;
        const int places = binary_places(largest, read(table.column(0) + rank));
        i64 sum = 0;
#pragma unroll 1
        for (; bits; bits &= bits - 1) {
            const double value = pixels.at(y, x + __ffs(bits) - 1);
            if (fabs(value) <= kLargestDouble) sum += __double2ll_rn(scalbn(value, places));
        }
        sums.add(rank, {static_cast<u64>(sum)});
    });
    sums.finish();
    __syncthreads();
    for (u32 rank = threadIdx.x; rank < components; rank += kThreads) {
        const double largest = __longlong_as_double(read(table.largest + rank));
        const u64 highest = read(table.column(4) + rank);
        double sum = 0.0;
        if (largest != 0.0) {
            const int places = binary_places(largest, read(table.column(0) + rank));
            const i64 units = static_cast<i64>(read(table.column(3) + rank));
            sum = scalbn(static_cast<double>(units), -places);
        }
        table.column(3)[rank] = __double_as_longlong(sum);
        table.column(4)[rank] = highest ? __double_as_longlong(value_of(highest)) : kNotANumber;
    }
}
