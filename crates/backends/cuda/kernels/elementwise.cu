// Ops that touch each element once. T token rows; V vocabulary; floor of each: its bytes over memory bandwidth.
//
// embed        reads T x H of the table, writes T x H
// rms_norm     reads and writes T x G*N, 4 FLOP an element
// gated_norm   reads two, writes one of T x G*N, 8 FLOP an element
// gate/swiglu  read two, write one of T x N
// rope         updates T x heads*head_dim
// kv_append    reads and writes 2 x T x W
// last_row, copy, fill, observe, begin_reply, advance: bytes only

extern "C" __global__ void __launch_bounds__(BLOCK) embed(View table, Words tokens, View out, int vocabulary, int width, const u64* home) {
    tokens = placed(tokens, home);
    out = placed(out, home);
    pdl_wait();
    pdl_launch();
    i64 t = blockIdx.x;
    int token = ((const int*)tokens.p)[t * tokens.ld];
    bool known = token >= 0 && token < vocabulary;
    for (int c = (blockIdx.y * BLOCK + threadIdx.x) * 4; c < width; c += gridDim.y * BLOCK * 4)
        store4(out, t, c, width, known ? load4(table, token, c, width) : make_float4(0.f, 0.f, 0.f, 0.f));
}

__device__ __forceinline__ float4 scale4(float4 q, float s, const float* weight, int c, int n, int centered) {
    float base = centered ? 1.f : 0.f;
    float4 w = make_float4(0.f, 0.f, 0.f, 0.f);
    if (c < n) w.x = weight[c];
    if (c + 1 < n) w.y = weight[c + 1];
    if (c + 2 < n) w.z = weight[c + 2];
    if (c + 3 < n) w.w = weight[c + 3];
    return make_float4(q.x * s * (w.x + base), q.y * s * (w.y + base), q.z * s * (w.z + base), q.w * s * (w.w + base));
}

// One block per (row, group): N > WARP_ROWS.
extern "C" __global__ void __launch_bounds__(BLOCK)
rms_norm_block(View x, const float* weight, View out, int n, float eps, int centered, const u64* home) {
    x = placed(x, home);
    out = placed(out, home);
    __shared__ float part[8];
    pdl_wait();
    pdl_launch();
    i64 t = blockIdx.x, first = (i64)blockIdx.y * n;
    const int HELD = 4;
    if (n > HELD * BLOCK * 4 || !x.vec || (first & 3) || ((u64)weight & 15)) {
        float s = rms_scale(block_squares(x, t, first, n, part), n, eps);
        for (int c = threadIdx.x * 4; c < n; c += BLOCK * 4)
            store4(out, t, first + c, first + n, scale4(load4(x, t, first + c, first + n), s, weight, c, n, centered));
        return;
    }
    // All of the row at once, in registers; the sums are those of block_squares, in its order.
    uint4 raw[HELD];
    float4 w[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        const int c = (i * BLOCK + threadIdx.x) * 4;
        raw[i] = c + 4 <= n ? raw4(x, t, first + c) : make_uint4(0, 0, 0, 0);
        w[i] = c + 4 <= n ? *(const float4*)(weight + c) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
    float4 q[HELD];
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        const int c = (i * BLOCK + threadIdx.x) * 4;
        q[i] = c + 4 <= n ? cooked4(raw[i], x.dtype) : c < n ? load4(x, t, first + c, first + n) : make_float4(0.f, 0.f, 0.f, 0.f);
        if (c < n) sum = add_squares(sum, q[i]);
    }
    sum = warp_sum(sum);
    if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = sum;
    __syncthreads();
    sum = 0.f;
#pragma unroll
    for (int i = 0; i < BLOCK / 32; ++i) sum += part[i];
    const float s = rms_scale(sum, n, eps), base = centered ? 1.f : 0.f;
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        const int c = (i * BLOCK + threadIdx.x) * 4;
        if (c + 4 <= n)
            store4(out, t, first + c, first + n, make_float4(q[i].x * s * (w[i].x + base), q[i].y * s * (w[i].y + base),
                                                             q[i].z * s * (w[i].z + base), q[i].w * s * (w[i].w + base)));
        else if (c < n)
            store4(out, t, first + c, first + n, scale4(q[i], s, weight, c, n, centered));
    }
}

// One warp per (row, group): N <= WARP_ROWS.
extern "C" __global__ void __launch_bounds__(BLOCK)
rms_norm_warp(View x, const float* weight, View out, int n, int groups, i64 total, float eps, int centered, const u64* home) {
    x = placed(x, home);
    out = placed(out, home);
    pdl_wait();
    pdl_launch();
    i64 g = (i64)blockIdx.x * (BLOCK / 32) + (threadIdx.x >> 5);
    if (g >= total) return;
    i64 t = g / groups, first = (g % groups) * n;
    float s = rms_scale(warp_squares(x, t, first, n), n, eps);
    __syncwarp();
    for (int c = (threadIdx.x & 31) * 4; c < n; c += 128)
        store4(out, t, first + c, first + n, scale4(load4(x, t, first + c, first + n), s, weight, c, n, centered));
}

// One block per (row, group).
extern "C" __global__ void __launch_bounds__(BLOCK)
gated_rms_norm_block(View x, View gate, const float* weight, View out, int n, float eps, const u64* home) {
    x = placed(x, home);
    gate = placed(gate, home);
    out = placed(out, home);
    __shared__ float part[8];
    pdl_wait();
    pdl_launch();
    i64 t = blockIdx.x, first = (i64)blockIdx.y * n;
    float s = rms_scale(block_squares(x, t, first, n, part), n, eps);
    for (int c = threadIdx.x * 4; c < n; c += BLOCK * 4) {
        float4 q = scale4(load4(x, t, first + c, first + n), s, weight, c, n, 0);
        float4 g = load4(gate, t, first + c, first + n);
        store4(out, t, first + c, first + n, make_float4(q.x * silu(g.x), q.y * silu(g.y), q.z * silu(g.z), q.w * silu(g.w)));
    }
}

// One warp per (row, group): N <= WARP_ROWS.
extern "C" __global__ void __launch_bounds__(BLOCK)
gated_rms_norm_warp(View x, View gate, const float* weight, View out, int n, int groups, i64 total, float eps, const u64* home) {
    x = placed(x, home);
    gate = placed(gate, home);
    out = placed(out, home);
    pdl_wait();
    pdl_launch();
    i64 g = (i64)blockIdx.x * (BLOCK / 32) + (threadIdx.x >> 5);
    if (g >= total) return;
    i64 t = g / groups, first = (g % groups) * n;
    float s = rms_scale(warp_squares(x, t, first, n), n, eps);
    __syncwarp();
    for (int c = (threadIdx.x & 31) * 4; c < n; c += 128) {
        float4 q = scale4(load4(x, t, first + c, first + n), s, weight, c, n, 0);
        float4 v = load4(gate, t, first + c, first + n);
        store4(out, t, first + c, first + n, make_float4(q.x * silu(v.x), q.y * silu(v.y), q.z * silu(v.z), q.w * silu(v.w)));
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK) sigmoid_gate(View x, View gate, View out, int n, const u64* home) {
    x = placed(x, home);
    gate = placed(gate, home);
    out = placed(out, home);
    pdl_wait();
    pdl_launch();
    i64 t = blockIdx.x;
    for (int c = (blockIdx.y * BLOCK + threadIdx.x) * 4; c < n; c += gridDim.y * BLOCK * 4) {
        float4 q = load4(x, t, c, n), g = load4(gate, t, c, n);
        store4(out, t, c, n, make_float4(q.x * sigmoid(g.x), q.y * sigmoid(g.y), q.z * sigmoid(g.z), q.w * sigmoid(g.w)));
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK) swiglu(View gate, View up, View out, int n, const u64* home) {
    gate = placed(gate, home);
    up = placed(up, home);
    out = placed(out, home);
    pdl_wait();
    pdl_launch();
    i64 t = blockIdx.x;
    for (int c = (blockIdx.y * BLOCK + threadIdx.x) * 4; c < n; c += gridDim.y * BLOCK * 4) {
        float4 g = load4(gate, t, c, n), u = load4(up, t, c, n);
        store4(out, t, c, n, make_float4(silu(g.x) * u.x, silu(g.y) * u.y, silu(g.z) * u.z, silu(g.w) * u.w));
    }
}

// (a, b) turned by position * frequency. Each operation is rounded alone, so that both users give the same bits.
__device__ __forceinline__ void turn(float& a, float& b, float position, float frequency) {
    float s, c;
    sincosf(__fmul_rn(position, frequency), &s, &c);
    const float p = a, q = b;
    a = __fsub_rn(__fmul_rn(p, c), __fmul_rn(q, s));
    b = __fadd_rn(__fmul_rn(q, c), __fmul_rn(p, s));
}

// One thread per pair; style 0: halves, 1: interleaved.
extern "C" __global__ void __launch_bounds__(BLOCK)
rope(View x, const u32* cursor, const float* frequencies, int heads, int head_dim, int pairs, int style, const u64* home) {
    x = placed(x, home);
    cursor = placed(cursor, home);
    pdl_wait();
    pdl_launch();
    i64 t = blockIdx.x;
    float position = (float)(*cursor + (u32)t);
    for (int i = blockIdx.y * BLOCK + threadIdx.x; i < heads * pairs; i += gridDim.y * BLOCK) {
        int f = i % pairs;
        i64 base = (i64)(i / pairs) * head_dim;
        i64 a = style == 0 ? base + f : base + 2 * f;
        i64 b = style == 0 ? a + pairs : a + 1;
        float p = load1(x, t, a), q = load1(x, t, b);
        turn(p, q, position, frequencies[f]);
        store1(x, t, a, p);
        store1(x, t, b, q);
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
kv_append(View key, View value, const u32* cursor, const u32* count, View key_cache, View value_cache, int rows, int width, i64 rows_of_cache, const u64* home) {
    key = placed(key, home);
    value = placed(value, home);
    cursor = placed(cursor, home);
    count = placed(count, home);
    key_cache = placed(key_cache, home);
    value_cache = placed(value_cache, home);
    pdl_wait();
    pdl_launch();
    u32 t = blockIdx.x;
    if (t >= valid_rows(count, rows)) return;
    i64 at = (i64)*cursor + t;
    if (at >= rows_of_cache) return;
    for (int c = (blockIdx.y * BLOCK + threadIdx.x) * 4; c < width; c += gridDim.y * BLOCK * 4) {
        store4(key_cache, at, c, width, load4(key, t, c, width));
        store4(value_cache, at, c, width, load4(value, t, c, width));
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK) last_row(View x, const u32* count, View out, int rows, int n, const u64* home) {
    x = placed(x, home);
    count = placed(count, home);
    out = placed(out, home);
    pdl_wait();
    pdl_launch();
    u32 valid = valid_rows(count, rows);
    i64 t = valid ? valid - 1 : 0;
    for (int c = (blockIdx.x * BLOCK + threadIdx.x) * 4; c < n; c += gridDim.x * BLOCK * 4)
        store4(out, 0, c, n, load4(x, t, c, n));
}

extern "C" __global__ void __launch_bounds__(BLOCK) observe(Words tokens, const u32* count, u32* counts, int rows, int vocabulary, const u64* home) {
    tokens = placed(tokens, home);
    count = placed(count, home);
    counts = placed(counts, home);
    pdl_wait();
    pdl_launch();
    u32 t = blockIdx.x * BLOCK + threadIdx.x;
    if (t >= valid_rows(count, rows)) return;
    int token = ((const int*)tokens.p)[t * tokens.ld];
    if (token >= 0 && token < vocabulary) atomicOr(counts + token, 0x80000000u);
}

extern "C" __global__ void __launch_bounds__(BLOCK) begin_reply(u32* counts, int vocabulary, const u64* home) {
    counts = placed(counts, home);
    pdl_wait();
    pdl_launch();
    for (int i = blockIdx.x * BLOCK + threadIdx.x; i < vocabulary; i += gridDim.x * BLOCK) {
        u32 c = counts[i];
        if (c & 0x7fffffffu) counts[i] = 0x80000000u;
    }
}

extern "C" __global__ void advance(u32* cursor, const u32* count, const u64* home) {
    cursor = placed(cursor, home);
    count = placed(count, home);
    pdl_wait();
    pdl_launch();
    *cursor += count ? *count : 1u;
}

extern "C" __global__ void __launch_bounds__(BLOCK) fill(Words out, i64 rows, i64 cols, u32 bits, const u64* home) {
    out = placed(out, home);
    pdl_wait();
    pdl_launch();
    i64 total = rows * cols;
    for (i64 i = (i64)blockIdx.x * BLOCK + threadIdx.x; i < total; i += (i64)gridDim.x * BLOCK)
        ((u32*)out.p)[i / cols * out.ld + i % cols] = bits;
}

// Rows of `bytes` bytes; strides in bytes. `unit` divides pointers, strides and bytes: 16, 4, 2 or 1.
extern "C" __global__ void __launch_bounds__(BLOCK)
copy_rows(const u8* source, u8* out, i64 rows, i64 bytes, i64 source_stride, i64 out_stride, int unit, const u64* home) {
    source = placed(source, home);
    out = placed(out, home);
    pdl_wait();
    pdl_launch();
    i64 per_row = bytes / unit, total = rows * per_row;
    for (i64 i = (i64)blockIdx.x * BLOCK + threadIdx.x; i < total; i += (i64)gridDim.x * BLOCK) {
        i64 r = i / per_row, c = i % per_row * unit;
        const u8* from = source + r * source_stride + c;
        u8* to = out + r * out_stride + c;
        if (unit == 16) *(uint4*)to = *(const uint4*)from;
        else if (unit == 4) *(u32*)to = *(const u32*)from;
        else if (unit == 2) *(u16*)to = *(const u16*)from;
        else *to = *from;
    }
}

// Adds a bias row to every row.
extern "C" __global__ void __launch_bounds__(BLOCK) add_bias(View out, const float* bias, int n, const u64* home) {
    out = placed(out, home);
    pdl_wait();
    pdl_launch();
    i64 t = blockIdx.x;
    for (int c = blockIdx.y * BLOCK + threadIdx.x; c < n; c += gridDim.y * BLOCK)
        store1(out, t, c, load1(out, t, c) + bias[c]);
}

// Per-head norm of queries and keys, RoPE, append: one launch of decode and prefill, bit for bit the ops it stands for.
// One warp per head of a row: query heads, then key heads, then value heads (copy only).
struct HeadNorm {
    View x;
    View out;
    const float* weight;  // null: no norm, x is rotated in place of out
    int heads;
    int centered;
    float eps;
    int pad;
};
extern "C" __global__ void __launch_bounds__(BLOCK)
norm_rope_append(HeadNorm query, HeadNorm key, View value, const u32* cursor, const u32* count, const float* frequencies,
                 View key_cache, View value_cache, int rows, int head_dim, int pairs, int style, i64 rows_of_cache, const u64* home) {
    value = placed(value, home);
    cursor = placed(cursor, home);
    count = placed(count, home);
    key_cache = placed(key_cache, home);
    value_cache = placed(value_cache, home);
    __shared__ float scratch[BLOCK / 32][512];
    pdl_wait();
    pdl_launch();
    int lane = threadIdx.x & 31;
    int per_row = query.heads + 2 * key.heads;
    i64 unit = (i64)blockIdx.x * (BLOCK / 32) + (threadIdx.x >> 5);
    i64 t = unit / per_row;
    if (t >= rows) return;
    int h = (int)(unit % per_row);
    u32 start = *cursor;
    bool append = (u32)t < valid_rows(count, rows) && (i64)start + t < rows_of_cache;
    if (h >= query.heads + key.heads) {
        i64 first = (i64)(h - query.heads - key.heads) * head_dim;
        i64 width = first + head_dim;
        if (append)
            for (int c = lane * 4; c < head_dim; c += 128)
                store4(value_cache, (i64)start + t, first + c, width, load4(value, t, first + c, width));
        return;
    }
    bool is_key = h >= query.heads;
    HeadNorm p = is_key ? key : query;
    p.x = placed(p.x, home);
    p.out = placed(p.out, home);
    i64 first = (i64)(is_key ? h - query.heads : h) * head_dim;
    i64 end = first + head_dim;
    float* row = scratch[threadIdx.x >> 5];
    float s = p.weight ? rms_scale(warp_squares(p.x, t, first, head_dim), head_dim, p.eps) : 1.f;
    for (int c = lane * 4; c < head_dim; c += 128) {
        float4 q = load4(p.x, t, first + c, end);
        if (p.weight) q = scale4(q, s, p.weight, c, head_dim, p.centered);
        row[c] = rounded(q.x, p.out.dtype);
        if (c + 1 < head_dim) row[c + 1] = rounded(q.y, p.out.dtype);
        if (c + 2 < head_dim) row[c + 2] = rounded(q.z, p.out.dtype);
        if (c + 3 < head_dim) row[c + 3] = rounded(q.w, p.out.dtype);
    }
    __syncwarp();
    float position = (float)(start + (u32)t);
    for (int f = lane; f < pairs; f += 32) {
        int a = style == 0 ? f : 2 * f, b = style == 0 ? f + pairs : 2 * f + 1;
        turn(row[a], row[b], position, frequencies[f]);
    }
    __syncwarp();
    for (int c = lane; c < head_dim; c += 32) {
        float v = rounded(row[c], p.out.dtype);
        store1(p.out, t, first + c, v);
        if (is_key && append) store1(key_cache, (i64)start + t, first + c, v);
    }
}
