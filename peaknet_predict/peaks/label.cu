// From a bit mask to the peaks of a panel: 8-connected components and their sums, no label image.
//
// One block labels one panel. It works on runs, maximal rows of set bits, instead of pixels (as in
// He, Chao, Suzuki, "A run-based two-scan labeling algorithm", 2008, and on GPUs Hennequin,
// Lacassagne et al., "A new direct connected component labeling and analysis algorithms for GPUs",
// 2018), and joins them by a union-find whose links always point to the earlier run (Playne and
// Hawick, "A new algorithm for parallel connected-component labelling on GPUs", 2018). A panel of a
// crystal's pattern has a few hundred runs, so that everything fits in shared memory.
//
// 1. Runs are numbered in raster order by a scan over the words: no atomics decide on any number.
// 2. Each run links to the first run that touches it in the row above, then trees are flattened.
// 3. What else touches above is united; the root of a component is its earliest run.
// 4. A scan over the roots ranks the components in raster order of their first pixels.
// 5. Integer sums go straight to row `rank` of the output. They commute: every repetition gives the
//    same bits, whatever the schedule.
//
// A panel with more runs than fit raises a flag: `peaknet_label_large` labels it in global memory.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr u32 kThreads = 1024;
constexpr u32 kWarps = kThreads / 32;
constexpr u32 kAll = 0xffffffffu;
constexpr u32 kRanked = 0x80000000u;  // marks `parent` of a root once it holds the component's rank
constexpr u32 kNoRank = 0xffffffffu;

// Parents are read and written by many threads between barriers. Every value ever stored is an
// ancestor, so any of them will do, but each access must be one indivisible one that the compiler
// does not keep in a register. In shared memory that is volatile; in global memory volatile would
// go to the L2 cache each time, whereas at the scope of a block (cta) the L1 cache may answer.
template <bool kShared> struct Runs {
    u32* parents;
    u16* begin;  // first and last pixel
    u16* end;
    u16* row;
    u32* row_start;  // [height + 1], the first run of each row

    __device__ u32 parent(u32 run) const {
        if (kShared) return *static_cast<volatile u32*>(parents + run);
        u32 value;
        asm volatile("ld.relaxed.cta.u32 %0, [%1];" : "=r"(value) : "l"(parents + run) : "memory");
        return value;
    }
    // Only an ancestor nearer to the root may replace a parent, hence one with a smaller number.
    __device__ void lift(u32 run, u32 ancestor) const {
        if (kShared) {
            atomicMin(parents + run, ancestor);  // a plain store would be a race to the checkers
        } else {
            asm volatile("st.relaxed.cta.u32 [%0], %1;"
                         :
                         : "l"(parents + run), "r"(ancestor)
                         : "memory");
        }
    }
};

struct Mask {
    const u32* words;  // of this panel
    u32 height, row_words;

    // The bits of `word` at which a run starts or ends; a run may cross words, not rows.
    __device__ u32 starts(u32 word, u32 at) const {
        const u32 before = (word & 1u) && at % row_words != 0 ? words[at - 1] >> 31 : 0u;
        return word & ~(word << 1 | before);
    }
    __device__ u32 ends(u32 word, u32 at) const {
        const u32 after = (word >> 31) && (at + 1) % row_words != 0 ? words[at + 1] << 31 : 0u;
        return word & ~(word >> 1 | after);
    }
};

// One column of the table for each sum; `capacity` rows of it belong to the panel.
struct Table {
    u64* columns;  // num_pixels, sum_y, sum_x, then, with pixels: intensity_sum, intensity_max
    u64* largest;  // scratch: the largest magnitude of a component
    u32 capacity;

    __device__ u64* at(u32 column, u32 rank) const {
        return columns + static_cast<u64>(column) * capacity + rank;
    }
};

__device__ inline u32 lane() {
    return threadIdx.x & 31u;
}

__device__ inline u32 inclusive_scan_of_warp(u32 value) {
    for (u32 distance = 1; distance < 32; distance *= 2) {
        const u32 lower = __shfl_up_sync(kAll, value, distance);
        if (lane() >= distance) value += lower;
    }
    return value;
}

// The sum over all warps before this one; `value` is the same in all lanes of a warp.
__device__ inline u32 exclusive_scan_of_warps(u32 value, u32* scratch, u32* total) {
    const u32 warp = threadIdx.x / 32;
    __syncthreads();  // an earlier scan may still be reading the scratch
    if (lane() == 0) scratch[warp] = value;
    __syncthreads();
    const u32 inclusive = inclusive_scan_of_warp(scratch[lane()]);
    *total = __shfl_sync(kAll, inclusive, 31);
    return __shfl_sync(kAll, inclusive, warp) - value;
}

// Each warp takes a contiguous share of `count`, in whole warps' widths.
__device__ inline void share_of_warp(u32 count, u32* first, u32* last) {
    const u32 share = ((count + kThreads - 1) / kThreads) * 32;
    *first = min(threadIdx.x / 32 * share, count);
    *last = min(*first + share, count);
}

// Returns the number of runs; stores them only if they fit.
template <bool kShared>
__device__ inline u32 find_runs(const Mask& mask, const Runs<kShared>& runs, u32 max_runs,
                                u32* scratch) {
    u32 first, last;
    share_of_warp(mask.height * mask.row_words, &first, &last);
    u32 count = 0;
#pragma unroll 4
    for (u32 base = first; base < last; base += 32) {
        const u32 at = base + lane();
        const u32 word = at < last ? mask.words[at] : 0u;
        count += __popc(mask.starts(word, at));
    }
    for (u32 distance = 16; distance; distance /= 2) {
        count += __shfl_xor_sync(kAll, count, distance);
    }
    u32 total;
    u32 before = exclusive_scan_of_warps(count, scratch, &total);
    if (total == 0 || total > max_runs) return total;
    for (u32 base = first; base < last; base += 32) {
        const u32 at = base + lane();
        const u32 word = at < last ? mask.words[at] : 0u;
        u32 starts = mask.starts(word, at);
        const u32 inclusive = inclusive_scan_of_warp(__popc(starts));
        u32 run = before + inclusive - __popc(starts);
        before += __shfl_sync(kAll, inclusive, 31);
        if (at >= last) continue;
        const u32 y = at / mask.row_words;
        const u32 x = (at - y * mask.row_words) * 32;
        if (x == 0) runs.row_start[y] = run;
        // The k-th start and the k-th end make the k-th run. A run that comes in from the word
        // before has started there already: the ends are one behind.
        const bool comes_in = (word & 1u) && !(starts & 1u);
        for (u32 k = run; starts; starts &= starts - 1, ++k) {
            runs.begin[k] = x + __ffs(starts) - 1;
            runs.row[k] = y;
        }
        u32 ends = mask.ends(word, at);
        for (u32 k = run - comes_in; ends; ends &= ends - 1, ++k) runs.end[k] = x + __ffs(ends) - 1;
    }
    if (threadIdx.x == 0) runs.row_start[mask.height] = total;
    __syncthreads();
    return total;
}

// The first run of the row above that ends at or right of where `run` begins, less one; and `last`,
// behind the row above. It touches `run` if it also begins in time: see `touches`.
template <bool kShared>
__device__ inline u32 first_above(const Runs<kShared>& runs, u32 run, u32* last) {
    const u32 y = runs.row[run];
    if (y == 0) return *last = 0;
    u32 low = runs.row_start[y - 1];
    u32 high = *last = runs.row_start[y];
    const u32 begin = runs.begin[run];
    while (low < high) {
        const u32 middle = (low + high) / 2;
        if (runs.end[middle] + 1u >= begin) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

template <bool kShared>
__device__ inline bool touches(const Runs<kShared>& runs, u32 run, u32 above, u32 last) {
    return above < last && runs.begin[above] <= runs.end[run] + 1u;
}

// Only the thread of a run writes its parent here, and only an ancestor nearer to the root. Others
// may walk over it meanwhile; the sooner they see it, the shorter their way.
template <bool kShared>
__device__ inline void flatten(const Runs<kShared>& runs, u32 total) {
    __syncthreads();
    for (u32 run = threadIdx.x; run < total; run += kThreads) {
        u32 up = runs.parent(run);
        for (u32 next; (next = runs.parent(up)) != up; up = next) runs.lift(run, next);
    }
    __syncthreads();
}

template <bool kShared>
__device__ inline u32 root_of(const Runs<kShared>& runs, u32 run) {
    for (u32 up; (up = runs.parent(run)) != run; run = up) {
    }
    return run;
}

// Hangs the later root below the earlier one. If another thread was faster and `a` is no longer a
// root, what it hung below remains to be united with `b`.
template <bool kShared>
__device__ inline void unite(const Runs<kShared>& runs, u32 a, u32 b) {
    while (true) {
        a = root_of(runs, a);
        b = root_of(runs, b);
        if (a == b) return;
        if (a < b) {
            const u32 earlier = a;
            a = b;
            b = earlier;
        }
        const u32 found = atomicMin(runs.parents + a, b);
        if (found == a) return;
        a = found;
    }
}

template <bool kShared>
__device__ inline void join_runs(const Runs<kShared>& runs, u32 total) {
    for (u32 run = threadIdx.x; run < total; run += kThreads) {
        u32 last;
        const u32 above = first_above(runs, run, &last);
        runs.parents[run] = touches(runs, run, above, last) ? above : run;
    }
    // Without this a comb, whose teeth are long chains that one run joins, would take walks of
    // (number of teeth) x (length of a tooth) steps in one thread.
    flatten(runs, total);
    for (u32 run = threadIdx.x; run < total; run += kThreads) {
        u32 last;
        u32 above = first_above(runs, run, &last);
        if (!touches(runs, run, above, last)) continue;
        for (++above; touches(runs, run, above, last); ++above) unite(runs, run, above);
    }
    flatten(runs, total);
}

// Replaces the parent of each root by the component's rank; returns the number of components.
template <bool kShared>
__device__ inline u32 rank_roots(const Runs<kShared>& runs, u32 total, u32* scratch) {
    u32 first, last;
    share_of_warp(total, &first, &last);
    u32 count = 0;
    for (u32 base = first; base < last; base += 32) {
        const u32 run = base + lane();
        count += __popc(__ballot_sync(kAll, run < last && runs.parent(run) == run));
    }
    u32 components;
    u32 rank = exclusive_scan_of_warps(count, scratch, &components);
    for (u32 base = first; base < last; base += 32) {
        const u32 run = base + lane();
        const bool is_root = run < last && runs.parent(run) == run;
        const u32 roots = __ballot_sync(kAll, is_root);
        if (is_root) runs.parents[run] = kRanked | (rank + __popc(roots & ((1u << lane()) - 1)));
        rank += __popc(roots);
    }
    __syncthreads();
    return components;
}

template <bool kShared>
__device__ inline u32 rank_of(const Runs<kShared>& runs, u32 run) {
    u32 up = runs.parent(run);
    if (!(up & kRanked)) up = runs.parent(up);
    return up & ~kRanked;
}

#include "intensity.cuh"

// A thread's consecutive runs often belong to one component where it matters, in noise that
// percolates: it adds them up first and touches memory when the component changes.
template <bool kShared>
__device__ inline void add_geometry(const Runs<kShared>& runs, u32 total, const Table& table) {
    u32 rank = kNoRank;
    u64 num_pixels = 0, sum_y = 0, sum_x = 0;
    for (u32 run = threadIdx.x;; run += kThreads) {
        const u32 next = run < total ? rank_of(runs, run) : kNoRank;
        if (next != rank) {
            if (rank < table.capacity) {
                atomicAdd(table.at(0, rank), num_pixels);
                atomicAdd(table.at(1, rank), sum_y);
                atomicAdd(table.at(2, rank), sum_x);
            }
            rank = next;
            num_pixels = sum_y = sum_x = 0;
        }
        if (run >= total) return;
        const u64 length = runs.end[run] - runs.begin[run] + 1u;
        num_pixels += length;
        sum_y += length * runs.row[run];
        sum_x += length * (static_cast<u32>(runs.begin[run]) + runs.end[run]) / 2;
    }
}

// Returns whether the runs fitted; if not, nothing was written.
template <bool kShared>
__device__ inline bool label_panel(const Mask& mask, const Runs<kShared>& runs, u32 max_runs,
                                   const Table& table, const Pixels& pixels, int* count) {
    __shared__ u32 scratch[kWarps];
    const u32 total = find_runs(mask, runs, max_runs, scratch);
    if (total > max_runs) return false;
    if (total == 0) {
        if (threadIdx.x == 0) *count = 0;
        return true;
    }
    join_runs(runs, total);
    const u32 components = rank_roots(runs, total, scratch);
    if (threadIdx.x == 0) *count = components;  // the true number, also above the capacity
    const u32 kept = min(components, table.capacity);
    const u32 columns = pixels.base ? 5 : 3;
    for (u32 rank = threadIdx.x; rank < kept; rank += kThreads) {
        for (u32 column = 0; column < columns; ++column) *table.at(column, rank) = 0;
        if (pixels.base) table.largest[rank] = 0;
    }
    __syncthreads();
    add_geometry(runs, total, table);
    if (pixels.base) add_intensity(runs, total, table, kept, pixels);
    return true;
}

// `panel_of` maps the rows of the output to panels; null: all panels in order.
#define PARAMETERS                                                                              \
    const u32 *mask, u32 height, u32 row_words, const int *panel_of, u32 max_peaks, u32 max_runs, \
        int *counts, u64 *table, u64 *largest, int *too_large, const void *pixels, int dtype,     \
        i64 pixels_n, i64 pixels_h, i64 pixels_w
#define LABEL(SLOT)                                                                             \
    label_panel({mask + static_cast<u64>(panel) * height * row_words, height, row_words}, runs, \
                max_runs,                                                                       \
                {table + static_cast<u64>(SLOT) * (pixels ? 5 : 3) * max_peaks,                 \
                 largest + static_cast<u64>(SLOT) * max_peaks, max_peaks},                      \
                {pixels, dtype, panel * pixels_n, pixels_h, pixels_w}, counts + SLOT)

extern "C" __global__ void __launch_bounds__(kThreads, 1) peaknet_label(PARAMETERS) {
    extern __shared__ u32 memory[];
    u16* const halves = reinterpret_cast<u16*>(memory + height + 1 + max_runs);
    const Runs<true> runs = {memory + height + 1, halves, halves + max_runs, halves + 2 * max_runs,
                             memory};
    const u32 slot = blockIdx.x;
    const i64 panel = panel_of ? panel_of[slot] : slot;
    const bool fitted = LABEL(slot);
    if (threadIdx.x == 0) too_large[slot] = !fitted;
}

// Always enqueued behind `peaknet_label`, so that the host need not know. A block takes every
// gridDim.x-th panel that was too large and has room of its own for the most runs there can be.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    peaknet_label_large(PARAMETERS, u32 slots, u32* room) {
    extern __shared__ u32 memory[];
    const u64 words = max_runs + 3 * ((max_runs + 1) / 2);
    u32* const parents = room + blockIdx.x * words;
    u16* const halves = reinterpret_cast<u16*>(parents + max_runs);
    const Runs<false> runs = {parents, halves, halves + max_runs, halves + 2 * max_runs, memory};
    for (u32 slot = blockIdx.x; slot < slots; slot += gridDim.x) {
        if (!too_large[slot]) continue;
        const i64 panel = panel_of ? panel_of[slot] : slot;
        LABEL(slot);
        __syncthreads();  // the runs are read to the end before the next panel replaces them
    }
}
