// The adjoint of the scans. Macros as in scan.cuh, and NEED_U, NEED_PROJ, NEED_WEIGHT, NEED_BIAS, NEED_A, NEED_FIRST,
// NEED_OFFSET, MIN_BLOCKS.
//
// Chunk by chunk from the end: the states of a chunk come from the one that the forward kept, and stay in registers while
// the adjoint runs back. What is summed over channels goes through shared memory in bfloat16: there the block's warps
// share one product, [steps and samples, channels] times [channels, δ | B | C], whose right side is dt_proj and ones.

constexpr int TP = CB + 8;                 // channels of a row in shared memory, padded
constexpr int B_AT = R, C_AT = R + 1;      // columns of a row
constexpr int TASKS = ROWS / 16 * PIECES;  // products of 16 rows and 8 columns

struct __align__(16) Shared {
    io_t rows[2][ROWS * PITCH];
    Places places;
#if NEED_PROJ || NEED_WEIGHT
    io_t sums[3][ROWS * TP];   // to be summed over channels: for δ (before dt_proj), for B, for C
    io_t turned[KT * 8 * TP];  // dt_projᵀ
#endif
};

struct Lane {
    int batch, chunks, segment, plane, tile, local, channel, sample, t, g, lane, warp, limit;
    OFFSET u, du;  // bytes from the first element
};

struct Arguments {
    const io_t *dy, *u, *proj;
    const float *weight, *bias, *a, *skip, *offset, *decay, *end;
    const io_t* ckpt;
    io_t *du, *dproj;
    float *dweight, *dbias, *da, *dfirst, *doffset;
};

// Sums a chunk's rows over the block's channels, and writes them.
__device__ __forceinline__ void write_sums(const Arguments& p, const Shared& shared, const int* places, int k, int chunk,
                                           const Lane& at) {
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
                load_matrices(x, shared.sums[0] + left + 16 * kk);
                load_matrices(w, shared.turned + right + 16 * kk);  // two matrices, twice
                multiply(out, x, w, out);
            }
        }
        if (n == B_AT / 8) {  // and C_AT / 8: R is even
#pragma unroll
            for (int kk = 0; kk < WARPS; ++kk) {
                load_matrices(x, shared.sums[1] + left + 16 * kk);
                multiply(out, x, pick_b, out);
                load_matrices(x, shared.sums[2] + left + 16 * kk);
                multiply(out, x, pick_c, out);
            }
        }
        const int sample = at.sample - at.t + at.g / 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int s = (2 * m + half) * 2 + at.g % 2;
            if ((EXACT || sample < at.batch) && (WHOLE || chunk * T + s < L)) {
                const i64 row = ((i64)at.tile * at.batch + sample) * L + places[s];
                *(u32*)(p.dproj + row * (4 * PP) + k * PP + 8 * n + 2 * at.t) = pack(out[2 * half], out[2 * half + 1]);
            }
        }
    }
#endif
}

// Adds a chunk's share of dt_proj's gradient: [16 channels of a warp, steps and samples] times [steps and samples, δ].
__device__ __forceinline__ void add_weight_gradient(float (*total)[4], const Shared& shared, const io_t* rows,
                                                    const Lane& at) {
#if NEED_WEIGHT
#pragma unroll
    for (int kk = 0; kk < ROWS / 16; ++kk) {
        u32 x[4], w[4];
        const int row = 16 * kk + at.lane % 8;
        load_turned(x, shared.sums[0] + (row + at.lane / 16 * 8) * TP + at.warp * 16 + at.lane / 8 % 2 * 8);
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
    const i64 part = ((i64)blockIdx.y * SEGMENTS + at.segment) * 4 + k;
#pragma unroll
    for (int n = 0; n < KT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int r = 8 * n + 2 * at.t + i % 2, c = at.tile * CB + at.warp * 16 + at.g + i / 2 * 8;
            if (r < R) dweight[(part * E + c) * R + r] = total[n][i];
        }
#endif
}

// The adjoint of direction k. FIRST: nothing is in du yet.
template <bool FIRST>
__device__ __forceinline__ void scan_back(const Arguments& p, int k, const Lane& at, Shared& shared) {
    const int from = at.segment * at.chunks, last = from + at.chunks - 1;
    __syncthreads();  // nobody reads what is shared any more
    shared.places.find(k, last, 0);
    shared.places.find(k, last - 1, 1);
    const Copier copier(p.proj, k, at.sample - at.t, at.batch);
    Direction dir;
    dir.load(p.weight, p.bias, p.a, k, at.channel, at.t);
    const int sample = EXACT || at.limit ? at.sample : 0;
    float carry[2], off[2], D[2], total_a[2], total_bias[2], total_offset[2], total_weight[KT][4] = {};
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        carry[c] = entered<true>(0.0f, p.decay, p.end, dir.A[c], sample, k, at.segment, at.channel + c);
        off[c] = HAS_OFFSET ? p.offset[k * E + at.channel + c] : 0.0f;
        D[c] = PLANES == 1 && FIRST ? p.skip[at.channel + c] : 0.0f;
        total_a[c] = total_bias[c] = total_offset[c] = 0.0f;
    }
#if NEED_PROJ
    for (int v = threadIdx.x; v < KT * 8 * CB; v += THREADS) {
        const int c = v / (KT * 8), r = v % (KT * 8);
        shared.turned[r * TP + c] = r < R ? narrow(p.weight[(k * E + at.tile * CB + c) * R + r]) : (io_t)0;
    }
#endif
    const io_t* ckpt = p.ckpt + ((i64)sample * 4 + k) * (SEGMENTS * at.chunks) * E + at.channel;
    int place[T], place_next[T];
    u32 u_next[T], dy_next[T], start_next;
    auto read = [&](int chunk) {
        start_next = *(const u32*)(ckpt + (i64)chunk * E);
#pragma unroll
        for (int i = 0; i < T; ++i) {
            u_next[i] = read_pair(p.u, at.u + (OFFSET)place_next[i] * (2 * E));
            dy_next[i] = read_pair(p.dy, at.u + (OFFSET)place_next[i] * (2 * E));
        }
    };
    __syncthreads();
    copier.start(shared.rows[0], shared.places.at[0], last);
    shared.places.read(0, place_next);
    read(last);
    int slot = 0;
    for (int back = 0; back < at.chunks; ++back) {
        const int chunk = last - back, this_slot = slot, next = slot == 2 ? 0 : slot + 1;
        const io_t* now = shared.rows[back & 1];
        wait_for_rows();  // and the sums of the chunk before have been read
        u32 u_now[T], dy_now[T], old[T];
        const float start[2] = {low(start_next), high(start_next)};
#pragma unroll
        for (int i = 0; i < T; ++i) {
            u_now[i] = u_next[i], dy_now[i] = dy_next[i], place[i] = place_next[i];
            old[i] = !FIRST && NEED_U ? read_pair(p.du, at.du + (OFFSET)place[i] * (2 * E)) : 0;
        }
        if (back + 1 < at.chunks) {
            copier.start(shared.rows[~back & 1], shared.places.at[next], chunk - 1);
            shared.places.read(next, place_next);
            shared.places.find(k, chunk - 2, next == 2 ? 0 : next + 1);
            read(chunk - 1);
        }
        slot = next;

        float delta[T][2], fade[T][2], slope[T][2], h[T][2];
#pragma unroll
        for (int j = 0; j < T / 2; ++j) {
            float raw[4];
            dir.raw(raw, now, j, at.lane);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int s = 2 * j + i;
                const float B = low(inputs_of(now, s, at.t));
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const float v = raw[2 * c + i], in = c ? high(u_now[s]) : low(u_now[s]);
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
            const u32 bc = inputs_of(now, s, at.t);
            const float B = low(bc), C = high(bc);
            float into_u[2], draw[2], for_b[2], for_c[2];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const float in = c ? high(u_now[s]) : low(u_now[s]), grad = c ? high(dy_now[s]) : low(dy_now[s]);
                const float adjoint = C * grad + carry[c], gB = adjoint * B;
                for_c[c] = grad * (HAS_OFFSET ? h[s][c] + off[c] : h[s][c]);
                for_b[c] = adjoint * (delta[s][c] * in);
                carry[c] = fade[s][c] * adjoint;
                const float passed = carry[c] * (s ? h[s ? s - 1 : 0][c] : start[c]);
                draw[c] = (in * gB + passed * (dir.A[c] * LN2)) * slope[s][c];
                float base = FIRST ? 0.0f : c ? high(old[s]) : low(old[s]);
                if (PLANES == 1 && FIRST) base = D[c] * grad;
                into_u[c] = delta[s][c] * gB + base;
                if (NEED_A) total_a[c] += passed * delta[s][c];
                if (NEED_BIAS) total_bias[c] += draw[c];
                if (NEED_OFFSET) total_offset[c] += grad * C;
            }
#if NEED_U
            write_pair(p.du, at.du + (OFFSET)place[s] * (2 * E), pack(into_u[0], into_u[1]), chunk * T + s, at.limit);
#endif
#if NEED_PROJ || NEED_WEIGHT
            const int cell = (s / 2 * 8 + 2 * at.t + s % 2) * TP + at.local;
            *(u32*)(shared.sums[0] + cell) = pack(draw[0], draw[1]);
            *(u32*)(shared.sums[1] + cell) = pack(for_b[0], for_b[1]);
            *(u32*)(shared.sums[2] + cell) = pack(for_c[0], for_c[1]);
#endif
        }
#if NEED_PROJ || NEED_WEIGHT
        __syncthreads();
        write_sums(p, shared, shared.places.at[this_slot], k, chunk, at);
        add_weight_gradient(total_weight, shared, now, at);
#endif
    }
    write_weight_gradient(total_weight, p.dweight, k, at);
    if (!EXACT && !at.limit) return;
    const i64 cell = (((i64)sample * SEGMENTS + at.segment) * 4 + k) * E + at.channel;
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
    const float* __restrict__ weight, const float* __restrict__ bias, const float* __restrict__ a,
    const float* __restrict__ skip, const float* __restrict__ offset, const float* __restrict__ decay,
    const float* __restrict__ end, const io_t* __restrict__ ckpt, io_t* du, io_t* __restrict__ dproj,
    float* __restrict__ dweight, float* __restrict__ dbias, float* __restrict__ da, float* __restrict__ dfirst,
    float* __restrict__ doffset, int batch, int chunks) {
    __shared__ Shared shared;
    const Arguments p{dy,  u,    proj, weight, bias,    a,     skip, offset, decay,
                      end, ckpt, du,   dproj,  dweight, dbias, da,   dfirst, doffset};
    Lane at;
    at.batch = batch, at.chunks = chunks, at.segment = blockIdx.z;
    at.lane = threadIdx.x % 32, at.warp = threadIdx.x / 32, at.t = at.lane % 4, at.g = at.lane / 4;
    at.plane = blockIdx.x % PLANES, at.tile = blockIdx.x / PLANES;
    at.local = at.warp * 16 + at.g * 2, at.channel = at.tile * CB + at.local;
    at.sample = blockIdx.y * SAMPLES + at.t;
    const bool live = EXACT || at.sample < batch;
    at.limit = live ? L : 0;
    at.u = ((OFFSET)(live ? at.sample : 0) * (L * E) + at.channel) * 2;
    at.du = at.u + (OFFSET)at.plane * batch * (L * E) * 2;
    scan_back<true>(p, at.plane, at, shared);
    for (int round = 1; round < ROUNDS; ++round) scan_back<false>(p, at.plane + PLANES * round, at, shared);
}
