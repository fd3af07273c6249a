// What each segment of a sequence makes of the state before it, h → exp(A ΣΔ) h + end: ΣΔ, and the end from zero. ADJOINT:
// the same of the adjoint behind it, coming from the other side. Macros as in scan.cuh, and ADJOINT, MIN_BLOCKS, SHARED.

struct __align__(16) Shared {
    io_t rows[2][ROWS * PITCH], map[2][ROWS * TP];
    Places<> places;
};
static_assert(sizeof(Shared) <= SHARED, "the launch asks for too little shared memory");

// map: u, or ADJOINT dy. decay, end: [B, 4, segments, E].
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) ss2d_ends(
    const io_t* __restrict__ map, const io_t* __restrict__ proj, const float* __restrict__ weight,
    const float* __restrict__ bias, const float* __restrict__ a_logs, float* __restrict__ decay, float* __restrict__ end,
    int batch, int chunks) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& shared = *(Shared*)memory;
    const int lane = threadIdx.x % 32, t = lane % 4, local = threadIdx.x / 32 * 16 + lane / 4 * 2;
    const int k = blockIdx.x % 4, first_channel = blockIdx.x / 4 * CB, channel = first_channel + local;
    const int first_sample = blockIdx.y * SAMPLES;
    // Nothing comes after the last segment; ADJOINT after the first.
    const int segment = blockIdx.z + ADJOINT, segments = gridDim.z + 1;
    const int count = chunks_from(segment * chunks, chunks);
    const int from = segment * chunks + (ADJOINT ? count - 1 : 0), ahead = ADJOINT ? -1 : 1;
    shared.places.find(k, from, 0);
    shared.places.find(k, from + ahead, 1);
    const RowCopier rows(proj, k, first_sample, batch);
    TileCopier tile(first_sample, batch, first_channel);
    Direction dir;
    dir.load(weight, bias, a_logs, k, channel, t);
    float h[2] = {}, total[2] = {};
    __syncthreads();
    tile.find(shared.places.at[0], from);
    rows.start(shared.rows[0], shared.places.at[0], from);
    tile.start(shared.map[0], map);
    for (int c = 0; c < count; ++c) {
        const int chunk = from + c * ahead, side = c & 1, other = side ^ 1;
        wait_for_copies();
        if (c + 1 < count) {
            tile.find(shared.places.at[other], chunk + ahead);
            rows.start(shared.rows[other], shared.places.at[other], chunk + ahead);
            tile.start(shared.map[other], map);
            shared.places.find(k, chunk + 2 * ahead, side);
        }
#pragma unroll
        for (int jj = 0; jj < T / 2; ++jj) {
            const int j = ADJOINT ? T / 2 - 1 - jj : jj;
            float raw[4];
            dir.raw(raw, shared.rows[side], j, lane);
#pragma unroll
            for (int ii = 0; ii < 2; ++ii) {
                const int i = ADJOINT ? 1 - ii : ii, s = 2 * j + i;
                const u32 bc = inputs_of(shared.rows[side], s, t), pair = *cell_of(shared.map[side], s, t, local);
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    float e;
                    const float delta = softplus(raw[2 * n + i], e), in = n ? high(pair) : low(pair);
                    const float fade = ex2(dir.A[n] * delta);
                    h[n] = ADJOINT ? fade * (h[n] + high(bc) * in) : fade * h[n] + delta * in * low(bc);
                    total[n] += delta;  // also beyond the end of the sequence, where it scales a zero
                }
            }
        }
    }
    if (!EXACT && first_sample + t >= batch) return;
    const i64 cell = (((i64)(first_sample + t) * 4 + k) * segments + segment) * E + channel;
#pragma unroll
    for (int n = 0; n < 2; ++n) decay[cell + n] = total[n], end[cell + n] = h[n];
}
