// Shared by gemv.cu and stream.cu: parameters, weights, epilogues.

#define SEGMENTS 6
#define STORE 0
#define ADD 1
#define CONV 2
#define PAIR 3
#define UNROLL 4

struct Segment {
    const void* w;
    const void* w2;      // PAIR: the second linear
    const float* bias;   // of w, or null
    const float* bias2;
    View out;            // of w
    View out2;           // PAIR: of w2; CONV: of the convolution
    View out3;           // PAIR: of silu(out) * out2
    const float* conv_weight;  // [N, taps]
    const float* conv_bias;
    float* conv_state;   // [taps - 1, N]
    int rows;
    int mode;
    int taps;
    int first_unit;
};
struct Gemv {
    View x;              // before the norm, if there is one
    View normed;         // where the plan has the norm's result
    const float* norm_weight;
    float eps;
    int centered;
    int k;
    int segments;
    int units;
    int ahead;           // pieces that each warp of the streaming kernel brings to the L2 cache before it waits
    Segment segment[SEGMENTS];
};

template <int W> struct Weights;
template <> struct Weights<F32> {
    static const int E = 4;
    typedef float T;
};
template <> struct Weights<BF16> {
    static const int E = 8;
    typedef u16 T;
};
template <> struct Weights<F16> {
    static const int E = 8;
    typedef u16 T;
};

// Where element e of x lies: for 8 elements a lane two planes of 4, so that 16-byte reads meet no bank twice.
template <int E> __device__ __forceinline__ int place(int e) {
    if (E == 4) return e;
    return (e & ~255) + ((e >> 2) & 1) * 128 + ((e >> 3) & 31) * 4 + (e & 3);
}

template <int W> __device__ __forceinline__ void unpack(uint4 raw, float* w) {
    u32 r[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (W == F32) {
            w[i] = __uint_as_float(r[i]);
        } else if (W == BF16) {
            w[2 * i] = __uint_as_float(r[i] << 16);
            w[2 * i + 1] = __uint_as_float(r[i] & 0xffff0000u);
        } else {
            w[2 * i] = f16_to_f32((u16)r[i]);
            w[2 * i + 1] = f16_to_f32((u16)(r[i] >> 16));
        }
    }
}

__device__ __forceinline__ uint4 stream_load(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Four columns of an aligned row.
template <int T> __device__ __forceinline__ float4 quad(const void* row, int c) {
    if (T == F32) return *(const float4*)((const float*)row + c);
    const uint2 raw = *(const uint2*)((const u16*)row + c);
    if (T == BF16)
        return make_float4(__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xffff0000u),
                           __uint_as_float(raw.y << 16), __uint_as_float(raw.y & 0xffff0000u));
    return make_float4(f16_to_f32((u16)raw.x), f16_to_f32((u16)(raw.x >> 16)),
                       f16_to_f32((u16)raw.y), f16_to_f32((u16)(raw.y >> 16)));
}

#define HELD 4  // groups of four columns that a thread loads before it uses the first

// What becomes of the sum `v` of row `n`: of token row `lane`, or every lane's with one row. `old`, `tap`: what the epilogue
// reads, loaded before the sum. `first`: the first sum of a pair.
template <int M>
__device__ __forceinline__ void finish(const Segment& p, int n, int lane, int half, float v, float old, float tap, float& first) {
    if (p.mode == CONV) {
        // The plan has one row.
        v = rounded(v, p.out.dtype);
        float sum = 0.f;
        for (int j = 0; j + 1 < p.taps; ++j)
            sum = fmaf(__shfl_sync(FULL, tap, j), __shfl_sync(FULL, old, j), sum);
        sum = fmaf(__shfl_sync(FULL, tap, p.taps - 1), v, sum);
        if (lane > 0 && lane + 1 < p.taps) p.conv_state[(i64)(lane - 1) * p.rows + n] = old;
        if (lane == 0) {
            store1(p.out, 0, n, v);
            if (p.taps > 1) p.conv_state[(i64)(p.taps - 2) * p.rows + n] = v;
            if (p.conv_bias) sum += p.conv_bias[n];
            store1(p.out2, 0, n, silu(sum));
        }
    } else if (lane < M) {
        if (p.mode == ADD) {
            store1(p.out, lane, n, old + v);
        } else if (p.mode == STORE) {
            store1(p.out, lane, n, v);
        } else {
            const View& o = half ? p.out2 : p.out;
            v = rounded(v, o.dtype);
            store1(o, lane, n, v);
            if (half) store1(p.out3, lane, n, silu(first) * v);
            else first = v;
        }
    }
}
