// The scans of one u. Macros as in scan.cuh, and SAVE (keep the state that enters each chunk), MIN_BLOCKS.
//
// A block reads its directions one after another. Later ones add to what earlier ones left in `y`: the same lane wrote
// it. With all four in one block the first adds skip · u too, and y is complete.

struct Lane {
    int batch, chunks, segment, plane, channel, sample, t, lane, limit;
    OFFSET u, y;  // bytes from the first element
};

// Scans direction k. FIRST: nothing is in y yet.
template <bool FIRST>
__device__ __forceinline__ void scan(
    const io_t* u, const io_t* proj, const float* weight, const float* bias, const float* a, const float* skip,
    const float* first, const float* offset, const float* decay, const float* end, io_t* y, io_t* ckpt, int k,
    const Lane& at, io_t (*rows)[ROWS * PITCH], Places& places) {
    const int from = at.segment * at.chunks;
    __syncthreads();  // nobody reads what is shared any more
    places.find(k, from, 0);
    places.find(k, from + 1, 1);
    const Copier copier(proj, k, at.sample - at.t, at.batch);
    Direction dir;
    dir.load(weight, bias, a, k, at.channel, at.t);
    float h[2], off[2], D[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        const int row = k * E + at.channel + c;
        h[c] = HAS_FIRST ? first[row] : 0.0f;
        h[c] = entered<false>(h[c], decay, end, dir.A[c], at.limit ? at.sample : 0, k, at.segment, at.channel + c);
        off[c] = HAS_OFFSET ? offset[row] : 0.0f;
        D[c] = PLANES == 1 && FIRST ? skip[at.channel + c] : 0.0f;
    }
    int place[T], place_next[T];
    u32 u_next[T], old[T];
    auto read = [&]() {
#pragma unroll
        for (int i = 0; i < T; ++i) {
            u_next[i] = read_pair(u, at.u + (OFFSET)place_next[i] * (2 * E));
            if (!FIRST) old[i] = read_pair(y, at.y + (OFFSET)place_next[i] * (2 * E));
        }
    };
    __syncthreads();
    copier.start(rows[0], places.at[0], from);
    places.read(0, place_next);
    read();
    int slot = 0;
    for (int c = 0; c < at.chunks; ++c) {
        const int chunk = from + c, next = slot == 2 ? 0 : slot + 1;
        const io_t* now = rows[c & 1];
        wait_for_rows();
        u32 u_now[T], before[T];
#pragma unroll
        for (int i = 0; i < T; ++i) u_now[i] = u_next[i], before[i] = FIRST ? 0 : old[i], place[i] = place_next[i];
        if (c + 1 < at.chunks) {
            copier.start(rows[~c & 1], places.at[next], chunk + 1);
            places.read(next, place_next);
            places.find(k, chunk + 2, next == 2 ? 0 : next + 1);
            read();
        }
        slot = next;
#if SAVE
        if (EXACT || at.limit)
            *(u32*)(ckpt + (((i64)at.sample * 4 + k) * (SEGMENTS * at.chunks) + chunk) * E + at.channel) = pack(h[0], h[1]);
#endif
#pragma unroll
        for (int j = 0; j < T / 2; ++j) {
            float raw[4];
            dir.raw(raw, now, j, at.lane);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int s = 2 * j + i;
                const u32 bc = inputs_of(now, s, at.t);
                float out[2];
#pragma unroll
                for (int c2 = 0; c2 < 2; ++c2) {
                    float e;
                    const float delta = softplus(raw[2 * c2 + i], e), in = c2 ? high(u_now[s]) : low(u_now[s]);
                    h[c2] = ex2(dir.A[c2] * delta) * h[c2] + delta * in * low(bc);
                    float base = FIRST ? 0.0f : c2 ? high(before[s]) : low(before[s]);
                    if (PLANES == 1 && FIRST) base = D[c2] * in;
                    out[c2] = (HAS_OFFSET ? h[c2] + off[c2] : h[c2]) * high(bc) + base;
                }
                write_pair(y, at.y + (OFFSET)place[s] * (2 * E), pack(out[0], out[1]), chunk * T + s, at.limit);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) ss2d_forward(
    const io_t* __restrict__ u, const io_t* __restrict__ proj, const float* __restrict__ weight,
    const float* __restrict__ bias, const float* __restrict__ a, const float* __restrict__ skip,
    const float* __restrict__ first, const float* __restrict__ offset, const float* __restrict__ decay,
    const float* __restrict__ end, io_t* y, io_t* __restrict__ ckpt, int batch, int chunks) {
    __shared__ __align__(16) io_t rows[2][ROWS * PITCH];
    __shared__ __align__(16) Places places;
    Lane at;
    at.batch = batch, at.chunks = chunks, at.segment = blockIdx.z;
    at.lane = threadIdx.x % 32, at.t = at.lane % 4;
    at.plane = blockIdx.x % PLANES;
    at.channel = blockIdx.x / PLANES * CB + threadIdx.x / 32 * 16 + at.lane / 4 * 2;
    at.sample = blockIdx.y * SAMPLES + at.t;
    const bool live = EXACT || at.sample < batch;
    at.limit = live ? L : 0;
    at.u = ((OFFSET)(live ? at.sample : 0) * (L * E) + at.channel) * 2;
    at.y = at.u + (OFFSET)at.plane * batch * (L * E) * 2;
#define SCAN(FIRST, K) scan<FIRST>(u, proj, weight, bias, a, skip, first, offset, decay, end, y, ckpt, K, at, rows, places)
    SCAN(true, at.plane);
    for (int round = 1; round < ROUNDS; ++round) SCAN(false, at.plane + PLANES * round);
#undef SCAN
}
