// What both directions of the pass share. Macros: HEIGHT, WIDTH of the map; E channels; R dt_rank, even; PP elements of a
// direction in a row of `proj`, [δ (R) | B | C | zeros], a multiple of 8; WARPS of a block; HAS_FIRST (initial states),
// HAS_OFFSET (state offsets); EXACT (the samples fill every block); OFFSET, the type that counts the bytes of every tensor.
//
// One state a channel (N = 1), bfloat16. A warp owns 16 channels of four samples and a lane two channels of one sample,
// for the whole sequence: the recurrence is a loop in registers. Δ is a matrix product, [16 channels, R] times [R, two
// steps of four samples], whose result has just this layout: columns 2t and 2t + 1 lie in lane t of a row's four lanes.

constexpr int T = 8;  // steps of a chunk
constexpr int L = HEIGHT * WIDTH;
constexpr int ALL_CHUNKS = (L + T - 1) / T;             // of a sequence
constexpr int SAMPLES = 4;                             // of a block
constexpr int CB = 16 * WARPS, THREADS = 32 * WARPS;   // channels, threads
constexpr int KT = (R + 7) / 8, PIECES = PP / 8;       // 16-byte pieces of δ, of a row
constexpr int ROWS = SAMPLES * T;                      // of a chunk: (step / 2, sample, step % 2)
constexpr int PITCH = PIECES % 2 ? PP : PP + 8;        // of a row in shared memory: ldmatrix meets no bank twice
constexpr int TP = CB + 8;                             // the same of the block's channels of a step and sample
#define WHOLE (HEIGHT * WIDTH % 8 == 0)  // every chunk has all of its steps
constexpr float LN2 = 0.6931471805599453f;

__device__ __forceinline__ u32 smem(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ u32 pack(float lo, float hi) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
    return pair;
}

// Chunks of the segment that begins with chunk `from`: the last one may have fewer than the others. Where chunks are WHOLE,
// nothing else stops a scan behind the end of the sequence.
__device__ __forceinline__ int chunks_from(int from, int chunks) {
    return from + chunks < ALL_CHUNKS ? chunks : ALL_CHUNKS - from;
}

// The places that chunks read, of some in turn; beyond the last step that of the last.
template <int CHUNKS = 3>
struct Places {
    int at[CHUNKS][T];

    __device__ __forceinline__ void find(int k, int chunk, int slot) {
        if (threadIdx.x >= T) return;
        const int step = chunk * T + threadIdx.x, within = step < 0 ? 0 : step < L ? step : L - 1;
        const int s = k < 2 ? within : L - 1 - within;
        at[slot][threadIdx.x] = k & 1 ? s % HEIGHT * WIDTH + s / HEIGHT : s;
    }
};

__device__ __forceinline__ void copy_async(io_t* to, const void* from, bool live) {  // 16 bytes, zeros unless live
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem(to)), "l"(from), "r"(live ? 16 : 0)
                 : "memory");
}

// A thread's share of a chunk's rows of `proj`; zeros beyond the last step or sample, so that B = C = 0 there.
struct RowCopier {
    static constexpr int COUNT = (ROWS * PIECES + THREADS - 1) / THREADS;

    const io_t* from[COUNT];
    int to[COUNT], step[COUNT];  // step: of the chunk, out of reach where there is nothing to copy

    __device__ __forceinline__ RowCopier(const io_t* proj, int k, int first_sample, int batch) {
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
            const int v = n * THREADS + threadIdx.x, row = v / PIECES, piece = v % PIECES * 8;
            const int sample = first_sample + row / 2 % SAMPLES;
            const bool live = v < ROWS * PIECES && (EXACT || sample < batch);
            from[n] = proj + (live ? (i64)sample * L * (4 * PP) + k * PP + piece : 0);
            to[n] = row * PITCH + piece;
            step[n] = v >= ROWS * PIECES ? -1 : (row / 8 * 2 + row % 2) | (live ? 0 : 1 << 20);
        }
    }

    __device__ __forceinline__ void start(io_t* rows, const int* places, int chunk) const {
#pragma unroll
        for (int n = 0; n < COUNT; ++n)
            if (step[n] >= 0)
                copy_async(rows + to[n], from[n] + places[step[n] & (T - 1)] * (4 * PP),
                           (WHOLE && EXACT) || chunk * T + step[n] < L);
    }
};

// A thread's share of a chunk's tile of a tensor [B, L, E]: two pieces of 8 channels. Whole rows of the block's channels
// are read and written side by side; where lanes own two channels each, a warp would ask for four sectors at a time.
struct TileCopier {
    static constexpr int COUNT = ROWS * CB / 8 / THREADS, ACROSS = CB / 8;
    static_assert(COUNT * THREADS * 8 == ROWS * CB, "every thread has as many pieces");

    OFFSET first[COUNT], bytes[COUNT];  // of the sample and channels, and of the piece in the chunk that was found last
    int to[COUNT], step[COUNT];
    bool live[COUNT];

    __device__ __forceinline__ TileCopier(int first_sample, int batch, int first_channel) {
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
            const int v = n * THREADS + threadIdx.x, row = v / ACROSS, piece = v % ACROSS * 8;
            const int sample = first_sample + row / 2 % SAMPLES;
            const bool there = EXACT || sample < batch;
            first[n] = ((OFFSET)(there ? sample : 0) * (L * E) + first_channel + piece) * 2;
            to[n] = row * TP + piece;
            step[n] = (row / 8 * 2 + row % 2) | (there ? 0 : 1 << 20);
        }
    }

    __device__ __forceinline__ void find(const int* places, int chunk) {
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
            bytes[n] = first[n] + (OFFSET)places[step[n] & (T - 1)] * (2 * E);
            live[n] = (WHOLE && EXACT) || chunk * T + step[n] < L;
        }
    }

    __device__ __forceinline__ void start(io_t* tile, const io_t* from) const {
#pragma unroll
        for (int n = 0; n < COUNT; ++n) copy_async(tile + to[n], (const char*)from + bytes[n], live[n]);
    }

    __device__ __forceinline__ void read(Pack<8>* into, const io_t* from) const {
#pragma unroll
        for (int n = 0; n < COUNT; ++n) into[n].load_vector((const io_t*)((const char*)from + bytes[n]));
    }

    // Writes a tile, and with ADD what was read before on top of it.
    template <bool ADD>
    __device__ __forceinline__ void write(io_t* out, const io_t* tile, const Pack<8>* before) const {
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
            Pack<8> piece;
            piece.load_vector(tile + to[n]);
            if (ADD)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    piece.set_pair(i, piece.get(2 * i) + before[n].get(2 * i), piece.get(2 * i + 1) + before[n].get(2 * i + 1));
            if (live[n]) piece.store_vector((io_t*)((char*)out + bytes[n]));
        }
    }
};

__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
}

__device__ __forceinline__ void multiply(float* out, const u32* a, const u32* b, const float* add) {  // 16 x 8 x 16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(out[0]), "=f"(out[1]), "=f"(out[2]), "=f"(out[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(add[0]), "f"(add[1]), "f"(add[2]),
          "f"(add[3]));
}

__device__ __forceinline__ void multiply_half(float* out, const u32* a, u32 b, const float* add) {  // 16 x 8 x 8
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
        : "=f"(out[0]), "=f"(out[1]), "=f"(out[2]), "=f"(out[3])
        : "r"(a[0]), "r"(a[1]), "r"(b), "f"(add[0]), "f"(add[1]), "f"(add[2]), "f"(add[3]));
}

// Four matrices of 8 x 8; lanes 8 i to 8 i + 7 say where the rows of matrix i lie.
__device__ __forceinline__ void load_matrices(u32* into, const io_t* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(into[0]), "=r"(into[1]), "=r"(into[2]), "=r"(into[3])
                 : "r"(smem(row))
                 : "memory");
}

__device__ __forceinline__ void load_turned(u32* into, const io_t* row) {  // their transposes
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(into[0]), "=r"(into[1]), "=r"(into[2]), "=r"(into[3])
                 : "r"(smem(row))
                 : "memory");
}

// Every direction adds its D · u at the same place: only the sum counts.
__device__ __forceinline__ float skip_of(const float* d, int channel) {
    return d[channel] + d[E + channel] + d[2 * E + channel] + d[3 * E + channel];
}

// What a lane needs of direction k: dt_proj's rows of its two channels, as the product's left side.
struct Direction {
    u32 weight[KT][2];
    float bias[4];
    float A[2];  // in units of log2

    __device__ __forceinline__ void load(const float* w, const float* b, const float* a_logs, int k, int channel, int t) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int row = k * E + channel + c;
#pragma unroll
            for (int q = 0; q < KT; ++q) {
                const int r = 8 * q + 2 * t;
                weight[q][c] = r < R ? pack(w[row * R + r], w[row * R + r + 1]) : 0;
            }
            bias[2 * c] = bias[2 * c + 1] = b[row];
            A[c] = -LOG2E * ex2(LOG2E * a_logs[row]);
        }
    }

    // Δ before softplus of steps 2 j and 2 j + 1: {channel 0: two steps, channel 1: two steps}.
    __device__ __forceinline__ void raw(float* out, const io_t* rows, int j, int lane) const {
        u32 b[(KT + 3) / 4 * 4];
#pragma unroll
        for (int q = 0; q < KT; q += 4) {
            const int piece = q + lane / 8;
            load_matrices(b + q, rows + (8 * j + lane % 8) * PITCH + 8 * (piece < PIECES ? piece : 0));
        }
        const float* add = bias;
#pragma unroll
        for (int q = 0; q + 1 < KT; q += 2) {
            multiply(out, weight[q], b + q, add);
            add = out;
        }
        if constexpr (KT % 2) multiply_half(out, weight[KT - 1], b[KT - 1], add);
    }
};

// softplus; e becomes e^-|v|. The polynomial of log1p has the smallest relative error, 6e-5.
__device__ __forceinline__ float softplus(float v, float& e) {
    e = ex2(-LOG2E * fabsf(v));
    const float p = 0.99994326f + e * (-0.4969778f + e * (0.30630088f + e * (-0.15742712f + e * 0.04134726f)));
    return fmaxf(v, 0.0f) + e * p;
}

// B and C of a lane's sample at a step of the chunk.
__device__ __forceinline__ u32 inputs_of(const io_t* rows, int step, int t) {
    return *(const u32*)(rows + (step / 2 * 8 + 2 * t + step % 2) * PITCH + R);
}

// A lane's two channels in a tile; `local` counts within the block.
__device__ __forceinline__ u32* cell_of(io_t* tile, int step, int t, int local) {
    return (u32*)(tile + (step / 2 * 8 + 2 * t + step % 2) * TP + local);
}

// The state (BACKWARD: the adjoint) with which a segment is entered, from what the segments before make of zero.
template <bool BACKWARD>
__device__ __forceinline__ float entered(float h, const float* decay, const float* end, float A, int sample, int k,
                                         int segment, int segments, int channel) {
    const int passed = BACKWARD ? segments - 1 - segment : segment;
    for (int i = 0; i < passed; ++i) {
        const i64 s = (((i64)sample * 4 + k) * segments + (BACKWARD ? segments - 1 - i : i)) * E + channel;
        h = ex2(A * decay[s]) * h + end[s];
    }
    return h;
}
