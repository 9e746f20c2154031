// One token row, from compute capability 9.0 on: weights come through rings in shared memory.
//
// Each warp owns rows and a ring of DEPTH pieces of PIECE bytes, which one lane fills by bulk copies; nothing is shared between
// warps but x, so there is no barrier after the prologue. The ring is filled before the wait for the previous kernel, and the
// next kernel may begin at once: its ring fills while this one ends, so memory never idles between two launches. Shared
// memory is sized so that two such blocks and one of another kernel fit on a multiprocessor, and never three.
// A lane's sums have the order of gemv_body: the bits are the same.
#define STREAM_WARPS (BLOCK / 32)
#ifndef PIECE
#define PIECE 2048
#endif
#ifndef DEPTH
#define DEPTH 5
#endif
#ifndef TRIGGER
#define TRIGGER 0
#endif

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void barrier_init(u64* b) { asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(b)) : "memory"); }
__device__ __forceinline__ void barrier_wait(u64* b, u32 phase) {
    asm volatile(
        "{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(shared_address(b)),
        "r"(phase)
        : "memory");
}
__device__ __forceinline__ void bulk_load(void* to, const void* from, u32 bytes, u64* b, u64 policy) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(b)), "l"(policy)
        : "memory");
}
__device__ __forceinline__ void bulk_prefetch(const void* from, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
#endif

// x to shared memory as W, normed if the plan says so. The norm has the order of `stage`.
template <int T, int W>
__device__ __forceinline__ void stage_packed(const Gemv& g, int padded, u16* xs, float* part) {
    const bool once = g.k <= HELD * BLOCK * 4;
    float scale = 1.f;
    if (g.norm_weight && !once) scale = rms_scale(block_squares(g.x, 0, 0, g.k, part), g.k, g.eps);
    for (int from = 0; from < padded; from += HELD * BLOCK * 4) {  // all threads alike: there are barriers inside
        const int base = from + threadIdx.x * 4;
        float4 q[HELD], w[HELD];
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            const int c = base + i * BLOCK * 4;
            q[i] = c < g.k ? quad<T>(g.x.p, c) : make_float4(0.f, 0.f, 0.f, 0.f);
        }
        if (g.norm_weight) {
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                const int c = base + i * BLOCK * 4;
                w[i] = c < g.k ? *(const float4*)(g.norm_weight + c) : make_float4(0.f, 0.f, 0.f, 0.f);
            }
            if (once) {
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
                    s = block_squares(g.x, 0, 0, g.k, part);
                }
                scale = rms_scale(s, g.k, g.eps);
            }
            const float add = g.centered ? 1.f : 0.f;
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                const int c = base + i * BLOCK * 4;
                q[i].x = rounded(q[i].x * scale * (w[i].x + add), W);
                q[i].y = rounded(q[i].y * scale * (w[i].y + add), W);
                q[i].z = rounded(q[i].z * scale * (w[i].z + add), W);
                q[i].w = rounded(q[i].w * scale * (w[i].w + add), W);
                if (c >= g.k) q[i] = make_float4(0.f, 0.f, 0.f, 0.f);
                else if (blockIdx.x == 0) store4(g.normed, 0, c, g.k, q[i]);
            }
        }
        const View packed = {xs, 0, W, 1};
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            const int c = base + i * BLOCK * 4;
            if (c < padded) store4(packed, 0, c, padded, q[i]);
        }
    }
}

template <int W>
__device__ __forceinline__ void stream_body(const Gemv& g) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ float4 shared[];
    __shared__ float part[BLOCK / 32];
    __shared__ u64 full[STREAM_WARPS][DEPTH];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int padded = (g.k + 255) & ~255;
    u16* xs = (u16*)shared;
    u8* ring = (u8*)shared + padded * 2 + warp * (DEPTH * PIECE);
    const int row_bytes = g.k * 2;
    const int stride = gridDim.x * STREAM_WARPS;
    const int start = warp * gridDim.x + blockIdx.x;
    auto locate = [&](int u, int from) {
        while (from + 1 < g.segments && u >= g.segment[from + 1].first_unit) ++from;
        return from;
    };
    if (lane == 0) {
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) barrier_init(&full[warp][i]);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    // The next piece to bring: of which unit, and of its rows which, from which byte on.
    int next_unit = start, next_s = locate(start, 0), next_half = 0, next_at = 0;
    const u8* next_row = 0;
    auto enter = [&]() {
        if (next_unit < g.units) {
            const Segment& p = g.segment[next_s];
            next_row = (const u8*)(next_half ? p.w2 : p.w) + (i64)(next_unit - p.first_unit) * row_bytes;
        }
    };
    auto advance_piece = [&]() {
        next_at += PIECE;
        if (next_at >= row_bytes) {
            next_at = 0;
            if (next_half == 0 && g.segment[next_s].mode == PAIR) {
                next_half = 1;
            } else {
                next_half = 0;
                next_unit += stride;
                if (next_unit < g.units) next_s = locate(next_unit, next_s);
            }
            enter();
        }
    };
    auto bring = [&](int slot) {
#ifndef TMA
        if (next_unit < g.units) {
#pragma unroll
            for (int j = 0; j < PIECE / 512; ++j) {
                const int at = j * 512 + lane * 16, left = row_bytes - next_at - at;
                if (PIECE == 512 || next_at + j * 512 < row_bytes)
                    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(ring + slot * PIECE + at)),
                                 "l"(next_row + next_at + (left > 0 ? at : 0)), "r"(left > 0 ? 16 : 0) : "memory");
            }
            advance_piece();
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        return;
#endif
        if (next_unit >= g.units) return;
        if (lane == 0) {
            const int left = row_bytes - next_at;
            bulk_load(ring + slot * PIECE, next_row + next_at, left < PIECE ? left : PIECE, &full[warp][slot], policy);
        }
        advance_piece();
    };
    enter();
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) bring(i);
    if (g.ahead > 0) {
        // What comes after the ring goes to the L2 cache.
        const int unit = next_unit, s = next_s, half = next_half, at = next_at;
        const u8* row = next_row;
        for (int i = 0; i < g.ahead && next_unit < g.units; ++i) {
            const int left = row_bytes - next_at;
            if (lane == 0) bulk_prefetch(next_row + next_at, left < PIECE ? left : PIECE);
            advance_piece();
        }
        next_unit = unit, next_s = s, next_half = half, next_at = at, next_row = row;
    }
    if (g.norm_weight)
        for (int c = threadIdx.x * 32; c < g.k; c += BLOCK * 32) prefetch(g.norm_weight + c);
    TRACE_START
#if TRIGGER == 0
    pdl_launch();
#endif
    pdl_wait();
    TRACE_WAITED
    if (g.x.dtype == F32) stage_packed<F32, W>(g, padded, xs, part);
    else stage_packed<W, W>(g, padded, xs, part);
    __syncthreads();
#if TRIGGER == 1
    pdl_launch();
#endif
    TRACE_STAGED

    int slot = 0;
    u32 phase = 0;
    int s = locate(start, 0);
    for (int unit = start; unit < g.units; unit += stride) {
        s = locate(unit, s);
        const Segment& p = g.segment[s];
        const int n = unit - p.first_unit;
        const int halves = p.mode == PAIR ? 2 : 1;
        float first = 0.f, old = 0.f, tap = 0.f;
#if TRIGGER == 2
        if (unit + stride >= g.units) pdl_launch();
#endif
        if (p.mode == ADD) {
            if (lane == 0) old = load1(p.out, 0, n);
        } else if (p.mode == CONV) {
            if (lane < p.taps) tap = p.conv_weight[(i64)n * p.taps + lane];
            if (lane + 1 < p.taps) old = p.conv_state[(i64)lane * p.rows + n];
        }
        for (int half = 0; half < halves; ++half) {
            const float* bias = half ? p.bias2 : p.bias;
            const float b = bias ? bias[n] : 0.f;
            float acc = 0.f;
            for (int at = 0; at < row_bytes; at += PIECE) {
#ifdef TMA
                barrier_wait(&full[warp][slot], phase);
#else
                asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1) : "memory");
#endif
                const uint4* wp = (const uint4*)(ring + slot * PIECE) + lane;
                const uint4* xp = (const uint4*)((const u8*)xs + at) + lane;
#pragma unroll
                for (int j = 0; j < PIECE / 512; ++j) {
                    const int byte = at + j * 512;
                    if (byte < row_bytes) {
                        // Past the end of a row x is zero, and the ring holds anything.
                        uint4 raw = wp[j * 32];
#ifdef TMA
                        if (byte + 512 > row_bytes && byte + lane * 16 >= row_bytes) raw = make_uint4(0, 0, 0, 0);
#endif
                        float w[8], x[8];
                        unpack<W>(raw, w);
                        unpack<W>(xp[j * 32], x);
#pragma unroll
                        for (int i = 0; i < 8; ++i) acc = fmaf(w[i], x[i], acc);
                    }
                }
#ifdef TMA
                __syncwarp();
#endif
                bring(slot);
                if (++slot == DEPTH) {
                    slot = 0;
                    phase ^= 1;
                }
            }
            const float v = warp_sum(acc) + b;
            finish<1>(p, n, lane, half, v, old, tap, first);
        }
    }
    TRACE_END(g.units)
#endif
}
#ifndef STREAM_PER_SM
#define STREAM_PER_SM 4
#endif
#define STREAM(name, W) \
    extern "C" __global__ void __launch_bounds__(BLOCK, STREAM_PER_SM) name(const __grid_constant__ Gemv g) { stream_body<W>(g); }
STREAM(gemv_stream_bf16, BF16)
STREAM(gemv_stream_f16, F16)
