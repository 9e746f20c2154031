// Prepended to every kernel source: element types, views, reductions with fixed orders, programmatic launch.
// No headers are needed, so NVRTC alone compiles the kernels.
typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef unsigned short u16;

#define F32 0
#define BF16 1
#define F16 2
#define WARP_ROWS 512  // groups up to this many columns are reduced by one warp, wider ones by a block of 256
#define BLOCK 256
#define FULL 0xffffffffu
#define INFINITY __int_as_float(0x7f800000)

// A rectangle of float elements; `ld` counts elements between rows. `vec` is 1 where every group of four columns
// that starts at a multiple of four is aligned for one load.
struct View {
    void* p;
    i64 ld;
    int dtype;
    int vec;
};

// 32-bit words (tokens, counts): pointer and elements between rows.
struct Words {
    void* p;
    i64 ld;
};

// One set of graphs serves all slots: where there are several, what a plan has in State is given as its offset in a slot, with
// the highest bit set, and `home` holds where the slot of this replay begins, less that bit. It changes between replays only.
// A kernel whose time is latency reads it where it needs it, and not at all for addresses; one that lasts reads it at once.
// Added to the pointer itself: of an address made from a number the compiler would not know that it is no shared memory's, and
// loads would wait for stores to that (the sampler took 16 us longer).
template <typename T> __device__ __forceinline__ T* placed(T* p, u64 home) { return (i64)p < 0 ? (T*)((const u8*)p + home) : p; }
template <typename T> __device__ __forceinline__ T* placed(T* p, const u64* home) {
    if ((i64)p < 0) p = (T*)((const u8*)p + *home);
    return p;
}
template <typename Home> __device__ __forceinline__ View placed(View v, Home home) {
    v.p = placed(v.p, home);
    return v;
}
template <typename Home> __device__ __forceinline__ Words placed(Words w, Home home) {
    w.p = placed(w.p, home);
    return w;
}

__device__ __forceinline__ float bf16_to_f32(u16 v) { return __uint_as_float((u32)v << 16); }
__device__ __forceinline__ u16 f32_to_bf16(float v) {
    u16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
}
__device__ __forceinline__ float f16_to_f32(u16 v) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
    return r;
}
__device__ __forceinline__ u16 f32_to_f16(float v) {
    u16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
}

__device__ __forceinline__ float load1(const View& v, i64 row, i64 col) {
    i64 i = row * v.ld + col;
    if (v.dtype == F32) return ((const float*)v.p)[i];
    u16 raw = ((const u16*)v.p)[i];
    return v.dtype == BF16 ? bf16_to_f32(raw) : f16_to_f32(raw);
}
__device__ __forceinline__ void store1(const View& v, i64 row, i64 col, float x) {
    i64 i = row * v.ld + col;
    if (v.dtype == F32) ((float*)v.p)[i] = x;
    else ((u16*)v.p)[i] = v.dtype == BF16 ? f32_to_bf16(x) : f32_to_f16(x);
}
// A load apart from its conversion. The type is known at run time only, and a conversion behind each load makes the next
// load wait for it: where several loads are to be on their way together, all raw loads come first.
__device__ __forceinline__ u32 raw1(const View& v, i64 row, i64 col) {
    const i64 i = row * v.ld + col;
    return v.dtype == F32 ? ((const u32*)v.p)[i] : (u32)((const u16*)v.p)[i];
}
__device__ __forceinline__ float cooked(u32 raw, int dtype) {
    if (dtype == F32) return __uint_as_float(raw);
    return dtype == BF16 ? __uint_as_float(raw << 16) : f16_to_f32((u16)raw);
}
// Four columns that are there and aligned; 16-bit ones in x and y.
__device__ __forceinline__ uint4 raw4(const View& v, i64 row, i64 col) {
    const i64 i = row * v.ld + col;
    if (v.dtype == F32) return *(const uint4*)((const float*)v.p + i);
    const uint2 raw = *(const uint2*)((const u16*)v.p + i);
    return make_uint4(raw.x, raw.y, 0, 0);
}
__device__ __forceinline__ float4 cooked4(uint4 raw, int dtype) {
    if (dtype == F32) return make_float4(__uint_as_float(raw.x), __uint_as_float(raw.y), __uint_as_float(raw.z), __uint_as_float(raw.w));
    return make_float4(cooked(raw.x & 0xffffu, dtype), cooked(raw.x >> 16, dtype), cooked(raw.y & 0xffffu, dtype), cooked(raw.y >> 16, dtype));
}
// What a value becomes when it is stored as `dtype` and loaded again.
__device__ __forceinline__ float rounded(float x, int dtype) {
    if (dtype == F32) return x;
    return dtype == BF16 ? bf16_to_f32(f32_to_bf16(x)) : f16_to_f32(f32_to_f16(x));
}

// Columns col..col+4 of a row of n columns; those past the end are zero.
__device__ __forceinline__ float4 load4(const View& v, i64 row, i64 col, i64 n) {
    if (v.vec && col + 4 <= n) {
        i64 i = row * v.ld + col;
        if (v.dtype == F32) return *(const float4*)((const float*)v.p + i);
        uint2 raw = *(const uint2*)((const u16*)v.p + i);
        if (v.dtype == BF16)
            return make_float4(__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xffff0000u),
                               __uint_as_float(raw.y << 16), __uint_as_float(raw.y & 0xffff0000u));
        return make_float4(f16_to_f32((u16)raw.x), f16_to_f32((u16)(raw.x >> 16)),
                           f16_to_f32((u16)raw.y), f16_to_f32((u16)(raw.y >> 16)));
    }
    float4 r = make_float4(0.f, 0.f, 0.f, 0.f);
    if (col < n) r.x = load1(v, row, col);
    if (col + 1 < n) r.y = load1(v, row, col + 1);
    if (col + 2 < n) r.z = load1(v, row, col + 2);
    if (col + 3 < n) r.w = load1(v, row, col + 3);
    return r;
}
__device__ __forceinline__ void store4(const View& v, i64 row, i64 col, i64 n, float4 x) {
    if (v.vec && col + 4 <= n) {
        i64 i = row * v.ld + col;
        if (v.dtype == F32) {
            *(float4*)((float*)v.p + i) = x;
            return;
        }
        uint2 raw;
        if (v.dtype == BF16) {
            raw.x = (u32)f32_to_bf16(x.x) | (u32)f32_to_bf16(x.y) << 16;
            raw.y = (u32)f32_to_bf16(x.z) | (u32)f32_to_bf16(x.w) << 16;
        } else {
            raw.x = (u32)f32_to_f16(x.x) | (u32)f32_to_f16(x.y) << 16;
            raw.y = (u32)f32_to_f16(x.z) | (u32)f32_to_f16(x.w) << 16;
        }
        *(uint2*)((u16*)v.p + i) = raw;
        return;
    }
    if (col < n) store1(v, row, col, x.x);
    if (col + 1 < n) store1(v, row, col + 1, x.y);
    if (col + 2 < n) store1(v, row, col + 2, x.z);
    if (col + 3 < n) store1(v, row, col + 3, x.w);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
__device__ __forceinline__ float silu(float x) { return x / (1.f + expf(-x)); }

// Butterfly sums: every lane ends with the same bits, whatever else runs.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) v += __shfl_xor_sync(FULL, v, d);
    return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) v = fmaxf(v, __shfl_xor_sync(FULL, v, d));
    return v;
}

__device__ __forceinline__ float add_squares(float s, float4 q) {
    s = fmaf(q.x, q.x, s);
    s = fmaf(q.y, q.y, s);
    s = fmaf(q.z, q.z, s);
    return fmaf(q.w, q.w, s);
}
// Sum of squares of columns first..first+n of a row, by one warp.
__device__ __forceinline__ float warp_squares(const View& x, i64 row, i64 first, int n) {
    float s = 0.f;
    for (int c = (threadIdx.x & 31) * 4; c < n; c += 128) s = add_squares(s, load4(x, row, first + c, first + n));
    return warp_sum(s);
}
// The same by a block of BLOCK threads; `part` is 8 floats of shared memory. Ends with a barrier.
__device__ __forceinline__ float block_squares(const View& x, i64 row, i64 first, int n, float* part) {
    if (n <= WARP_ROWS) {
        if (threadIdx.x < 32) {
            float s = warp_squares(x, row, first, n);
            if (threadIdx.x == 0) part[0] = s;
        }
        __syncthreads();
        float sum = part[0];
        __syncthreads();
        return sum;
    }
    float s = 0.f;
    for (int c = threadIdx.x * 4; c < n; c += BLOCK * 4) s = add_squares(s, load4(x, row, first + c, first + n));
    s = warp_sum(s);
    if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = s;
    __syncthreads();
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < BLOCK / 32; ++w) sum += part[w];
    __syncthreads();
    return sum;
}
__device__ __forceinline__ float rms_scale(float squares, int n, float eps) { return 1.f / sqrtf(squares / (float)n + eps); }

// Programmatic dependent launch. Before its wait a kernel reads only weights, or what no op before it in the replay writes, and
// writes nothing. Most kernels let the next one begin only after their wait: with three kernels on the device at once the third's
// blocks crowd the multiprocessors that the first left earliest, and a kernel that divides its work evenly among its blocks
// then waits for those. Kernels of few or long-lived blocks (chains, the delta step, attention_stream) let it begin at once.
__device__ __forceinline__ void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void pdl_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ u32 valid_rows(const u32* count, u32 rows) {
    if (!count) return rows;
    u32 c = *count;
    return c < rows ? c : rows;
}
