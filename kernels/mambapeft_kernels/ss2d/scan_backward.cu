// The adjoint of the scans. Macros as in scan.cuh, and NEED_U, NEED_PROJ, NEED_WEIGHT, NEED_BIAS, NEED_A, NEED_FIRST,
// NEED_OFFSET, MIN_BLOCKS.
//
// Chunk by chunk from the end: the states of a chunk come from the one that the forward kept, and stay in registers while
// the adjoint runs back. What is summed over channels goes through shared memory in bfloat16: there the block's warps
// share one product, [steps and samples, channels] times [channels, δ | B | C], whose right side is dt_proj and ones.
// What a chunk leaves there is summed and written beside the next chunk: one barrier a chunk, and warps without a product
// need not wait for the others.

constexpr int B_AT = R, C_AT = R + 1;      // columns of a row
constexpr int TASKS = ROWS / 16 * PIECES;  // products of 16 rows and 8 columns

struct __align__(16) Shared {
    io_t rows[3][ROWS * PITCH];  // of the chunk before, the present and the next one, in turn
    // Where a lane has read u and dy, it leaves what is to be summed over channels for B and for C.
    io_t u[3][ROWS * TP], dy[3][ROWS * TP];
    io_t du[2][ROWS * TP], draw[2][ROWS * TP];  // draw: of Δ before softplus
    io_t turned[KT * 8 * TP];                   // dt_projᵀ
    Places<4> places;
};
static_assert(sizeof(Shared) <= SHARED, "the launch asks for too little shared memory");

struct Lane {
    int segment, segments, tile, local, channel, first_sample, t, g, lane, warp;
};

struct Arguments {
    const io_t *dy, *u, *proj;
    const float *weight, *bias, *a_logs, *d, *offset, *decay, *end;
    const io_t* ckpt;
    io_t *du, *dproj;
    float *dweight, *dbias, *da, *dfirst, *doffset;
    int batch, chunks, planes;
};

// Sums a chunk's rows over the block's channels, and writes them.
__device__ __forceinline__ void write_sums(const Arguments& p, const Shared& shared, int third, int side,
                                           const int* places, int k, int chunk, const Lane& at) {
#if NEED_PROJ
    for (int task = at.warp; task < TASKS; task += WARPS) {
        const int m = task / PIECES, n = task % PIECES;
        const u32 one = 0x3f803f80u, b = at.g == B_AT % 8 ? one : 0, c = at.g == C_AT % 8 ? one : 0;
        const u32 pick_b[2] = {b, b}, pick_c[2] = {c, c};
        const int left = (16 * m + at.lane % 16) * TP + at.lane / 16 * 8;
        const int right = (8 * n + at.lane % 8) * TP + at.lane / 8 % 2 * 8;
        float out[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        u32 x[4], w[4];
        if (n < KT) {
#pragma unroll
            for (int kk = 0; kk < WARPS; ++kk) {
                load_matrices(x, shared.draw[side] + left + 16 * kk);
                load_matrices(w, shared.turned + right + 16 * kk);  // two matrices, twice
                multiply(out, x, w, out);
            }
        }
        if (n == B_AT / 8) {  // and C_AT / 8: R is even
#pragma unroll
            for (int kk = 0; kk < WARPS; ++kk) {
                load_matrices(x, shared.u[third] + left + 16 * kk);
                multiply(out, x, pick_b, out);
                load_matrices(x, shared.dy[third] + left + 16 * kk);
                multiply(out, x, pick_c, out);
            }
        }
        const int sample = at.first_sample + at.g / 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int s = (2 * m + half) * 2 + at.g % 2;
            if ((EXACT || sample < p.batch) && (WHOLE || chunk * T + s < L)) {
                const i64 row = ((i64)at.tile * p.batch + sample) * L + places[s];
                *(u32*)(p.dproj + row * (4 * PP) + k * PP + 8 * n + 2 * at.t) = pack(out[2 * half], out[2 * half + 1]);
            }
        }
    }
#endif
}

// Adds a chunk's share of dt_proj's gradient: [16 channels of a warp, steps and samples] times [steps and samples, δ].
__device__ __forceinline__ void add_weight_gradient(float (*total)[4], const io_t* draw, const io_t* rows,
                                                    const Lane& at) {
#if NEED_WEIGHT
#pragma unroll
    for (int kk = 0; kk < ROWS / 16; ++kk) {
        u32 x[4], w[4];
        const int row = 16 * kk + at.lane % 8;
        load_turned(x, draw + (row + at.lane / 16 * 8) * TP + at.warp * 16 + at.lane / 8 % 2 * 8);
#pragma unroll
        for (int n = 0; n < KT; ++n) {
            load_turned(w, rows + (row + at.lane / 8 % 2 * 8) * PITCH + 8 * n);  // two matrices, twice
            multiply(total[n], x, w, total[n]);
        }
    }
#endif
}

__device__ __forceinline__ void write_weight_gradient(float (*total)[4], float* dweight, int k, const Lane& at) {
#if NEED_WEIGHT
    const i64 part = ((i64)blockIdx.y * at.segments + at.segment) * 4 + k;
#pragma unroll
    for (int n = 0; n < KT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int r = 8 * n + 2 * at.t + i % 2, c = at.tile * CB + at.warp * 16 + at.g + i / 2 * 8;
            if (r < R) dweight[(part * E + c) * R + r] = total[n][i];
        }
#endif
}

// The adjoint of direction k. FIRST: nothing is in du yet. du: the part of this block.
template <bool FIRST>
__device__ __forceinline__ void scan_back(const Arguments& p, io_t* du, int k, const Lane& at, Shared& shared) {
    const int from = at.segment * p.chunks, chunks = chunks_from(from, p.chunks), end = from + chunks - 1;
    const bool live = EXACT || at.first_sample + at.t < p.batch;
    const int sample = live ? at.first_sample + at.t : 0;
    __syncthreads();  // nobody uses what is shared any more
    shared.places.find(k, end, 0);
    shared.places.find(k, end - 1, 1);
    const RowCopier rows(p.proj, k, at.first_sample, p.batch);
    TileCopier tile(at.first_sample, p.batch, at.tile * CB);
    Direction dir;
    dir.load(p.weight, p.bias, p.a_logs, k, at.channel, at.t);
    float carry[2], off[2], D[2], total_a[2], total_bias[2], total_offset[2], total_weight[KT][4] = {};
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        carry[c] = entered<true>(0.0f, p.decay, p.end, dir.A[c], sample, k, at.segment, at.segments, at.channel + c);
        off[c] = HAS_OFFSET ? p.offset[k * E + at.channel + c] : 0.0f;
        D[c] = FIRST && k == 0 ? skip_of(p.d, at.channel + c) : 0.0f;
        total_a[c] = total_bias[c] = total_offset[c] = 0.0f;
    }
#if NEED_PROJ
    for (int v = threadIdx.x; v < KT * 8 * CB; v += THREADS) {
        const int c = v / (KT * 8), r = v % (KT * 8);
        shared.turned[r * TP + c] = r < R ? narrow(p.weight[(k * E + at.tile * CB + c) * R + r]) : (io_t)0;
    }
#endif
    const io_t* ckpt = p.ckpt + ((i64)sample * 4 + k) * (at.segments * p.chunks) * E + at.channel;
    u32 start_next = *(const u32*)(ckpt + (i64)end * E);
    __syncthreads();
    tile.find(shared.places.at[0], end);
    rows.start(shared.rows[0], shared.places.at[0], end);
    tile.start(shared.u[0], p.u);
    tile.start(shared.dy[0], p.dy);
    int third = 0, third_before = 0;
    TileCopier now = tile;
    Pack<8> before[TileCopier::COUNT];
    // Sums and writes what the chunk `back` has left.
    auto finish = [&](int back, int third) {
        const int side = back & 1;
        if (NEED_U) now.write<!FIRST>(du, shared.du[side], before);
        write_sums(p, shared, third, side, shared.places.at[back & 3], k, end - back, at);
        add_weight_gradient(total_weight, shared.draw[side], shared.rows[third], at);
    };
    for (int back = 0; back < chunks; ++back) {
        const int chunk = end - back, side = back & 1, next = third == 2 ? 0 : third + 1;
        const float start[2] = {low(start_next), high(start_next)};
        const TileCopier here = tile;
        wait_for_copies();  // and everyone has left the chunk before
        if (back + 1 < chunks) {
            const int* places = shared.places.at[back + 1 & 3];
            start_next = *(const u32*)(ckpt + (i64)(chunk - 1) * E);
            tile.find(places, chunk - 1);
            rows.start(shared.rows[next], places, chunk - 1);
            tile.start(shared.u[next], p.u);
            tile.start(shared.dy[next], p.dy);
            shared.places.find(k, chunk - 2, back + 2 & 3);
        }
        if (back) finish(back - 1, third_before);
        now = here;
        if (!FIRST && NEED_U) now.read(before, du);

        float delta[T][2], fade[T][2], slope[T][2], h[T][2];
#pragma unroll
        for (int j = 0; j < T / 2; ++j) {
            float raw[4];
            dir.raw(raw, shared.rows[third], j, at.lane);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int s = 2 * j + i;
                const float B = low(inputs_of(shared.rows[third], s, at.t));
                const u32 u = *cell_of(shared.u[third], s, at.t, at.local);
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const float v = raw[2 * c + i], in = c ? high(u) : low(u);
                    float e;
                    delta[s][c] = softplus(v, e);
                    slope[s][c] = (v < 0.0f ? e : 1.0f) * rcp(1.0f + e);
                    fade[s][c] = ex2(dir.A[c] * delta[s][c]);
                    h[s][c] = fade[s][c] * (s ? h[s ? s - 1 : 0][c] : start[c]) + delta[s][c] * in * B;
                }
            }
        }
#pragma unroll
        for (int s = T - 1; s >= 0; --s) {
            const u32 bc = inputs_of(shared.rows[third], s, at.t);
            u32 *u = cell_of(shared.u[third], s, at.t, at.local), *dy = cell_of(shared.dy[third], s, at.t, at.local);
            const u32 two_u = *u, two_dy = *dy;
            const float B = low(bc), C = high(bc);
            float into_u[2], draw[2], for_b[2], for_c[2];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const float in = c ? high(two_u) : low(two_u), grad = c ? high(two_dy) : low(two_dy);
                const float adjoint = C * grad + carry[c], gB = adjoint * B;
                for_c[c] = grad * (HAS_OFFSET ? h[s][c] + off[c] : h[s][c]);
                for_b[c] = adjoint * (delta[s][c] * in);
                carry[c] = fade[s][c] * adjoint;
                const float passed = carry[c] * (s ? h[s ? s - 1 : 0][c] : start[c]);
                draw[c] = (in * gB + passed * (dir.A[c] * LN2)) * slope[s][c];
                into_u[c] = delta[s][c] * gB + (FIRST ? D[c] * grad : 0.0f);
                if (NEED_A) total_a[c] += passed * delta[s][c];
                if (NEED_BIAS) total_bias[c] += draw[c];
                if (NEED_OFFSET) total_offset[c] += grad * C;
            }
            if (NEED_U) *cell_of(shared.du[side], s, at.t, at.local) = pack(into_u[0], into_u[1]);
            if (NEED_PROJ || NEED_WEIGHT) *cell_of(shared.draw[side], s, at.t, at.local) = pack(draw[0], draw[1]);
            if (NEED_PROJ) *u = pack(for_b[0], for_b[1]), *dy = pack(for_c[0], for_c[1]);
        }
        third_before = third, third = next;
    }
    __syncthreads();
    finish(chunks - 1, third_before);
    write_weight_gradient(total_weight, p.dweight, k, at);
    if (!live) return;
    const i64 cell = (((i64)sample * at.segments + at.segment) * 4 + k) * E + at.channel;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        if (NEED_A) p.da[cell + c] = total_a[c];
        if (NEED_BIAS) p.dbias[cell + c] = total_bias[c];
        if (NEED_OFFSET) p.doffset[cell + c] = total_offset[c];
        if (NEED_FIRST) p.dfirst[cell + c] = carry[c];  // of the first segment; later ones are not read
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) ss2d_backward(
    const io_t* __restrict__ dy, const io_t* __restrict__ u, const io_t* __restrict__ proj,
    const float* __restrict__ weight, const float* __restrict__ bias, const float* __restrict__ a_logs,
    const float* __restrict__ d, const float* __restrict__ offset, const float* __restrict__ decay,
    const float* __restrict__ end, const io_t* __restrict__ ckpt, io_t* du, io_t* __restrict__ dproj,
    float* __restrict__ dweight, float* __restrict__ dbias, float* __restrict__ da, float* __restrict__ dfirst,
    float* __restrict__ doffset, int batch, int chunks, int planes) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& shared = *(Shared*)memory;
    const Arguments p{dy,   u,  proj,  weight,  bias,  a_logs, d,      offset,  decay, end,    ckpt,
                      du, dproj, dweight, dbias, da,     dfirst, doffset, batch, chunks, planes};
    Lane at;
    at.segment = blockIdx.z, at.segments = gridDim.z, at.tile = blockIdx.x / planes;
    at.lane = threadIdx.x % 32, at.warp = threadIdx.x / 32, at.t = at.lane % 4, at.g = at.lane / 4;
    at.local = at.warp * 16 + at.g * 2, at.channel = at.tile * CB + at.local;
    at.first_sample = blockIdx.y * SAMPLES;
    const int plane = blockIdx.x % planes;
    io_t* mine = du + (i64)plane * batch * L * E;
    scan_back<true>(p, mine, plane, at, shared);
    // 0, 2, 1, 3: a direction that comes back over the places of the one before finds the last of them in the cache.
    for (int i = plane + planes; i < 4; i += planes) {
        const int k = planes == 1 ? i % 2 * 2 + i / 2 : i;
        scan_back<false>(p, mine, k, at, shared);
    }
}
