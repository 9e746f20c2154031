// Causal convolution and the gated delta rule.
//
// causal_conv: x [T, C], state f32 [K-1, C], weight f32 [C, K]. Floor: T x C read and written, state read and written.
// gated_delta: qkv [T, 2*KH*KD + VH*VD], state f32 [VH*KD, VD]. Floor: state read and written once, 7 FLOP per element
// of the state and token; the chain over tokens is serial.
//
// gated_delta: a block owns COLUMNS value columns of one value head; eight lanes share a column pair and split the
// key rows, in registers for the whole launch. Tokens come in tiles: all warps normalise queries and keys of the
// tile into shared memory, then run its tokens one after another without a barrier. A token's arithmetic does not depend
// on where a launch starts or ends, so prefill by any buckets and decode give the same bits.
//   a = g (S^T k), c = g (S^T q), d = (v - a) b, out = c + d (k . q), S = g S + k d^T
// which is the definition with S^T q taken before the update.

extern "C" __global__ void __launch_bounds__(BLOCK)
causal_conv(View x, const float* weight, const float* bias, const u32* count, float* state, View out, int rows, int channels, int taps, int span) {
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

__device__ __forceinline__ float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }

// CHUNKS chunks of 32 key rows; a lane holds four rows of each, of two columns.
template <int CHUNKS, int COLUMNS, int TOKENS>
__device__ __forceinline__ void delta_body(const Delta& p) {
    const int KD = CHUNKS * 32;
    __shared__ __align__(16) float ks[TOKENS][KD];
    __shared__ __align__(16) float qs[TOKENS][KD];
    __shared__ float vs[TOKENS][COLUMNS];
    __shared__ float gs[TOKENS], bs[TOKENS], kq[TOKENS];
    __shared__ __align__(16) float head_out[256];
    __shared__ bool last;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const int h = blockIdx.x;
    const int kh = h / (p.value_heads / p.key_heads);
    const int group = lane & (GROUPS - 1);
    const int pair = threadIdx.x / GROUPS;
    const int col = blockIdx.y * p.columns + pair * 2;
    const bool own0 = pair * 2 < p.columns && col < p.value_dim, own1 = pair * 2 + 1 < p.columns && col + 1 < p.value_dim;
    const i64 q0 = (i64)kh * p.key_dim, k0 = (i64)(p.key_heads + kh) * p.key_dim;
    const i64 v0 = 2 * (i64)p.key_heads * p.key_dim + (i64)h * p.value_dim;
    const bool wide = (p.value_dim & 1) == 0;
    float* state = p.state + (i64)h * p.key_dim * p.value_dim;

    float s0[CHUNKS * 4], s1[CHUNKS * 4];
    float rate, dt;
    auto read_state = [&]() {
        rate = expf(p.a_log[h]), dt = p.dt_bias[h];
#pragma unroll
        for (int i = 0; i < CHUNKS * 4; ++i) {
            int r = (i >> 2) * 32 + group * 4 + (i & 3);
            s0[i] = s1[i] = 0.f;
            if (r < p.key_dim) {
                const float* at = state + (i64)r * p.value_dim + col;
                if (own0 && own1 && wide) {
                    float2 v = *(const float2*)at;
                    s0[i] = v.x;
                    s1[i] = v.y;
                } else {
                    if (own0) s0[i] = at[0];
                    if (own1) s1[i] = at[1];
                }
            }
        }
    };
    if (p.early) read_state();
    pdl_wait();
    // Not before: a chain's rings would take the memory's time from what follows here.
    pdl_launch();
    const bool norms = p.gate.p && gridDim.y == 1;
    u32 gate = 0;
    float norm_weight = 0.f;
    if (norms && (int)threadIdx.x < p.value_dim) {
        gate = raw1(p.gate, 0, (i64)h * p.value_dim + threadIdx.x);
        norm_weight = p.norm_weight[threadIdx.x];
    }
    if (!p.early) read_state();
    const int valid = (int)valid_rows(p.count, p.rows);
    const float root = sqrtf((float)p.key_dim);

    for (int base = 0; base < valid; base += TOKENS) {
        const int here = valid - base < TOKENS ? valid - base : TOKENS;
        __syncthreads();
        // A warp prepares AT_ONCE tokens side by side; all their loads go out before the first sum.
        const int AT_ONCE = CHUNKS <= 4 && COLUMNS <= 32 ? 4 : 1;
        for (int from = 0; from < here; from += warps * AT_ONCE) {
            u32 raw_q[AT_ONCE][CHUNKS], raw_k[AT_ONCE][CHUNKS], raw_decay = 0, raw_beta = 0;
#pragma unroll
            for (int n = 0; n < AT_ONCE; ++n)
#pragma unroll
                for (int c = 0; c < CHUNKS; ++c) {
                    const int r = c * 32 + lane, at = from + warp + n * warps;
                    const bool live = r < p.key_dim && at < here;
                    raw_q[n][c] = live ? raw1(p.qkv, base + at, q0 + r) : 0u;
                    raw_k[n][c] = live ? raw1(p.qkv, base + at, k0 + r) : 0u;
                }
            // Lane n has the rates of the warp's token n.
            const int own_token = from + warp + lane * warps;
            const bool rates = lane < AT_ONCE && own_token < here;
            if (rates) {
                raw_decay = raw1(p.decay, base + own_token, h);
                raw_beta = raw1(p.beta, base + own_token, h);
            }
            if (from == 0) {
                // Values of the tile, VALUES a thread at a time.
                const int VALUES = 4;
                for (int i = threadIdx.x; i < here * COLUMNS; i += VALUES * blockDim.x) {
                    u32 raw_v[VALUES];
#pragma unroll
                    for (int n = 0; n < VALUES; ++n) {
                        const int at = i + n * blockDim.x, t = at / COLUMNS, c = at % COLUMNS;
                        const int column = blockIdx.y * p.columns + c;
                        const bool live = t < here && c < p.columns && column < p.value_dim;
                        raw_v[n] = live ? raw1(p.qkv, base + t, v0 + column) : 0u;
                    }
#pragma unroll
                    for (int n = 0; n < VALUES; ++n) {
                        const int at = i + n * blockDim.x, t = at / COLUMNS, c = at % COLUMNS;
                        if (t < here) vs[t][c] = cooked(raw_v[n], p.qkv.dtype);
                    }
                }
            }
            float qv[AT_ONCE][CHUNKS], kv[AT_ONCE][CHUNKS], qq[AT_ONCE], kk[AT_ONCE], dot[AT_ONCE];
#pragma unroll
            for (int n = 0; n < AT_ONCE; ++n) {
                qq[n] = kk[n] = dot[n] = 0.f;
#pragma unroll
                for (int c = 0; c < CHUNKS; ++c) {
                    qv[n][c] = cooked(raw_q[n][c], p.qkv.dtype);
                    kv[n][c] = cooked(raw_k[n][c], p.qkv.dtype);
                    qq[n] = fmaf(qv[n][c], qv[n][c], qq[n]);
                    kk[n] = fmaf(kv[n][c], kv[n][c], kk[n]);
                }
            }
#pragma unroll
            for (int d = 16; d > 0; d >>= 1)
#pragma unroll
                for (int n = 0; n < AT_ONCE; ++n) {
                    qq[n] += __shfl_xor_sync(FULL, qq[n], d);
                    kk[n] += __shfl_xor_sync(FULL, kk[n], d);
                }
#pragma unroll
            for (int n = 0; n < AT_ONCE; ++n) {
                const int i = from + warp + n * warps;
                const float q_norm = sqrtf(qq[n] + 1e-6f), k_norm = sqrtf(kk[n] + 1e-6f);
#pragma unroll
                for (int c = 0; c < CHUNKS; ++c) {
                    const float q = qv[n][c] / q_norm / root, k = kv[n][c] / k_norm;
                    if (i < here) {
                        qs[i][c * 32 + lane] = q;
                        ks[i][c * 32 + lane] = k;
                    }
                    dot[n] = fmaf(k, q, dot[n]);
                }
            }
#pragma unroll
            for (int d = 16; d > 0; d >>= 1)
#pragma unroll
                for (int n = 0; n < AT_ONCE; ++n) dot[n] += __shfl_xor_sync(FULL, dot[n], d);
            if (rates) {
                float own_dot = dot[0];
#pragma unroll
                for (int n = 1; n < AT_ONCE; ++n)
                    if (lane == n) own_dot = dot[n];
                kq[own_token] = own_dot;
                gs[own_token] = expf(-rate * softplus(cooked(raw_decay, p.decay.dtype) + dt));
                bs[own_token] = sigmoid(cooked(raw_beta, p.beta.dtype));
            }
        }
        __syncthreads();
        for (int i = 0; i < here; ++i) {
            const i64 t = base + i;
            const float v_0 = own0 ? vs[i][pair * 2] : 0.f, v_1 = own1 ? vs[i][pair * 2 + 1] : 0.f;
            const float g = gs[i];
            float a0 = 0.f, a1 = 0.f, c0 = 0.f, c1 = 0.f;
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) {
                float4 k = *(const float4*)&ks[i][c * 32 + group * 4];
                float4 q = *(const float4*)&qs[i][c * 32 + group * 4];
                float kx[4] = {k.x, k.y, k.z, k.w}, qx[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int r = c * 4 + j;
                    a0 = fmaf(s0[r], kx[j], a0);
                    a1 = fmaf(s1[r], kx[j], a1);
                    c0 = fmaf(s0[r], qx[j], c0);
                    c1 = fmaf(s1[r], qx[j], c1);
                }
            }
#pragma unroll
            for (int d = GROUPS / 2; d > 0; d >>= 1) {
                a0 += __shfl_xor_sync(FULL, a0, d);
                a1 += __shfl_xor_sync(FULL, a1, d);
                c0 += __shfl_xor_sync(FULL, c0, d);
                c1 += __shfl_xor_sync(FULL, c1, d);
            }
            const float d0 = (v_0 - g * a0) * bs[i], d1 = (v_1 - g * a1) * bs[i];
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) {
                const float4 k = *(const float4*)&ks[i][c * 32 + group * 4];
                const float kx[4] = {k.x, k.y, k.z, k.w};
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int r = c * 4 + j;
                    s0[r] = fmaf(kx[j], d0, g * s0[r]);
                    s1[r] = fmaf(kx[j], d1, g * s1[r]);
                }
            }
            if (group == 0) {
                const i64 o = (i64)h * p.value_dim + col;
                const float o0 = fmaf(kq[i], d0, g * c0), o1 = fmaf(kq[i], d1, g * c1);
                if (own0) store1(p.out, t, o, o0);
                if (own1) store1(p.out, t, o + 1, o1);
                if (norms) {
                    if (own0) head_out[pair * 2] = rounded(o0, p.out.dtype);
                    if (own1) head_out[pair * 2 + 1] = rounded(o1, p.out.dtype);
                }
            }
        }
    }
    // The plan has one row where there is a gate. The last block of a head to get here norms and gates it, in the order of
    // the separate kernel; the state is written while the blocks count themselves.
    if (norms) {
        __syncthreads();
        const View local = {head_out, 0, F32, 1};
        const int c = threadIdx.x;
        // Few warps: a head has at most 256 columns, and every one of them is some thread's.
        if (c < ((p.value_dim + 31) & ~31)) {
            const float scale = rms_scale(warp_squares(local, 0, 0, p.value_dim), p.value_dim, p.eps);
            if (c < p.value_dim) store1(p.normed, 0, (i64)h * p.value_dim + c, head_out[c] * scale * norm_weight * silu(cooked(gate, p.gate.dtype)));
        }
    } else if (p.gate.p) {
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) last = atomicInc(p.done + h, gridDim.y - 1) == gridDim.y - 1;
    }
    if (valid > 0) {
#pragma unroll
        for (int i = 0; i < CHUNKS * 4; ++i) {
            int r = (i >> 2) * 32 + group * 4 + (i & 3);
            if (r < p.key_dim) {
                float* at = state + (i64)r * p.value_dim + col;
                if (own0 && own1 && wide) {
                    *(float2*)at = make_float2(s0[i], s1[i]);
                } else {
                    if (own0) at[0] = s0[i];
                    if (own1) at[1] = s1[i];
                }
            }
        }
    }
    if (p.gate.p && !norms) {
        __syncthreads();
        if (!last) return;
        __threadfence();
        const i64 first = (i64)h * p.value_dim;
        for (int c = threadIdx.x; c < p.value_dim; c += blockDim.x) {
            if (p.out.dtype == F32) {
                head_out[c] = ((volatile const float*)p.out.p)[first + c];
            } else {
                const u16 raw = ((volatile const u16*)p.out.p)[first + c];
                head_out[c] = p.out.dtype == BF16 ? bf16_to_f32(raw) : f16_to_f32(raw);
            }
        }
        __syncthreads();
        const View local = {head_out, 0, F32, 1};
        const float scale = rms_scale(warp_squares(local, 0, 0, p.value_dim), p.value_dim, p.eps);
        for (int c = threadIdx.x; c < p.value_dim; c += blockDim.x)
            store1(p.normed, 0, first + c, head_out[c] * scale * p.norm_weight[c] * silu(load1(p.gate, 0, first + c)));
    }
}
#define DELTA(name, CHUNKS, COLUMNS, TOKENS, THREADS)                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, THREADS == 512 ? 1 : 4) name(const __grid_constant__ Delta p) { \
        delta_body<CHUNKS, COLUMNS, TOKENS>(p);                                                     \
    }
DELTA(gated_delta_1, 1, 32, 16, 128)
DELTA(gated_delta_2, 2, 32, 16, 128)
DELTA(gated_delta_4, 4, 32, 16, 128)
DELTA(gated_delta_8, 8, 32, 16, 128)
// One block a head: decode.
DELTA(gated_delta_wide_1, 1, 128, 1, 512)
DELTA(gated_delta_wide_2, 2, 128, 1, 512)
DELTA(gated_delta_wide_4, 4, 128, 1, 512)
