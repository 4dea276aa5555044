// From a bit mask to the peaks of a panel: 8-connected components and their sums, no label image.
//
// One block labels one panel. Two rows make a strip, 32 columns of a strip a cell: two words of the
// mask that lie side by side. In a strip, pixels of adjoining columns always touch. So a piece, a
// maximal run of columns of a cell with a pixel in either row, is connected, and pieces are what is
// joined (as runs of one row in He, Chao, Suzuki, "A run-based two-scan labeling algorithm", 2008).
// There are at most 16 in a cell: for 512 x 512 pixels of anything, 16 bits number them and shared
// memory holds a parent for each. What else there is to know about a piece is counted from the bits
// again. The union-find has links that always point to the earlier piece (Playne and Hawick, "A new
// algorithm for parallel connected-component labelling on GPUs", 2018).
//
// 1. Pieces are numbered in raster order of their first pixels by a scan over the cells: no atomics
//    decide on any number. Cells that are not empty are listed.
// 2. Each piece links to the first piece that touches it in the strip above, then trees are
//    flattened.
// 3. What else touches is united; the root of a component is its earliest piece.
// 4. A scan over the roots ranks the components in raster order of their first pixels.
// 5. Integer sums go straight to row `rank` of the output. They commute: every repetition gives the
//    same bits, whatever the schedule.
//
// What takes the time is instructions. Loops whose turns differ between the threads of a warp are
// flat and go on until none has work: nested ones would leave it to run one thread after another.
//
// A panel with more pieces than fit raises a flag; `peaknet_label_large` does it in global memory.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr u32 kThreads = 1024;
constexpr u32 kWarps = kThreads / 32;
constexpr u32 kAll = 0xffffffffu;
constexpr u32 kNone = 0xffffffffu;  // no cell, no piece, no rank
constexpr u32 kLeftmost = 1u, kRightmost = 1u << 31;

// The bits from a seed to the end of its run of ones in `within`: where the carry goes.
__device__ inline u32 onward(u32 seeds, u32 within) {
    return (within & ~(within + seeds)) | seeds;
}

// The lowest bit that is set, and it with all below.
__device__ inline u32 lowest(u32 bits) {
    return bits & (0u - bits);
}
__device__ inline u32 up_to(u32 bit) {
    return bit | (bit - 1);
}

struct Cell {
    u32 upper, lower;

    __device__ u32 columns() const { return upper | lower; }
    __device__ u32 starts() const { return columns() & ~(columns() << 1); }
    // The first pixel in the upper row of each piece that has one: from its start the carry runs
    // over the columns that have none.
    __device__ u32 heads() const { return ((lower & ~upper) + starts()) & upper; }
};

// A cell and the numbers of its pieces. Those whose first pixel is in the upper row, the high ones,
// come before all of the strip that have none there.
struct Pieces : Cell {
    u32 first_high, first_low;

    // All columns of the high pieces.
    __device__ u32 high() const {
        return onward(upper, columns()) | __brev(onward(__brev(upper), __brev(columns())));
    }
    // The piece to which a column belongs.
    __device__ u32 at(u32 column) const {
        const bool is_high = high() & column;
        const u32 counted = starts() & (is_high ? high() : ~high()) & up_to(column);
        return (is_high ? first_high : first_low) + __popc(counted) - 1;
    }
};

// Index: u16 for pieces in shared memory, u32 in global memory.
template <typename Index> struct Panel {
    const u64* mask;  // the upper row in the lower half
    u32 strips, row_cells;
    u64* before;     // [cells + 1], high and (from bit 32) low pieces in all cells before
    u32* occupied;   // [cells], those that are not empty, in no particular order
    Index* parents;  // of pieces
    u32* roots;      // a bit for each piece
    u32* ranks;      // [words of `roots`], the rank of the first root in a word

    __device__ u32 cells() const { return strips * row_cells; }
    __device__ Cell cell(u32 index) const {
        const u64 words = __ldg(mask + index);
        return {static_cast<u32>(words), static_cast<u32>(words >> 32)};
    }
    __device__ Pieces pieces(u32 index, u32 strip) const {
        const u64 own = before[index];
        const u64 strip_before = before[strip * row_cells];
        const u64 strip_after = before[(strip + 1) * row_cells];
        return {cell(index), static_cast<u32>(own) + static_cast<u32>(strip_before >> 32),
                static_cast<u32>(own >> 32) + static_cast<u32>(strip_after)};
    }

    // Many threads read and write parents between barriers. Every value ever stored is an ancestor,
    // so any of them will do, but each access must be one indivisible one that the compiler does
    // not keep in a register. In shared memory that is volatile; in global memory volatile would go
    // to the L2 cache each time, whereas at the scope of a block (cta) the L1 cache may answer.
    __device__ u32 parent(u32 piece) const {
        if constexpr (sizeof(Index) == 2) return *static_cast<volatile Index*>(parents + piece);
        u32 value;
        asm volatile("ld.relaxed.cta.u32 %0, [%1];"
                     : "=r"(value)
                     : "l"(parents + piece)
                     : "memory");
        return value;
    }
    __device__ u32 root_of(u32 piece) const {
#pragma unroll 1
        for (u32 up; (up = parent(piece)) != piece; piece = up) {
        }
        return piece;
    }
    // Unites pairs of pieces, for each thread of a warp as many as `next(&a, &b)` has for it: hangs
    // the later root below the earlier one. If another thread was faster and the later one is no
    // longer a root, what it hangs below remains to be united with the earlier one.
    template <typename Next> __device__ void unite(const Next& next) const {
        u32 a = 0, b = 0;
        bool busy = next(&a, &b);
#pragma unroll 1
        while (__any_sync(kAll, busy)) {
            if (!busy) continue;
            u32 up_a = parent(a), up_b = parent(b);
            bool done = up_a == up_b;
            if (!done && up_a == a && up_b == b) {
                const u32 later = max(a, b);
                up_b = min(a, b);
                up_a = atomicCAS(parents + later, static_cast<Index>(later),
                                 static_cast<Index>(up_b));
                done = up_a == later;
            }
            a = up_a;
            b = up_b;
            if (done) busy = next(&a, &b);
        }
    }
    __device__ u32 rank_of(u32 piece) const {
        const u32 root = parent(piece);
        return ranks[root / 32] + __popc(roots[root / 32] & ((1u << root % 32) - 1));
    }
};

// One column of the table for each sum; `capacity` rows of it belong to the panel.
struct Table {
    u64* columns;  // num_pixels, sum_y, sum_x, then, with pixels: intensity_sum, intensity_max
    u64* largest;  // scratch: the largest magnitude of a component
    u32 capacity;

    __device__ u64* column(u32 index) const { return columns + static_cast<u64>(index) * capacity; }
};

__device__ inline u32 lane() {
    return threadIdx.x & 31u;
}

template <typename Sum> __device__ inline Sum inclusive_scan_of_warp(Sum value) {
    for (u32 distance = 1; distance < 32; distance *= 2) {
        const Sum lower = __shfl_up_sync(kAll, value, distance);
        if (lane() >= distance) value += lower;
    }
    return value;
}

// A pair of counts in 16 bits each becomes one of sums in 32 bits each.
__device__ inline u64 widen(u32 pair) {
    return (pair & 0xffffu) | static_cast<u64>(pair >> 16) << 32;
}

// Of pairs of counts, each up to 32, one pair for each item: calls `store(item, its counts, sums of
// the counts before it)` for every item and returns the sums of all.
template <typename Count, typename Store>
__device__ inline u64 scan(u32 items, const Count& count, const Store& store) {
    __shared__ u64 sums[kWarps];
    // Each warp takes a contiguous share, in whole warps' widths.
    const u32 warp = threadIdx.x / 32;
    const u32 rounds = (items + kThreads - 1) / kThreads;
    const u32 begin = warp * rounds * 32 + lane();
    const auto count_if_any = [&](u32 item) {
        const u32 counted = count(min(item, items - 1));
        return item < items ? counted : 0u;
    };
    u64 sum = 0;
#pragma unroll 4
    for (u32 k = 0; k < rounds; ++k) sum += widen(count_if_any(begin + 32 * k));
    for (u32 distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(kAll, sum, distance);
    if (lane() == 0) sums[warp] = sum;
    __syncthreads();
    const u64 inclusive = inclusive_scan_of_warp(sums[lane()]);
    u64 before = __shfl_sync(kAll, inclusive, warp) - sum;
#pragma unroll 4
    for (u32 k = 0; k < rounds; ++k) {
        const u32 item = begin + 32 * k;
        const u32 own = count_if_any(item);
        const u32 up_to_own = inclusive_scan_of_warp(own);
        if (item < items) store(item, own, before + widen(up_to_own - own));
        before += widen(__shfl_sync(kAll, up_to_own, 31));
    }
    __syncthreads();
    return __shfl_sync(kAll, inclusive, 31);
}

// Returns the number of pieces.
template <typename Index>
__device__ inline u32 number_pieces(const Panel<Index>& panel, u32* num_occupied) {
    if (threadIdx.x == 0) *num_occupied = 0;
    const u64 total = scan(
        panel.cells(),
        [&](u32 index) {
            const Cell cell = panel.cell(index);
            const u32 high = __popc(cell.heads());
            return high | (__popc(cell.starts()) - high) << 16;
        },
        [&](u32 index, u32 own, u64 before) {
            panel.before[index] = before;
            if (own) panel.occupied[atomicAdd(num_occupied, 1u)] = index;
        });
    if (threadIdx.x == 0) panel.before[panel.cells()] = total;
    __syncthreads();
    return static_cast<u32>(total) + static_cast<u32>(total >> 32);
}

// A cell with the one above it, and a bit for each pair of runs, of its upper and of the other's
// lower row, that touch: where their overlap starts, or right of where two corners meet.
struct Contacts {
    Pieces own = {}, above = {};
    u32 bits;

    template <typename Index>
    __device__ Contacts(const Panel<Index>& panel, u32 cell, u32 strip) {
        if (cell != kNone) own = panel.pieces(cell, strip);
        if (cell != kNone && strip) above = panel.pieces(cell - panel.row_cells, strip - 1);
        const u32 a = own.upper, b = above.lower;
        const u32 overlap = a & b;
        bits = (overlap & ~(overlap << 1)) | (a & ~b & (b << 1) & ~(a << 1)) |
               (b & ~a & (a << 1) & ~(b << 1));
    }
    // The pieces of a contact.
    __device__ u32 piece(u32 bit) const { return own.at(own.upper & bit ? bit : bit >> 1); }
    __device__ u32 piece_above(u32 bit) const {
        return above.at(above.lower & bit ? bit : bit >> 1);
    }
};

// Calls `visit(cell, strip)` for every cell that is not empty, by whole warps: kNone for no cell.
template <typename Index, typename Visit>
__device__ inline void each_cell(const Panel<Index>& panel, u32 num_occupied, const Visit& visit) {
#pragma unroll 1
    for (u32 i = threadIdx.x; i - lane() < num_occupied; i += kThreads) {
        const u32 cell = i < num_occupied ? panel.occupied[i] : kNone;
        visit(cell, cell / panel.row_cells);
    }
}

// Links all pieces to their roots and notes which are roots. What a batch of pieces finds above
// itself is flat already: all batches together walk hardly farther than the longest tree.
template <typename Index>
__device__ inline void flatten(const Panel<Index>& panel, u32 total) {
#pragma unroll 1
    for (u32 base = 0; base < total; base += kThreads) {
        const u32 piece = base + threadIdx.x;
        __syncthreads();
        const u32 root = piece < total ? panel.root_of(piece) : kNone;
        const u32 roots = __ballot_sync(kAll, root == piece);
        __syncthreads();
        if (piece >= total) continue;
        panel.parents[piece] = root;
        if (lane() == 0) panel.roots[piece / 32] = roots;
    }
    __syncthreads();
}

template <typename Index>
__device__ inline void join_pieces(const Panel<Index>& panel, u32 num_occupied, u32 total) {
    each_cell(panel, num_occupied, [&](u32 cell, u32 strip) {
        const Contacts contacts(panel, cell, strip);
#pragma unroll 1
        for (u32 left = contacts.own.starts(); left;) {
            const u32 start = lowest(left);
            left ^= start;
            const u32 here = contacts.bits & (lowest(left) - start);  // up to the next start
            const u32 piece = contacts.own.at(start);
            panel.parents[piece] = here ? contacts.piece_above(lowest(here)) : piece;
        }
    });
    // Without this a comb, whose teeth are long chains that one run joins, would take walks of
    // (number of teeth) x (length of a tooth) steps in one thread.
    flatten(panel, total);
    each_cell(panel, num_occupied, [&](u32 cell, u32 strip) {
        const Contacts contacts(panel, cell, strip);
        const Pieces& own = contacts.own;
        u32 left = contacts.bits;
        u32 linked = kNone;
        panel.unite([&](u32* a, u32* b) {
#pragma unroll 1
            for (; left; left &= left - 1) {
                *a = contacts.piece(lowest(left));
                if (*a == linked) break;
                linked = *a;  // the first contact of a piece is its link
            }
            if (!left) return false;
            *b = contacts.piece_above(lowest(left));
            left &= left - 1;
            return true;
        });
        // Across the borders of cells: in the strip; over the corners left and right above. A pixel
        // with one right above it has no need of the corners: strips join those.
        const u32 column = cell - strip * panel.row_cells;
        const u32 alone = own.upper & ~contacts.above.lower;
#pragma unroll 1
        for (u32 k = 0; k < 3; ++k) {
            const u32 bit = k < 2 ? kLeftmost : kRightmost;
            const u32 opposite = k < 2 ? kRightmost : kLeftmost;
            bool is_new = (k ? alone : own.columns()) & bit && (strip || k == 0) &&
                          (k < 2 ? column != 0 : column + 1 < panel.row_cells);
            Pieces other = {};
            if (is_new) {
                const u32 beside = k < 2 ? cell - 1 : cell + 1;
                other = k ? panel.pieces(beside - panel.row_cells, strip - 1)
                          : panel.pieces(beside, strip);
                is_new = (k ? other.lower : other.columns()) & opposite;
            }
            panel.unite([&](u32* a, u32* b) {
                if (!is_new) return false;
                *a = own.at(bit);
                *b = other.at(opposite);
                is_new = false;
                return true;
            });
        }
    });
    flatten(panel, total);
}

// Calls `visit(rank, y, x, bits)` for what a component has of a word of the mask, by whole warps.
template <typename Index, typename Visit>
__device__ inline void each_part(const Panel<Index>& panel, u32 num_occupied, const Visit& visit) {
#pragma unroll 1
    for (u32 i = threadIdx.x; i - lane() < 2 * num_occupied; i += kThreads) {
        const u32 cell = i < 2 * num_occupied ? panel.occupied[i / 2] : 0;
        const u32 strip = cell / panel.row_cells;
        const Pieces pieces = panel.pieces(cell, strip);
        u32 left = i >= 2 * num_occupied ? 0u : i % 2 ? pieces.lower : pieces.upper;
        u32 rank = kNone, part = 0;
#pragma unroll 1
        while (__any_sync(kAll, left | part)) {
            const u32 next = left ? panel.rank_of(pieces.at(lowest(left))) : kNone;
            if (next != rank && part) {
                visit(rank, 2 * strip + i % 2, 32 * (cell - strip * panel.row_cells), part);
                part = 0;
            }
            const u32 run = left & ~(left + lowest(left));
            rank = next;
            part |= run;
            left ^= run;
        }
    }
}

struct Add {
    __device__ static u64 join(u64 a, u64 b) { return a + b; }
    __device__ static void store(u64* at, u64 value) { atomicAdd(at, value); }
};
struct Max {
    __device__ static u64 join(u64 a, u64 b) { return max(a, b); }
    __device__ static void store(u64* at, u64 value) { atomicMax(at, value); }
};

// Adds values to columns of the table. In noise that percolates one component has most of a panel
// and all threads would wait for its few words of memory. So a thread keeps what belongs to the
// earliest component that it has met, and a warp adds that up if it is the same in all threads.
template <typename Op, u32 kColumns> struct Gather {
    u64* columns[kColumns];
    u32 rank = kNone;
    u64 kept[kColumns] = {};

    __device__ void store(u32 to, const u64 (&values)[kColumns]) const {
        for (u32 c = 0; c < kColumns; ++c) Op::store(columns[c] + to, values[c]);
    }
    __device__ void add(u32 to, const u64 (&values)[kColumns]) {
        if (to > rank) return store(to, values);
        if (to < rank && rank != kNone) store(rank, kept);
        for (u32 c = 0; c < kColumns; ++c) {
            kept[c] = to < rank ? values[c] : Op::join(kept[c], values[c]);
        }
        rank = to;
    }
    // To be called by all threads of a warp.
    __device__ void finish() {
        const bool same = __all_sync(kAll, rank == __shfl_sync(kAll, rank, 0));
        if (rank == kNone && same) return;
        for (u32 c = 0; same && c < kColumns; ++c) {
            for (u32 distance = 16; distance; distance /= 2) {
                kept[c] = Op::join(kept[c], __shfl_xor_sync(kAll, kept[c], distance));
            }
        }
        if (rank != kNone && (!same || lane() == 0)) store(rank, kept);
    }
};

#include "intensity.cuh"

// The sum of the numbers of the bits that are set.
__device__ inline u32 sum_of_places(u32 bits) {
    return __popc(bits & 0xaaaaaaaau) + 2 * __popc(bits & 0xccccccccu) +
           4 * __popc(bits & 0xf0f0f0f0u) + 8 * __popc(bits & 0xff00ff00u) +
           16 * __popc(bits & 0xffff0000u);
}

template <typename Index>
__device__ inline void add_geometry(const Panel<Index>& panel, u32 num_occupied,
                                    const Table& table) {
    Gather<Add, 3> sums = {{table.column(0), table.column(1), table.column(2)}};
    each_part(panel, num_occupied, [&](u32 rank, u32 y, u32 x, u32 bits) {
        const u64 num_pixels = __popc(bits);
        sums.add(rank, {num_pixels, num_pixels * y, num_pixels * x + sum_of_places(bits)});
    });
    sums.finish();
}

// Returns whether the pieces fitted. If they did and the components fit the table too, fills it.
template <typename Index>
__device__ inline bool label_panel(const Panel<Index>& panel, u32 max_pieces, const Table& table,
                                   const Pixels& pixels, int* count) {
    __shared__ u32 num_occupied;
    const u32 total = number_pieces(panel, &num_occupied);
    if (total > max_pieces) return false;
    if (total == 0) {
        if (threadIdx.x == 0) *count = 0;
        return true;
    }
    join_pieces(panel, num_occupied, total);
    const u32 components = scan(
        (total + 31) / 32, [&](u32 i) { return __popc(panel.roots[i]); },
        [&](u32 i, u32, u64 before) { panel.ranks[i] = before; });
    if (threadIdx.x == 0) *count = components;
    // The host will ask again, with more room.
    if (components > table.capacity) return true;
    const u32 columns = pixels.base ? 5 : 3;
#pragma unroll 1
    for (u32 rank = threadIdx.x; rank < components; rank += kThreads) {
#pragma unroll 1
        for (u32 column = 0; column < columns; ++column) table.column(column)[rank] = 0;
        if (pixels.base) table.largest[rank] = 0;
    }
    __syncthreads();
    add_geometry(panel, num_occupied, table);
    if (pixels.base) add_intensity(panel, num_occupied, table, components, pixels);
    return true;
}

// `panel_of` maps the slots, rows of the output, to panels; null: all panels in order. `scratch`
// has for each slot `before` and `occupied` of struct Panel, 3 cells + 2 words made even, and
// `memory` 2 words and 32 indices for every 32 pieces, begun or complete.
#define PARAMETERS                                                                             \
    const u64 *mask, u32 strips, u32 row_cells, const int *panel_of, u32 max_peaks,            \
        u32 max_pieces, int *counts, u64 *table, u64 *largest, int *too_large, u64 *scratch,   \
        const void *pixels, int dtype, i64 pixels_n, i64 pixels_h, i64 pixels_w
#define LABEL(INDEX)                                                                           \
    const i64 panel = panel_of ? panel_of[slot] : slot;                                        \
    const u64 cells = static_cast<u64>(strips) * row_cells;                                    \
    u64* const before = scratch + slot * ((3 * cells + 3) / 2);                                \
    const u32 groups = (max_pieces + 31) / 32;                                                 \
    const bool fitted = label_panel<INDEX>(                                                    \
        {mask + panel * cells, strips, row_cells, before,                                      \
         reinterpret_cast<u32*>(before + cells + 1),                                           \
         reinterpret_cast<INDEX*>(memory + 2 * groups), memory, memory + groups},              \
        max_pieces,                                                                            \
        {table + static_cast<u64>(slot) * (pixels ? 5 : 3) * max_peaks,                        \
         largest + static_cast<u64>(slot) * max_peaks, max_peaks},                             \
        {pixels, dtype, panel * pixels_n, pixels_h, pixels_w}, counts + slot)

extern "C" __global__ void __launch_bounds__(kThreads, 1) peaknet_label(PARAMETERS) {
    extern __shared__ u32 memory[];
    const u32 slot = blockIdx.x;
    LABEL(u16);
    if (threadIdx.x == 0) too_large[slot] = !fitted;
}

// Enqueued behind `peaknet_label` where panels may be too large, so that the host need not know. A
// block takes every gridDim.x-th of them and has room of its own for the most pieces there can be.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    peaknet_label_large(PARAMETERS, u32 slots, u32* room) {
    u32* const memory = room + blockIdx.x * (static_cast<u64>((max_pieces + 31) / 32) * 34);
    for (u32 slot = blockIdx.x; slot < slots; slot += gridDim.x) {
        if (!too_large[slot]) continue;
        LABEL(u32);
        static_cast<void>(fitted);  // always
        __syncthreads();  // the pieces are read to the end before the next panel replaces them
    }
}
