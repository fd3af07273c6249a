// The adjoint of both scans. Macros: CHUNK, N states, E channels, P lanes that share a channel pair (4 or 8), ST states of
// a lane (4; or 6 with four lanes), NEED_DZ, NEED_DA, HAS_SO (state offset), STORE_DECAY (how many of a chunk's decays
// stay in registers; the rest is computed twice), MIN_BLOCKS (per multiprocessor); strides of a token and of a channel in
// dout (OL, OE), z (ZL, ZE) and dz (GL, GE); INDEX, the type that counts every tensor's elements. A tenth of the
// instructions computed addresses when sizes and strides were arguments and indices had 64 bits.
//
// A block of four warps owns CB channels of one sample and direction. A lane owns ST states of two channels; Q = 32 / P
// channel pairs make a warp. Chunk by chunk from the end, it recomputes the states from the checkpoint (they stay in
// registers), then runs the adjoint recurrence backwards.
//
// Two sums cross lanes in every step: over channels (dB, dC) and over states (du, dΔ). Both are reduce-scatters. A lane
// keeps channel k at register k ^ (p & 1) and, of four states, state j at register j ^ (q & 3), so what it sends is
// always in the same registers and no selects are needed; B and C lie in shared memory in the four orders that this
// asks for. Six states have no such order: there the lanes select.

constexpr int T = CHUNK;  // tokens of a chunk, see checkpoints.py
static_assert((T & (T - 1)) == 0, "steps are counted backwards by flipping bits");
constexpr int Q = 32 / P;
constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int CB = 2 * Q * WARPS;       // channels of a block
constexpr int NB = ST * P;              // states, as lanes hold them
constexpr int NP = (N + 7) / 8 * 8;     // states, as checkpoints hold them
constexpr int PAIRS = CB / 2;           // a thread stages and finishes one channel pair ...
constexpr int ROWS = THREADS / PAIRS;   // ... in every ROWS-th token: warps touch shared memory in whole lines
constexpr int VEC = 16 / sizeof(io_t);  // elements of a 16-byte copy
constexpr int VPT = T * CB / VEC;       // such copies of a chunk's tile
constexpr int RAW = NEED_DZ ? 5 : 4;    // Δ, u, dout, z, total
constexpr int ORDERS = ST == 4 ? 4 : 1;
constexpr bool WHOLE = E % CB == 0;     // every block has all of its channels
constexpr float LN2 = 0.6931471805599453f;

// One struct, so that a lane's addresses are a few registers plus constants.
struct __align__(16) Shared {
    io_t raw[2][RAW][T * CB];            // as copied, in the order of memory, two buffers
    float bc[2][T * 2 * N];              // B|C as copied, in the order of memory
    io_t ckpt[2][CB * NP];               // the states with which the chunk begins
    float4 order[T][2][ORDERS][NB / 4];  // B and C in the orders that lanes ask for
    float2 step[T][CB];                  // {Δ, Δu}; after its step: {Σ_n g B, Σ_n g a h A}
    float2 read[T][CB];                  // {Δu, dy}
    float sum[WARPS][T][2][NB];          // a warp's dB and dC
    float skip[CB];                      // D
};

__device__ __forceinline__ u32 smem(const void* p) { return (u32)__cvta_generic_to_shared(p); }

template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool live) {  // zeros unless live
    const int bytes = live ? BYTES : 0;
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem(to)), "l"(from), "r"(bytes));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(smem(to)), "l"(from), "r"(bytes));
}

// Sixteen bytes of shared memory in one access: alone, the compiler would load the two of four numbers that are used,
// and lanes 16 bytes apart meet in the same banks.
__device__ __forceinline__ float4 load_whole(const void* p) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(smem(p)));
    return v;
}

__device__ __forceinline__ float add_from(float keep, float send, int lanes) {
    return keep + __shfl_xor_sync(0xffffffffu, send, lanes);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_backward(
    const io_t* __restrict__ dout, const io_t* __restrict__ u, const io_t* __restrict__ delta,
    const float* __restrict__ bc, const io_t* __restrict__ z, const io_t* __restrict__ total,
    const io_t* __restrict__ ckpt, const float* a0, const float* a1, const float* d0, const float* d1,
    const float* so0, const float* so1, io_t* __restrict__ du, io_t* __restrict__ draw, io_t* __restrict__ dz,
    io_t* __restrict__ dbc, float* __restrict__ da, int batch, int length, INDEX ob, INDEX zb, INDEX gb, float scale,
    int reverse_bits) {
    const int dir = blockIdx.z, b = blockIdx.y, first = blockIdx.x * CB, groups = gridDim.z;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, p = lane % P, q = lane / P;
    const bool reverse = reverse_bits >> dir & 1;
    const int chunks = (length + T - 1) / T;
    const INDEX row0 = ((INDEX)dir * batch + b) * length;

    __shared__ Shared shared;

    int local[2];  // this lane's channels in the block
    auto state_of = [&](int s) { return ST == 4 ? 4 * p + (s ^ (q & 3)) : ST * p + s; };
    float A[2][ST], carry[2][ST];
#if HAS_SO
    float so[2][ST];
    const float* so_ptr = dir ? so1 : so0;
#endif
#if NEED_DA
    float dA[2][ST];
#endif
    const float* a_ptr = dir ? a1 : a0;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        local[k] = (warp * Q + q) * 2 + (k ^ (p & 1));
#pragma unroll
        for (int s = 0; s < ST; ++s) {
            const int e = first + local[k], n = state_of(s);
            const bool live = e < E && n < N;
            A[k][s] = live ? -ex2(LOG2E * a_ptr[e * N + n]) * LOG2E : 0.0f;
            carry[k][s] = 0.0f;
#if HAS_SO
            so[k][s] = live && so_ptr ? so_ptr[e * N + n] : 0.0f;
#endif
#if NEED_DA
            dA[k][s] = 0.0f;
#endif
        }
    }
    if (tid < CB) shared.skip[tid] = first + tid < E ? (dir ? d1 : d0)[first + tid] : 0.0f;

    // B (kind 0) or C (kind 1) of this lane's states at step i.
    auto read_states = [&](int i, int kind, float* into) {
        if constexpr (ST == 4) {
            const float4 v = shared.order[i][kind][q & 3][p];
            into[0] = v.x, into[1] = v.y, into[2] = v.z, into[3] = v.w;
        } else {
#pragma unroll
            for (int s = 0; s < ST; s += 2) {
                const float2 v = ((const float2*)shared.order[i][kind][0])[(ST * p + s) / 2];
                into[s] = v.x, into[s + 1] = v.y;
            }
        }
    };

    // Chunks lie in memory in the order of tokens; steps go in the order of the direction.
    const int flip = reverse ? T - 1 : 0;
    auto step_of = [&](int row) { return row ^ flip; };

    // This block's corner of every tensor.
    const INDEX own = row0 * E + first, shared_own = (INDEX)b * length * E + first;
    const INDEX dout_own = b * ob + (INDEX)first * OE, z_own = b * zb + (INDEX)first * ZE;
    const INDEX ckpt_own = (((INDEX)dir * batch + b) * chunks * E + first) * NP;
    const int width = WHOLE ? CB : E - first;  // may exceed CB

    // Starts the copies of chunk j into buffer `to`; which tensor a warp copies is known at compile time.
    const int copy_row = tid % VPT / (CB / VEC), copy_col = tid % (CB / VEC) * VEC;
    auto fetch = [&](int j, int to) {
        const int t = j * T + copy_row;
        const bool live = t < length && copy_col < width;
#pragma unroll
        for (int r = 0; r < RAW; ++r) {
            if (tid / VPT != r % (THREADS / VPT)) continue;
            if (r == 4 && dir) continue;  // direction 0 alone writes dz
            const io_t* from = r == 0 ? delta : r == 1 ? u : r == 2 ? dout : r == 3 ? z : total;
            const INDEX corner = r < 2 ? own : r == 2 ? dout_own : r == 3 ? z_own : shared_own;
            const int line = r == 2 ? OL : r == 3 ? ZL : E;
            io_t* into = &shared.raw[to][r][copy_row * CB + copy_col];
#if ALIGNED
            copy_async<16>(into, from + (corner + t * line + copy_col), live);
#else
            const int step = r == 2 ? OE : r == 3 ? ZE : 1;
#pragma unroll
            for (int k = 0; k < VEC; ++k) {
                const bool there = live && copy_col + k < width;
                into[k] = there ? from[corner + (INDEX)t * line + (copy_col + k) * step] : (io_t)0;
            }
#endif
        }
        const int words = (length - j * T) * (2 * N);
#pragma unroll
        for (int w = 0; w < (T * N + THREADS - 1) / THREADS; ++w) {  // in the order of memory
            const int v = (w * THREADS + tid) * 2;
            if (v < T * 2 * N) copy_async<8>(&shared.bc[to][v], bc + ((row0 + j * T) * (2 * N) + v), v < words);
        }
#pragma unroll
        for (int w = 0; w < (CB * NP / VEC + THREADS - 1) / THREADS; ++w) {
            const int v = (w * THREADS + tid) * VEC;
            if (v < CB * NP)
                copy_async<16>(&shared.ckpt[to][v], ckpt + (ckpt_own + (INDEX)j * (E * NP) + v), v < width * NP);
        }
        asm volatile("cp.async.commit_group;");
    };

    const int pair = tid % PAIRS, first_row = tid / PAIRS;
    const int live_cols = width <= 2 * pair ? 0 : (width == 2 * pair + 1 ? 1 : 2);
    const INDEX dz_own = b * gb + (INDEX)(first + 2 * pair) * GE;
    const INDEX dbc_own = ((INDEX)blockIdx.x * groups * batch * length + row0) * (2 * N);

    // Writes out what the chunk's sums give. A thread finishes the elements that it staged, so what it reads of its own
    // (step, read) it may overwrite next.
    auto finish = [&](int j, int buffer) {
        const float skip[2] = {shared.skip[2 * pair], shared.skip[2 * pair + 1]};
#pragma unroll
        for (int r = 0; r < T / ROWS; ++r) {
            const int row = r * ROWS + first_row, i = step_of(row), token = j * T + row, at = row * CB + 2 * pair;
            const int live = token < length ? live_cols : 0;
            const INDEX to = own + token * E + 2 * pair;
            Pack<2> rd, ru, out_u, out_d;
            rd.load_vector(&shared.raw[buffer][0][at]);
            ru.load_vector(&shared.raw[buffer][1][at]);
            const float4 sums = *(const float4*)&shared.step[i][2 * pair], read = load_whole(&shared.read[i][2 * pair]);
            out_u.set_pair(0, rd.get(0) * sums.x + skip[0] * read.y, rd.get(1) * sums.z + skip[1] * read.w);
            out_d.set_pair(0, (ru.get(0) * sums.x + LN2 * sums.y) * one_minus_exp(rd.get(0)),
                           (ru.get(1) * sums.z + LN2 * sums.w) * one_minus_exp(rd.get(1)));
            out_u.store(du + to, 1, live);
            out_d.store(draw + to, 1, live);
        }
#pragma unroll
        for (int w = 0; w < T * 2 * NB / THREADS; ++w) {
            const int v = w * THREADS + tid, n = v % NB, kind = v / NB % 2, row = v / (2 * NB), t = j * T + row;
            float sum = 0.0f;
#pragma unroll
            for (int k = 0; k < WARPS; ++k) sum += shared.sum[k][step_of(row)][kind][n];
            if (n < N && t < length) dbc[dbc_own + t * (2 * N) + kind * N + n] = narrow(sum);
        }
    };

    fetch(reverse ? 0 : chunks - 1, 0);
    for (int it = 0; it <= chunks; ++it) {
        const int now = it & 1;
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncthreads();  // this chunk's copies and the sums of the chunk before are visible
        if (it > 0) finish(reverse ? it - 1 : chunks - it, now ^ 1);
        if (it == chunks) break;
        const int j = reverse ? it : chunks - 1 - it;

        // Stage this thread's elements: dy = scale · dout · silu(z), and dz.
#pragma unroll
        for (int r = 0; r < T / ROWS; ++r) {
            const int row = r * ROWS + first_row, i = step_of(row), at = row * CB + 2 * pair;
            Pack<2> rd, ru, ro, rz;
            rd.load_vector(&shared.raw[now][0][at]);
            ru.load_vector(&shared.raw[now][1][at]);
            ro.load_vector(&shared.raw[now][2][at]);
            rz.load_vector(&shared.raw[now][3][at]);
            float step[2], input[2], dy[2], grad[2];
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const float zk = rz.get(k), gate = sigmoid(zk), o = scale * ro.get(k);
                step[k] = rd.get(k);
                input[k] = step[k] * ru.get(k);
                dy[k] = o * zk * gate;
                grad[k] = o * gate * (1.0f + zk * (1.0f - gate));
            }
            *(float4*)&shared.step[i][2 * pair] = make_float4(step[0], input[0], step[1], input[1]);
            *(float4*)&shared.read[i][2 * pair] = make_float4(input[0], dy[0], input[1], dy[1]);
#if NEED_DZ
            if (dir == 0) {
                const int token = j * T + row;
                Pack<2> rt, out_z;
                rt.load_vector(&shared.raw[now][RAW - 1][at]);
                out_z.set_pair(0, grad[0] * rt.get(0), grad[1] * rt.get(1));
                out_z.store(dz + (dz_own + (INDEX)token * GL), GE, token < length ? live_cols : 0);
            }
#endif
        }
        constexpr int QUADS = NB / 4;
#pragma unroll
        for (int w = 0; w < (T * 2 * QUADS + THREADS - 1) / THREADS; ++w) {
            const int v = w * THREADS + tid;
            if (v >= T * 2 * QUADS) break;
            const int quad = v % QUADS, kind = v / QUADS % 2, row = v / (2 * QUADS), i = step_of(row);
            const float* from = &shared.bc[now][row * 2 * N + kind * N + 4 * quad];
            float f[4];
            if constexpr (N == NB) {
                const float4 whole = *(const float4*)from;
                f[0] = whole.x, f[1] = whole.y, f[2] = whole.z, f[3] = whole.w;
            } else {
#pragma unroll
                for (int s = 0; s < 4; ++s) f[s] = 4 * quad + s < N ? from[s] : 0.0f;
            }
            shared.order[i][kind][0][quad] = make_float4(f[0], f[1], f[2], f[3]);
            if constexpr (ORDERS == 4) {
                shared.order[i][kind][1][quad] = make_float4(f[1], f[0], f[3], f[2]);
                shared.order[i][kind][2][quad] = make_float4(f[2], f[3], f[0], f[1]);
                shared.order[i][kind][3][quad] = make_float4(f[3], f[2], f[1], f[0]);
            }
        }
        __syncthreads();
        if (it + 1 < chunks) fetch(reverse ? j + 1 : j - 1, now ^ 1);

        float decay[T][2][ST], state[T][2][ST];
        // The states with which the chunk begins, of one channel.
        auto read_start = [&](int k, float* into) {
            const io_t* from = &shared.ckpt[now][local[k] * NP];
            if constexpr (ST == 4) {
                Pack<4> four;
                if (4 * p < NP)
                    four.load_vector(from + 4 * p);
                else
                    four.clear();
                four.exchange(q & 2, q & 1);
#pragma unroll
                for (int s = 0; s < 4; ++s) into[s] = four.get(s);
            } else {
#pragma unroll
                for (int s = 0; s < ST; ++s) into[s] = state_of(s) < NP ? widen(from[state_of(s)]) : 0.0f;
            }
        };
#pragma unroll
        for (int i = 0; i < T; ++i) {
            float B[ST];
            read_states(i, 0, B);
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const float2 step = shared.step[i][local[k]];
                float begin[ST];
                if (i == 0) read_start(k, begin);
#pragma unroll
                for (int s = 0; s < ST; ++s) {
                    decay[i][k][s] = ex2(step.x * A[k][s]);
                    const float before = i ? state[i ? i - 1 : 0][k][s] : begin[s];
                    state[i][k][s] = decay[i][k][s] * before + step.y * B[s];
                }
            }
        }
#pragma unroll
        for (int i = T - 1; i >= 0; --i) {
            float B[ST], C[ST], dB[ST], dC[ST];
            read_states(i, 0, B);
            read_states(i, 1, C);
#pragma unroll
            for (int s = 0; s < ST; ++s) dB[s] = dC[s] = 0.0f;
            float gB[2] = {0.0f, 0.0f}, gA[2] = {0.0f, 0.0f};
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const float2 step = shared.read[i][local[k]];
                float begin[ST];
                if (i == 0) read_start(k, begin);
#if NEED_DA
                const float delta_k = shared.step[i][local[k]].x;
#else
                const float delta_k = i < STORE_DECAY ? 0.0f : shared.step[i][local[k]].x;
#endif
#pragma unroll
                for (int s = 0; s < ST; ++s) {
                    const float a = i < STORE_DECAY ? decay[i][k][s] : ex2(delta_k * A[k][s]);
                    const float g = C[s] * step.y + carry[k][s];
#if HAS_SO
                    dC[s] += step.y * (state[i][k][s] + so[k][s]);
#else
                    dC[s] += step.y * state[i][k][s];
#endif
                    dB[s] += step.x * g;
                    gB[k] += g * B[s];
                    carry[k][s] = a * g;
                    const float kept = carry[k][s] * (i ? state[i ? i - 1 : 0][k][s] : begin[s]);
                    gA[k] += kept * A[k][s];
#if NEED_DA
                    dA[k][s] += kept * delta_k;
#endif
                }
            }
            // Over states: first the other lane's channel, then one lane keeps g·B, the other g·a·h·A.
            gB[0] = add_from(gB[0], gB[1], 1);
            gA[0] = add_from(gA[0], gA[1], 1);
            float over_states = add_from(p & 2 ? gA[0] : gB[0], p & 2 ? gB[0] : gA[0], 2);
            if constexpr (P == 8) over_states += __shfl_xor_sync(0xffffffffu, over_states, 4);
            __syncwarp();  // every lane that reads this step is in this warp and has read it
            if (P == 4 || p < 4) (p & 2 ? shared.step[i][local[0]].y : shared.step[i][local[0]].x) = over_states;

            // Over channels.
            float* sum = shared.sum[warp][i][0];
            if constexpr (ST == 4) {
                dB[0] = add_from(dB[0], dB[2], 2 * P);
                dC[0] = add_from(dC[0], dC[2], 2 * P);
                dB[1] = add_from(dB[1], dB[3], 2 * P);
                dC[1] = add_from(dC[1], dC[3], 2 * P);
                dB[0] = add_from(dB[0], dB[1], P);
                dC[0] = add_from(dC[0], dC[1], P);
                const int n = 4 * p + (q & 3);
                if constexpr (Q == 8) {
                    sum[(q >> 2) * NB + n] = add_from(q & 4 ? dC[0] : dB[0], q & 4 ? dB[0] : dC[0], 4 * P);
                } else {
                    sum[n] = dB[0];
                    sum[NB + n] = dC[0];
                }
            } else {  // Q = 8: one bit of q chooses dB or dC, one a half of the states, the last is summed by both
                float kept[ST], half[ST / 2];
#pragma unroll
                for (int s = 0; s < ST; ++s)
                    kept[s] = add_from(q & 4 ? dC[s] : dB[s], q & 4 ? dB[s] : dC[s], 4 * P);
#pragma unroll
                for (int s = 0; s < ST / 2; ++s) {
                    const float mine = q & 2 ? kept[s + ST / 2] : kept[s], yours = q & 2 ? kept[s] : kept[s + ST / 2];
                    half[s] = add_from(mine, yours, 2 * P);
                    half[s] = add_from(half[s], half[s], P);
                    if (!(q & 1)) sum[(q >> 2) * NB + ST * p + (q >> 1 & 1) * (ST / 2) + s] = half[s];
                }
            }
        }
    }
#if NEED_DA
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int s = 0; s < ST; ++s) {
            const int e = first + local[k], n = state_of(s);
            if (e < E && n < N) da[(((INDEX)b * groups + dir) * E + e) * N + n] = dA[k][s];
        }
#endif
}
