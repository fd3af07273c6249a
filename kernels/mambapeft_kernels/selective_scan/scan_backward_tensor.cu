// The adjoint of both scans with its sums on the tensor cores: bfloat16, 16 states, rows in 16-byte pieces, channels in
// groups of 64, no dA and no state offset. Macros: E channels, N = 16 states, CHUNK = 8, NEED_DZ; strides of a
// token in dout (OL), z (ZL) and dz (GL); INDEX, the type that counts every tensor's elements.
//
// A block of four warps owns 64 channels of one sample and direction, a warp 16 of them. Lane (r, c) = (lane / 4,
// lane % 4) owns the states 2r, 2r + 1 of the channels 4c .. 4c + 3: the layout of a product's left operand (16 states x
// 8 channels, tf32), twice. Chunk by chunk from the end it recomputes the states from the checkpoint (they and the decays
// stay in registers), then runs the adjoint recurrence backwards. Per step, on the tensor cores:
//
// * Δu ⊗ B and dy ⊗ C as products whose inner index one token alone fills;
// * dC = H dy and dB = G Δu, with all eight tokens' dy and Δu as right operand: one column of the result is wanted;
// * the sums over states (for du and dΔ): a lane's partial sums as bfloat16 pairs, which `transpose` turns so that a
//   product with a column of ones adds them up over the eight lanes, in float32.

constexpr int T = CHUNK, WARPS = 4, THREADS = 32 * WARPS, CB = 16 * WARPS;
static_assert(T == 8 && N == 16, "one tile of tokens, one of states");
constexpr int RAW = NEED_DZ ? 5 : 4;                  // Δ, u, dout, z, total
constexpr int SUM_ROW = 36, C_ROW = 20, ROW = 24;     // rows padded for the banks
constexpr float LN2 = 0.6931471805599453f;

struct __align__(16) Buffer {
    uint2 raw[WARPS][RAW][32];     // as copied, by lane
    uint4 ckpt[WARPS][40];         // 16 channels x 32 bytes, 32 more after every fourth
    float B[T][4][N];              // of a step i its B at i % 4, and zeros else
    float C[T][C_ROW];             // behind B; zeros behind each row
    float sum[WARPS][T][SUM_ROW];  // a warp's dB and dC
};

struct __align__(16) Warp {
    float4 step[T][4];    // Δ
    float input[T][ROW];  // Δu, of four channels the first, third, second, fourth
    float dy[T][ROW];     // zeros behind
};

struct __align__(16) Shared {
    Buffer buffer[2];
    Warp warp[WARPS];
    float skip[CB];   // D
    u32 ones[2 * T];  // two bfloat16 ones at T - 1, zeros elsewhere
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

__device__ __forceinline__ float lo16(u32 w) { return __uint_as_float(w << 16); }
__device__ __forceinline__ float hi16(u32 w) { return __uint_as_float(w & 0xffff0000u); }

__device__ __forceinline__ void open4(uint2 w, float* f) {
    f[0] = lo16(w.x), f[1] = hi16(w.x), f[2] = lo16(w.y), f[3] = hi16(w.y);
}

__device__ __forceinline__ u32 close2(float lo, float hi) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}

// d (16 states x 8 tokens) += a (16 states x 8 channels) b; of a the states 2r and 2r + 1 of one channel, then of another.
__device__ __forceinline__ void mma(float* d, float a0, float a1, float a2, float a3, float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
          "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// d = a b, four tokens along the inner index
__device__ __forceinline__ void outer(float* d, float a0, float a1, float b) {
    asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%7,%7,%7};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(b)), "f"(0.0f));
}

// d += a b, four along the inner index
__device__ __forceinline__ void add_outer(float* d, float a0, float a1, float b) {
    asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(b)));
}

__device__ __forceinline__ u32 transpose(u32 v) {
    u32 r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}

// d (16 columns x 8 tokens) += the sums over eight lanes in a0 (columns 0-7) and a1 (8-15), for the token of `ones`.
__device__ __forceinline__ void add_column(float* d, u32 a0, u32 a1, u32 ones) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(ones));
}

__device__ __forceinline__ float tf32(float v) {  // the unit drops the last 13 bits: half of them added, it rounds
    return __uint_as_float(__float_as_uint(v) + 0x1000u);
}

// Stays in a register: the compiler would compute it again in every chunk.
__device__ __forceinline__ int kept(int v) {
    asm volatile("" : "+r"(v));
    return v;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) scan_backward_tensor(
    const io_t* __restrict__ dout, const io_t* __restrict__ u, const io_t* __restrict__ delta,
    const float* __restrict__ bc, const io_t* __restrict__ z, const io_t* __restrict__ total,
    const io_t* __restrict__ ckpt, const float* a0, const float* a1, const float* d0, const float* d1,
    io_t* __restrict__ du, io_t* __restrict__ draw, io_t* __restrict__ dz, io_t* __restrict__ dbc, int batch,
    int length, INDEX ob, INDEX zb, INDEX gb, float scale, int reverse_bits) {
    __shared__ Shared shared;
    const int dir = blockIdx.z, b = blockIdx.y, first = blockIdx.x * CB, groups = gridDim.z;
    const int tid = threadIdx.x, lane = kept(tid & 31), warp = kept(tid >> 5), r = kept(lane >> 2), c = kept(lane & 3);
    const bool reverse = reverse_bits >> dir & 1;
    const int chunks = (length + T - 1) / T, flip = kept(reverse ? T - 1 : 0), ahead = reverse ? T : -T;
    const INDEX sample = (INDEX)dir * batch + b;
    Warp& mine = shared.warp[warp];

    // carry: two states of the channels 4c + m and 4c + 2 + m, in the order of a product's results.
    float A[4][2], carry[2][4];
    {
        const float* a_ptr = dir ? a1 : a0;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float2 v = *(const float2*)&a_ptr[(first + 16 * warp + 4 * c + k) * N + 2 * r];
            A[k][0] = -ex2(LOG2E * v.x) * LOG2E, A[k][1] = -ex2(LOG2E * v.y) * LOG2E;
            carry[k & 1][2 * (k >> 1)] = carry[k & 1][2 * (k >> 1) + 1] = 0.0f;
        }
    }
    if (tid < CB) shared.skip[tid] = (dir ? d1 : d0)[first + tid];
    // Zeros for the lanes that have no part in an outer product.
    if (tid < 2 * T) *(float4*)&shared.buffer[tid & 1].C[tid >> 1][N] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int k = 0; k < 2; ++k) ((float4*)shared.buffer[k].B)[tid] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (tid < 2 * T) shared.ones[tid] = tid == T - 1 ? 0x3f803f80u : 0;
    if (c == 0) *(float4*)&mine.dy[r][16] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

    const int staged = r ^ flip, own = 16 * warp + 4 * c;  // a chunk's token and the channels that a lane stages
    const int bc_step = tid >> 4, bc_pair = tid & 15, bc_token = bc_step ^ flip;  // what it stages of B|C
    const INDEX scan_own = sample * length * E + first + own, total_own = (INDEX)b * length * E + first + own;
    const INDEX dout_own = b * ob + first + own, z_own = b * zb + first + own, dz_own = b * gb + first + own;
    const INDEX finish_own = sample * length * E + first + 16 * warp + 2 * r;
    const INDEX ckpt_own = (sample * chunks * E + first + 16 * warp) * N + 8 * lane;
    const INDEX bc_own = sample * length * (2 * N) + 2 * bc_pair;
    const INDEX dbc_own = (INDEX)blockIdx.x * groups * batch * length * (2 * N) + bc_own;

    // Where a lane's parts lie in a buffer.
    const int raw_own = kept(warp * (RAW * 32) + lane), ckpt_to = kept(warp * 40 + lane + (lane >> 3) * 2);
    const int begin_own = kept(warp * 160 + c * 40 + r), sum_own = kept((warp * T + 2 * c) * SUM_ROW + 2 * r);
    const int finish_raw = kept(warp * (RAW * 64) + 16 * c + r), finish_token = kept(2 * c ^ flip);
    const int bc_to = kept(bc_pair < N / 2 ? (bc_step * 4 + bc_step % 4) * N + 2 * bc_pair
                                           : T * 4 * N + bc_step * C_ROW + 2 * bc_pair - N);

    auto fetch = [&](int start, Buffer& to) {
        const int t = start + staged;
        const bool live = (unsigned)t < (unsigned)length;
        uint2* raw = to.raw[0][0] + raw_own;
        copy_async<8>(raw, delta + (scan_own + t * E), live);
        copy_async<8>(raw + 32, u + (scan_own + t * E), live);
        copy_async<8>(raw + 64, dout + (dout_own + t * OL), live);
        copy_async<8>(raw + 96, z + (z_own + t * ZL), live);
#if NEED_DZ
        if (dir == 0) copy_async<8>(raw + 128, total + (total_own + t * E), live);
#endif
        const bool there = (unsigned)start < (unsigned)length;
        copy_async<16>(to.ckpt[0] + ckpt_to, ckpt + (ckpt_own + start * (E * N / T)), there);
        const int token = start + bc_token;
        copy_async<8>(to.B[0][0] + bc_to, bc + (bc_own + token * (2 * N)), (unsigned)token < (unsigned)length);
        asm volatile("cp.async.commit_group;");
    };
    auto finish_bc = [&](int start, const Buffer& from) {  // what the warps summed over channels
        const int token = start + bc_token;
        if ((unsigned)token >= (unsigned)length) return;
        float2 s = *(const float2*)&from.sum[0][bc_step][2 * bc_pair];
#pragma unroll
        for (int k = 1; k < WARPS; ++k) {
            const float2 v = *(const float2*)&from.sum[k][bc_step][2 * bc_pair];
            s.x += v.x, s.y += v.y;
        }
        *(u32*)&dbc[dbc_own + token * (2 * N)] = close2(s.x, s.y);
    };

    int start = reverse ? 0 : (chunks - 1) * T;
    __syncthreads();
    fetch(start, shared.buffer[0]);
    int side = 0;  // bytes from the first buffer
    for (int it = 0; it < chunks; ++it, start += ahead, side = (int)sizeof(Buffer) - side) {
        Buffer& now = *(Buffer*)((char*)shared.buffer + side);
        Buffer& other = *(Buffer*)((char*)shared.buffer + ((int)sizeof(Buffer) - side));
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncthreads();
        finish_bc(start - ahead, other);

        // Stage (token r, channels 4c ..).
        float dy[4], input[4];
        {
            const uint2* raw = now.raw[0][0] + raw_own;
            float step[4], uu[4], o[4], zz[4], grad[4];
            open4(raw[0], step), open4(raw[32], uu), open4(raw[64], o), open4(raw[96], zz);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float gate = sigmoid(zz[k]), os = scale * o[k] * gate, y = os * zz[k];
                dy[k] = tf32(y);
                grad[k] = os + y * (1.0f - gate);  // o gate (1 + z (1 - gate))
                input[k] = tf32(step[k] * uu[k]);
            }
            mine.step[r][c] = make_float4(step[0], step[1], step[2], step[3]);
            *(float4*)&mine.input[r][4 * c] = make_float4(input[0], input[2], input[1], input[3]);
            *(float4*)&mine.dy[r][4 * c] = make_float4(dy[0], dy[1], dy[2], dy[3]);
#if NEED_DZ
            const int token = start + staged;
            if (dir == 0 && token < length) {
                float tt[4];
                open4(raw[128], tt);
                *(uint2*)&dz[dz_own + token * GL] =
                    make_uint2(close2(grad[0] * tt[0], grad[1] * tt[1]), close2(grad[2] * tt[2], grad[3] * tt[3]));
            }
#endif
        }
        __syncwarp();
        fetch(start + ahead, other);

        const u32* begin_at = (const u32*)now.ckpt[0] + begin_own;
        float decay[T][4][2], state[T][4][2];
        float dB[2][2], dC[2][2];  // tokens 2c, 2c + 1; states 2r, 2r + 1
        {
            // Δu of the tokens c, c + 4 and the channels 2r, 2r + 1
            const float2 in[2] = {*(const float2*)&mine.input[c][2 * r], *(const float2*)&mine.input[4 + c][2 * r]};
#pragma unroll
            for (int i = 0; i < T; ++i) {
                const float4 s4 = mine.step[i][c];
                const float s[4] = {s4.x, s4.y, s4.z, s4.w};
                const float2 B = *(const float2*)&now.B[i][c][2 * r];
                float add[2][4];  // of the channels 4c, 4c + 1 and 4c + 2, 4c + 3
                outer(add[0], B.x, B.y, in[i / 4].x);
                outer(add[1], B.x, B.y, in[i / 4].y);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const u32 begin = i == 0 ? begin_at[k * 8] : 0;
#pragma unroll
                    for (int n = 0; n < 2; ++n) {
                        const float before = i ? state[i ? i - 1 : 0][k][n] : n ? hi16(begin) : lo16(begin);
                        decay[i][k][n] = ex2(s[k] * A[k][n]);
                        state[i][k][n] = decay[i][k][n] * before + add[k >> 1][2 * n + (k & 1)];
                    }
                }
                float acc[4] = {0, 0, 0, 0};
                mma(acc, state[i][0][0], state[i][0][1], state[i][1][0], state[i][1][1], dy[0], dy[1]);
                mma(acc, state[i][2][0], state[i][2][1], state[i][3][0], state[i][3][1], dy[2], dy[3]);
#pragma unroll
                for (int n = 0; n < 2; ++n)
                    if (c == i / 2 || i < 2) dC[i & 1][n] = acc[2 * n + (i & 1)];
            }
        }
        float over_states[2][4];  // of g B and g a h A: {channel 2r of the tokens 2c, 2c + 1; channel 2r + 1 of both}
#pragma unroll
        for (int k = 0; k < 4; ++k) over_states[0][k] = over_states[1][k] = 0.0f;
        {
            const int own_c = 2 * r + (c & 1);
            const float *C0 = now.C[0] + (c < 2 ? own_c : N), *C1 = now.C[0] + (c < 2 ? N : own_c);
            const float* out = mine.dy[0] + ((r ^ c) & 1 ? 16 : 4 * (r >> 1) + 2 * (c >> 1));
            const float4 in4 = *(const float4*)&mine.input[r][4 * c];
#pragma unroll
            for (int i = T - 1; i >= 0; --i) {
                const float2 B = *(const float2*)&now.B[i][i & 3][2 * r], o = *(const float2*)(out + ROW * i);
                const float c0 = C0[C_ROW * i], c1 = C1[C_ROW * i];
                add_outer(carry[0], c0, c1, o.x);
                add_outer(carry[1], c0, c1, o.y);
                float g[4][2], gB[4], gA[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const u32 begin = i == 0 ? begin_at[k * 8] : 0;
#pragma unroll
                    for (int n = 0; n < 2; ++n) {
                        const float before = i ? state[i ? i - 1 : 0][k][n] : n ? hi16(begin) : lo16(begin);
                        float& next = carry[k & 1][2 * (k >> 1) + n];
                        g[k][n] = next;
                        next = decay[i][k][n] * g[k][n];
                        const float kept = next * before;
                        gB[k] = n ? gB[k] + g[k][n] * B.y : g[k][n] * B.x;
                        gA[k] = n ? gA[k] + kept * A[k][n] : kept * A[k][n];
                    }
                }
                const u32 ones = shared.ones[T - 1 - i + r];
                add_column(over_states[0], transpose(close2(gB[0], gB[2])), transpose(close2(gB[1], gB[3])), ones);
                add_column(over_states[1], transpose(close2(gA[0], gA[2])), transpose(close2(gA[1], gA[3])), ones);
                float acc[4] = {0, 0, 0, 0};
                mma(acc, g[0][0], g[0][1], g[2][0], g[2][1], in4.x, in4.y);
                mma(acc, g[1][0], g[1][1], g[3][0], g[3][1], in4.z, in4.w);
#pragma unroll
                for (int n = 0; n < 2; ++n)
                    if (c == i / 2 || i >= T - 2) dB[i & 1][n] = acc[2 * n + (i & 1)];
            }
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            float* to = now.sum[0][k] + sum_own;
            *(float2*)to = make_float2(dB[k][0], dB[k][1]);
            *(float2*)(to + N) = make_float2(dC[k][0], dC[k][1]);
        }

        // Finish (tokens 2c, 2c + 1; channels 2r, 2r + 1).
        {
            const float2 skip = *(const float2*)&shared.skip[16 * warp + 2 * r];
            const int token0 = start + finish_token;
            const INDEX at0 = finish_own + token0 * E;
            const u32* raw = (const u32*)now.raw[0][0] + finish_raw;
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int token = k ? token0 + (reverse ? -1 : 1) : token0;
                const INDEX at = k ? at0 + (reverse ? -E : E) : at0;
                const u32 rd = raw[8 * k], ru = raw[64 + 8 * k];
                const float2 y = *(const float2*)&mine.dy[2 * c + k][2 * r];
                const float d0 = lo16(rd), d1 = hi16(rd), B0 = over_states[0][k], B1 = over_states[0][2 + k];
                const u32 ou = close2(d0 * B0 + skip.x * y.x, d1 * B1 + skip.y * y.y);
                const u32 od = close2((lo16(ru) * B0 + LN2 * over_states[1][k]) * one_minus_exp(d0),
                                      (hi16(ru) * B1 + LN2 * over_states[1][2 + k]) * one_minus_exp(d1));
                if (token < length) *(u32*)&du[at] = ou, *(u32*)&draw[at] = od;
            }
        }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    finish_bc(start - ahead, shared.buffer[~chunks & 1]);
}
