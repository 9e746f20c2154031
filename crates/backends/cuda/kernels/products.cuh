// What gemv.cu and chain.cu have in common: linears of one x, what comes before and after their sums. Goes between common.cuh
// and either.
//
// Prologue: x may be the RMS norm of another row (norm_weight != null); block 0 also writes it where the plan has it.
// Epilogues: store, add to out, store then causal convolution of one new row, SwiGLU of a pair of linears.
// Every buffer that the separate ops would write is written with the same bits.

#define SEGMENTS 6
#define STORE 0
#define ADD 1
#define CONV 2
#define PAIR 3
#define HELD 4  // groups of four columns that a thread loads before it uses the first

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
    int pad;
    Segment segment[SEGMENTS];
};

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

__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// What becomes of the sum `v` of row `n`: of token row `lane`, or every lane's with one row. `old`, `tap`: what the epilogue
// reads, loaded before the sum. `first`: the first sum of a pair.
// Logits and a convolution's state lie in State; other results only where ANY says that they may (a chain asks for no more: it
// ends some 750 rows a warp and token).
template <int M, bool ANY, typename Home>
__device__ __forceinline__ void finish(const Segment& p, Home home, int n, int lane, int half, float v, float old, float tap, float& first) {
    auto result = [&](const View& v) { return ANY ? placed(v, home) : v; };
    if (p.mode == CONV) {
        // The plan has one row.
        v = rounded(v, p.out.dtype);
        float sum = 0.f;
        for (int j = 0; j + 1 < p.taps; ++j)
            sum = fmaf(__shfl_sync(FULL, tap, j), __shfl_sync(FULL, old, j), sum);
        sum = fmaf(__shfl_sync(FULL, tap, p.taps - 1), v, sum);
        float* state = placed(p.conv_state, home);
        if (lane > 0 && lane + 1 < p.taps) state[(i64)(lane - 1) * p.rows + n] = old;
        if (lane == 0) {
            store1(result(p.out), 0, n, v);
            if (p.taps > 1) state[(i64)(p.taps - 2) * p.rows + n] = v;
            if (p.conv_bias) sum += p.conv_bias[n];
            store1(result(p.out2), 0, n, silu(sum));
        }
    } else if (lane < M) {
        if (p.mode == ADD) {
            store1(result(p.out), lane, n, old + v);
        } else if (p.mode == STORE) {
            store1(placed(p.out, home), lane, n, v);
        } else {
            const View o = result(half ? p.out2 : p.out);
            v = rounded(v, o.dtype);
            store1(o, lane, n, v);
            if (half) store1(result(p.out3), lane, n, silu(first) * v);
            else first = v;
        }
    }
}

