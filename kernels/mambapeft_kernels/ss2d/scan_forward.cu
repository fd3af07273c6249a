// The scans of one u. Macros as in scan.cuh, and SAVE (keep the state that enters each chunk), MIN_BLOCKS, SHARED.
//
// `y` has `planes` parts to be added up. A block scans the 4 / planes directions of one part one after another, and later
// ones add to what earlier ones left there. Direction 0 adds Σ D · u too.

struct __align__(16) Shared {
    io_t rows[2][ROWS * PITCH], u[2][ROWS * TP], y[2][ROWS * TP];
    Places<> places;
};
static_assert(sizeof(Shared) <= SHARED, "the launch asks for too little shared memory");

struct Arguments {
    const io_t *u, *proj;
    const float *weight, *bias, *a_logs, *d, *first, *offset, *decay, *end;
    io_t *y, *ckpt;
    int batch, chunks, planes;
};

// Scans direction k. FIRST: nothing is in y yet. y: the part of this block.
template <bool FIRST>
__device__ __forceinline__ void scan(const Arguments& p, io_t* y, int k, Shared& shared) {
    const int lane = threadIdx.x % 32, t = lane % 4, local = threadIdx.x / 32 * 16 + lane / 4 * 2;
    const int first_channel = blockIdx.x / p.planes * CB, channel = first_channel + local;
    const int first_sample = blockIdx.y * SAMPLES;
    const bool live = EXACT || first_sample + t < p.batch;
    const int sample = live ? first_sample + t : 0;
    const int segment = blockIdx.z, segments = gridDim.z, from = segment * p.chunks;
    const int chunks = chunks_from(from, p.chunks);
    __syncthreads();  // nobody uses what is shared any more
    shared.places.find(k, from, 0);
    shared.places.find(k, from + 1, 1);
    const RowCopier rows(p.proj, k, first_sample, p.batch);
    TileCopier tile(first_sample, p.batch, first_channel);
    Direction dir;
    dir.load(p.weight, p.bias, p.a_logs, k, channel, t);
    float h[2], off[2], D[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        const int row = k * E + channel + c;
        h[c] = HAS_FIRST ? p.first[row] : 0.0f;
        h[c] = entered<false>(h[c], p.decay, p.end, dir.A[c], sample, k, segment, segments, channel + c);
        off[c] = HAS_OFFSET ? p.offset[row] : 0.0f;
        D[c] = FIRST && k == 0 ? skip_of(p.d, channel + c) : 0.0f;
    }
    Pack<8> before[TileCopier::COUNT];
    __syncthreads();
    tile.find(shared.places.at[0], from);
    TileCopier now = tile, last = tile;  // of the chunks that are computed and written
    rows.start(shared.rows[0], shared.places.at[0], from);
    tile.start(shared.u[0], p.u);
    for (int c = 0; c < chunks; ++c) {
        const int chunk = from + c, side = c & 1, other = side ^ 1;
        wait_for_copies();
        if (c + 1 < chunks) {
            tile.find(shared.places.at[other], chunk + 1);
            rows.start(shared.rows[other], shared.places.at[other], chunk + 1);
            tile.start(shared.u[other], p.u);
            shared.places.find(k, chunk + 2, side);
        }
        if (c) last.write<!FIRST>(y, shared.y[other], before);
        if (!FIRST) now.read(before, y);
#if SAVE
        if (live)
            *(u32*)(p.ckpt + (((i64)sample * 4 + k) * (segments * p.chunks) + chunk) * E + channel) = pack(h[0], h[1]);
#endif
#pragma unroll
        for (int j = 0; j < T / 2; ++j) {
            float raw[4];
            dir.raw(raw, shared.rows[side], j, lane);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int s = 2 * j + i;
                const u32 bc = inputs_of(shared.rows[side], s, t), u = *cell_of(shared.u[side], s, t, local);
                float out[2];
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    float e;
                    const float delta = softplus(raw[2 * n + i], e), in = n ? high(u) : low(u);
                    h[n] = ex2(dir.A[n] * delta) * h[n] + delta * in * low(bc);
                    out[n] = (HAS_OFFSET ? h[n] + off[n] : h[n]) * high(bc) + (FIRST ? D[n] * in : 0.0f);
                }
                *cell_of(shared.y[side], s, t, local) = pack(out[0], out[1]);
            }
        }
        last = now, now = tile;
    }
    __syncthreads();
    last.write<!FIRST>(y, shared.y[chunks - 1 & 1], before);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) ss2d_forward(
    const io_t* __restrict__ u, const io_t* __restrict__ proj, const float* __restrict__ weight,
    const float* __restrict__ bias, const float* __restrict__ a_logs, const float* __restrict__ d,
    const float* __restrict__ first, const float* __restrict__ offset, const float* __restrict__ decay,
    const float* __restrict__ end, io_t* y, io_t* __restrict__ ckpt, int batch, int chunks, int planes) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& shared = *(Shared*)memory;
    const Arguments p{u, proj, weight, bias, a_logs, d, first, offset, decay, end, y, ckpt, batch, chunks, planes};
    const int plane = blockIdx.x % planes;
    io_t* mine = y + (i64)plane * batch * L * E;
    scan<true>(p, mine, plane, shared);
    // 0, 2, 1, 3: a direction that comes back over the places of the one before finds the last of them in the cache.
    for (int i = plane + planes; i < 4; i += planes) {
        const int k = planes == 1 ? i % 2 * 2 + i / 2 : i;
        scan<false>(p, mine, k, shared);
    }
}
