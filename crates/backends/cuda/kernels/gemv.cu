// Linear and LinearAdd for M = 1..8 token rows: weights are streamed once, x stays in shared memory.
//
// x [M, K] any float type, weights [N, K] row-major of type W, out [M, N]. Floor: N*K weight bytes over memory
// bandwidth (2 FLOP a weight and row are far below the arithmetic limit).
//
// One launch serves up to SEGMENTS linears of one x. A warp owns a row of weights; each lane holds four 16-byte loads
// in flight while it multiplies the four before. Lane l sums the elements l*E..l*E+E of every chunk of 32*E in rising
// order, then a butterfly: the order depends on K alone, so neither M, nor fusion, nor the grid changes a bit.
// Structures and epilogues: products.cuh.
//
// x lies in shared memory as float32, or, with several rows of 16-bit x, as it came: eight float32 rows would take 16 bytes of
// shared memory for each of weights, more than a multiprocessor reads while memory brings those, and twice the room.

#define UNROLL 4

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

__device__ __forceinline__ uint4 stream_load(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// Elements c..c+4 of row m of x, to shared memory; X: as type X.
template <int E, int X> __device__ __forceinline__ void keep(void* xs, int m, int padded, int c, float4 q) {
    if (X == F32) {
        *(float4*)((float*)xs + m * padded + place<E>(c)) = q;
    } else {
        const View packed = {xs, padded, X, 1};
        store4(packed, m, c, padded, q);
    }
}

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

// Row m of x, normed if the plan says so, to shared memory. T: type of x, whose rows are aligned.
template <int T, int E, int X>
__device__ __forceinline__ void stage(const Gemv& g, const u64* home, int m, int padded, void* xs, float* part) {
    const View x = placed(g.x, *home);
    const u8* row = (const u8*)x.p + (i64)m * x.ld * (T == F32 ? 4 : 2);
    const bool once = g.k <= HELD * BLOCK * 4;
    float scale = 1.f;
    if (g.norm_weight && !once) scale = rms_scale(block_squares(x, m, 0, g.k, part), g.k, g.eps);
    for (int from = 0; from < padded; from += HELD * BLOCK * 4) {  // all threads alike: there are barriers inside
        const int base = from + threadIdx.x * 4;
        float4 q[HELD];
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            const int c = base + i * BLOCK * 4;
            q[i] = c < g.k ? quad<T>(row, c) : make_float4(0.f, 0.f, 0.f, 0.f);
        }
        if (g.norm_weight) {
            if (once) {
                // The sums of block_squares, in its order, over what is held.
                float s = 0.f;
                if (g.k > WARP_ROWS) {
#pragma unroll
                    for (int i = 0; i < HELD; ++i)
                        if (base + i * BLOCK * 4 < g.k) s = add_squares(s, q[i]);
                    s = warp_sum(s);
                    if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = s;
                    __syncthreads();
                    s = 0.f;
#pragma unroll
                    for (int i = 0; i < BLOCK / 32; ++i) s += part[i];
                } else {
                    s = block_squares(x, m, 0, g.k, part);
                }
                scale = rms_scale(s, g.k, g.eps);
            }
            float4 w[HELD];
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                const int c = base + i * BLOCK * 4;
                w[i] = c < g.k ? *(const float4*)(g.norm_weight + c) : make_float4(0.f, 0.f, 0.f, 0.f);
            }
            const float add = g.centered ? 1.f : 0.f;
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                const int c = base + i * BLOCK * 4;
                q[i].x = rounded(q[i].x * scale * (w[i].x + add), g.normed.dtype);
                q[i].y = rounded(q[i].y * scale * (w[i].y + add), g.normed.dtype);
                q[i].z = rounded(q[i].z * scale * (w[i].z + add), g.normed.dtype);
                q[i].w = rounded(q[i].w * scale * (w[i].w + add), g.normed.dtype);
                if (c >= g.k) q[i] = make_float4(0.f, 0.f, 0.f, 0.f);
                else if (blockIdx.x == 0) store4(placed(g.normed, *home), m, c, g.k, q[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            const int c = base + i * BLOCK * 4;
            if (c < padded) keep<E, X>(xs, m, padded, c, q[i]);
        }
    }
}
// The same for rows that are not aligned.
template <int E, int X>
__device__ __forceinline__ void stage_any(const Gemv& g, const u64* home, int m, int padded, void* xs, float* part) {
    const View x = placed(g.x, *home);
    float scale = 1.f;
    if (g.norm_weight) scale = rms_scale(block_squares(x, m, 0, g.k, part), g.k, g.eps);
    for (int c = threadIdx.x * 4; c < padded; c += BLOCK * 4) {
        float4 q = load4(x, m, c, g.k);
        if (g.norm_weight) {
            float base = g.centered ? 1.f : 0.f;
            q.x = c < g.k ? rounded(q.x * scale * (g.norm_weight[c] + base), g.normed.dtype) : 0.f;
            q.y = c + 1 < g.k ? rounded(q.y * scale * (g.norm_weight[c + 1] + base), g.normed.dtype) : 0.f;
            q.z = c + 2 < g.k ? rounded(q.z * scale * (g.norm_weight[c + 2] + base), g.normed.dtype) : 0.f;
            q.w = c + 3 < g.k ? rounded(q.w * scale * (g.norm_weight[c + 3] + base), g.normed.dtype) : 0.f;
            if (blockIdx.x == 0) store4(placed(g.normed, *home), m, c, g.k, q);
        }
        keep<E, X>(xs, m, padded, c, q);
    }
}

template <int W, int M, int X>
__device__ __forceinline__ void gemv_body(const Gemv& g, const u64* home) {
    const int E = Weights<W>::E;
    const int CHUNK = 32 * E, STEP = CHUNK * UNROLL;
    typedef typename Weights<W>::T T;
    extern __shared__ float4 shared[];
    void* xs = shared;
    __shared__ float part[M][8];
    const int lane = threadIdx.x & 31;
    const int padded = (g.k + CHUNK - 1) / CHUNK * CHUNK;
    const int steps = (g.k + STEP - 1) / STEP;
    const int stride = gridDim.x * (BLOCK / 32);

    int unit = (threadIdx.x >> 5) * gridDim.x + blockIdx.x;  // neighbours in a unit's order lie on different SMs
    int s = 0;                                               // index of the segment of `unit`
    auto locate = [&](int u, int from) {
        while (from + 1 < g.segments && u >= g.segment[from + 1].first_unit) ++from;
        return from;
    };
    auto row_of = [&](int u, int seg, int half) {
        const Segment& p = g.segment[seg];
        return (const T*)(half ? p.w2 : p.w) + (i64)(u - p.first_unit) * g.k;
    };
    uint4 now[UNROLL], next[UNROLL];
    auto fetch = [&](uint4* into, const T* row, int step) {
#pragma unroll
        for (int j = 0; j < UNROLL; ++j) {
            int e = step * STEP + j * CHUNK + lane * E;
            into[j] = e < g.k ? stream_load(row + e) : make_uint4(0, 0, 0, 0);
        }
    };
    s = locate(unit, 0);
    const T* row = 0;
    if (unit < g.units) {
        row = row_of(unit, s, 0);
        fetch(now, row, 0);  // weights are nobody's output: no need to wait
    }
    if (g.norm_weight)
        for (int c = threadIdx.x * 32; c < g.k; c += BLOCK * 32) prefetch(g.norm_weight + c);
    pdl_wait();
    if (unit + stride >= g.units) pdl_launch();

    const bool aligned = g.x.vec && ((u64)g.norm_weight & 15) == 0 && (g.k & 3) == 0;
#pragma unroll 1  // for the compiler's sake: with 8 rows it takes a minute otherwise
    for (int m = 0; m < M; ++m) {
        if (!aligned) stage_any<E, X>(g, home, m, padded, xs, part[m]);
        else if (g.x.dtype == F32) stage<F32, E, X>(g, home, m, padded, xs, part[m]);
        else if (g.x.dtype == BF16) stage<BF16, E, X>(g, home, m, padded, xs, part[m]);
        else stage<F16, E, X>(g, home, m, padded, xs, part[m]);
    }
    __syncthreads();

    while (unit < g.units) {
        const Segment& p = g.segment[s];
        const int n = unit - p.first_unit;
        const int halves = p.mode == PAIR ? 2 : 1;
        float first = 0.f;
        const int unit2 = unit + stride;
        const int s2 = locate(unit2, s);
        if (unit2 < g.units && unit2 + stride >= g.units) pdl_launch();  // this warp's last unit but one
        // What the epilogue needs comes while the row is summed. ADD: lane m holds what row m had. CONV: lane j holds tap j
        // and the state's row j.
        float old = 0.f, tap = 0.f;
        if (p.mode == ADD) {
            if (lane < M) old = load1(placed(p.out, *home), lane, n);
        } else if (p.mode == CONV) {
            if (lane < p.taps) tap = p.conv_weight[(i64)n * p.taps + lane];
            if (lane + 1 < p.taps) old = placed(p.conv_state, *home)[(i64)lane * p.rows + n];
        }
        for (int half = 0; half < halves; ++half) {
            const float* bias = half ? p.bias2 : p.bias;
            const float b = bias ? bias[n] : 0.f;
            float acc[M];
#pragma unroll
            for (int m = 0; m < M; ++m) acc[m] = 0.f;
            for (int step = 0; step < steps; ++step) {
                if (step + 1 < steps) {
                    fetch(next, row, step + 1);
                } else if (half + 1 < halves) {
                    row = row_of(unit, s, 1);
                    fetch(next, row, 0);
                } else if (unit2 < g.units) {
                    row = row_of(unit2, s2, 0);
                    fetch(next, row, 0);
                }
#pragma unroll
                for (int j = 0; j < UNROLL; ++j) {
                    int chunk = step * STEP + j * CHUNK;
                    if (chunk < g.k) {
                        float w[E];
                        unpack<W>(now[j], w);
#pragma unroll
                        for (int m = 0; m < M; ++m) {
                            if (X == F32) {
                                const float* xm = (const float*)xs + m * padded + chunk + lane * 4;
#pragma unroll
                                for (int q = 0; q < E / 4; ++q) {
                                    const float4 four = *(const float4*)(xm + q * 128);
                                    acc[m] = fmaf(w[4 * q], four.x, acc[m]);
                                    acc[m] = fmaf(w[4 * q + 1], four.y, acc[m]);
                                    acc[m] = fmaf(w[4 * q + 2], four.z, acc[m]);
                                    acc[m] = fmaf(w[4 * q + 3], four.w, acc[m]);
                                }
                            } else {
                                float eight[8];
                                unpack<X>(*(const uint4*)((const u16*)xs + m * padded + chunk + lane * 8), eight);
#pragma unroll
                                for (int i = 0; i < E; ++i) acc[m] = fmaf(w[i], eight[i], acc[m]);
                            }
                        }
                    }
                }
#pragma unroll
                for (int j = 0; j < UNROLL; ++j) now[j] = next[j];
            }
            float v = 0.f;  // of row `lane`; with one row, every lane's
#pragma unroll
            for (int m = 0; m < M; ++m) {
                const float sum = warp_sum(acc[m]) + b;
                if (M == 1 || lane == m) v = sum;
            }
            finish<M, true>(p, *home, n, lane, half, v, old, tap, first);
        }
        unit = unit2;
        s = s2;
    }
}

#define GEMV(name, W, M, X, PER_SM)                                                                                        \
    extern "C" __global__ void __launch_bounds__(BLOCK, PER_SM) name(const __grid_constant__ Gemv g, const u64* home) { \
        gemv_body<W, M, X>(g, home);                                                                                    \
    }
GEMV(gemv_f32_1, F32, 1, F32, 4)
GEMV(gemv_f32_2, F32, 2, F32, 2)
GEMV(gemv_f32_4, F32, 4, F32, 2)
GEMV(gemv_f32_8, F32, 8, F32, 1)
GEMV(gemv_bf16_1, BF16, 1, F32, 4)
GEMV(gemv_bf16_2, BF16, 2, F32, 2)
GEMV(gemv_bf16_4, BF16, 4, F32, 2)
GEMV(gemv_bf16_8, BF16, 8, F32, 1)
GEMV(gemv_f16_1, F16, 1, F32, 4)
GEMV(gemv_f16_2, F16, 2, F32, 2)
GEMV(gemv_f16_4, F16, 4, F32, 2)
GEMV(gemv_f16_8, F16, 8, F32, 1)
GEMV(gemv_bf16_packed_2, BF16, 2, BF16, 2)
GEMV(gemv_bf16_packed_4, BF16, 4, BF16, 2)
GEMV(gemv_bf16_packed_8, BF16, 8, BF16, 2)
GEMV(gemv_f16_packed_2, F16, 2, F16, 2)
GEMV(gemv_f16_packed_4, F16, 4, F16, 2)
GEMV(gemv_f16_packed_8, F16, 8, F16, 2)
