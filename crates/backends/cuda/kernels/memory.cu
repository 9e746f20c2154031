// Region copy, random weights, dequantisation, comparison of bits.
//
// Region copies: floor 2 bytes moved per byte copied. The table is a kernel parameter. Tiles go to blocks in turn, so a table of
// one large and many small regions loads every multiprocessor alike.
// copy_bulk, from compute capability 9.0 on: a ring of tiles in shared memory, a multiprocessor's one block, of which one
// thread has bulk copies fill and empty it: 192 KiB on their way, and a kernel of few instructions that begins and ends soon.
// copy_regions, before that: threads move vectors.
// copy_beside: the same beside replays, by two blocks a multiprocessor that lie beside a block of a chain: they take no shared
// memory, and the registers that CHAIN_REGISTERS leaves.
// random_fill: bit for bit ampoule_plan::RandomFill. dequantise: GGML blocks to bf16.

struct Piece {
    const u8* from;
    u8* to;
    i64 bytes;
};
template <int N> struct Pieces {
    int count;
    int depth;         // of copy_bulk: tiles of the ring, two at least; else vectors that a thread has on their way: MANY or 2
    i64 first[N + 1];  // tiles (of copy_bulk) or vectors before each piece; both ends have the same address modulo 16
    Piece piece[N];
};
// The piece that `at` lies in, no earlier than `low`: near it if there are few, by halves if there are many.
template <int N> __device__ __forceinline__ int piece_at(const Pieces<N>& t, i64 at, int low) {
    if (N <= 96) {
        while (low + 1 < t.count && t.first[low + 1] <= at) ++low;
    } else {
        int high = t.count;  // first[low] <= at < first[high]
        while (low + 1 < high) {
            const int middle = (low + high) / 2;
            if (t.first[middle] <= at) low = middle;
            else high = middle;
        }
    }
    return low;
}

#define BULK_TILE 16384
#define BULK_TILES 12
template <int N> __device__ __forceinline__ void bulk_body(const Pieces<N>& t) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ uint4 shared[];
    __shared__ u64 full[BULK_TILES];
    const int lane = threadIdx.x;
    // Tiles hold the whole vectors of a piece; bytes before and behind them go by themselves.
    for (int i = blockIdx.x; i < t.count; i += gridDim.x) {
        const Piece p = t.piece[i];
        i64 head = -(u64)p.from & 15;
        if (head > p.bytes) head = p.bytes;
        const i64 behind = p.bytes - ((p.bytes - head) & 15) + lane - 16;
        if (lane < head) p.to[lane] = p.from[lane];
        if (lane >= 16 && behind < p.bytes) p.to[behind] = p.from[behind];
    }
    if (lane != 0) return;
    const u32 barriers = shared_address(full), ring = (shared_address(shared) + 127) & ~127u;
    bulk_barriers(barriers, t.depth);
    const i64 tiles = t.first[t.count], step = gridDim.x;
    auto tile_of = [&](i64 tile, int& low) {
        low = piece_at(t, tile, low);
        const Piece p = t.piece[low];
        const i64 head = -(u64)p.from & 15;
        const i64 at = (tile - t.first[low]) * BULK_TILE, left = ((p.bytes - head) & ~(i64)15) - at;
        return Piece{p.from + head + at, p.to + head + at, left < BULK_TILE ? left : BULK_TILE};
    };
    i64 next = blockIdx.x;  // to be brought
    int next_low = 0, low = 0;
    auto bring = [&](int place) {
        const Piece p = tile_of(next, next_low);
        bulk_load(ring + place * BULK_TILE, p.from, (u32)p.bytes, barriers + 8 * place);
        next += step;
    };
    for (int place = 0; place < t.depth && next < tiles; ++place) bring(place);
    int place = 0, before = -1;
    u32 parity = 0;
    for (i64 tile = blockIdx.x; tile < tiles; tile += step) {
        barrier_wait(barriers + 8 * place, parity);
        const Piece p = tile_of(tile, low);
        bulk_store(p.to, ring + place * BULK_TILE, (u32)p.bytes);
        // The place before this one is filled again, so that one store is always on its way.
        if (before >= 0 && next < tiles) {
            asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
            bring(before);
        }
        before = place;
        if (++place == t.depth) place = 0, parity ^= 1;
    }
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
}

// Vectors v, v + T, ... before `end`, which are all whole, as long as DEPTH of them are left; v goes on behind them. T threads.
template <int DEPTH, int T> __device__ __forceinline__ void move_whole(const uint4* from, uint4* to, i64& v, i64 end) {
    for (; v + (DEPTH - 1) * T < end; v += DEPTH * T) {
        uint4 moved[DEPTH];
#pragma unroll
        for (int m = 0; m < DEPTH; ++m) moved[m] = from[v + m * T];
#pragma unroll
        for (int m = 0; m < DEPTH; ++m) to[v + m * T] = moved[m];
    }
}
template <int N, int T, int MANY> __device__ __forceinline__ void copy_body(const Pieces<N>& t) {
    const i64 total = t.first[t.count];
    const int size = t.depth * T;  // of a tile: neighbours move neighbouring ones
    int low = 0;
    for (i64 tile = (i64)blockIdx.x * size; tile < total; tile += (i64)gridDim.x * size) {
    i64 at = tile;
    const i64 end = at + size < total ? at + size : total;
    low = piece_at(t, at, low);
    for (int i = low; i < t.count && at < end; ++i) {
        const Piece p = t.piece[i];
        const i64 base = t.first[i];
        const i64 stop = t.first[i + 1] < end ? t.first[i + 1] : end;
        // Vector 0 of a piece begins at the 16-byte boundary at or below its start.
        const i64 skew = (i64)((u64)p.from & 15);
        i64 v = at - base + threadIdx.x;
        const i64 v_end = stop - base;
        const i64 whole = (p.bytes + skew) / 16;  // vectors before this one end inside the piece
        const uint4* from = (const uint4*)(p.from - skew);
        uint4* to = (uint4*)(p.to - skew);
        if (skew == 0 || v > 0) {
            const i64 sure = v_end < whole ? v_end : whole;
            if (t.depth == MANY) move_whole<MANY, T>(from, to, v, sure);
            else move_whole<2, T>(from, to, v, sure);
        }
        for (; v < v_end; v += T) {
            if (v < whole && (v > 0 || skew == 0)) {
                to[v] = from[v];
            } else {
                i64 b0 = v * 16 - skew, b1 = b0 + 16;
                if (b0 < 0) b0 = 0;
                if (b1 > p.bytes) b1 = p.bytes;
                for (i64 b = b0; b < b1; ++b) p.to[b] = p.from[b];
            }
        }
        at = stop;
    }
    }
}
#define BESIDE 64
extern "C" __global__ void __launch_bounds__(32) copy_bulk_8(const __grid_constant__ Pieces<8> t) { bulk_body<8>(t); }
extern "C" __global__ void __launch_bounds__(32) copy_bulk_96(const __grid_constant__ Pieces<96> t) { bulk_body<96>(t); }
extern "C" __global__ void __launch_bounds__(32) copy_bulk_960(const __grid_constant__ Pieces<960> t) { bulk_body<960>(t); }
extern "C" __global__ void __launch_bounds__(BLOCK) copy_regions_8(const __grid_constant__ Pieces<8> t) {
    copy_body<8, BLOCK, 8>(t);
}
extern "C" __global__ void __launch_bounds__(BLOCK) copy_regions_96(const __grid_constant__ Pieces<96> t) {
    copy_body<96, BLOCK, 8>(t);
}
extern "C" __global__ void __launch_bounds__(BLOCK) copy_regions_960(const __grid_constant__ Pieces<960> t) {
    copy_body<960, BLOCK, 8>(t);
}
extern "C" __global__ void __launch_bounds__(BESIDE, 16) copy_beside_8(const __grid_constant__ Pieces<8> t) {
    copy_body<8, BESIDE, 12>(t);
}
extern "C" __global__ void __launch_bounds__(BESIDE, 16) copy_beside_96(const __grid_constant__ Pieces<96> t) {
    copy_body<96, BESIDE, 12>(t);
}
extern "C" __global__ void __launch_bounds__(BESIDE, 16) copy_beside_960(const __grid_constant__ Pieces<960> t) {
    copy_body<960, BESIDE, 12>(t);
}

__device__ __forceinline__ float random_value(u64 seed, float centre, float half_width, u64 index) {
    u64 z = seed + (index + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    float u = __fsub_rn(__fmul_rn((float)(u32)(z >> 40), 1.1920928955078125e-7f), 1.f);
    return __fmaf_rn(u, half_width, centre);
}
extern "C" __global__ void __launch_bounds__(BLOCK)
random_fill(void* out, i64 elements, int dtype, u64 seed, float centre, float half_width) {
    View v = {out, 0, dtype, 1};
    for (i64 i = ((i64)blockIdx.x * BLOCK + threadIdx.x) * 4; i < elements; i += (i64)gridDim.x * BLOCK * 4) {
        float4 q;
        q.x = random_value(seed, centre, half_width, i);
        q.y = random_value(seed, centre, half_width, i + 1);
        q.z = random_value(seed, centre, half_width, i + 2);
        q.w = random_value(seed, centre, half_width, i + 3);
        store4(v, 0, i, elements, q);
    }
}
// Rows that repeat with period `period`: for checking that a row's bits do not depend on its neighbours.
extern "C" __global__ void __launch_bounds__(BLOCK) periodic_fill(View out, i64 rows, int cols, int period, u64 seed, float half_width) {
    for (i64 i = (i64)blockIdx.x * BLOCK + threadIdx.x; i < rows * cols; i += (i64)gridDim.x * BLOCK) {
        i64 r = i / cols, c = i % cols;
        store1(out, r, c, random_value(seed, 0.f, half_width, (u64)((r % period) * cols + c)));
    }
}
// Counts elements of `out` whose bits differ from those of row `row % period` of `reference`.
extern "C" __global__ void __launch_bounds__(BLOCK) count_differences(View out, View reference, i64 rows, i64 cols, int period, u32* differences) {
    u32 wrong = 0;
    for (i64 i = (i64)blockIdx.x * BLOCK + threadIdx.x; i < rows * cols; i += (i64)gridDim.x * BLOCK) {
        i64 r = i / cols, c = i % cols;
        wrong += __float_as_uint(load1(out, r, c)) != __float_as_uint(load1(reference, r % period, c));
    }
    if (wrong) atomicAdd(differences, wrong);
}

// type: 0 Q8_0, 1 Q4_0, 2 Q4_1. One warp per block of 32 elements.
extern "C" __global__ void __launch_bounds__(BLOCK) dequantise(const u8* blocks, u16* out, i64 count, int type) {
    const int lane = threadIdx.x & 31;
    for (i64 b = (i64)blockIdx.x * (BLOCK / 32) + (threadIdx.x >> 5); b < count; b += (i64)gridDim.x * (BLOCK / 32)) {
        const u8* p = blocks + b * (type == 0 ? 34 : type == 1 ? 18 : 20);
        float d = f16_to_f32((u16)(p[0] | p[1] << 8)), value;
        if (type == 0) {
            value = __fmul_rn(d, (float)(signed char)p[2 + lane]);
        } else {
            u8 byte = p[(type == 1 ? 2 : 4) + (lane & 15)];
            int q = lane < 16 ? byte & 15 : byte >> 4;
            value = type == 1 ? __fmul_rn(d, (float)(q - 8)) : __fadd_rn(__fmul_rn(d, (float)q), f16_to_f32((u16)(p[2] | p[3] << 8)));
        }
        out[b * 32 + lane] = f32_to_bf16(value);
    }
}

// Reads everything once: what reads alone can reach. `out` is written only if all words are one (they are not).
extern "C" __global__ void __launch_bounds__(BLOCK) read_all(const uint4* from, i64 vectors, u32* out) {
    u32 sum = 0;
    const i64 step = (i64)gridDim.x * BLOCK;
    i64 i = (i64)blockIdx.x * BLOCK + threadIdx.x;
    for (; i + 3 * step < vectors; i += 4 * step) {
        const uint4 a = __ldcs(from + i), b = __ldcs(from + i + step), c = __ldcs(from + i + 2 * step), d = __ldcs(from + i + 3 * step);
        sum |= (a.x & a.y & a.z & a.w) ^ (b.x & b.y & b.z & b.w) ^ (c.x & c.y & c.z & c.w) ^ (d.x & d.y & d.z & d.w);
    }
    for (; i < vectors; i += step) sum |= from[i].x;
    if (sum == 0xffffffffu) *out = sum;
}
