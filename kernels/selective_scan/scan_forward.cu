// Both scans of a block, their sum and the gate. Macros: N states, G directions, SAVE (keep what the backward
// needs), HAS_SO (state offset), MIN_BLOCKS (per multiprocessor).
//
// A block owns CB channels of one sample in all directions: 64 threads a direction, a thread owns ST states of two
// neighbouring channels, two lanes share a channel pair. The directions walk the chunks from opposite ends; who
// comes to a chunk first leaves its y in `out`, who comes second adds its own, applies the gate and overwrites it.

constexpr int ST = (N + 7) / 8 * 4;  // states of a thread
constexpr int NP = 2 * ST;           // padded states
constexpr int CB = 64;               // channels of a block
constexpr int THREADS = 64;          // of a direction
constexpr int BC_WORDS = (T * 2 * NP + THREADS - 1) / THREADS;
constexpr int PAIRS = CB / 2 + CB / 8;  // a row of channel pairs, one pad every four: no bank conflicts

struct Inputs {  // what a thread stages of one chunk, prefetched into registers
    Pack<8> u, delta;
    float bc[BC_WORDS];
};

extern "C" __global__ void __launch_bounds__(THREADS * G, MIN_BLOCKS) scan_forward(
    const io_t* __restrict__ u, const io_t* __restrict__ delta, const float* __restrict__ bc,
    const io_t* __restrict__ z, const float* a0, const float* a1, const float* d0, const float* d1,
    const float* so0, const float* so1, const float* oo0, const float* oo1, io_t* out, io_t* total, float* ckpt,
    int batch, int length, int channels, i64 zb, i64 zl, i64 ze, float scale, int reverse_bits) {
    const int dir = threadIdx.x / THREADS, tid = threadIdx.x % THREADS;
    const int pair = tid >> 1, part = tid & 1;
    const int b = blockIdx.y, first = blockIdx.x * CB;
    const bool reverse = reverse_bits >> dir & 1;
    const bool same_way = reverse_bits == 0 || reverse_bits == 3;
    const int chunks = (length + T - 1) / T;
    const i64 row0 = ((i64)dir * batch + b) * length;

    __shared__ float4 step_s[G][T][PAIRS];  // {Δ, Δu} of two channels
    __shared__ float4 bc_s[G][T][NP / 2];   // B then C
    __shared__ float4 y_s[G][T][CB / 4];
    __shared__ float skip_s[G][CB], shift_s[G][CB];

    float h[2][ST], A[2][ST];
#if HAS_SO
    float so[2][ST];
    const float* so_ptr = dir ? so1 : so0;
#endif
    {
        const float* a_ptr = dir ? a1 : a0;
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
            for (int s = 0; s < ST; ++s) {
                const int e = first + 2 * pair + k, n = part * ST + s;
                const bool live = e < channels && n < N;
                h[k][s] = 0.0f;
                A[k][s] = live ? -ex2(LOG2E * a_ptr[(i64)e * N + n]) * LOG2E : 0.0f;
#if HAS_SO
                so[k][s] = live && so_ptr ? so_ptr[(i64)e * N + n] : 0.0f;
#endif
            }
        const float* d_ptr = dir ? d1 : d0;
        const float* oo_ptr = dir ? oo1 : oo0;
        const int e = first + tid;
        skip_s[dir][tid] = e < channels ? d_ptr[e] : 0.0f;
        shift_s[dir][tid] = e < channels && oo_ptr ? oo_ptr[e] : 0.0f;
    }

    const int slot = tid >> 3, col = (tid & 7) * 8;  // the eight elements this thread stages and finishes
    const int rest = channels - first - col;
    const int live_cols = rest < 0 ? 0 : (rest > 8 ? 8 : rest);
    auto token_of = [&](int j, int i) { return j * T + (reverse ? T - 1 - i : i); };
    auto fetch = [&](int j, Inputs& in) {
        const int token = token_of(j, slot);
        const i64 at = (row0 + token) * channels + first + col;
        const int live = token < length ? live_cols : 0;
        in.u.load(u + at, 1, live);
        in.delta.load(delta + at, 1, live);
#pragma unroll
        for (int w = 0; w < BC_WORDS; ++w) {
            const int at_s = w * THREADS + tid, i = at_s / (2 * NP), c = at_s % (2 * NP), n = c % NP;
            const int t = token_of(j, i);
            const bool ok = i < T && n < N && t < length;
            in.bc[w] = ok ? bc[(row0 + t) * (2 * N) + (c / NP) * N + n] : 0.0f;
        }
    };

    Inputs in;
    fetch(reverse ? chunks - 1 : 0, in);
    for (int it = 0; it < chunks; ++it) {
        const int j = reverse ? chunks - 1 - it : it;
        const Pack<8> u_now = in.u;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float da = in.delta.get(2 * k), db = in.delta.get(2 * k + 1);
            const int at = col / 2 + k;
            step_s[dir][slot][at + at / 4] = make_float4(da, da * in.u.get(2 * k), db, db * in.u.get(2 * k + 1));
        }
#pragma unroll
        for (int w = 0; w < BC_WORDS; ++w)
            if (w * THREADS + tid < T * 2 * NP) ((float*)bc_s[dir])[w * THREADS + tid] = in.bc[w];
        __syncthreads();

        const int token = token_of(j, slot);
        const int live = token < length ? live_cols : 0;
        const i64 out_at = ((i64)b * length + token) * channels + first + col;
        const bool both_here = G == 2 && (same_way || 2 * it == chunks - 1);
        const bool second = G == 1 || (both_here ? dir == 1 : 2 * it > chunks - 1);
        Pack<8> z_now, other;
        other.clear();
        z_now.clear();
        if (second) z_now.load(z + b * zb + (i64)token * zl + (first + col) * ze, ze, live);
        if (G == 2 && second && !both_here) other.load(out + out_at, 1, live);
        if (it + 1 < chunks) fetch(reverse ? j - 1 : j + 1, in);

#if SAVE
        float* at = ckpt + (((i64)dir * batch + b) * chunks + j) * channels * NP;
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
            for (int s = 0; s < ST; s += 4) {
                const int e = first + 2 * pair + k;
                if (e < channels)
                    *(float4*)(at + (i64)e * NP + part * ST + s) =
                        make_float4(h[k][s], h[k][s + 1], h[k][s + 2], h[k][s + 3]);
            }
#endif
#pragma unroll
        for (int i = 0; i < T; ++i) {
            const float4 step = step_s[dir][i][pair + pair / 4];
            float y0 = 0.0f, y1 = 0.0f;
#pragma unroll
            for (int s4 = 0; s4 < ST / 4; ++s4) {
                const float4 Bv = bc_s[dir][i][part * (ST / 4) + s4];
                const float4 Cv = bc_s[dir][i][NP / 4 + part * (ST / 4) + s4];
                const float B4[4] = {Bv.x, Bv.y, Bv.z, Bv.w}, C4[4] = {Cv.x, Cv.y, Cv.z, Cv.w};
#pragma unroll
                for (int s = 0; s < 4; ++s) {
                    const int n = s4 * 4 + s;
                    h[0][n] = ex2(step.x * A[0][n]) * h[0][n] + step.y * B4[s];
                    h[1][n] = ex2(step.z * A[1][n]) * h[1][n] + step.w * B4[s];
                    y0 += C4[s] * h[0][n];
                    y1 += C4[s] * h[1][n];
#if HAS_SO
                    y0 += C4[s] * so[0][n];
                    y1 += C4[s] * so[1][n];
#endif
                }
            }
            // Each lane of a pair of lanes finishes one of the two channels.
            const float mine = part ? y1 : y0, yours = part ? y0 : y1;
            ((float*)y_s[dir][i])[tid] = mine + __shfl_xor_sync(0xffffffffu, yours, 1);
        }
        __syncthreads();

        float v[8];
#pragma unroll
        for (int k = 0; k < 8; k += 4) {
            const float4 y4 = y_s[dir][slot][col / 4 + k / 4];
            v[k] = y4.x, v[k + 1] = y4.y, v[k + 2] = y4.z, v[k + 3] = y4.w;
        }
#pragma unroll
        for (int k = 0; k < 8; ++k) v[k] += skip_s[dir][col + k] * u_now.get(k) + shift_s[dir][col + k];
        Pack<8> result;
        if (!second) {
#pragma unroll
            for (int k = 0; k < 4; ++k) result.set_pair(k, v[2 * k], v[2 * k + 1]);
            result.store(out + out_at, 1, live);
        }
        if (both_here) {  // the same for the whole block
            __syncthreads();
            if (second) other.load(out + out_at, 1, live);
        }
        if (second) {
#pragma unroll
            for (int k = 0; k < 8; ++k) v[k] += other.get(k);
#if SAVE
#pragma unroll
            for (int k = 0; k < 4; ++k) result.set_pair(k, v[2 * k], v[2 * k + 1]);
            result.store(total + out_at, 1, live);
#endif
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                const float zk = z_now.get(k);
                v[k] *= scale * zk * sigmoid(zk);
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) result.set_pair(k, v[2 * k], v[2 * k + 1]);
            result.store(out + out_at, 1, live);
        }
    }
}
