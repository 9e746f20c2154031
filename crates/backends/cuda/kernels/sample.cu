// Draws the next token exactly as docs/sampling.md says.
//
// logits f32 [1, V], counts u32 [1, V], adjusted f32 [1, V]. Floor: 12 bytes a token of the vocabulary; the rest is latency.
// One cooperative launch: every block keeps its slice of the vocabulary in shared memory, thresholds come from radix
// selection over monotone integer keys (11, 11, 10 bits), all sums are of integers, so no result depends on an order.
// The token goes to the plan's Output and, as one 64-bit word with the launch's number, to mapped host memory.

#define THREADS 512
#define BINS 2048
#define MIRRORS 64

struct SampleWork {
    u32 arrived;
    u32 generation;
    u64 launch;      // number of launches finished
    u64 best[2];     // by parity of the launch: highest adjusted logit
    u64 drawn;       // highest adjusted logit plus noise
    u64 histogram[6][BINS];
};
struct Sample {
    const float* logits;
    const float* params;
    const u32* seed;
    const int* bias_tokens;
    const float* bias_values;
    const u32* cursor;
    const int* forced;
    u32* counts;
    float* adjusted;
    int* token;
    u64* mirror;     // [MIRRORS] in mapped host memory: launch << 32 | token
    SampleWork* work;
    int vocabulary;
    int biases;
    int slice;
    int pad;
};

__device__ __forceinline__ u32 sort_key(float v) {
    u32 u = __float_as_uint(v + 0.f);  // -0 counts as 0
    return u ^ ((u >> 31) ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float sort_value(u32 key) { return __uint_as_float(key ^ ((key >> 31) ? 0x80000000u : 0xffffffffu)); }
// Higher values first, then lower indices; 0 is below everything.
__device__ __forceinline__ u64 rank_of(float v, u32 index) { return (u64)sort_key(v) << 32 | (0xffffffffu - index); }

__device__ __forceinline__ void grid_barrier(SampleWork* w) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        volatile u32* generation = &w->generation;
        u32 before = *generation;
        if (atomicAdd(&w->arrived, 1u) == gridDim.x - 1) {
            w->arrived = 0;
            __threadfence();
            atomicAdd(&w->generation, 1u);
        } else {
            while (*generation == before) {
            }
        }
        __threadfence();
    }
    __syncthreads();
}

__device__ __forceinline__ u64 block_best(u64 v, u64* part) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) {
        u64 o = __shfl_xor_sync(FULL, v, d);
        v = o > v ? o : v;
    }
    if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = v;
    __syncthreads();
    v = 0;
    for (int w = 0; w < THREADS / 32; ++w) v = part[w] > v ? part[w] : v;
    __syncthreads();
    return v;
}

struct Chosen {
    u32 bin;
    u64 above;  // weight in all bins over it, plus what was above before
};
// The highest bin at which the weight from the top, `above` included, reaches `target`.
__device__ __forceinline__ Chosen choose(const u64* histogram, u64 above, u64 target, u64* part, Chosen* result) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u64 w[BINS / THREADS], sum = 0;
#pragma unroll
    for (int j = 0; j < BINS / THREADS; ++j) {
        w[j] = ((volatile const u64*)histogram)[BINS - 1 - (threadIdx.x * (BINS / THREADS) + j)];
        sum += w[j];
    }
    u64 upto = sum;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
        u64 o = __shfl_up_sync(FULL, upto, d);
        if (lane >= d) upto += o;
    }
    if (lane == 31) part[warp] = upto;
    if (threadIdx.x == 0) result->bin = 0, result->above = above;
    __syncthreads();
    u64 before = above + upto - sum;
    for (int i = 0; i < warp; ++i) before += part[i];
    if (before < target && before + sum >= target) {
#pragma unroll
        for (int j = 0; j < BINS / THREADS; ++j) {
            if (before < target && before + w[j] >= target) {
                result->bin = BINS - 1 - (threadIdx.x * (BINS / THREADS) + j);
                result->above = before;
                before = target;  // ends the search
            } else {
                before += w[j];
            }
        }
    }
    __syncthreads();
    Chosen c = *result;
    __syncthreads();
    return c;
}

__device__ __forceinline__ u64 mass_of(float a, float top) {
    float e = expf(a - top);
    if (!(e > 0.f)) return 0;
    return (u64)(e * 4294967296.f);
}

__device__ __forceinline__ u32 philox_word(u32 k0, u32 k1, u32 token, u32 position) {
    u32 c0 = token / 4, c1 = position, c2 = 0, c3 = 0;
#pragma unroll
    for (int i = 0; i < 10; ++i) {
        u32 h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
        u32 h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
        c0 = h1 ^ c1 ^ k0;
        c1 = l1;
        c2 = h0 ^ c3 ^ k1;
        c3 = l0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    u32 w = token & 3;
    return w == 0 ? c0 : w == 1 ? c1 : w == 2 ? c2 : c3;
}
__device__ __forceinline__ float gumbel(u32 x) {
    float u = __fmul_rn(__fadd_rn((float)x, 0.5f), 2.3283064365386963e-10f);
    u = fminf(u, 0.99999994039535522f);
    float e = -log1pf(-u);
    return -logf(e);
}

extern "C" __global__ void __launch_bounds__(THREADS) sample(const __grid_constant__ Sample args, const u64* home) {
    Sample p = args;
    p.logits = placed(p.logits, home), p.params = placed(p.params, home), p.seed = placed(p.seed, home);
    p.bias_tokens = placed(p.bias_tokens, home), p.bias_values = placed(p.bias_values, home), p.cursor = placed(p.cursor, home);
    p.forced = placed(p.forced, home), p.counts = placed(p.counts, home), p.adjusted = placed(p.adjusted, home), p.token = placed(p.token, home);
    extern __shared__ float4 shared[];
    float* a = (float*)shared;  // [slice]
    __shared__ u64 bins[BINS];
    __shared__ u64 part[THREADS / 32];
    __shared__ Chosen result;
    pdl_wait();
    pdl_launch();
    SampleWork* w = p.work;
    const u64 launch = *(volatile u64*)&w->launch;
    const float temperature = p.params[0], repetition = p.params[4], presence = p.params[5], frequency = p.params[6];
    const int first = blockIdx.x * p.slice;
    const int n = p.vocabulary - first < p.slice ? p.vocabulary - first : p.slice;

    for (int i = threadIdx.x; i < n; i += THREADS) {
        float l = p.logits[first + i];
        u32 c = p.counts[first + i];
        u32 times = c & 0x7fffffffu;
        if (c != 0 && repetition != 1.f) l = l > 0.f ? __fdiv_rn(l, repetition) : __fmul_rn(l, repetition);
        if (times) l = __fsub_rn(l, __fadd_rn(__fmul_rn(frequency, (float)times), presence));
        a[i] = l;
    }
    // Bias in the order of its entries: a token's entries all belong to one thread. Most blocks have none.
    bool biased = false;
    for (int b = threadIdx.x; b < p.biases; b += THREADS) {
        int i = p.bias_tokens[b] - first;
        biased |= i >= 0 && i < n;
    }
    if (__syncthreads_or(biased))
        for (int b = 0; b < p.biases; ++b) {
            int i = p.bias_tokens[b] - first;
            if (i >= 0 && i < n && i % THREADS == (int)threadIdx.x) a[i] = __fadd_rn(a[i], p.bias_values[b]);
        }
    u64 best = 0;
    for (int i = threadIdx.x; i < n; i += THREADS) {
        float l = a[i];
        if (l != l) l = -INFINITY;
        if (temperature != 0.f) l = __fdiv_rn(l, temperature);
        a[i] = l;
        p.adjusted[first + i] = l;
        u64 r = rank_of(l, first + i);
        best = r > best ? r : best;
    }
    best = block_best(best, part);
    if (threadIdx.x == 0 && n > 0) atomicMax(&w->best[launch & 1], best);
    grid_barrier(w);
    best = *(volatile u64*)&w->best[launch & 1];
    const float top = sort_value((u32)(best >> 32));
    const int forced = *p.forced;
    int token = (int)(0xffffffffu - (u32)best);
    u32 used = 0;  // histograms touched

    if (forced >= 0) {
        token = forced;
    } else if (top == -INFINITY) {
        token = 0;
    } else if (temperature != 0.f) {
        u32 floor_key = 0;  // keys below it are dropped
        for (int stage = 0; stage < 2; ++stage) {
            // Stage 0: top-k, weight 1 each. Stage 1: top-p, weight by mass.
            const float k = p.params[1], top_p = p.params[2];
            if (stage == 0 ? !(k >= 1.f && k < (float)p.vocabulary) : !(top_p < 1.f)) continue;
            u64 target = stage == 0 ? (u64)k : 0, above = 0;
            u32 prefix = 0;
            for (int pass = 0; pass < 3; ++pass) {
                const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
                const int high = pass == 0 ? 32 : pass == 1 ? 21 : 10;  // bits at and over it are decided
                u64* histogram = w->histogram[stage * 3 + pass];
                used |= 1u << (stage * 3 + pass);
                for (int b = threadIdx.x; b < BINS; b += THREADS) bins[b] = 0;
                __syncthreads();
                for (int i = threadIdx.x; i < n; i += THREADS) {
                    u32 key = sort_key(a[i]);
                    if (key < floor_key || (high < 32 && key >> high != prefix >> high)) continue;
                    u64 weight = stage == 0 ? 1 : mass_of(a[i], top);
                    if (weight) atomicAdd(&bins[key >> shift & (pass == 2 ? 1023 : 2047)], weight);
                }
                __syncthreads();
                for (int b = threadIdx.x; b < BINS; b += THREADS)
                    if (bins[b]) atomicAdd(histogram + b, bins[b]);
                grid_barrier(w);
                if (stage == 1 && pass == 0) {
                    // The least sum with sum * 2^24 >= floor(p * 2^24) * total.
                    u64 total = 0;
                    for (int b = threadIdx.x; b < BINS; b += THREADS) total += ((volatile u64*)histogram)[b];
#pragma unroll
                    for (int d = 16; d > 0; d >>= 1) total += __shfl_xor_sync(FULL, total, d);
                    if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = total;
                    __syncthreads();
                    total = 0;
                    for (int i = 0; i < THREADS / 32; ++i) total += part[i];
                    __syncthreads();
                    u64 share = top_p > 0.f ? (u64)(top_p * 16777216.f) : 0;
                    u64 low = share * total, over = __umul64hi(share, total);
                    target = (over << 40 | low >> 24) + ((low & 0xffffffu) ? 1 : 0);
                    if (target == 0) target = 1;
                }
                Chosen c = choose(histogram, above, target, part, &result);
                above = c.above;
                prefix |= c.bin << shift;
            }
            floor_key = prefix > floor_key ? prefix : floor_key;
        }
        const float min_p = p.params[3];
        const u32 k0 = p.seed[0], k1 = p.seed[1], position = p.cursor[0];
        u64 drawn = 0;
        for (int i = threadIdx.x; i < n; i += THREADS) {
            float v = a[i];
            if (sort_key(v) < floor_key || v < top - 26.f) continue;
            if (min_p > 0.f && !(expf(v - top) >= min_p)) continue;
            u64 r = rank_of(__fadd_rn(v, gumbel(philox_word(k0, k1, first + i, position))), first + i);
            drawn = r > drawn ? r : drawn;
        }
        drawn = block_best(drawn, part);
        if (threadIdx.x == 0 && drawn) atomicMax(&w->drawn, drawn);
        grid_barrier(w);
        if (blockIdx.x == 0) {
            drawn = *(volatile u64*)&w->drawn;
            if (drawn) token = (int)(0xffffffffu - (u32)drawn);
        }
    }
    if (blockIdx.x != 0) return;
    __syncthreads();
    if (threadIdx.x == 0) {
        *p.token = token;
        *(volatile u64*)(p.mirror + launch % MIRRORS) = (launch + 1) << 32 | (u32)token;
        __threadfence_system();
        if (token >= 0 && token < p.vocabulary) {
            u32 c = p.counts[token];
            if ((c & 0x7fffffffu) != 0x7fffffffu) p.counts[token] = c + 1;
        }
        w->best[(launch + 1) & 1] = 0;
        w->drawn = 0;
        *(volatile u64*)&w->launch = launch + 1;
    }
    for (int h = 0; h < 6; ++h)
        if (used >> h & 1)
            for (int b = threadIdx.x; b < BINS; b += THREADS) w->histogram[h][b] = 0;
}
