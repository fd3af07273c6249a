// u = SiLU(convolution of x) of every direction and its product with x_proj, in one pass over x. Macros: E channels, K
// taps, G directions, REV0, REV1, W rows of x_proj and R of them that make the low-rank Δ, WEIGHT_BF16; the stride of a
// token in x (XL); INDEX, the type that counts every tensor's elements.
//
// A block owns 32 tokens of one direction, a warp 32 of its channels at a time: each thread computes u of eight channels
// over RUN tokens in a row, and keeps it as the operand of a tensor-core product (m16n8k16), whose rows (tokens) and inner
// index (channels) are numbered so that a thread gives what it has. The warps' sums over channels meet in shared memory.

constexpr int RUN = 4, WARPS = 4, TOKENS = 8 * RUN;
constexpr int TILES = (W + 7) / 8;  // of eight rows of x_proj
constexpr int LINE = 8 * TILES + 2;

// Eight neighbouring elements of a row of x_proj.
__device__ __forceinline__ uint4 load_weights(const weight_t* from) {
#if WEIGHT_BF16
    return *(const uint4*)from;
#else
    const float4 a = *(const float4*)from, b = *(const float4*)(from + 4);
    uint4 v;
    v.x = bf16_pair(a.x, a.y), v.y = bf16_pair(a.z, a.w), v.z = bf16_pair(b.x, b.y), v.w = bf16_pair(b.z, b.w);
    return v;
#endif
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, TILES > 8 ? 3 : 4) input_projection(
    const io_t* __restrict__ x, const weight_t* p0, const weight_t* p1, const float* w0, const float* w1, const float* b0,
    const float* b1, io_t* __restrict__ u, io_t* __restrict__ low, float* __restrict__ bc, int batch, int length, INDEX xb) {
    __shared__ float sums[WARPS][TOKENS][LINE];
    const int d = blockIdx.x, warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
    const int runs = (length + RUN - 1) / RUN;  // of a sample
    const int run = blockIdx.y * 8 + group, b = run / runs, start = run % runs * RUN;
    const int live = b < batch ? length : 0;
    const bool reverse = d ? REV1 : REV0;
    const weight_t* weight = d ? p1 : p0;
    float acc[RUN / 2][TILES][4];
#pragma unroll
    for (int i = 0; i < RUN / 2; ++i)
#pragma unroll
        for (int j = 0; j < TILES; ++j) acc[i][j][0] = acc[i][j][1] = acc[i][j][2] = acc[i][j][3] = 0.0f;

#pragma unroll 1
    for (int channel = 32 * warp + 8 * member; channel < E; channel += 32 * WARPS) {
        Pack<8> rows[RUN + HALO], result[RUN];
        load_rows<RUN + HALO, XL>(rows, x, b * xb + channel, reverse ? start : start - HALO, live);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            Filter<4> filter;
            filter.load(d ? w1 : w0, d ? b1 : b0, channel + 4 * half);
#pragma unroll
            for (int i = 0; i < RUN; ++i) {
                float v[4];
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    float sum = filter.bias[c];
#pragma unroll
                    for (int k = 0; k < K; ++k)
                        sum += filter.weight[k][c] * rows[reverse ? i + K - 1 - k : i + k].get(4 * half + c);
                    v[c] = sum * sigmoid(sum);
                }
                result[i].set_pair(2 * half, v[0], v[1]);
                result[i].set_pair(2 * half + 1, v[2], v[3]);
            }
        }
        io_t* to = u + ((((INDEX)d * batch + b) * length + start) * E + channel);
#pragma unroll
        for (int i = 0; i < RUN; ++i)
            if (start + i < live) result[i].store_vector(to + i * E);
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
            uint4 v = {0, 0, 0, 0};
            if (8 * j + group < W) v = load_weights(weight + ((8 * j + group) * E + channel));
#pragma unroll
            for (int i = 0; i < RUN / 2; ++i) {
                const u32 *first = result[2 * i].word, *second = result[2 * i + 1].word;
                multiply(acc[i][j], first[0], second[0], first[1], second[1], v.x, v.y);
                multiply(acc[i][j], first[2], second[2], first[3], second[3], v.z, v.w);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < RUN / 2; ++i)
#pragma unroll
        for (int j = 0; j < TILES; ++j)
#pragma unroll
            for (int q = 0; q < 2; ++q)
                *(float2*)&sums[warp][group * RUN + 2 * i + q][8 * j + 2 * member] =
                    make_float2(acc[i][j][2 * q], acc[i][j][2 * q + 1]);
    __syncthreads();
    for (int i = threadIdx.x; i < TOKENS * W; i += 32 * WARPS) {
        const int token = i / W, row = i % W, of = blockIdx.y * 8 + token / RUN;
        const int sample = of / runs, at = of % runs * RUN + token % RUN;
        if (sample >= batch || at >= length) continue;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += sums[w][token][row];
        const INDEX line = ((INDEX)d * batch + sample) * length + at;
        if (row < R)
            low[line * R + row] = narrow(sum);
        else
            bc[line * (W - R) + row - R] = sum;
    }
}
