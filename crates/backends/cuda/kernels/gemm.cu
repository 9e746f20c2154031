// Linear and LinearAdd for any number of rows in full float32: out[t, n] (+)= sum_k x[t, k] * w[n, k] (+ bias[n]).
//
// x [T, K], weights [N, K] of type W, out [T, N]; any float types. Floor: 2*T*N*K FLOP at the float32 rate.
// A block makes a tile of 64 x 64; every element is one chain of fused multiply-adds with k rising from 0, so a row's
// bits depend on nothing but the row. Serves float32 weights, mixed types, and machines without cuBLASLt.

#define TILE 64
#define DEPTH 16

template <int W> __device__ __forceinline__ float weight_at(const void* w, i64 i) {
    if (W == F32) return ((const float*)w)[i];
    u16 raw = ((const u16*)w)[i];
    return W == BF16 ? bf16_to_f32(raw) : f16_to_f32(raw);
}

template <int W>
__device__ __forceinline__ void gemm_body(const View& x, const void* w, const float* bias, const View& out, int rows, int n_total, int k_total, int add) {
    __shared__ __align__(16) float xs[DEPTH][TILE + 4];
    __shared__ __align__(16) float ws[DEPTH][TILE + 4];
    pdl_wait();
    pdl_launch();
    const int n0 = blockIdx.x * TILE, t0 = blockIdx.y * TILE;
    const int tx = threadIdx.x & 15, ty = threadIdx.x >> 4;
    float acc[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][j] = 0.f;
    const int lr = threadIdx.x >> 2, lk = (threadIdx.x & 3) * 4;
    for (int k0 = 0; k0 < k_total; k0 += DEPTH) {
        float4 xv = make_float4(0.f, 0.f, 0.f, 0.f);
        if (t0 + lr < rows) xv = load4(x, t0 + lr, k0 + lk, k_total);
        float wv[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            int k = k0 + lk + j;
            wv[j] = n0 + lr < n_total && k < k_total ? weight_at<W>(w, (i64)(n0 + lr) * k_total + k) : 0.f;
        }
        __syncthreads();
        xs[lk][lr] = xv.x;
        xs[lk + 1][lr] = xv.y;
        xs[lk + 2][lr] = xv.z;
        xs[lk + 3][lr] = xv.w;
#pragma unroll
        for (int j = 0; j < 4; ++j) ws[lk + j][lr] = wv[j];
        __syncthreads();
        const int depth = k_total - k0 < DEPTH ? k_total - k0 : DEPTH;
        for (int k = 0; k < depth; ++k) {
            float4 a = *(const float4*)&xs[k][ty * 4];
            float4 b = *(const float4*)&ws[k][tx * 4];
            float av[4] = {a.x, a.y, a.z, a.w}, bv[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) acc[i][j] = fmaf(av[i], bv[j], acc[i][j]);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int t = t0 + ty * 4 + i;
        if (t >= rows) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            int n = n0 + tx * 4 + j;
            if (n >= n_total) continue;
            float v = acc[i][j] + (bias ? bias[n] : 0.f);
            if (add) v += load1(out, t, n);
            store1(out, t, n, v);
        }
    }
}
#define GEMM(name, W)                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                            \
    name(View x, const void* w, const float* bias, View out, int rows, int n, int k, int add, const u64* home) { \
        gemm_body<W>(placed(x, home), w, bias, placed(out, home), rows, n, k, add);                                        \
    }
GEMM(gemm_f32, F32)
GEMM(gemm_bf16, BF16)
GEMM(gemm_f16, F16)
