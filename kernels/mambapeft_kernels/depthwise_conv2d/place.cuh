// What a thread of the depthwise kernels owns: two channels and ROWS rows of one map. A warp reads 64 channels side by
// side. Macros as in conv.cu.

constexpr int PAIRS = E / 2, GROUPS = (HEIGHT + ROWS - 1) / ROWS;

struct Place {
    int pair;  // of channels
    i64 item;  // of all maps' groups of rows

    // The last maps first: the product before has written them last, and the one behind begins with the first.
    __device__ __forceinline__ Place() {
        const unsigned block = gridDim.x - 1 - blockIdx.x, across = (E + 63) / 64;
        pair = block % across * 32 + threadIdx.x % 32;
        item = (i64)(block / across) * 4 + threadIdx.x / 32;
    }

    __device__ __forceinline__ bool is_outside(int batch) const { return pair >= PAIRS || item >= (i64)batch * GROUPS; }
    __device__ __forceinline__ int first_row() const { return (int)(item % GROUPS) * ROWS; }
    __device__ __forceinline__ i64 map() const { return item / GROUPS * (HEIGHT * WIDTH) * E + 2 * pair; }
};
