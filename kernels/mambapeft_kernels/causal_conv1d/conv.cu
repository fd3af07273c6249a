// The depthwise convolution + SiLU of every direction, and its gradients. Macros: E channels, K taps, G directions, REV0,
// REV1, NEED_W (gradients of the filters); strides of a token in x (XL) and dx (GL); INDEX, the type that counts every
// tensor's elements.
//
// A thread owns two neighbouring channels over RUN tokens of one sample: a warp reads whole 128-byte lines (bfloat16)
// and every row of x is read once for all taps and directions. All loops unroll, so the rows stay in registers.

constexpr int RUN = 16;
constexpr int HALO = K - 1;

struct Filter {
    float weight[K][2], bias[2];

    __device__ __forceinline__ void load(const float* w, const float* b, int channel) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            bias[c] = b[channel + c];
#pragma unroll
            for (int k = 0; k < K; ++k) weight[k][c] = w[(channel + c) * K + k];
        }
    }
};

// Rows [start, start + COUNT) of a sample; zeros outside of it.
template <int COUNT, int LINE>
__device__ __forceinline__ void load_rows(Pack<2>* rows, const io_t* base, INDEX corner, int start, int length) {
    const io_t* from = base + (corner + start * LINE);
#pragma unroll
    for (int r = 0; r < COUNT; ++r) {
        rows[r].clear();
        if (start + r >= 0 && start + r < length) rows[r].load_vector(from + r * LINE);
    }
}

// The convolution at the row `at` of `x` (which holds the neighbours), before SiLU.
__device__ __forceinline__ float preactivation(const Pack<2>* x, int at, const Filter& f, int c, bool reverse) {
    float sum = f.bias[c];
#pragma unroll
    for (int k = 0; k < K; ++k) sum += f.weight[k][c] * x[reverse ? at + (K - 1 - k) : at - (K - 1 - k)].get(c);
    return sum;
}

extern "C" __global__ void __launch_bounds__(128) conv_forward(
    const io_t* __restrict__ x, const float* w0, const float* w1, const float* b0, const float* b1,
    io_t* __restrict__ u, int batch, int length, INDEX xb) {
    const int channel = (blockIdx.x * 128 + threadIdx.x) * 2, start = blockIdx.y * RUN, b = blockIdx.z;
    if (channel >= E) return;
    Pack<2> rows[RUN + 2 * HALO];
    load_rows<RUN + 2 * HALO, XL>(rows, x, b * xb + channel, start - HALO, length);
#pragma unroll
    for (int d = 0; d < G; ++d) {
        const bool reverse = d ? REV1 : REV0;
        Filter filter;
        filter.load(d ? w1 : w0, d ? b1 : b0, channel);
        io_t* to = u + ((((INDEX)d * batch + b) * length + start) * E + channel);
#pragma unroll
        for (int i = 0; i < RUN; ++i) {
            if (start + i >= length) break;
            float v[2];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                v[c] = preactivation(rows, i + HALO, filter, c, reverse);
                v[c] *= sigmoid(v[c]);
            }
            Pack<2> result;
            result.set_pair(0, v[0], v[1]);
            result.store_vector(to + i * E);
        }
    }
}

extern "C" __global__ void __launch_bounds__(128) conv_backward(
    const io_t* __restrict__ du, const io_t* __restrict__ x, const float* w0, const float* w1, const float* b0,
    const float* b1, io_t* __restrict__ dx, float* __restrict__ dw, int batch, int length, INDEX xb, INDEX gb) {
    const int channel = (blockIdx.x * 128 + threadIdx.x) * 2, start = blockIdx.y * RUN, b = blockIdx.z;
    if (channel >= E) return;
    Pack<2> rows[RUN + 2 * HALO];
    load_rows<RUN + 2 * HALO, XL>(rows, x, b * xb + channel, start - HALO, length);
    float sum[RUN][2];
#pragma unroll
    for (int i = 0; i < RUN; ++i) sum[i][0] = sum[i][1] = 0.0f;
#pragma unroll
    for (int d = 0; d < G; ++d) {
        const bool reverse = d ? REV1 : REV0;
        Filter filter;
        filter.load(d ? w1 : w0, d ? b1 : b0, channel);
        // Tokens whose u reads this run: it and HALO tokens behind it (before it, when reading backwards).
        const int from = reverse ? start - HALO : start;
        Pack<2> grad[RUN + HALO];
        load_rows<RUN + HALO, E>(grad, du, ((INDEX)d * batch + b) * length * E + channel, from, length);
#if NEED_W
        float own[K + 1][2];  // the sums over this run: of each tap, and of the bias
#pragma unroll
        for (int k = 0; k <= K; ++k) own[k][0] = own[k][1] = 0.0f;
#endif
#pragma unroll
        for (int i = 0; i < RUN + HALO; ++i) {
            const int at = reverse ? i : i + HALO;  // the row of x of token from + i
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const float pre = preactivation(rows, at, filter, c, reverse), gate = sigmoid(pre);
                const float g = grad[i].get(c) * gate * (1.0f + pre * (1.0f - gate));
#pragma unroll
                for (int k = 0; k < K; ++k) {
                    const int into = (reverse ? at + (K - 1 - k) : at - (K - 1 - k)) - HALO;
                    if (into >= 0 && into < RUN) sum[into][c] += filter.weight[k][c] * g;
                }
#if NEED_W
                if (at < HALO || at >= RUN + HALO) continue;  // a token of another run
                own[K][c] += g;
#pragma unroll
                for (int k = 0; k < K; ++k) own[k][c] += g * rows[reverse ? at + (K - 1 - k) : at - (K - 1 - k)].get(c);
#endif
            }
        }
#if NEED_W
        float* partial = dw + ((((INDEX)blockIdx.y * batch + b) * G + d) * (K + 1) * E + channel);
#pragma unroll
        for (int k = 0; k <= K; ++k) *(float2*)(partial + k * E) = make_float2(own[k][0], own[k][1]);
#endif
    }
    io_t* to = dx + (b * gb + (INDEX)start * GL + channel);
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
        if (start + i >= length) break;
        Pack<2> result;
        result.set_pair(0, sum[i][0], sum[i][1]);
        result.store_vector(to + i * GL);
    }
}
