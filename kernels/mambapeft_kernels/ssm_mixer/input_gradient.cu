// The gradient of a block's x from those of the scans' u and of x_proj's output, in one pass over du: through x_proj,
// SiLU and the depthwise convolution of every direction. Macros: E channels, K taps, G directions, REV0, REV1, W columns
// of x_proj's output, WEIGHT_BF16 (x_proj is stored in bfloat16, else in float32); strides of a token in x (XL) and dx
// (GL); INDEX, the type that counts every tensor's elements.
//
// A thread owns four neighbouring channels over RUN tokens of one sample. With the HALO tokens whose gradients reach
// into them these are 16, which eight tensor-core products (m16n8k16, two tokens of each thread) finish in registers:
// rows are channels, columns tokens, and both, like the sum's index, are numbered so that a thread gets what it owns.
// So du is read once, and never written.

constexpr int RUN = 16 - HALO;
constexpr int WARPS = 4;
constexpr int HALVES = (W + 31) / 32;           // a row of dproj is summed over in pieces of 32
constexpr int LINE = (HALVES | 1) * 32;         // an odd number of pieces: two tokens' rows lie in different banks
constexpr int ROWS = 3 * RUN + 16;              // tokens that the four runs of a warp read
constexpr int STEP = W % 8 ? W % 4 ? 2 : 4 : 8;  // elements that a thread copies at once

// dproj of the block's tokens from `first` on; zeros for tokens and columns that do not exist.
__device__ __forceinline__ void stage(io_t (*tile)[LINE], const io_t* dproj, int first, int length) {
    constexpr int PIECES = HALVES * 32 / STEP;
    for (int i = threadIdx.x; i < ROWS * PIECES; i += 32 * WARPS) {
        const int row = i / PIECES, column = i % PIECES * STEP, token = first + row;
        Pack<STEP> piece;
        piece.clear();
        if (column < W && token >= 0 && token < length) piece.load_vector(dproj + ((INDEX)token * W + column));
        piece.store_vector(tile[row] + column);
    }
}

// x_proj's columns of four channels, as the products want them: piece by piece 8 rows of x_proj from `row` on.
struct Projection {
    u32 operand[2][2 * HALVES][4];

    __device__ __forceinline__ void load(const weight_t* weight, int channel, int row) {
#pragma unroll
        for (int pair = 0; pair < 4 * HALVES; ++pair) {
            const int k = pair / 4 * 32 + row + pair % 4 * 2;
            u32 found[4];
            if (k < W)  // and k + 1: W is even
                load_pair(found, weight + (k * E + channel));
            else
                found[0] = found[1] = found[2] = found[3] = 0;
#pragma unroll
            for (int c = 0; c < 4; ++c) operand[c / 2][pair / 2][pair % 2 * 2 + c % 2] = found[c];
        }
    }

    // Of each channel two rows.
    __device__ __forceinline__ void load_pair(u32* found, const weight_t* from) {
#if WEIGHT_BF16
        const uint2 low = *(const uint2*)from, high = *(const uint2*)(from + E);
        found[0] = __byte_perm(low.x, high.x, 0x5410), found[1] = __byte_perm(low.x, high.x, 0x7632);
        found[2] = __byte_perm(low.y, high.y, 0x5410), found[3] = __byte_perm(low.y, high.y, 0x7632);
#else
        const float4 low = *(const float4*)from, high = *(const float4*)(from + E);
        found[0] = bf16_pair(low.x, high.x), found[1] = bf16_pair(low.y, high.y);
        found[2] = bf16_pair(low.z, high.z), found[3] = bf16_pair(low.w, high.w);
#endif
    }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, 3) input_gradient(
    const io_t* __restrict__ du, const io_t* __restrict__ dproj, const io_t* __restrict__ x, const weight_t* p0,
    const weight_t* p1, const float* w0, const float* w1, const float* b0, const float* b1, io_t* __restrict__ dx,
    int batch, int length, INDEX xb, INDEX gb) {
    __shared__ __align__(16) io_t tile[G][ROWS][LINE];
    const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4, b = blockIdx.z;
    const int channel = (blockIdx.x * WARPS + threadIdx.x / 32) * 32 + 4 * group;
    const int first = blockIdx.y * 4 * RUN, start = first + member * RUN;
#pragma unroll
    for (int d = 0; d < G; ++d)
        stage(tile[d], dproj + ((INDEX)d * batch + b) * length * W, (d ? REV1 : REV0) ? first - HALO : first, length);
    __syncthreads();
    if (channel >= E) return;  // whole warps: E is a multiple of 32
    Pack<4> rows[RUN + 2 * HALO];
    load_rows<RUN + 2 * HALO, XL>(rows, x, b * xb + channel, start - HALO, length);
    float sum[RUN][4];
#pragma unroll
    for (int i = 0; i < RUN; ++i) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0.0f;
#pragma unroll
    for (int d = 0; d < G; ++d) {
        const bool reverse = d ? REV1 : REV0;
        Pack<4> grad[16];
        const int from = reverse ? start - HALO : start;
        load_rows<16, E>(grad, du, ((INDEX)d * batch + b) * length * E + channel, from, length);
        Projection projection;
        projection.load(d ? p1 : p0, channel, 8 * member);
        Filter<4> filter;
        filter.load(d ? w1 : w0, d ? b1 : b0, channel);
        const io_t* operand = tile[d][RUN * (group / 2) + group % 2] + 8 * member;
#pragma unroll
        for (int i = 0; i < 16; i += 2) {
            float g[4][2];  // channels, two tokens: in the order of the products' results
#pragma unroll
            for (int c = 0; c < 4; ++c) g[c][0] = grad[i].get(c), g[c][1] = grad[i + 1].get(c);
#pragma unroll
            for (int half = 0; half < HALVES; ++half) {
                const uint4 v = *(const uint4*)(operand + i * LINE + 32 * half);
#pragma unroll
                for (int c = 0; c < 4; c += 2) {
                    const u32 *low = projection.operand[c / 2][2 * half], *high = projection.operand[c / 2][2 * half + 1];
                    multiply(g[c], low[0], low[1], low[2], low[3], v.x, v.y);
                    multiply(g[c], high[0], high[1], high[2], high[3], v.z, v.w);
                }
            }
#pragma unroll
            for (int q = 0; q < 2; ++q) {
                const int at = reverse ? i + q : i + q + HALO;  // the row of x of token from + i + q
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const float pre = preactivation(rows, at, filter, c, reverse), gate = sigmoid(pre);
                    const float slope = g[c][q] * gate * (1.0f + pre * (1.0f - gate));
#pragma unroll
                    for (int k = 0; k < K; ++k) {
                        const int into = (reverse ? at + (K - 1 - k) : at - (K - 1 - k)) - HALO;
                        if (into >= 0 && into < RUN) sum[into][c] += filter.weight[k][c] * slope;
                    }
                }
            }
        }
    }
    io_t* to = dx + (b * gb + (INDEX)start * GL + channel);
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
        if (start + i >= length) break;
        Pack<4> result;
        result.set_pair(0, sum[i][0], sum[i][1]);
        result.set_pair(1, sum[i][2], sum[i][3]);
        result.store_vector(to + i * GL);
    }
}
