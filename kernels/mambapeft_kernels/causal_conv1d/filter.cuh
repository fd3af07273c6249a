// What every kernel with the depthwise convolution has in common. Macros: K taps, INDEX.

constexpr int HALO = K - 1;

// The taps and the bias of WIDTH neighbouring channels.
template <int WIDTH>
struct Filter {
    float weight[K][WIDTH], bias[WIDTH];

    __device__ __forceinline__ void load(const float* w, const float* b, int channel) {
#pragma unroll
        for (int c = 0; c < WIDTH; ++c) {
            bias[c] = b[channel + c];
            const float* taps = w + (channel + c) * K;
            if constexpr (WIDTH == 4 && K == 4) {  // its only user has taps that are aligned
                const float4 four = *(const float4*)taps;
                weight[0][c] = four.x, weight[1][c] = four.y, weight[2][c] = four.z, weight[3][c] = four.w;
            } else {
#pragma unroll
                for (int k = 0; k < K; ++k) weight[k][c] = taps[k];
            }
        }
    }
};

// Rows [start, start + COUNT) of a sample, LINE elements apart; zeros outside of it.
template <int COUNT, int LINE, int WIDTH>
__device__ __forceinline__ void load_rows(Pack<WIDTH>* rows, const io_t* base, INDEX corner, int start, int length) {
    const io_t* from = base + (corner + start * LINE);
#pragma unroll
    for (int r = 0; r < COUNT; ++r) {
        rows[r].clear();
        if (start + r >= 0 && start + r < length) rows[r].load_vector(from + r * LINE);
    }
}

// The convolution at the row `at` of `x` (which holds the neighbours), before SiLU.
template <int WIDTH>
__device__ __forceinline__ float preactivation(
    const Pack<WIDTH>* x, int at, const Filter<WIDTH>& f, int c, bool reverse) {
    float sum = f.bias[c];
#pragma unroll
    for (int k = 0; k < K; ++k) sum += f.weight[k][c] * x[reverse ? at + (K - 1 - k) : at - (K - 1 - k)].get(c);
    return sum;
}
