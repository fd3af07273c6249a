// Both scans of a block, their sum and the gate. Macros: CHUNK, N states, E channels, G directions, P lanes that share a
// channel pair (2 or 4), SAVE (keep what the backward needs), HAS_SO (state offset), MIN_BLOCKS (per multiprocessor);
// strides of a token and of a channel in z (ZL, ZE); INDEX, the type that counts every tensor's elements.
//
// A block owns CB channels of one sample in all directions; a thread owns ST states of two neighbouring channels. The
// directions walk the chunks from opposite ends; who comes to a chunk first leaves its y in `out`, who comes second
// adds its own, applies the gate and overwrites it.

constexpr int T = CHUNK;  // tokens of a chunk, see checkpoints.py
constexpr int ST = (N + 4 * P - 1) / (4 * P) * 4;  // states of a thread
constexpr int NB = P * ST;                         // states as lanes hold them
constexpr int NP = (N + 7) / 8 * 8;                // states as checkpoints hold them
constexpr int CB = 64;                             // channels of a block
constexpr int THREADS = CB / 2 * P;                // of a direction
constexpr int EPT = T * CB / THREADS;              // elements a thread stages and finishes: one row, EPT columns
constexpr int BC_WORDS = (T * 2 * N + THREADS - 1) / THREADS;
constexpr int PAIRS = CB / 2 + CB / 8;  // a row of channel pairs, one pad every four: fewer bank conflicts
constexpr bool WHOLE = E % CB == 0;     // every block has all of its channels
static_assert((T & (T - 1)) == 0, "steps are counted backwards by flipping bits");

struct Inputs {  // what a thread stages of one chunk, prefetched into registers
    Pack<EPT> u, delta;
    float bc[BC_WORDS];
};

struct __align__(16) Shared {  // of a direction
    float4 step[T][PAIRS];      // {Δ, Δu} of two channels
    float4 bc[T][2][NB / 4];    // B and C
    float4 y[T][CB / 4];
    float4 skip[CB / 4], shift[CB / 4];
};

extern "C" __global__ void __launch_bounds__(THREADS * G, MIN_BLOCKS) scan_forward(
    const io_t* __restrict__ u, const io_t* __restrict__ delta, const float* __restrict__ bc,
    const io_t* __restrict__ z, const float* a0, const float* a1, const float* d0, const float* d1,
    const float* so0, const float* so1, const float* oo0, const float* oo1, io_t* out, io_t* total, io_t* ckpt,
    int batch, int length, INDEX zb, float scale, int reverse_bits) {
    const int dir = threadIdx.x / THREADS, tid = threadIdx.x % THREADS;
    const int pair = tid / P, part = tid % P;
    const int b = blockIdx.y, first = blockIdx.x * CB;
    const bool reverse = reverse_bits >> dir & 1;
    const bool same_way = reverse_bits == 0 || reverse_bits == 3;
    const int chunks = (length + T - 1) / T;
    const INDEX row0 = ((INDEX)dir * batch + b) * length;

    __shared__ Shared all_shared[G];
    Shared& shared = all_shared[dir];

    // A lane's states: four of every 4 P, so that the lanes of a channel read and write whole sectors together.
    auto state_of = [&](int s) { return (s / 4) * 4 * P + part * 4 + s % 4; };
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
                const int e = first + 2 * pair + k, n = state_of(s);
                const bool live = e < E && n < N;
                h[k][s] = 0.0f;
                A[k][s] = live ? -ex2(LOG2E * a_ptr[e * N + n]) * LOG2E : 0.0f;
#if HAS_SO
                so[k][s] = live && so_ptr ? so_ptr[e * N + n] : 0.0f;
#endif
            }
        const float* d_ptr = dir ? d1 : d0;
        const float* oo_ptr = dir ? oo1 : oo0;
        if (tid < CB) {
            const int e = first + tid;
            ((float*)shared.skip)[tid] = e < E ? d_ptr[e] : 0.0f;
            ((float*)shared.shift)[tid] = e < E && oo_ptr ? oo_ptr[e] : 0.0f;
        }
        for (int v = tid; v < T * 2 * NB; v += THREADS) ((float*)shared.bc)[v] = 0.0f;  // states beyond N stay zero
    }

    // A thread stages and finishes one row of a chunk, in the order of memory; steps go in the order of the direction.
    const int row = tid / (CB / EPT), col = tid % (CB / EPT) * EPT, flip = reverse ? T - 1 : 0, slot = row ^ flip;
    const int rest = E - first - col;
    const int live_cols = WHOLE ? EPT : rest < 0 ? 0 : (rest > EPT ? EPT : rest);
    auto fetch = [&](int j, Inputs& in) {
        const int token = j * T + row;
        const INDEX at = (row0 + token) * E + first + col;
        const int live = token < length ? live_cols : 0;
        in.u.load(u + at, 1, live);
        in.delta.load(delta + at, 1, live);
        const float* from = bc + (row0 + j * T) * (2 * N);  // in the order of memory
        const int words = (length - j * T) * (2 * N);
#pragma unroll
        for (int w = 0; w < BC_WORDS; ++w) {
            const int v = w * THREADS + tid;
            in.bc[w] = v < T * 2 * N && v < words ? from[v] : 0.0f;
        }
    };

    auto checkpoint = [&](int j) {
        io_t* at = ckpt + ((((INDEX)dir * batch + b) * chunks + j) * E + first + 2 * pair) * NP;
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
            for (int s = 0; s < ST; s += 4)
                if ((WHOLE || first + 2 * pair + k < E) && state_of(s) < NP) {
                    Pack<4> four;
                    four.set_pair(0, h[k][s], h[k][s + 1]);
                    four.set_pair(1, h[k][s + 2], h[k][s + 3]);
                    four.store_vector(at + k * NP + state_of(s));
                }
    };
    auto sync_direction = [&]() {
        if (dir)
            asm volatile("bar.sync 2, %0;" ::"n"(THREADS) : "memory");
        else
            asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
    };

    Inputs in;
    fetch(reverse ? chunks - 1 : 0, in);
    if (SAVE) checkpoint(reverse ? chunks - 1 : 0);
    sync_direction();  // the zeros in shared.bc are in place
    for (int it = 0; it < chunks; ++it) {
        const int j = reverse ? chunks - 1 - it : it;
        const Pack<EPT> u_now = in.u;
#pragma unroll
        for (int k = 0; k < EPT / 2; ++k) {
            const float da = in.delta.get(2 * k), db = in.delta.get(2 * k + 1);
            const int at = col / 2 + k;
            shared.step[slot][at + at / 4] = make_float4(da, da * in.u.get(2 * k), db, db * in.u.get(2 * k + 1));
        }
#pragma unroll
        for (int w = 0; w < BC_WORDS; ++w) {
            const int v = w * THREADS + tid, i = v / (2 * N) ^ flip, c = v % (2 * N);
            if (v < T * 2 * N) ((float*)shared.bc[i][c / N])[c % N] = in.bc[w];
        }
        // Once, before the first second visit: all of the other direction's first visits are done and visible.
        if (G == 2 && !same_way && it == chunks / 2)
            __syncthreads();
        else
            sync_direction();

        const int token = j * T + row;
        const int live = token < length ? live_cols : 0;
        const INDEX out_at = ((INDEX)b * length + token) * E + first + col;
        const bool both_here = G == 2 && (same_way || 2 * it == chunks - 1);
        const bool second = G == 1 || (both_here ? dir == 1 : 2 * it > chunks - 1);
        Pack<EPT> z_now, other;
        other.clear();
        z_now.clear();
        if (second) z_now.load(z + (b * zb + (INDEX)token * ZL + (first + col) * ZE), ZE, live);
        if (G == 2 && second && !both_here) other.load(out + out_at, 1, live);
        if (it + 1 < chunks) fetch(reverse ? j - 1 : j + 1, in);

        // The assembler keeps loads behind earlier stores: y is stored behind the last step, so that steps overlap.
        float ys[T];
        float4 next = shared.step[0][pair + pair / 4];
#pragma unroll
        for (int i = 0; i < T; ++i) {
            const float4 step = next;
            if (i + 1 < T) next = shared.step[i + 1][pair + pair / 4];
            float y0 = 0.0f, y1 = 0.0f;
#pragma unroll
            for (int s4 = 0; s4 < ST / 4; ++s4) {
                const float4 Bv = shared.bc[i][0][s4 * P + part];
                const float4 Cv = shared.bc[i][1][s4 * P + part];
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
            // Half of a pair's lanes finish one of its two channels, half the other.
            float y = (part & 1 ? y1 : y0) + __shfl_xor_sync(0xffffffffu, part & 1 ? y0 : y1, 1);
            if constexpr (P == 4) y += __shfl_xor_sync(0xffffffffu, y, 2);
            ys[i] = y;
        }
#pragma unroll
        for (int i = 0; i < T; ++i)
            if (part < 2) ((float*)shared.y[i])[2 * pair + part] = ys[i];
        if (SAVE && it + 1 < chunks) checkpoint(reverse ? j - 1 : j + 1);
        sync_direction();

        float v[EPT];
#pragma unroll
        for (int k = 0; k < EPT; k += 4) {
            const float4 y4 = shared.y[slot][(col + k) / 4], d4 = shared.skip[(col + k) / 4];
            const float4 o4 = shared.shift[(col + k) / 4];
            v[k] = y4.x + d4.x * u_now.get(k) + o4.x;
            v[k + 1] = y4.y + d4.y * u_now.get(k + 1) + o4.y;
            v[k + 2] = y4.z + d4.z * u_now.get(k + 2) + o4.z;
            v[k + 3] = y4.w + d4.w * u_now.get(k + 3) + o4.w;
        }
        Pack<EPT> result;
        if (!second) {
#pragma unroll
            for (int k = 0; k < EPT / 2; ++k) result.set_pair(k, v[2 * k], v[2 * k + 1]);
            result.store(out + out_at, 1, live);
        }
        if (both_here) {  // the same for the whole block
            __syncthreads();
            if (second) other.load(out + out_at, 1, live);
        }
        if (second) {
#pragma unroll
            for (int k = 0; k < EPT; ++k) v[k] += other.get(k);
#if SAVE
#pragma unroll
            for (int k = 0; k < EPT / 2; ++k) result.set_pair(k, v[2 * k], v[2 * k + 1]);
            result.store(total + out_at, 1, live);
#endif
#pragma unroll
            for (int k = 0; k < EPT; ++k) {
                const float zk = z_now.get(k);
                v[k] *= scale * zk * sigmoid(zk);
            }
#pragma unroll
            for (int k = 0; k < EPT / 2; ++k) result.set_pair(k, v[2 * k], v[2 * k + 1]);
            result.store(out + out_at, 1, live);
        }
    }
}
