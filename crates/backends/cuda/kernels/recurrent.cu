// Causal convolution and the gated delta rule.
//
// causal_conv: x [T, C], state f32 [K-1, C], weight f32 [C, K]. Floor: T x C read and written, state read and written.
// gated_delta: qkv [T, 2*KH*KD + VH*VD], state f32 [VH*KD, VD]. Floor: state read and written once, 7 FLOP per element
// of the state and token; the chain over tokens is serial.
//
// gated_delta: a block owns some value columns of one value head; eight lanes share a column pair and split the
// key rows, in registers for the whole launch. Tokens come in tiles: all warps normalise queries and keys of the
// tile into shared memory, then run its tokens one after another without a barrier. A token's arithmetic does not depend
// on where a launch starts or ends, so prefill by any buckets and decode give the same bits.
//   a = g (S^T k), c = g (S^T q), d = (v - a) b, out = c + d (k . q), S = g S + k d^T
// which is the definition with S^T q taken before the update.

extern "C" __global__ void __launch_bounds__(BLOCK)
causal_conv(View x, const float* weight, const float* bias, const u32* count, float* state, View out, int rows, int channels, int taps, int span,
            const u64* home) {
    x = placed(x, home), out = placed(out, home), state = placed(state, home), count = placed(count, home);
    pdl_wait();
    pdl_launch();
    int c = blockIdx.x * BLOCK + threadIdx.x;
    if (c >= channels) return;
    const int keep = taps - 1;
    int valid = (int)valid_rows(count, rows);
    int t0 = blockIdx.y * span;
    int t1 = t0 + span < valid ? t0 + span : valid;
    auto seq = [&](int i) { return i < keep ? state[(i64)i * channels + c] : load1(x, i - keep, c); };
    if (taps == 4) {
        // The usual kernel: taps and window in registers.
        float w0 = weight[(i64)c * 4], w1 = weight[(i64)c * 4 + 1], w2 = weight[(i64)c * 4 + 2], w3 = weight[(i64)c * 4 + 3];
        if (t0 < t1) {
            float a = seq(t0), b = seq(t0 + 1), d = seq(t0 + 2);
            const float add = bias ? bias[c] : 0.f;
            for (int t = t0; t < t1; t += 8) {
                u32 next[8];  // eight loads in flight before the first store
#pragma unroll
                for (int i = 0; i < 8; ++i) next[i] = t + i < t1 ? raw1(x, t + i, c) : 0u;
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    if (t + i >= t1) break;
                    const float e = cooked(next[i], x.dtype);
                    float sum = fmaf(w3, e, fmaf(w2, d, fmaf(w1, b, fmaf(w0, a, 0.f))));
                    if (bias) sum += add;
                    store1(out, t + i, c, silu(sum));
                    a = b;
                    b = d;
                    d = e;
                }
            }
        }
    } else {
        for (int t = t0; t < t1; ++t) {
            float sum = 0.f;
            for (int j = 0; j < taps; ++j) sum = fmaf(weight[(i64)c * taps + j], seq(t + j), sum);
            if (bias) sum += bias[c];
            store1(out, t, c, silu(sum));
        }
    }
    // Only the first span reads the old state, so it alone may replace it: rising j reads row j + valid before writing j.
    if (blockIdx.y == 0 && valid > 0)
        for (int j = 0; j < keep; ++j) state[(i64)j * channels + c] = seq(j + valid);
}

#define GROUPS 8  // lanes that share a column pair

struct Delta {
    View qkv, decay, beta, out;
    const float* a_log;
    const float* dt_bias;
    const u32* count;
    float* state;
    int rows, key_heads, value_heads, key_dim, value_dim, columns;
    // Decode only: norm and gate of the head's output (gate.p == null: none).
    View gate;
    View normed;
    const float* norm_weight;
    u32* done;  // per value head: blocks that have stored their columns; zero between launches
    float eps;
    int early;  // 1: nothing before it in the plan writes the state, a_log or dt_bias: they are read before the wait
};

// What else of it may lie in State, where it is for this replay.
struct Reached {
    View qkv, decay, beta, out, gate, normed;
    const u32* count;
    __device__ __forceinline__ Reached(const Delta& p, const u64* home)
        : qkv(placed(p.qkv, home)), decay(placed(p.decay, home)), beta(placed(p.beta, home)), out(placed(p.out, home)), gate(placed(p.gate, home)),
          normed(placed(p.normed, home)), count(placed(p.count, home)) {}
};

__device__ __forceinline__ float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }

// What a lane holds of the state: of CHUNKS chunks of 32 key rows, four rows of each, of two columns.
template <int CHUNKS> struct Held {
    float s0[CHUNKS * 4], s1[CHUNKS * 4], rate, dt;
    float* state;  // of the head
    int group, pair, col;
    bool own0, own1;  // whether there are such columns

    __device__ __forceinline__ Held(const Delta& p, const u64* home) {
        group = threadIdx.x & (GROUPS - 1), pair = threadIdx.x / GROUPS;
        col = blockIdx.y * p.columns + pair * 2;
        own0 = pair * 2 < p.columns && col < p.value_dim, own1 = pair * 2 + 1 < p.columns && col + 1 < p.value_dim;
        state = placed(p.state, home) + (i64)blockIdx.x * p.key_dim * p.value_dim;
    }
    template <typename Two, typename One> __device__ __forceinline__ void each(const Delta& p, Two two, One one) {
        float* at = state + (i64)(group * 4) * p.value_dim + col;
        const bool wide = own0 && own1 && (p.value_dim & 1) == 0;
        if (wide && p.key_dim == CHUNKS * 32) {
            // Nothing to ask for each: the accesses go out one behind the other.
#pragma unroll
            for (int i = 0; i < CHUNKS * 4; ++i) two((float2*)(at + ((i >> 2) * 32 + (i & 3)) * p.value_dim), s0[i], s1[i]);
            return;
        }
#pragma unroll
        for (int i = 0; i < CHUNKS * 4; ++i) {
            const int r = (i >> 2) * 32 + (i & 3);
            if (group * 4 + r >= p.key_dim) continue;
            if (wide) {
                two((float2*)(at + r * p.value_dim), s0[i], s1[i]);
            } else {
                if (own0) one(at + r * p.value_dim, s0[i]);
                if (own1) one(at + r * p.value_dim + 1, s1[i]);
            }
        }
    }
    __device__ __forceinline__ void read(const Delta& p) {
        rate = expf(p.a_log[blockIdx.x]), dt = p.dt_bias[blockIdx.x];
#pragma unroll
        for (int i = 0; i < CHUNKS * 4; ++i) s0[i] = s1[i] = 0.f;
        each(p, [](const float2* at, float& a, float& b) { const float2 v = *at; a = v.x, b = v.y; }, [](const float* at, float& a) { a = *at; });
    }
    __device__ __forceinline__ void write(const Delta& p) {
        each(p, [](float2* at, float a, float b) { *at = make_float2(a, b); }, [](float* at, float a) { *at = a; });
    }
    __device__ __forceinline__ float decay(float raw) const { return expf(-rate * softplus(raw + dt)); }
};

// A lane's rows of a key or query.
template <int CHUNKS> struct Rows {
    float x[CHUNKS * 4];
    __device__ __forceinline__ void read(const float* row, int group) {
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            const float4 v = *(const float4*)(row + c * 32 + group * 4);
            x[c * 4] = v.x, x[c * 4 + 1] = v.y, x[c * 4 + 2] = v.z, x[c * 4 + 3] = v.w;
        }
    }
};

// Query and key of a token, a lane's elements c * 32 + lane: normed (the query over the root of its length, too), and their product.
template <int CHUNKS> struct Normed {
    float q[CHUNKS], k[CHUNKS], qq, kk, kq;
    __device__ __forceinline__ void squares(const u32* raw_q, const u32* raw_k, int dtype) {
        qq = kk = 0.f;
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            q[c] = cooked(raw_q[c], dtype);
            k[c] = cooked(raw_k[c], dtype);
            qq = fmaf(q[c], q[c], qq);
            kk = fmaf(k[c], k[c], kk);
        }
    }
    __device__ __forceinline__ void scale(float root) {
        const float q_scale = 1.f / (sqrtf(qq + 1e-6f) * root), k_scale = 1.f / sqrtf(kk + 1e-6f);
        kq = 0.f;
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            q[c] *= q_scale;
            k[c] *= k_scale;
            kq = fmaf(k[c], q[c], kq);
        }
    }
};

// One token, with norm and gate of the head's output.
template <int CHUNKS>
__device__ __forceinline__ void delta_step(const Delta& p, const u64* home) {
    const int KD = CHUNKS * 32;
    __shared__ __align__(16) float ks[KD], qs[KD];
    __shared__ __align__(16) float head_out[256];
    __shared__ float gs, bs, kq;
    __shared__ bool last;
    const int lane = threadIdx.x & 31, h = blockIdx.x, kh = h / (p.value_heads / p.key_heads);
    Held<CHUNKS> held(p, home);
    const Reached in(p, home);
    if (p.early) held.read(p);
    pdl_wait();
    // Not before: a chain's rings would take the memory's time from what follows here.
    pdl_launch();
    const bool alone = gridDim.y == 1;  // the block has all of the head
    u32 gate = 0;
    float norm_weight = 0.f;
    if (alone && (int)threadIdx.x < p.value_dim) {
        gate = raw1(in.gate, 0, (i64)h * p.value_dim + threadIdx.x);
        norm_weight = p.norm_weight[threadIdx.x];
    }
    if (!p.early) held.read(p);
    if (valid_rows(in.count, p.rows) == 0) return;
    const i64 v0 = 2 * (i64)p.key_heads * p.key_dim + (i64)h * p.value_dim + held.col;
    const u32 raw_v0 = held.own0 ? raw1(in.qkv, 0, v0) : 0u, raw_v1 = held.own1 ? raw1(in.qkv, 0, v0 + 1) : 0u;
    if (threadIdx.x < 32) {
        u32 raw_q[CHUNKS], raw_k[CHUNKS];
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            const int r = c * 32 + lane;
            raw_q[c] = r < p.key_dim ? raw1(in.qkv, 0, (i64)kh * p.key_dim + r) : 0u;
            raw_k[c] = r < p.key_dim ? raw1(in.qkv, 0, (i64)(p.key_heads + kh) * p.key_dim + r) : 0u;
        }
        const u32 raw_decay = raw1(in.decay, 0, h), raw_beta = raw1(in.beta, 0, h);
        Normed<CHUNKS> token;
        token.squares(raw_q, raw_k, in.qkv.dtype);
#pragma unroll
        for (int d = 16; d > 0; d >>= 1) {
            token.qq += __shfl_xor_sync(FULL, token.qq, d);
            token.kk += __shfl_xor_sync(FULL, token.kk, d);
        }
        token.scale(sqrtf((float)p.key_dim));
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            qs[c * 32 + lane] = token.q[c];
            ks[c * 32 + lane] = token.k[c];
        }
        token.kq = warp_sum(token.kq);
        if (lane == 0) {
            kq = token.kq;
            gs = held.decay(cooked(raw_decay, in.decay.dtype));
            bs = sigmoid(cooked(raw_beta, in.beta.dtype));
        }
    }
    __syncthreads();
    Rows<CHUNKS> k, q;
    k.read(ks, held.group);
    q.read(qs, held.group);
    const float g = gs;
    float a0 = 0.f, a1 = 0.f, c0 = 0.f, c1 = 0.f;
#pragma unroll
    for (int r = 0; r < CHUNKS * 4; ++r) {
        a0 = fmaf(held.s0[r], k.x[r], a0);
        a1 = fmaf(held.s1[r], k.x[r], a1);
        c0 = fmaf(held.s0[r], q.x[r], c0);
        c1 = fmaf(held.s1[r], q.x[r], c1);
    }
#pragma unroll
    for (int d = GROUPS / 2; d > 0; d >>= 1) {
        a0 += __shfl_xor_sync(FULL, a0, d);
        a1 += __shfl_xor_sync(FULL, a1, d);
        c0 += __shfl_xor_sync(FULL, c0, d);
        c1 += __shfl_xor_sync(FULL, c1, d);
    }
    const float d0 = (cooked(raw_v0, in.qkv.dtype) - g * a0) * bs, d1 = (cooked(raw_v1, in.qkv.dtype) - g * a1) * bs;
#pragma unroll
    for (int r = 0; r < CHUNKS * 4; ++r) {
        held.s0[r] = fmaf(k.x[r], d0, g * held.s0[r]);
        held.s1[r] = fmaf(k.x[r], d1, g * held.s1[r]);
    }
    if (held.group == 0) {
        const i64 o = (i64)h * p.value_dim + held.col;
        const float o0 = fmaf(kq, d0, g * c0), o1 = fmaf(kq, d1, g * c1);
        if (held.own0) store1(in.out, 0, o, o0);
        if (held.own1) store1(in.out, 0, o + 1, o1);
        if (alone) {
            if (held.own0) head_out[held.pair * 2] = rounded(o0, in.out.dtype);
            if (held.own1) head_out[held.pair * 2 + 1] = rounded(o1, in.out.dtype);
        }
    }
    // The block, or the last block of a head to get here, norms and gates it, in the order of the separate kernel; the state is
    // written while the blocks count themselves.
    const View local = {head_out, 0, F32, 1};
    if (alone) {
        __syncthreads();
        const int c = threadIdx.x;
        // A head has at most 128 columns here, and every one of them is some thread's.
        if (c < ((p.value_dim + 31) & ~31)) {
            const float scale = rms_scale(warp_squares(local, 0, 0, p.value_dim), p.value_dim, p.eps);
            if (c < p.value_dim) store1(in.normed, 0, (i64)h * p.value_dim + c, head_out[c] * scale * norm_weight * silu(cooked(gate, in.gate.dtype)));
        }
    } else {
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) last = atomicInc(p.done + h, gridDim.y - 1) == gridDim.y - 1;
    }
    held.write(p);
    if (alone) return;
    __syncthreads();
    if (!last) return;
    __threadfence();
    const i64 first = (i64)h * p.value_dim;
    for (int c = threadIdx.x; c < p.value_dim; c += blockDim.x) {
        if (in.out.dtype == F32) {
            head_out[c] = ((volatile const float*)in.out.p)[first + c];
        } else {
            const u16 raw = ((volatile const u16*)in.out.p)[first + c];
            head_out[c] = in.out.dtype == BF16 ? bf16_to_f32(raw) : f16_to_f32(raw);
        }
    }
    __syncthreads();
    const float scale = rms_scale(warp_squares(local, 0, 0, p.value_dim), p.value_dim, p.eps);
    for (int c = threadIdx.x; c < p.value_dim; c += blockDim.x)
        store1(in.normed, 0, first + c, head_out[c] * scale * p.norm_weight[c] * silu(load1(in.gate, 0, first + c)));
}

// Many tokens: the same arithmetic, laid out for the chain over tokens, which is the whole time of this kernel. What a token
// needs of keys, queries and rates is in shared memory or registers before its turn; of its own sums only S^T k stands
// between it and the next token. S^T q goes to shared memory in GROUPS pieces, which are added once a tile.
template <int CHUNKS, int TOKENS>
__device__ __forceinline__ void delta_tokens(const Delta& p, const u64* home) {
    const int KD = CHUNKS * 32, PAIRS = 16, EACH = TOKENS / 4;
    __shared__ __align__(16) float ks[TOKENS][KD], qs[TOKENS][KD];
    __shared__ __align__(16) float2 cs[TOKENS][PAIRS][GROUPS];
    __shared__ float2 vs[TOKENS][PAIRS], ds[TOKENS][PAIRS];
    __shared__ float gs[TOKENS], bs[TOKENS], kq[TOKENS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, threads = blockDim.x, warps = threads >> 5;
    const int h = blockIdx.x, kh = h / (p.value_heads / p.key_heads), first_column = blockIdx.y * p.columns;
    const i64 q0 = (i64)kh * p.key_dim, k0 = (i64)(p.key_heads + kh) * p.key_dim;
    const i64 v0 = 2 * (i64)p.key_heads * p.key_dim + (i64)h * p.value_dim + first_column;
    Held<CHUNKS> held(p, home);
    const Reached in(p, home);
    if (p.early) held.read(p);
    pdl_wait();
    pdl_launch();
    if (!p.early) held.read(p);
    const int valid = (int)valid_rows(in.count, p.rows);
    const float root = sqrtf((float)p.key_dim);

    // A warp prepares tokens warp, warp + warps, ... of a tile; lane n has the rates of its n-th. Narrow heads have fewer warps
    // than four, and tiles of fewer tokens.
    const int tile = warps * EACH, own = warp + lane * warps;
    u32 raw_q[EACH][CHUNKS], raw_k[EACH][CHUNKS], raw_v[EACH], raw_decay = 0, raw_beta = 0;
    // Tokens past the end are the last one again: nothing reads what becomes of them.
    auto fetch_as = [&](bool four_bytes, int base) {
#pragma unroll
        for (int n = 0; n < EACH; ++n) {
            const int t = base + warp + n * warps < valid ? base + warp + n * warps : valid - 1;
            const i64 row = t * in.qkv.ld + lane;
            auto at = [&](i64 column) { return four_bytes ? ((const u32*)in.qkv.p)[row + column] : (u32)((const u16*)in.qkv.p)[row + column]; };
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) {
                const bool live = c * 32 + lane < p.key_dim;
                raw_q[n][c] = live ? at(q0 + c * 32) : 0u;
                raw_k[n][c] = live ? at(k0 + c * 32) : 0u;
            }
            raw_v[n] = lane < p.columns && first_column + lane < p.value_dim ? at(v0) : 0u;
        }
        if (lane < EACH && base + own < valid) {
            raw_decay = raw1(in.decay, base + own, h);
            raw_beta = raw1(in.beta, base + own, h);
        }
    };
    auto fetch = [&](int base) {
        // One question for all loads, not one for each.
        if (in.qkv.dtype == F32) fetch_as(true, base);
        else fetch_as(false, base);
    };
    auto prepare = [&]() {
        Normed<CHUNKS> token[EACH];
#pragma unroll
        for (int n = 0; n < EACH; ++n) token[n].squares(raw_q[n], raw_k[n], in.qkv.dtype);
#pragma unroll
        for (int d = 16; d > 0; d >>= 1)
#pragma unroll
            for (int n = 0; n < EACH; ++n) {
                token[n].qq += __shfl_xor_sync(FULL, token[n].qq, d);
                token[n].kk += __shfl_xor_sync(FULL, token[n].kk, d);
            }
#pragma unroll
        for (int n = 0; n < EACH; ++n) {
            const int i = warp + n * warps;
            token[n].scale(root);
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) {
                qs[i][c * 32 + lane] = token[n].q[c];
                ks[i][c * 32 + lane] = token[n].k[c];
            }
            ((float*)vs[i])[lane] = cooked(raw_v[n], in.qkv.dtype);
        }
#pragma unroll
        for (int d = 16; d > 0; d >>= 1)
#pragma unroll
            for (int n = 0; n < EACH; ++n) token[n].kq += __shfl_xor_sync(FULL, token[n].kq, d);
        if (lane < EACH) {
            float own_kq = token[0].kq;
#pragma unroll
            for (int n = 1; n < EACH; ++n)
                if (lane == n) own_kq = token[n].kq;
            kq[own] = own_kq;
            gs[own] = held.decay(cooked(raw_decay, in.decay.dtype));
            bs[own] = sigmoid(cooked(raw_beta, in.beta.dtype));
        }
    };
    if (valid > 0) fetch(0);
    for (int base = 0; base < valid; base += tile) {
        const int here = valid - base < tile ? valid - base : tile;
        prepare();
        __syncthreads();
        if (base + tile < valid) fetch(base + tile);
        Rows<CHUNKS> k, q;
        k.read(ks[0], held.group);
        float g = gs[0], b = bs[0];
        float2 v = vs[0][held.pair];
        for (int i = 0; i < here; ++i) {
            float a0 = 0.f, a1 = 0.f, c0 = 0.f, c1 = 0.f;
#pragma unroll
            for (int r = 0; r < CHUNKS * 4; ++r) {
                a0 = fmaf(held.s0[r], k.x[r], a0);
                a1 = fmaf(held.s1[r], k.x[r], a1);
            }
#pragma unroll
            for (int d = GROUPS / 2; d > 0; d >>= 1) {
                a0 += __shfl_xor_sync(FULL, a0, d);
                a1 += __shfl_xor_sync(FULL, a1, d);
            }
            q.read(qs[i], held.group);
#pragma unroll
            for (int r = 0; r < CHUNKS * 4; ++r) {
                c0 = fmaf(held.s0[r], q.x[r], c0);
                c1 = fmaf(held.s1[r], q.x[r], c1);
            }
            cs[i][held.pair][held.group] = make_float2(c0, c1);
            const float d0 = (v.x - g * a0) * b, d1 = (v.y - g * a1) * b;
#pragma unroll
            for (int r = 0; r < CHUNKS * 4; ++r) {
                held.s0[r] = fmaf(k.x[r], d0, g * held.s0[r]);
                held.s1[r] = fmaf(k.x[r], d1, g * held.s1[r]);
            }
            if (held.group == 0) ds[i][held.pair] = make_float2(d0, d1);
            const int next = i + 1 < here ? i + 1 : i;
            k.read(ks[next], held.group);
            g = gs[next], b = bs[next], v = vs[next][held.pair];
        }
        __syncthreads();
        for (int n = threadIdx.x; n < here * PAIRS; n += threads) {
            const int i = n / PAIRS, pair = n % PAIRS, column = first_column + pair * 2;
            if (pair * 2 >= p.columns || column >= p.value_dim) continue;
            // In the order of the butterfly: 4, 2, 1 apart.
            const float4* from = (const float4*)cs[i][pair];
            const float4 c01 = from[0], c23 = from[1], c45 = from[2], c67 = from[3];
            const float c0 = ((c01.x + c45.x) + (c23.x + c67.x)) + ((c01.z + c45.z) + (c23.z + c67.z));
            const float c1 = ((c01.y + c45.y) + (c23.y + c67.y)) + ((c01.w + c45.w) + (c23.w + c67.w));
            const float2 d = ds[i][pair];
            const i64 o = (i64)h * p.value_dim + column;
            store1(in.out, base + i, o, fmaf(kq[i], d.x, gs[i] * c0));
            if (pair * 2 + 1 < p.columns && column + 1 < p.value_dim) store1(in.out, base + i, o + 1, fmaf(kq[i], d.y, gs[i] * c1));
        }
        __syncthreads();
    }
    if (valid > 0) held.write(p);
}

#define DELTA_STEP(name, CHUNKS, THREADS)                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, THREADS == 512 ? 1 : 4) name(const __grid_constant__ Delta p, const u64* home) { \
        delta_step<CHUNKS>(p, home);                                                                         \
    }
// One block a head, of at most 128 columns; where key rows take more registers, blocks of 32 columns.
DELTA_STEP(gated_delta_step_wide_1, 1, 512)
DELTA_STEP(gated_delta_step_wide_2, 2, 512)
DELTA_STEP(gated_delta_step_wide_4, 4, 512)
DELTA_STEP(gated_delta_step_8, 8, 128)

#define DELTA_TOKENS(name, CHUNKS, TOKENS)                                                       \
    extern "C" __global__ void __launch_bounds__(128, 2) name(const __grid_constant__ Delta p, const u64* home) { \
        delta_tokens<CHUNKS, TOKENS>(p, home);                                               \
    }
DELTA_TOKENS(gated_delta_tokens_1, 1, 16)
DELTA_TOKENS(gated_delta_tokens_2, 2, 16)
DELTA_TOKENS(gated_delta_tokens_4, 4, 16)
DELTA_TOKENS(gated_delta_tokens_8, 8, 8)
