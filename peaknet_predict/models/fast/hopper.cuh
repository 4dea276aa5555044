// What the kernels for Hopper share: bfloat16, GELU, copies into shared memory and its layout, and the
// multiplication of matrices that lie there.

#include "bfloat16.cuh"

// Adds eight values times a factor.
__device__ __forceinline__ void add(float (&sum)[8], uint4 values, float factor) {
  const u32 pairs[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum[2 * i] = fmaf(low(pairs[i]), factor, sum[2 * i]);
    sum[2 * i + 1] = fmaf(high(pairs[i]), factor, sum[2 * i + 1]);
  }
}

__device__ __forceinline__ uint4 to_values(const float (&sum)[8]) {
  return make_uint4(to_pair(sum[0], sum[1]), to_pair(sum[2], sum[3]), to_pair(sum[4], sum[5]),
                    to_pair(sum[6], sum[7]));
}

// GELU of 2x. tanh of a cubic takes the place of erf; its coefficients minimise the largest error,
// 2.7e-4, which is below what bfloat16 keeps of values beyond 0.1.
__device__ __forceinline__ float gelu_of_double(float x) {
  const float slope = fmaf(0.2776892f, x * x, 1.60026914f);
  float tanh;
  asm("tanh.approx.f32 %0, %1;" : "=f"(tanh) : "f"(x * slope));
  return fmaf(x, tanh, x);
}

// A matrix lies in shared memory as slices of kSlice (64 or 32) columns, each with its rows one after
// the other. Within a row, units of 16 bytes are permuted as the tensor cores expect it ("swizzled"),
// so that the same unit of eight rows meets no bank twice.
template <int kSlice>
struct Slices {
  static constexpr int kUnits = kSlice / 8;  // of a row
  static constexpr int kPitch = 2 * kSlice;  // bytes of a row

  // Where a unit lies, from the start of the slice.
  static __device__ __forceinline__ int place(int row, int unit) {
    return row * kPitch + 16 * (unit ^ (kSlice == 64 ? row & 7 : row >> 1 & 3));
  }

  // Describes a matrix that starts at an address (PTX ISA, "matrix descriptor format"). Adding n moves
  // it by 16 n bytes.
  static __device__ __forceinline__ u64 descriptor(u32 address) {
    constexpr u64 kLayout = kSlice == 64 ? 1 : 2;  // swizzled over 128 or 64 bytes
    constexpr u64 kStride = 8 * kPitch;            // from eight rows to the next eight
    return kLayout << 62 | kStride >> 4 << 32 | 1ull << 16 | address >> 4;
  }

  // Copies one slice of rows that lie `pitch` values apart; if kPartial, rows from `limit` on become
  // zeros. A thread always copies the same unit: all but one address are constants away.
  template <int kThreads, int kRows, bool kPartial = false>
  static __device__ __forceinline__ void copy_slice(u32 target, const u16* source, int pitch,
                                                    int thread, int limit = 0) {
    constexpr int kStep = kThreads / kUnits;  // rows copied at a time
    static_assert(kStep % 8 == 0, "a thread keeps its place in the permutation");
    const int first = thread / kUnits, unit = thread % kUnits;
    target += place(first, unit);
    source += (i64)first * pitch + 8 * unit;
#pragma unroll
    for (int row = 0; row < kRows; row += kStep) {
      const int bytes = !kPartial || first + row < limit ? 16 : 0;
      if (kRows % kStep != 0 && first + row >= kRows) break;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target + row * kPitch),
                   "l"(source + row * pitch), "r"(bytes));
    }
  }

  // Copies whole rows of kInner values that follow each other in memory.
  template <int kThreads, int kRows, int kInner, bool kPartial>
  static __device__ __forceinline__ void copy(u32 target, const u16* source, int limit, int thread) {
#pragma unroll
    for (int slice = 0; slice < kInner / kSlice; ++slice) {
      copy_slice<kThreads, kRows, kPartial>(target + slice * kRows * kPitch,
                                            source + slice * kSlice, kInner, thread, limit);
    }
    asm volatile("cp.async.commit_group;");
  }
};

// Waits until no more than kPending groups of this thread's copies are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The same for groups of products.
template <int kPending>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from using sums before the products that make them are done.
template <int kSums>
__device__ __forceinline__ void hold(float (&sum)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

// Lets the tensor cores see what this thread has stored to shared memory; a barrier must follow. It
// waits for stores to global memory too. Copies need none in practice, though the letter of the PTX ISA
// asks for it: Triton's code has none either, and runs compare equal.
__device__ __forceinline__ void publish_writes() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A barrier of the 128 threads of a group.
__device__ __forceinline__ void wait_for_group(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

#define SUM8(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), \
                "+f"(sum[i + 4]), "+f"(sum[i + 5]), "+f"(sum[i + 6]), "+f"(sum[i + 7])
#define SUM64(i) SUM8(i), SUM8(i + 8), SUM8(i + 16), SUM8(i + 24), \
                 SUM8(i + 32), SUM8(i + 40), SUM8(i + 48), SUM8(i + 56)

// Begins to multiply 64 rows by 128 or 256 columns over 16 values, and to add, unless it is the first,
// to sums: sum[4 j + 2 i + k] belongs to row (lane / 4) + 8 i of the warp's 16 and to column
// 8 j + 2 (lane % 4) + k.
__device__ __forceinline__ void multiply(float (&sum)[64], u64 a, u64 b, bool is_first) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %66, 0;"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, 0, 0;}"
      : SUM64(0)
      : "l"(a), "l"(b), "r"(is_first ? 0 : 1));
}

__device__ __forceinline__ void multiply(float (&sum)[128], u64 a, u64 b, bool is_first) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %130, 0;"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, %128, %129, p, 1, 1, 0, 0;}"
      : SUM64(0), SUM64(64)
      : "l"(a), "l"(b), "r"(is_first ? 0 : 1));
}

// The same with the left operand in registers, as `load_left` has it, and 96, 192 or 256 columns.
__device__ __forceinline__ void multiply_left(float (&sum)[48], const u32 (&a)[4], u64 b,
                                              bool is_first) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %53, 0;"
      "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
      "{%48, %49, %50, %51}, %52, p, 1, 1, 0;}"
      : SUM8(0), SUM8(8), SUM8(16), SUM8(24), SUM8(32), SUM8(40)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(is_first ? 0 : 1));
}

__device__ __forceinline__ void multiply_left(float (&sum)[96], const u32 (&a)[4], u64 b,
                                              bool is_first) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %101, 0;"
      "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
      "{%96, %97, %98, %99}, %100, p, 1, 1, 0;}"
      : SUM64(0), SUM8(64), SUM8(72), SUM8(80), SUM8(88)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(is_first ? 0 : 1));
}

__device__ __forceinline__ void multiply_left(float (&sum)[128], const u32 (&a)[4], u64 b,
                                              bool is_first) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %133, 0;"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "{%128, %129, %130, %131}, %132, p, 1, 1, 0;}"
      : SUM64(0), SUM64(64)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(is_first ? 0 : 1));
}

// Loads 16 rows and 16 columns, from the slice's row `row` and unit `unit` on, as a left operand.
__device__ __forceinline__ void load_left(u32 (&a)[4], u32 slice, int row, int unit, int lane) {
  const u32 address = slice + Slices<64>::place(row + lane % 16, unit + lane / 16);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address));
}

__device__ __forceinline__ float sum_of(const float (&parts)[4]) {
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// Sums over the four lanes that hold a row of a product.
__device__ __forceinline__ float over_quad(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// The product of 64 rows `a` with kColumns rows `b`, both of kInner values, or what it adds to the sums if
// kAdds; waits for it.
template <int kSlice, int kInner, int kColumns, bool kAdds = false, int kSums>
__device__ __forceinline__ void multiply_tile(float (&sum)[kSums], u32 a_address, u32 b_address) {
  static_assert(kSums == kColumns / 2, "sums of a thread");
  using S = Slices<kSlice>;
  const u64 a = S::descriptor(a_address), b = S::descriptor(b_address);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int k = 0; k < kInner / 16; ++k) {
    const int slice = k / (kSlice / 16), step = k % (kSlice / 16) * 32;
    multiply(sum, a + (slice * 64 * S::kPitch + step) / 16,
             b + (slice * kColumns * S::kPitch + step) / 16, !kAdds && k == 0);
  }
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  wait_for_products<0>();
  hold(sum);
}

// Multiplies four registers of a left operand by the factors of its columns.
__device__ __forceinline__ void scale_pairs(u32 (&a)[4], float2 first, float2 second) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = i < 2 ? first : second;
    a[i] = to_pair(low(a[i]) * f.x, high(a[i]) * f.y);
  }
}

// Stores four 8x8 matrices of pairs, held as a product is: 16 rows of 16 columns. Each lane says where
// one unit of 16 bytes goes: of row lane % 16, the first of lanes below 16, the second of the others.
__device__ __forceinline__ void store_matrices(u32 address, const u32 (&pairs)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
               : "memory");
}

// The same to rows of 128 bytes, from unit `unit` on. `load_row_unit` reads a unit of a row back.
__device__ __forceinline__ void store_block(u32 staging, const u32 (&pairs)[4], int unit, int lane) {
  store_matrices(staging + Slices<64>::place(lane % 16, unit + lane / 16), pairs);
}

__device__ __forceinline__ uint4 load_row_unit(const unsigned char* staging, int row, int unit) {
  return *(const uint4*)(staging + Slices<64>::place(row, unit));
}

// Four numbers for each pair of columns, which lie in shared memory, for two blocks of eight columns at a
// time. Those of the next two are asked for ahead: a load does not overtake a store to shared memory, so
// the arithmetic of a part would wait for the end of the part before.
struct TermsAhead {
  const float4* terms;  // of this thread's columns
  float4 next[2];

  __device__ __forceinline__ TermsAhead(const float4* terms_of_quad)
      : terms(terms_of_quad), next{terms_of_quad[0], terms_of_quad[4]} {}

  template <int kBlocks>
  __device__ __forceinline__ void take(float4 (&of)[2], int block) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      of[i] = next[i];
      if (block + 2 + i < kBlocks) next[i] = terms[4 * (block + 2 + i)];
    }
  }
};

// Shared memory from the next address that descriptors can hold, in both views of it.
struct SharedMemory {
  unsigned char* bytes;
  u32 address;
};

__device__ __forceinline__ SharedMemory aligned_memory(unsigned char* raw) {
  const u32 address = (u32)__cvta_generic_to_shared(raw);
  const u32 aligned = (address + 1023) & ~1023u;
  return {raw + (aligned - address), aligned};
}
