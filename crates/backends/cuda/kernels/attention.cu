// Causal attention over the static key-value cache; positions come from the cursor on the device.
//
// query [T, H*D], caches [C, KH*D], out [T, H*D]; KV type f32, bf16 or f16, query and out any float type.
// Decode floor: (position + T) x 2 x KH*D elements of cache over memory bandwidth. Prefill floor: 4*H*D FLOP a key and row.
//
// Decode (T <= 8): the context is cut at absolute multiples of SPLIT; a block takes one split, one row and G query heads of
// one KV head, so that keys and values are read once per G heads; a second kernel combines them in an order
// that depends on their number alone. attention_stream: blocks go from split to split, with the next ones on their way to
// shared memory; attention_split: a block a split, for what the former does not take.
// Prefill: tiles of keys from position 0 upwards. A tile wholly masked for a row changes no bit of it, so a row does not
// depend on the rows beside it (as long as the values are finite). With few tokens and keys of several parts all query heads of a
// key head share the rows of a tile: keys and values are read once for all of them.

#define SPLIT 64
#define MOST_SPLITS 4096
#define WARPS 8
#define KEYS_A_WARP (SPLIT / WARPS)

struct Attention {
    View query, key, value, out;
    View gate;   // combine only: out is also gated into `gated`, if gate.p
    View gated;
    const u32* cursor;
    const u32* count;
    float* sums;     // [T, H, splits, 2]: maximum, sum
    float* partial;  // [T, H, splits, D]
    i64 cache_rows;
    int rows, heads, kv_heads, head_dim, splits, vec;
    float scale;
    int parts;   // attention_tiles: 1 where each block takes one part of the keys
    int stages;  // attention_stream: splits in shared memory at a time
    int early;   // attention_stream: 1: rows below the cursor, and the cursor, are read before the wait
    int pack;    // attention_tiles: query heads that share a tile, token by token: all of a key head, or 1
    int pad;
};

// What of it may lie in State, where it is for this replay.
struct Reached {
    View query, key, value, out;
    const u32* cursor;
    const u32* count;
    __device__ __forceinline__ Reached(const Attention& p, const u64* home)
        : query(placed(p.query, home)), key(placed(p.key, home)), value(placed(p.value, home)), out(placed(p.out, home)), cursor(placed(p.cursor, home)),
          count(placed(p.count, home)) {}
};

template <int KV> struct Eight {
    uint4 raw;
    __device__ __forceinline__ void load(const View& v, i64 row, i64 col, int n, int vec) {
        if (vec) {
            raw = n > 0 ? *(const uint4*)((const u16*)v.p + row * v.ld + col) : make_uint4(0, 0, 0, 0);
        } else {
            u32 h[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u16* p = (const u16*)v.p + row * v.ld + col + 2 * i;
                h[i] = (2 * i < n ? (u32)p[0] : 0u) | (2 * i + 1 < n ? (u32)p[1] << 16 : 0u);
            }
            raw = make_uint4(h[0], h[1], h[2], h[3]);
        }
    }
    __device__ __forceinline__ void unpack(float* f) const {
        u32 r[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            f[2 * i] = KV == BF16 ? __uint_as_float(r[i] << 16) : f16_to_f32((u16)r[i]);
            f[2 * i + 1] = KV == BF16 ? __uint_as_float(r[i] & 0xffff0000u) : f16_to_f32((u16)(r[i] >> 16));
        }
    }
};
template <> struct Eight<F32> {
    float4 a, b;
    __device__ __forceinline__ void load(const View& v, i64 row, i64 col, int n, int vec) {
        const float* p = (const float*)v.p + row * v.ld + col;
        if (vec) {
            a = n > 0 ? *(const float4*)p : make_float4(0.f, 0.f, 0.f, 0.f);
            b = n > 0 ? *(const float4*)(p + 4) : make_float4(0.f, 0.f, 0.f, 0.f);
        } else {
            float t[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) t[i] = i < n ? p[i] : 0.f;
            a = make_float4(t[0], t[1], t[2], t[3]);
            b = make_float4(t[4], t[5], t[6], t[7]);
        }
    }
    __device__ __forceinline__ void unpack(float* f) const {
        f[0] = a.x, f[1] = a.y, f[2] = a.z, f[3] = a.w, f[4] = b.x, f[5] = b.y, f[6] = b.z, f[7] = b.w;
    }
};

template <int KV, int G> __device__ __forceinline__ void split_body(const Attention& p, const u64* home) {
    const Reached in(p, home);
    __shared__ float score[G][SPLIT];
    __shared__ float reduce[WARPS][G][256];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int split = blockIdx.x, h0 = blockIdx.y * G, kh = h0 / (p.heads / p.kv_heads);
    const i64 t = blockIdx.z;
    const i64 kv0 = (i64)kh * p.head_dim;
    const i64 start = (i64)split * SPLIT;
    pdl_wait();
    pdl_launch();
    if ((u32)t >= valid_rows(in.count, p.rows)) return;
    i64 limit = (i64)*in.cursor + t + 1;
    if (limit > p.cache_rows) limit = p.cache_rows;
    if (start >= limit) return;
    const int n = limit - start < SPLIT ? (int)(limit - start) : SPLIT;

    int lanes = 1;
    while (lanes * 8 < p.head_dim) lanes *= 2;  // lanes that share a key
    const int keys = 32 / lanes, sub = lane / lanes, d0 = (lane % lanes) * 8;
    const int own = p.head_dim - d0;  // elements this lane holds, if positive
    // A warp takes eight keys: all of them, and their values, are on their way before the first is used.
    auto key_of = [&](int u) { return u * keys + sub < KEYS_A_WARP ? warp * KEYS_A_WARP + u * keys + sub : SPLIT; };
    Eight<KV> k[KEYS_A_WARP], v[KEYS_A_WARP];
#pragma unroll
    for (int u = 0; u < KEYS_A_WARP; ++u) {
        const int j = key_of(u);
        k[u].load(in.key, start + (j < n ? j : 0), kv0 + d0, j < n ? own : 0, p.vec);
    }
#pragma unroll
    for (int u = 0; u < KEYS_A_WARP; ++u) {
        const int j = key_of(u);
        v[u].load(in.value, start + (j < n ? j : 0), kv0 + d0, j < n ? own : 0, p.vec);
    }
    float q[G][8];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        const i64 head = (i64)(h0 + g) * p.head_dim;
        const float4 a = load4(in.query, t, head + d0, head + p.head_dim), b = load4(in.query, t, head + d0 + 4, head + p.head_dim);
        q[g][0] = a.x, q[g][1] = a.y, q[g][2] = a.z, q[g][3] = a.w;
        q[g][4] = b.x, q[g][5] = b.y, q[g][6] = b.z, q[g][7] = b.w;
    }
#pragma unroll
    for (int u = 0; u < KEYS_A_WARP; ++u) {
        const int j = key_of(u);  // beyond the end where fewer rounds hold all keys
        float f[8], s[G];
        k[u].unpack(f);
#pragma unroll
        for (int g = 0; g < G; ++g) {
            s[g] = 0.f;
#pragma unroll
            for (int i = 0; i < 8; ++i) s[g] = fmaf(q[g][i], f[i], s[g]);
        }
#pragma unroll
        for (int d = 16; d > 0; d >>= 1)
            if (d < lanes)
#pragma unroll
                for (int g = 0; g < G; ++g) s[g] += __shfl_xor_sync(FULL, s[g], d);
        if (d0 == 0 && j < n)
#pragma unroll
            for (int g = 0; g < G; ++g) score[g][j] = s[g] * p.scale;
    }
    __syncthreads();
    const i64 slot = (t * p.heads + h0) * p.splits + split;
    if (warp < G) {
        float m = -INFINITY, l = 0.f;
        for (int j = lane; j < n; j += 32) m = fmaxf(m, score[warp][j]);
        m = warp_max(m);
        for (int j = lane; j < n; j += 32) {
            float e = expf(score[warp][j] - m);
            score[warp][j] = e;
            l += e;
        }
        l = warp_sum(l);
        if (lane == 0) {
            float* at = p.sums + (slot + (i64)warp * p.splits) * 2;
            at[0] = m;
            at[1] = l;
        }
    }
    __syncthreads();
    float acc[G][8];
#pragma unroll
    for (int g = 0; g < G; ++g)
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[g][i] = 0.f;
#pragma unroll
    for (int u = 0; u < KEYS_A_WARP; ++u) {
        const int j = key_of(u);
        float f[8];
        v[u].unpack(f);
#pragma unroll
        for (int g = 0; g < G; ++g) {
            const float e = j < n ? score[g][j] : 0.f;
#pragma unroll
            for (int i = 0; i < 8; ++i) acc[g][i] = fmaf(e, f[i], acc[g][i]);
        }
    }
#pragma unroll
    for (int g = 0; g < G; ++g)
#pragma unroll
        for (int i = 0; i < 8; ++i)
            for (int d = lanes; d < 32; d <<= 1) acc[g][i] += __shfl_xor_sync(FULL, acc[g][i], d);
    if (sub == 0)
#pragma unroll
        for (int g = 0; g < G; ++g)
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (i < own) reduce[warp][g][d0 + i] = acc[g][i];
    __syncthreads();
    for (int i = threadIdx.x; i < G * p.head_dim; i += BLOCK) {
        int g = i / p.head_dim, d = i % p.head_dim;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += reduce[w][g][d];
        p.partial[(slot + (i64)g * p.splits) * p.head_dim + d] = sum;
    }
}
#define SPLITS(name, KV, G)                                                                                      \
    extern "C" __global__ void __launch_bounds__(BLOCK, KV == F32 ? 1 : 2) name(const __grid_constant__ Attention p, const u64* home) {\
        split_body<KV, G>(p, home);                                                                                  \
    }
SPLITS(attention_split_f32_1, F32, 1)
SPLITS(attention_split_f32_2, F32, 2)
SPLITS(attention_split_f32_4, F32, 4)
SPLITS(attention_split_bf16_1, BF16, 1)
SPLITS(attention_split_bf16_2, BF16, 2)
SPLITS(attention_split_bf16_4, BF16, 4)
SPLITS(attention_split_f16_1, F16, 1)
SPLITS(attention_split_f16_2, F16, 2)
SPLITS(attention_split_f16_4, F16, 4)

// 16-bit caches with aligned rows, D 64, 128 or 256. One block a multiprocessor (where D is 256) takes every gridDim.x-th
// split; `stages` splits of keys and values are on their way or in use.
template <int N> __device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
template <int KV, int D, int G> __device__ __forceinline__ void stream_body(const Attention& p, const u64* home) {
    const Reached in(p, home);
    const int LANES = D / 8, KEYS = 32 / LANES, ROUNDS = KEYS_A_WARP / KEYS;  // lanes a key; keys at a time; times
    extern __shared__ float4 stream_shared[];
    u16* ring = (u16*)stream_shared;  // [stages][2][SPLIT][D]: keys, values
    __shared__ float score[G][SPLIT];
    __shared__ __align__(16) float reduce[WARPS][G][D];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int h0 = blockIdx.y * G, kh = h0 / (p.heads / p.kv_heads);
    const i64 t = blockIdx.z, kv0 = (i64)kh * D;
    const int stages = p.stages;
    i64 position = 0, limit = 0;
    int live = 0, issued = 0;
    auto reach = [&]() {
        position = (i64)*in.cursor;
        limit = (u32)t < valid_rows(in.count, p.rows) ? position + t + 1 : 0;
        if (limit > p.cache_rows) limit = p.cache_rows;
        live = (int)((limit + SPLIT - 1) / SPLIT);
    };
    auto split_of = [&](int k) { return (int)blockIdx.x + k * (int)gridDim.x; };
    auto issue = [&](int k) {
        const int split = split_of(k);
        if (split < live) {
            u16* into = ring + (k % stages) * (2 * SPLIT * D);
            const i64 start = (i64)split * SPLIT;
#pragma unroll
            for (int which = 0; which < 2; ++which) {
                const View& v = which ? in.value : in.key;
                const u16* from = (const u16*)v.p + kv0;
#pragma unroll
                for (int i = 0; i < SPLIT * (D / 8) / BLOCK; ++i) {
                    const int at = i * BLOCK + threadIdx.x, j = at / (D / 8), d = at % (D / 8) * 8;
                    const bool there = start + j < limit;
                    const int bytes = there ? 16 : 0;  // what is beyond the end becomes zero
                    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                                     shared_address(into + which * (SPLIT * D) + j * D + d)),
                                 "l"(from + (there ? start + j : 0) * v.ld + d), "r"(bytes) : "memory");
                }
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");  // one group a turn, also of nothing
    };
    pdl_launch();
    if (p.early) {
        // Whole splits below the cursor were there when this replay began.
        reach();
        while (issued < stages && (i64)(split_of(issued) + 1) * SPLIT <= position) issue(issued++);
    }
    pdl_wait();
    if (!p.early) reach();
    if (split_of(0) >= live) return;
    while (issued < stages) issue(issued++);

    const int sub = lane / LANES, d0 = lane % LANES * 8;
    float q[G][8];
    if (in.query.dtype == F32) {
        const float* from = (const float*)in.query.p + t * in.query.ld + (i64)h0 * D + d0;
        float4 raw[G][2];
#pragma unroll
        for (int g = 0; g < G; ++g)
#pragma unroll
            for (int i = 0; i < 2; ++i) raw[g][i] = *(const float4*)(from + g * D + i * 4);
#pragma unroll
        for (int g = 0; g < G; ++g)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                q[g][4 * i] = raw[g][i].x, q[g][4 * i + 1] = raw[g][i].y, q[g][4 * i + 2] = raw[g][i].z, q[g][4 * i + 3] = raw[g][i].w;
    } else {
        const u16* from = (const u16*)in.query.p + t * in.query.ld + (i64)h0 * D + d0;
        uint4 raw[G];
#pragma unroll
        for (int g = 0; g < G; ++g) raw[g] = *(const uint4*)(from + g * D);
#pragma unroll
        for (int g = 0; g < G; ++g) {
            const u32 r[4] = {raw[g].x, raw[g].y, raw[g].z, raw[g].w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                q[g][2 * i] = cooked(r[i] & 0xffffu, in.query.dtype);
                q[g][2 * i + 1] = cooked(r[i] >> 16, in.query.dtype);
            }
        }
    }
    for (int k = 0; split_of(k) < live; ++k) {
        const int split = split_of(k);
        const int n = limit - (i64)split * SPLIT < SPLIT ? (int)(limit - (i64)split * SPLIT) : SPLIT;
        const u16* ks = ring + (k % stages) * (2 * SPLIT * D);
        const u16* vs = ks + SPLIT * D;
        if (stages >= 3) wait_copies<2>();
        else if (stages == 2) wait_copies<1>();
        else wait_copies<0>();
        __syncthreads();
        const int N = ROUNDS * G;
        float s[N];
#pragma unroll
        for (int u = 0; u < ROUNDS; ++u) {
            Eight<KV> key;
            key.raw = *(const uint4*)(ks + (warp * KEYS_A_WARP + u * KEYS + sub) * D + d0);
            float f[8];
            key.unpack(f);
#pragma unroll
            for (int g = 0; g < G; ++g) {
                float sum = 0.f;
#pragma unroll
                for (int i = 0; i < 8; ++i) sum = fmaf(q[g][i], f[i], sum);
                s[u * G + g] = sum;
            }
        }
        // The lanes of a key add up all N sums at once: at each step a lane hands half of its sums over and takes the
        // other half, until it has one; then those with the same one add.
#pragma unroll
        for (int d = LANES / 2, count = N; d > 0; d >>= 1) {
            if (count > 1) {
                count /= 2;
                const bool upper = (lane & d) != 0;
#pragma unroll
                for (int i = 0; i < N / 2; ++i)
                    if (i < count) {
                        const float mine = upper ? s[i + count] : s[i], other = upper ? s[i] : s[i + count];
                        s[i] = mine + __shfl_xor_sync(FULL, other, d);
                    }
            } else {
                s[0] += __shfl_xor_sync(FULL, s[0], d);
            }
        }
        {
            const int which = lane % LANES / (LANES / N), u = which / G, g = which % G;
            const int j = warp * KEYS_A_WARP + u * KEYS + sub;
            if (lane % (LANES / N) == 0) score[g][j] = s[0] * p.scale;
        }
        __syncthreads();
        const i64 slot = (t * p.heads + h0) * p.splits + split;
        if (warp < G) {
            const float a = lane < n ? score[warp][lane] : -INFINITY, b = lane + 32 < n ? score[warp][lane + 32] : -INFINITY;
            const float m = warp_max(fmaxf(a, b));
            const float ea = lane < n ? expf(a - m) : 0.f, eb = lane + 32 < n ? expf(b - m) : 0.f;
            score[warp][lane] = ea;
            score[warp][lane + 32] = eb;
            const float l = warp_sum(ea + eb);
            if (lane == 0) {
                float* at = p.sums + (slot + (i64)warp * p.splits) * 2;
                at[0] = m;
                at[1] = l;
            }
        }
        __syncthreads();
        float acc[G][8];
#pragma unroll
        for (int g = 0; g < G; ++g)
#pragma unroll
            for (int i = 0; i < 8; ++i) acc[g][i] = 0.f;
#pragma unroll
        for (int u = 0; u < ROUNDS; ++u) {
            const int j = warp * KEYS_A_WARP + u * KEYS + sub;
            Eight<KV> value;
            value.raw = *(const uint4*)(vs + j * D + d0);
            float f[8];
            value.unpack(f);
#pragma unroll
            for (int g = 0; g < G; ++g) {
                const float e = score[g][j];
#pragma unroll
                for (int i = 0; i < 8; ++i) acc[g][i] = fmaf(e, f[i], acc[g][i]);
            }
        }
#pragma unroll
        for (int g = 0; g < G; ++g)
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int d = LANES; d < 32; d <<= 1) acc[g][i] += __shfl_xor_sync(FULL, acc[g][i], d);
        if (sub == 0)
#pragma unroll
            for (int g = 0; g < G; ++g)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    *(float4*)&reduce[warp][g][d0 + 4 * i] = make_float4(acc[g][4 * i], acc[g][4 * i + 1], acc[g][4 * i + 2], acc[g][4 * i + 3]);
        __syncthreads();
        issue(k + stages);
        for (int i = threadIdx.x; i < G * D; i += BLOCK) {
            const int g = i / D, d = i % D;
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) sum += reduce[w][g][d];
            p.partial[(slot + (i64)g * p.splits) * D + d] = sum;
        }
    }
    wait_copies<0>();
}
#define STREAMS(name, KV, D, G) \
    extern "C" __global__ void __launch_bounds__(BLOCK, 1) name(const __grid_constant__ Attention p, const u64* home) {\
        stream_body<KV, D, G>(p, home);                                                                              \
    }
STREAMS(attention_stream_bf16_64_1, BF16, 64, 1)
STREAMS(attention_stream_bf16_64_2, BF16, 64, 2)
STREAMS(attention_stream_bf16_64_4, BF16, 64, 4)
STREAMS(attention_stream_bf16_128_1, BF16, 128, 1)
STREAMS(attention_stream_bf16_128_2, BF16, 128, 2)
STREAMS(attention_stream_bf16_128_4, BF16, 128, 4)
STREAMS(attention_stream_bf16_256_1, BF16, 256, 1)
STREAMS(attention_stream_bf16_256_2, BF16, 256, 2)
STREAMS(attention_stream_bf16_256_4, BF16, 256, 4)
STREAMS(attention_stream_f16_64_1, F16, 64, 1)
STREAMS(attention_stream_f16_64_2, F16, 64, 2)
STREAMS(attention_stream_f16_64_4, F16, 64, 4)
STREAMS(attention_stream_f16_128_1, F16, 128, 1)
STREAMS(attention_stream_f16_128_2, F16, 128, 2)
STREAMS(attention_stream_f16_128_4, F16, 128, 4)
STREAMS(attention_stream_f16_256_1, F16, 256, 1)
STREAMS(attention_stream_f16_256_2, F16, 256, 2)
STREAMS(attention_stream_f16_256_4, F16, 256, 4)

// A block takes 64 elements of one head of one row: 16 groups of threads sum every 16th split, in rising order, then the
// groups are added in rising order.
#define COMBINED 64
#define GROUPS (BLOCK / (COMBINED / 4))
extern "C" __global__ void __launch_bounds__(BLOCK) attention_combine(const __grid_constant__ Attention p, const u64* home) {
    __shared__ float weight[MOST_SPLITS];
    __shared__ float part[BLOCK / 32];
    __shared__ __align__(16) float sums[GROUPS][COMBINED];
    const Reached in(p, home);
    pdl_wait();
    pdl_launch();
    const i64 t = blockIdx.z;
    const int h = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if ((u32)t >= valid_rows(in.count, p.rows)) return;
    i64 limit = (i64)*in.cursor + t + 1;
    if (limit > p.cache_rows) limit = p.cache_rows;
    const int n = (int)((limit + SPLIT - 1) / SPLIT);
    const i64 slot = (t * p.heads + h) * p.splits;
    const float* at = p.sums + slot * 2;
    float m = -INFINITY, l = 0.f;
    for (int s = threadIdx.x; s < n; s += BLOCK) m = fmaxf(m, at[2 * s]);
    m = warp_max(m);
    if (lane == 0) part[warp] = m;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < BLOCK / 32; ++w) m = fmaxf(m, part[w]);
    __syncthreads();
    for (int s = threadIdx.x; s < n; s += BLOCK) {
        float e = expf(at[2 * s] - m);
        weight[s] = e;
        l = fmaf(e, at[2 * s + 1], l);
    }
    l = warp_sum(l);
    if (lane == 0) part[warp] = l;
    __syncthreads();
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < BLOCK / 32; ++w) total += part[w];

    const int group = threadIdx.x / (COMBINED / 4), c = threadIdx.x % (COMBINED / 4) * 4, d = blockIdx.y * COMBINED + c;
    const View partial = {p.partial, p.head_dim, F32, (p.head_dim & 3) == 0};
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
    for (int s = group; s < n; s += GROUPS) {
        const float4 a = load4(partial, slot + s, d, p.head_dim);
        const float e = weight[s];
        sum.x = fmaf(e, a.x, sum.x);
        sum.y = fmaf(e, a.y, sum.y);
        sum.z = fmaf(e, a.z, sum.z);
        sum.w = fmaf(e, a.w, sum.w);
    }
    *(float4*)&sums[group][c] = sum;
    __syncthreads();
    const int mine = blockIdx.y * COMBINED + threadIdx.x;
    if (threadIdx.x < COMBINED && mine < p.head_dim) {
        float all = 0.f;
#pragma unroll
        for (int i = 0; i < GROUPS; ++i) all += sums[i][threadIdx.x];
        const i64 column = (i64)h * p.head_dim + mine;
        float v = rounded(all / total, in.out.dtype);
        store1(in.out, t, column, v);
        if (p.gate.p) store1(placed(p.gated, home), t, column, v * sigmoid(load1(placed(p.gate, home), t, column)));
    }
}
#undef GROUPS

// Prefill without tensor cores: any types, D <= 256. A block of 128 threads takes 16 rows of one head.
#define ROWS 16
#define KEYS 32
extern "C" __global__ void __launch_bounds__(128) attention_rows(const __grid_constant__ Attention p, const u64* home) {
    extern __shared__ float4 rows_shared[];
    const int D = p.head_dim, ld = D + 1;
    float* qs = (float*)rows_shared;      // [ROWS][ld]
    float* ks = qs + ROWS * ld;      // [KEYS][ld]: keys, then values
    float* ss = ks + KEYS * ld;      // [ROWS][KEYS + 1]
    const Reached in(p, home);
    pdl_wait();
    pdl_launch();
    const int h = blockIdx.x, kh = h / (p.heads / p.kv_heads);
    const i64 t0 = (i64)blockIdx.y * ROWS, q0 = (i64)h * D, kv0 = (i64)kh * D;
    const i64 valid = valid_rows(in.count, p.rows);
    if (t0 >= valid) return;
    const i64 position = *in.cursor;
    const i64 last = t0 + ROWS < valid ? t0 + ROWS : valid;
    i64 limit = position + last;
    if (limit > p.cache_rows) limit = p.cache_rows;
    for (int i = threadIdx.x; i < ROWS * D; i += 128) {
        int r = i / D, d = i % D;
        qs[r * ld + d] = t0 + r < valid ? load1(in.query, t0 + r, q0 + d) : 0.f;
    }
    const int r = threadIdx.x >> 3, sub = threadIdx.x & 7;
    float acc[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) acc[i] = 0.f;
    float m = -INFINITY, l = 0.f;
    for (i64 j0 = 0; j0 < limit; j0 += KEYS) {
        __syncthreads();
        for (int i = threadIdx.x; i < KEYS * D; i += 128) {
            int j = i / D, d = i % D;
            ks[j * ld + d] = j0 + j < limit ? load1(in.key, j0 + j, kv0 + d) : 0.f;
        }
        __syncthreads();
        float s[4], top = m;
#pragma unroll
        for (int u = 0; u < 4; ++u) {
            const int j = sub + 8 * u;
            float dot = 0.f;
            for (int d = 0; d < D; ++d) dot = fmaf(qs[r * ld + d], ks[j * ld + d], dot);
            s[u] = j0 + j <= position + t0 + r && j0 + j < limit ? dot * p.scale : -INFINITY;
            top = fmaxf(top, s[u]);
        }
#pragma unroll
        for (int d = 4; d > 0; d >>= 1) top = fmaxf(top, __shfl_xor_sync(FULL, top, d));
        float sum = 0.f;
#pragma unroll
        for (int u = 0; u < 4; ++u) {
            float e = s[u] == -INFINITY ? 0.f : expf(s[u] - top);
            ss[r * (KEYS + 1) + sub + 8 * u] = e;
            sum += e;
        }
#pragma unroll
        for (int d = 4; d > 0; d >>= 1) sum += __shfl_xor_sync(FULL, sum, d);
        const float keep = m == top ? 1.f : expf(m - top);
        m = top;
        l = fmaf(l, keep, sum);
        // Keys of this tile that the row attends to: what later rows hold, NaN included, is never touched.
        i64 reach = position + t0 + r + 1 - j0;
        const int seen = reach < 0 ? 0 : reach < KEYS ? (int)reach : KEYS;
        __syncthreads();
        for (int i = threadIdx.x; i < KEYS * D; i += 128) {
            int j = i / D, d = i % D;
            ks[j * ld + d] = j0 + j < limit ? load1(in.value, j0 + j, kv0 + d) : 0.f;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            const int d = sub + 8 * i;
            if (d < D) {
                float a = acc[i] * keep;
                for (int j = 0; j < seen; ++j) a = fmaf(ss[r * (KEYS + 1) + j], ks[j * ld + d], a);
                acc[i] = a;
            }
        }
    }
    if (t0 + r < valid) {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            const int d = sub + 8 * i;
            if (d < D) store1(in.out, t0 + r, q0 + d, acc[i] / l);
        }
    }
}

// Prefill on tensor cores: KV bf16 or f16, D 64, 128 or 256. Four warps, 16 query rows each; operands are rounded to the
// cache's type, products accumulate in float32.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool live) {
    int bytes = live ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes));
}
__device__ __forceinline__ void commit_async() { asm volatile("cp.async.commit_group;"); }
template <int N> __device__ __forceinline__ void wait_async() { asm volatile("cp.async.wait_group %0;" ::"n"(N)); }
__device__ __forceinline__ void ldmatrix4(u32* r, const void* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)));
}
__device__ __forceinline__ void ldmatrix4t(u32* r, const void* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)));
}
template <int KV> __device__ __forceinline__ void mma(float* c, const u32* a, u32 b0, u32 b1) {
    if (KV == BF16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <int KV> __device__ __forceinline__ u32 pack(float low, float high) {
    return KV == BF16 ? (u32)f32_to_bf16(low) | (u32)f32_to_bf16(high) << 16 : (u32)f32_to_f16(low) | (u32)f32_to_f16(high) << 16;
}

// Takes values that are not finite out of a tile and gives them to the rows that do attend to them.
template <int KV> __device__ __forceinline__ bool finite16(u32 half) {
    const u32 exponent = KV == BF16 ? 0x7f80u : 0x7c00u;
    return (half & exponent) != exponent;
}
template <int KV, int D, int BN>
__device__ __forceinline__ void shield(u16* vs, float (*o)[4], i64 see0, i64 see1, int lane) {
    const int LD = D + 8;
    bool bad = false;
    for (int i = threadIdx.x; i < BN * (D / 2); i += 128) {
        u32 two = *(const u32*)(vs + i / (D / 2) * LD + i % (D / 2) * 2);
        bad |= !finite16<KV>(two & 0xffffu) || !finite16<KV>(two >> 16);
    }
    if (!__syncthreads_or(bad)) return;
    for (int j = 0; j < BN; ++j) {
        if (j > see0 && j > see1) break;
#pragma unroll
        for (int i = 0; i < D / 8; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                u16 v = vs[j * LD + i * 8 + (lane & 3) * 2 + (e & 1)];
                if (!finite16<KV>(v) && j <= (e < 2 ? see0 : see1)) o[i][e] += KV == BF16 ? bf16_to_f32(v) : f16_to_f32(v);
            }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < BN * D; i += 128) {
        u16* v = vs + i / D * LD + i % D;
        if (!finite16<KV>(*v)) *v = 0;
    }
    __syncthreads();
}

// Keys of a part. With few token rows each part is a block's and attention_parts adds them; with many rows a block takes
// all parts of its rows and adds them itself, with the same additions in the same order: the same bits.
#define PART 512
// Scales of what was added so far (x) and of the next part (y). A part without a key that the row sees changes nothing.
__device__ __forceinline__ void merge_scales(float* whole_m, float* whole_l, const float* m, const float* l, float* x, float* y) {
    const float log2e = 1.4426950408889634f;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const float top = fmaxf(whole_m[e], m[e]);
        x[e] = whole_m[e] == top ? 1.f : exp2f((whole_m[e] - top) * log2e);
        y[e] = m[e] == -INFINITY ? 0.f : exp2f((m[e] - top) * log2e);
        whole_m[e] = top;
        whole_l[e] = fmaf(l[e], y[e], whole_l[e] * x[e]);
    }
}
// o = whole * x + o * y; a part that the row does not see has y = 0, and x = 1.
__device__ __forceinline__ void merge(float* o, const float4 whole, const float* x, const float* y) {
    const float w[4] = {whole.x, whole.y, whole.z, whole.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) o[e] = y[e >> 1] == 0.f ? w[e] * x[e >> 1] : fmaf(o[e], y[e >> 1], w[e] * x[e >> 1]);
}

template <int KV, int D, int BN> __device__ __forceinline__ void tiles_body(const Attention& p, const u64* home, bool parted) {
    const Reached in(p, home);
    const int BM = 64, LD = D + 8;  // rows are 16 bytes apart in the banks
    extern __shared__ float4 shared[];
    // Two tiles of keys and values at a time where registers leave room for two blocks a multiprocessor anyway: the next one is
    // on its way for as long as a tile takes. 99 KiB a block: two blocks on sm_90 and sm_100; one where a multiprocessor has
    // less than 200 KiB, and all that a block may have on sm_86, 89 and 120.
    const int STAGES = D == 256 ? 2 : 1;
    u16* qs = (u16*)shared;           // [BM][LD]
    u16* ks = qs + BM * LD;           // [STAGES][BN][LD]
    u16* vs = ks + STAGES * BN * LD;  // [STAGES][BN][LD]
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    pdl_wait();
    pdl_launch();
    // A row of a tile is a token's query of one head; with `shared_heads` heads in a tile, row r is token r / shared_heads.
    const int shared_heads = p.pack, h0 = blockIdx.x * shared_heads, kh = h0 / (p.heads / p.kv_heads);
    const int t0 = (int)(gridDim.y - 1 - blockIdx.y) * BM;  // longest rows first
    const int valid = (int)valid_rows(in.count, p.rows) * shared_heads;
    if (t0 >= valid) return;
    const i64 position = *in.cursor;
    const int last = t0 + BM < valid ? t0 + BM : valid;
    i64 limit = position + (last - 1) / shared_heads + 1;
    if (limit > p.cache_rows) limit = p.cache_rows;
    // Keys are taken in parts that begin at absolute multiples of PART. Here: one part, or all of them in rising order.
    const i64 first = parted ? (i64)blockIdx.z * PART : 0;
    if (first >= limit) return;
    const i64 beyond = parted && first + PART < limit ? first + PART : limit;
    const bool busy = t0 + warp * 16 < valid;  // warps without rows only load
    const u16* key = (const u16*)in.key.p + (i64)kh * D;
    const u16* value = (const u16*)in.value.p + (i64)kh * D;
    // A thread copies 16 bytes of every STEP-th row; the rows past the last one are zeros.
    const int STEP = 128 / (D / 8), row_of = threadIdx.x / (D / 8), column_of = threadIdx.x % (D / 8) * 8;
    auto stage = [&](u16* into, const u16* from, i64 ld, i64 j0) {
        const u16* at = from + (j0 + row_of) * ld + column_of;
        const int left = (int)(limit - j0) - row_of;
        into += row_of * LD + column_of;
#pragma unroll
        for (int n = 0; n < BN / STEP; ++n, at += STEP * ld) copy_async(into + n * STEP * LD, n * STEP < left ? at : from, n * STEP < left);
    };
    stage(ks, key, in.key.ld, first);
    if (STAGES == 2) stage(vs, value, in.value.ld, first);
    commit_async();
    for (int i = threadIdx.x; i < BM * (D / 4); i += 128) {
        int r = i / (D / 4), d = i % (D / 4) * 4;
        const int t = (t0 + r) / shared_heads, h = h0 + (t0 + r) % shared_heads;
        float4 q = t0 + r < valid ? load4(in.query, t, (i64)h * D + d, (i64)(h + 1) * D) : make_float4(0.f, 0.f, 0.f, 0.f);
        uint2 w;
        w.x = pack<KV>(q.x, q.y);
        w.y = pack<KV>(q.z, q.w);
        *(uint2*)(qs + r * LD + d) = w;
    }
    float o[D / 8][4];
#pragma unroll
    for (int i = 0; i < D / 8; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.f;
    float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.f, 0.f};
    float whole_m[2] = {-INFINITY, -INFINITY}, whole_l[2] = {0.f, 0.f};
    const i64 block = blockIdx.x + (i64)gridDim.x * (blockIdx.y + (i64)gridDim.y * (parted ? blockIdx.z : 0));
    float4* kept = (float4*)p.partial + block * (D / 8 * 128) + threadIdx.x;  // [D / 8][128]
    float4* kept_sums = (float4*)p.sums + block * 128 + threadIdx.x;
    // Rows of this lane: its fragment's rows lane/4 and lane/4 + 8.
    const int row = t0 + warp * 16 + lane / 4;
    const i64 see0 = position + row / shared_heads, see1 = position + (row + 8) / shared_heads;
    const float log2e = 1.4426950408889634f;
    int here = 0;  // of the tile at hand, from the first one
    for (i64 j0 = first; j0 < beyond; j0 += BN) {
        if (STAGES == 2) {
            if (j0 + BN < beyond) {
                stage(ks + (BN * LD - here), key, in.key.ld, j0 + BN);
                stage(vs + (BN * LD - here), value, in.value.ld, j0 + BN);
            }
        } else {
            stage(vs, value, in.value.ld, j0);
        }
        commit_async();
        wait_async<1>();
        __syncthreads();
        float s[BN / 8][4];
#pragma unroll
        for (int i = 0; i < BN / 8; ++i) s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0.f;
#pragma unroll
        for (int d = 0; d < (busy ? D : 0); d += 16) {
            u32 a[4];
            ldmatrix4(a, qs + (warp * 16 + (lane & 15)) * LD + d + (lane >> 4) * 8);
#pragma unroll
            for (int j = 0; j < BN; j += 16) {
                u32 b[4];
                ldmatrix4(b, ks + here + (j + (lane & 7) + (lane >> 4) * 8) * LD + d + ((lane >> 3) & 1) * 8);
                mma<KV>(s[j / 8], a, b[0], b[1]);
                mma<KV>(s[j / 8 + 1], a, b[2], b[3]);
            }
        }
        if (STAGES == 1) {
            __syncthreads();
            if (j0 + BN < beyond) stage(ks, key, in.key.ld, j0 + BN);
            commit_async();
        }
        // Whether some row does not see all of the tile, or not all of it is there.
        const bool ragged = j0 + BN > position + t0 / shared_heads + 1 || j0 + BN > limit;
        const int last0 = ragged ? (int)((see0 < limit ? see0 : limit - 1) - j0) : BN;
        const int last1 = ragged ? (int)((see1 < limit ? see1 : limit - 1) - j0) : BN;
        float top[2] = {m[0], m[1]};
#pragma unroll
        for (int i = 0; i < BN / 8; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                s[i][e] *= p.scale;
                if (i * 8 + (lane & 3) * 2 + (e & 1) > (e < 2 ? last0 : last1)) s[i][e] = -INFINITY;
                top[e >> 1] = fmaxf(top[e >> 1], s[i][e]);
            }
        float keep[2], sum[2] = {0.f, 0.f};
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            top[e] = fmaxf(top[e], __shfl_xor_sync(FULL, top[e], 1));
            top[e] = fmaxf(top[e], __shfl_xor_sync(FULL, top[e], 2));
            keep[e] = m[e] == top[e] ? 1.f : exp2f((m[e] - top[e]) * log2e);
            m[e] = top[e];
        }
        u32 pa[BN / 8][2];
#pragma unroll
        for (int i = 0; i < BN / 8; ++i) {
            float v[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                v[e] = s[i][e] == -INFINITY ? 0.f : exp2f((s[i][e] - m[e >> 1]) * log2e);
                sum[e >> 1] += v[e];
            }
            pa[i][0] = pack<KV>(v[0], v[1]);
            pa[i][1] = pack<KV>(v[2], v[3]);
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            sum[e] += __shfl_xor_sync(FULL, sum[e], 1);
            sum[e] += __shfl_xor_sync(FULL, sum[e], 2);
            l[e] = fmaf(l[e], keep[e], sum[e]);
        }
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
            o[i][0] *= keep[0];
            o[i][1] *= keep[0];
            o[i][2] *= keep[1];
            o[i][3] *= keep[1];
        }
        if (STAGES == 1) {
            wait_async<1>();
            __syncthreads();
        }
        // A tile that some row does not wholly see: a weight of zero must hide whatever later rows hold, NaN included.
        if (ragged) shield<KV, D, BN>(vs + here, o, see0 - j0, see1 - j0, lane);
#pragma unroll
        for (int j = 0; j < (busy ? BN : 0); j += 16) {
            const u32 a[4] = {pa[j / 8][0], pa[j / 8][1], pa[j / 8 + 1][0], pa[j / 8 + 1][1]};
#pragma unroll
            for (int d = 0; d < D; d += 16) {
                u32 b[4];
                ldmatrix4t(b, vs + here + (j + (lane & 15)) * LD + d + (lane >> 4) * 8);
                mma<KV>(o[d / 8], a, b[0], b[1]);
                mma<KV>(o[d / 8 + 1], a, b[2], b[3]);
            }
        }
        __syncthreads();
        if (STAGES == 2) here = BN * LD - here;
        if (!parted && limit > PART && ((j0 + BN) % PART == 0 || j0 + BN >= limit) && busy) {
            // The end of a part: add it to those before.
            float x[2], y[2];
            const bool more = j0 + BN < limit, before = j0 + BN > PART;
            if (before) {
                merge_scales(whole_m, whole_l, m, l, x, y);
            } else {
                whole_m[0] = m[0], whole_m[1] = m[1], whole_l[0] = l[0], whole_l[1] = l[1];
            }
#pragma unroll
            for (int i = 0; i < D / 8; ++i) {
                if (before) merge(o[i], kept[i * 128], x, y);
                if (more) {
                    kept[i * 128] = make_float4(o[i][0], o[i][1], o[i][2], o[i][3]);
                    o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.f;
                }
            }
            m[0] = m[1] = -INFINITY;
            l[0] = l[1] = 0.f;
            if (!more) l[0] = whole_l[0], l[1] = whole_l[1];
        }
    }
    wait_async<0>();
    if (parted) {
        if (busy) {
            *kept_sums = make_float4(m[0], l[0], m[1], l[1]);
#pragma unroll
            for (int i = 0; i < D / 8; ++i) kept[i * 128] = make_float4(o[i][0], o[i][1], o[i][2], o[i][3]);
        }
        return;
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        if (row + e * 8 >= valid) continue;
        const int t = (row + e * 8) / shared_heads, h = h0 + (row + e * 8) % shared_heads;
        const float inverse = 1.f / l[e];
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
            const i64 c = (i64)h * D + i * 8 + (lane & 3) * 2;
            store1(in.out, t, c, o[i][2 * e] * inverse);
            store1(in.out, t, c + 1, o[i][2 * e + 1] * inverse);
        }
    }
}
#define TILES(name, KV, D, BN)                                                            \
    extern "C" __global__ void __launch_bounds__(128, 2) name(const __grid_constant__ Attention p, const u64* home) {\
        tiles_body<KV, D, BN>(p, home, p.parts != 0);                                  \
    }
TILES(attention_tiles_bf16_64, BF16, 64, 64)
TILES(attention_tiles_bf16_128, BF16, 128, 64)
TILES(attention_tiles_bf16_256, BF16, 256, 32)
TILES(attention_tiles_f16_64, F16, 64, 64)
TILES(attention_tiles_f16_128, F16, 128, 64)
TILES(attention_tiles_f16_256, F16, 256, 32)

// Adds the parts that attention_tiles left, in rising order. Grid: that of attention_tiles, with D / 8 in place of parts: a
// block takes eight columns.
extern "C" __global__ void __launch_bounds__(128) attention_parts(const __grid_constant__ Attention p, const u64* home) {
    const Reached in(p, home);
    pdl_wait();
    pdl_launch();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int shared_heads = p.pack, t0 = (int)(gridDim.y - 1 - blockIdx.y) * 64;
    const int valid = (int)valid_rows(in.count, p.rows) * shared_heads;
    if (t0 + warp * 16 >= valid) return;
    const int last = t0 + 64 < valid ? t0 + 64 : valid;
    i64 limit = (i64)*in.cursor + (last - 1) / shared_heads + 1;
    if (limit > p.cache_rows) limit = p.cache_rows;
    const int parts = (int)((limit + PART - 1) / PART), groups = p.head_dim / 8;
    float whole_m[2], whole_l[2], o[4];
    const int TOGETHER = 12;  // parts whose loads are on their way together
    for (int from = 0; from < parts; from += TOGETHER) {
        float4 sums[TOGETHER], v[TOGETHER];
#pragma unroll
        for (int j = 0; j < TOGETHER; ++j) {
            const int part = from + j < parts ? from + j : from;
            const i64 block = blockIdx.x + (i64)gridDim.x * (blockIdx.y + (i64)gridDim.y * part);
            sums[j] = ((const float4*)p.sums)[block * 128 + threadIdx.x];
            v[j] = ((const float4*)p.partial)[(block * groups + blockIdx.z) * 128 + threadIdx.x];
        }
#pragma unroll
        for (int j = 0; j < TOGETHER; ++j) {
            if (from + j >= parts) break;
            const float m[2] = {sums[j].x, sums[j].z}, l[2] = {sums[j].y, sums[j].w};
            const float4 whole = make_float4(o[0], o[1], o[2], o[3]);
            o[0] = v[j].x, o[1] = v[j].y, o[2] = v[j].z, o[3] = v[j].w;
            if (from + j > 0) {
                float x[2], y[2];
                merge_scales(whole_m, whole_l, m, l, x, y);
                merge(o, whole, x, y);
            } else {
                whole_m[0] = m[0], whole_m[1] = m[1], whole_l[0] = l[0], whole_l[1] = l[1];
            }
        }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int row = t0 + warp * 16 + lane / 4 + e * 8;
        if (row >= valid) continue;
        const int t = row / shared_heads, h = blockIdx.x * shared_heads + row % shared_heads;
        const float inverse = 1.f / whole_l[e];
        const i64 c = (i64)h * p.head_dim + blockIdx.z * 8 + (lane & 3) * 2;
        store1(in.out, t, c, o[2 * e] * inverse);
        store1(in.out, t, c + 1, o[2 * e + 1] * inverse);
    }
}
