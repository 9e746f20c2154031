// Several products of one row, one after another, in one launch: one block a multiprocessor, from compute capability 9.0 on.
// Floor: as in gemv.cu.
//
// Between two products all blocks meet, which with the staging of x takes some 3 us: memory would be idle for as long. It is
// not, because weights come through rings in shared memory: a warp owns rows as in gemv.cu and a ring of `depth` pieces, which
// one lane fills by bulk copies and which runs ahead of the sums, into the next product's weights and, before the launch's
// wait, into the first one's. 132 rings of 192 KiB are 8 us of memory. Nothing but x is shared between warps. What one product
// writes the next reads past the L1 caches, which do not know of each other. A lane's sums have the order of gemv_body: the
// bits are the same.
#define CHAIN 4
#define CHAIN_WARPS 16
#define CHAIN_BLOCK (CHAIN_WARPS * 32)
#define CHAIN_REGISTERS 112  // of a thread: 2048 of each quarter of a multiprocessor are left, room for two blocks of copy_beside
#define PIECE 4096
#define MOST_DEPTH 8
struct Chain {
    u32* turn;     // of the meeting: its highest bit changes when all have arrived
    int phases;
    int depth;     // pieces of a warp's ring
    int near;      // pieces on their way, in the middle of a phase
    int x_bytes;   // of shared memory before the rings
    Gemv phase[CHAIN];
};

#if __CUDA_ARCH__ >= 900
// All blocks meet. The first block adds what the others leave of 2^31, so that the top bit changes once a meeting and the
// word needs no reset. Who waits for most of a minute waits for blocks that are not on the device: an error is better than a
// hang.
__device__ __forceinline__ void meet(u32* turn) {
    __syncthreads();
    if (threadIdx.x == 0) {
        const u32 add = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u;
        u32 before, now, looks = 0;
        asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(turn), "r"(add) : "memory");
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(turn) : "memory");
            if (++looks == 1u << 26) __trap();
        } while (((before ^ now) & 0x80000000u) == 0);
    }
    __syncthreads();
}

// One element, and four aligned ones, past the L1 cache.
__device__ __forceinline__ float load_shared(const View& v, int c) {
    return v.dtype == F32 ? __ldcg((const float*)v.p + c) : cooked(__ldcg((const u16*)v.p + c), v.dtype);
}
template <int T> __device__ __forceinline__ float4 quad_shared(const void* row, int c) {
    if (T == F32) return __ldcg((const float4*)((const float*)row + c));
    const uint2 raw = __ldcg((const uint2*)((const u16*)row + c));
    return cooked4(make_uint4(raw.x, raw.y, 0, 0), T);
}

// x, of type T, to shared memory as W, zeros after its end; normed if the plan says so, with the sums of block_squares in
// their order, which is that of BLOCK threads.
template <int W, int T>
__device__ __forceinline__ void stage_chain(const Gemv& g, u16* xs, float* part) {
    const void* x = g.x.p;
    const int padded = (g.k + 255) & ~255;
    const View packed = {xs, 0, W, 1};
    const float4 zero = make_float4(0.f, 0.f, 0.f, 0.f);
    if (!g.norm_weight) {
        // Without a norm x is of type W.
        const int AT_ONCE = 6;  // loads that are on their way together
#pragma unroll 1
        for (int from = threadIdx.x * 4; from < padded; from += AT_ONCE * CHAIN_BLOCK * 4) {
            uint2 q[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const int c = from + i * CHAIN_BLOCK * 4;
                q[i] = c < g.k ? __ldcg((const uint2*)((const u16*)x + c)) : make_uint2(0, 0);
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const int c = from + i * CHAIN_BLOCK * 4;
                if (c < padded) *(uint2*)(xs + c) = q[i];
            }
        }
        return;
    }
    const bool once = g.k <= HELD * BLOCK * 4, worker = threadIdx.x < BLOCK;
    float4 q[HELD], w[HELD];
    auto load = [&](int from) {
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            const int c = from + threadIdx.x * 4 + i * BLOCK * 4;
            q[i] = c < g.k ? quad_shared<T>(x, c) : zero;
            w[i] = c < g.k ? *(const float4*)(g.norm_weight + c) : zero;
        }
    };
    if (worker) {
        load(0);
        float s = 0.f;
        if (g.k <= WARP_ROWS) {
            if (threadIdx.x < 32)
                for (int c = threadIdx.x * 4; c < g.k; c += 128) s = add_squares(s, quad_shared<T>(x, c));
        } else if (once) {
#pragma unroll
            for (int i = 0; i < HELD; ++i)
                if ((int)threadIdx.x * 4 + i * BLOCK * 4 < g.k) s = add_squares(s, q[i]);
        } else {
            for (int c = threadIdx.x * 4; c < g.k; c += BLOCK * 4) s = add_squares(s, quad_shared<T>(x, c));
        }
        s = warp_sum(s);
        if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = s;
    }
    __syncthreads();
    if (!worker) return;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < BLOCK / 32; ++i) sum += part[i];
    const float scale = rms_scale(g.k > WARP_ROWS ? sum : part[0], g.k, g.eps);
    const float add = g.centered ? 1.f : 0.f;
    for (int from = 0; from < padded; from += HELD * BLOCK * 4) {
        if (from > 0) load(from);
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            const int c = from + threadIdx.x * 4 + i * BLOCK * 4;
            float4 v = q[i];
            v.x = rounded(v.x * scale * (w[i].x + add), W);
            v.y = rounded(v.y * scale * (w[i].y + add), W);
            v.z = rounded(v.z * scale * (w[i].z + add), W);
            v.w = rounded(v.w * scale * (w[i].w + add), W);
            if (c >= g.k) v = zero;
            else if (blockIdx.x == 0) store4(g.normed, 0, c, g.k, v);
            if (c < padded) store4(packed, 0, c, padded, v);
        }
    }
}
#endif

template <int W>
__device__ __forceinline__ void chain_body(const Chain& chain, const u64* home_at) {
#if __CUDA_ARCH__ >= 900
    const u64 home = *home_at;
    extern __shared__ float4 shared[];
    __shared__ float part[BLOCK / 32];
    __shared__ u64 full[CHAIN_WARPS][MOST_DEPTH];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, depth = chain.depth;
    // Bulk copies to multiples of 128: to odd multiples of 32 a token of the 9B shape takes 1 % longer, of 16 it takes 11 %.
    u8* base = (u8*)shared + (-shared_address(shared) & 127);
    u16* xs = (u16*)base;
    const u8* ring = base + chain.x_bytes + warp * (depth * PIECE);
    const u32 ring_at = shared_address(ring), barriers = shared_address(full[warp]);
    const int stride = gridDim.x * CHAIN_WARPS;
    const int mine = warp * gridDim.x + blockIdx.x;  // neighbours in a unit's order lie on different SMs
    if (lane == 0) {
        bulk_barriers(barriers, depth);
    }
    __syncwarp();

    // The next piece to bring: of which phase, unit and half of it, from which byte on. No row: all has been brought.
    int f_phase = 0, f_unit = mine, f_segment = 0, f_half = 0, f_at = 0, f_bytes = 0;
    const u8* f_row = 0;
    auto enter = [&]() {
        f_row = 0;
        for (; f_phase < chain.phases; ++f_phase, f_unit = mine, f_segment = 0) {
            const Gemv& g = chain.phase[f_phase];
            if (f_unit >= g.units) continue;
            while (f_segment + 1 < g.segments && f_unit >= g.segment[f_segment + 1].first_unit) ++f_segment;
            const Segment& p = g.segment[f_segment];
            f_bytes = g.k * 2;
            f_row = (const u8*)(f_half ? p.w2 : p.w) + (i64)(f_unit - p.first_unit) * f_bytes;
            return;
        }
    };
    auto bring = [&](int slot) {
        if (!f_row) return;
        const int left = f_bytes - f_at;
        if (lane == 0) bulk_load(ring_at + slot * PIECE, f_row + f_at, left < PIECE ? left : PIECE, barriers + 8 * slot);
        f_at += PIECE;
        if (f_at < f_bytes) return;
        f_at = 0;
        if (!f_half && chain.phase[f_phase].segment[f_segment].mode == PAIR) {
            f_half = 1;
        } else {
            f_half = 0;
            f_unit += stride;
        }
        enter();
    };
    // Where the next piece goes, and how many have been brought and not yet summed.
    int free_slot = 0, held = 0;
    auto fill = [&](int pieces) {
        while (held < pieces) {
            bring(free_slot);
            ++held;
            if (++free_slot == depth) free_slot = 0;
        }
    };
    enter();
    fill(depth);  // weights are nobody's output: no need to wait
    pdl_launch();

    int slot = 0;
    u32 parity = 0;
    for (int ph = 0; ph < chain.phases; ++ph) {
        const Gemv& g = chain.phase[ph];
        const int bytes = g.k * 2;
        if (g.norm_weight)
            for (int c = threadIdx.x * 32; c < g.k; c += CHAIN_BLOCK * 32) prefetch(g.norm_weight + c);
        if (ph == 0) pdl_wait();
        else meet(chain.turn);
        if (g.x.dtype == F32) stage_chain<W, F32>(g, xs, part);
        else stage_chain<W, W>(g, xs, part);
        __syncthreads();

        int s = 0, burst = chain.near;
        for (int unit = mine; unit < g.units; unit += stride) {
            while (s + 1 < g.segments && unit >= g.segment[s + 1].first_unit) ++s;
            const Segment& p = g.segment[s];
            const int n = unit - p.first_unit;
            const int halves = p.mode == PAIR ? 2 : 1;
            float first = 0.f, old = 0.f, tap = 0.f;
            // As in gemv_body.
            if (p.mode == ADD) {
                old = load_shared(p.out, n);
            } else if (p.mode == CONV) {
                if (lane < p.taps) tap = p.conv_weight[(i64)n * p.taps + lane];
                if (lane + 1 < p.taps) old = __ldcg(placed(p.conv_state, home) + (i64)lane * p.rows + n);
            }
#pragma unroll 1
            for (int half = 0; half < halves; ++half) {
                const float* bias = half ? p.bias2 : p.bias;
                const float b = bias ? bias[n] : 0.f;
                float acc = 0.f;
#pragma unroll 1
                for (int at = 0; at < bytes; at += PIECE) {
                    barrier_wait(barriers + 8 * slot, parity);
                    const uint4* wp = (const uint4*)(ring + slot * PIECE) + lane;
                    const uint4* xp = (const uint4*)((const u8*)xs + at) + lane;
                    uint4 raw[PIECE / 512];
#pragma unroll
                    for (int j = 0; j < PIECE / 512; ++j)
                        // Past a row's end the ring holds anything.
                        raw[j] = at + j * 512 + lane * 16 < bytes ? wp[j * 32] : make_uint4(0, 0, 0, 0);
                    __syncwarp();
                    --held;
                    // Between two phases the ring is full. Then what has come is summed while `near` pieces more are on
                    // their way, and from there on no more than that: memory serves a few streams better than many.
                    if (burst > 0) {
                        --burst;
                        fill(held + 1);
                    } else {
                        fill(chain.near);
                    }
                    if (++slot == depth) {
                        slot = 0;
                        parity ^= 1;
                    }
#pragma unroll
                    for (int j = 0; j < PIECE / 512; ++j) {
                        if (at + j * 512 < bytes) {
                            float f[8], x[8];
                            unpack<W>(raw[j], f);
                            unpack<W>(xp[j * 32], x);
#pragma unroll
                            for (int i = 0; i < 8; ++i) acc = fmaf(f[i], x[i], acc);
                        }
                    }
                }
                const float v = warp_sum(acc) + b;
                finish<1, false>(p, home, n, lane, half, v, old, tap, first);
            }
        }
        fill(depth);
    }
#endif
}
extern "C" __global__ void __maxnreg__(CHAIN_REGISTERS) chain_bf16(const __grid_constant__ Chain chain, const u64* home_at) {
    chain_body<BF16>(chain, home_at);
}
extern "C" __global__ void __maxnreg__(CHAIN_REGISTERS) chain_f16(const __grid_constant__ Chain chain, const u64* home_at) {
    chain_body<F16>(chain, home_at);
}
