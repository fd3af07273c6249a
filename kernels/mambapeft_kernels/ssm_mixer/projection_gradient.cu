// The gradient of x_proj's output [dt | B | C]: that of Δ before softplus through dt_proj, and the sum of the scans'
// partial gradients of B|C. Macros: E channels, R rank, S = 2N, PARTS partial sums, WARPS of a block,
// WEIGHT_BF16; INDEX, the type that counts every tensor's elements.
//
// A block owns 32 tokens of one direction, a warp 32 of its channels at a time. Its rows of draw are the operand of a
// tensor-core product as they come; tokens and channels are numbered accordingly. Warps' sums meet in shared memory.

constexpr int RUN = 4, TOKENS = 8 * RUN, THREADS = 32 * WARPS;
constexpr int TILES = (R + 7) / 8;  // of eight columns of dt_proj
constexpr int LINE = 8 * TILES + 2;

// Of column `column` of dt_proj the rows of eight channels, in pairs.
__device__ __forceinline__ void load_weights(u32* pairs, const weight_t* weight, int channel, int column) {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
        const weight_t* from = weight + (channel + 2 * p) * R + column;
#if WEIGHT_BF16
        pairs[p] = column < R ? from[0] | (u32)from[R] << 16 : 0;
#else
        pairs[p] = column < R ? bf16_pair(from[0], from[R]) : 0;
#endif
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) projection_gradient(
    const io_t* __restrict__ draw, const weight_t* w0, const weight_t* w1, const io_t* __restrict__ dbc,
    io_t* __restrict__ dproj, int tokens, INDEX part_stride) {
    __shared__ float sums[WARPS][TOKENS][LINE];
    const int d = blockIdx.y, warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
    const int first = blockIdx.x * TOKENS, start = first + group * RUN;
    const weight_t* weight = d ? w1 : w0;
    const INDEX corner = (INDEX)d * tokens;

    for (int i = 4 * threadIdx.x; i < TOKENS * S; i += 4 * THREADS) {
        const int token = first + i / S;
        if (token >= tokens) break;
        const io_t* from = dbc + ((corner + first) * S + i);
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            Pack<4> piece;
            piece.load_vector(from + part * part_stride);
#pragma unroll
            for (int k = 0; k < 4; ++k) sum[k] += piece.get(k);
        }
        io_t* to = dproj + ((corner + token) * (R + S) + R + i % S);
#pragma unroll
        for (int k = 0; k < 4; ++k) to[k] = narrow(sum[k]);
    }

    float acc[RUN / 2][TILES][4];
#pragma unroll
    for (int i = 0; i < RUN / 2; ++i)
#pragma unroll
        for (int j = 0; j < TILES; ++j) acc[i][j][0] = acc[i][j][1] = acc[i][j][2] = acc[i][j][3] = 0.0f;
#pragma unroll 3
    for (int channel = 32 * warp + 8 * member; channel < E; channel += 32 * WARPS) {
        Pack<8> rows[RUN];
#pragma unroll
        for (int i = 0; i < RUN; ++i) {
            rows[i].clear();
            if (start + i < tokens) rows[i].load_vector(draw + ((corner + start + i) * E + channel));
        }
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
            u32 pairs[4];
            load_weights(pairs, weight, channel, 8 * j + group);
#pragma unroll
            for (int i = 0; i < RUN / 2; ++i) {
                const u32 *a = rows[2 * i].word, *b = rows[2 * i + 1].word;
                multiply(acc[i][j], a[0], b[0], a[1], b[1], pairs[0], pairs[1]);
                multiply(acc[i][j], a[2], b[2], a[3], b[3], pairs[2], pairs[3]);
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
    for (int i = threadIdx.x; i < TOKENS * R; i += THREADS) {
        const int token = i / R, column = i % R;
        if (first + token >= tokens) break;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += sums[w][token][column];
        dproj[(corner + first + token) * (R + S) + column] = narrow(sum);
    }
}
