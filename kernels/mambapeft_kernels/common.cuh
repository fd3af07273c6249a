// Shared by every .cu file; the launcher puts it in front of them. No headers: NVRTC alone compiles it. Macros: IO_BF16 (1: bfloat16 in and out, 0: float32), ALIGNED (16-byte accesses are possible).

typedef unsigned int u32;
typedef long long i64;
#if IO_BF16
typedef unsigned short io_t;
#else
typedef float io_t;
#endif

constexpr float LOG2E = 1.4426950408889634f;

__device__ __forceinline__ float ex2(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

__device__ __forceinline__ float rcp(float v) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

__device__ __forceinline__ float sigmoid(float v) { return rcp(1.0f + ex2(-LOG2E * v)); }

// 1 - exp(-v): the derivative of softplus in terms of its value; a series where the subtraction would cancel, as long as
// the accuracy of the results asks for.
__device__ __forceinline__ float one_minus_exp(float v) {
#if IO_BF16
    return v < 0.03f ? v - v * v * 0.5f : 1.0f - ex2(-LOG2E * v);
#else
    float series = v * (1.0f - v * 0.5f * (1.0f - v * (1.0f / 3) * (1.0f - v * 0.25f * (1.0f - v * 0.2f))));
    return v < 0.1f ? series : 1.0f - ex2(-LOG2E * v);
#endif
}

__device__ __forceinline__ float widen(io_t v) {
#if IO_BF16
    return __uint_as_float((u32)v << 16);
#else
    return v;
#endif
}

__device__ __forceinline__ io_t narrow(float v) {
#if IO_BF16
    io_t r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
#else
    return v;
#endif
}

// COUNT consecutive elements held as the 32-bit words they came in.
template <int COUNT>
struct Pack {
    static constexpr int WORDS = COUNT * sizeof(io_t) / 4;
    u32 word[WORDS];

    __device__ __forceinline__ float get(int k) const {
#if IO_BF16
        return __uint_as_float(k & 1 ? word[k >> 1] & 0xffff0000u : word[k >> 1] << 16);
#else
        return __uint_as_float(word[k]);
#endif
    }

    __device__ __forceinline__ void set_pair(int k, float lo, float hi) {  // elements 2k and 2k + 1
#if IO_BF16
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word[k]) : "f"(hi), "f"(lo));
#else
        word[2 * k] = __float_as_uint(lo);
        word[2 * k + 1] = __float_as_uint(hi);
#endif
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int w = 0; w < WORDS; ++w) word[w] = 0;
    }

    __device__ __forceinline__ void load_vector(const io_t* p) {
        if constexpr (WORDS % 4 == 0) {
#pragma unroll
            for (int w = 0; w < WORDS; w += 4) *(uint4*)(word + w) = *(const uint4*)((const u32*)p + w);
        } else if constexpr (WORDS % 2 == 0) {
#pragma unroll
            for (int w = 0; w < WORDS; w += 2) *(uint2*)(word + w) = *(const uint2*)((const u32*)p + w);
        } else {
#pragma unroll
            for (int w = 0; w < WORDS; ++w) word[w] = ((const u32*)p)[w];
        }
    }

    __device__ __forceinline__ void store_vector(io_t* p) const {
        if constexpr (WORDS % 4 == 0) {
#pragma unroll
            for (int w = 0; w < WORDS; w += 4) *(uint4*)((u32*)p + w) = *(const uint4*)(word + w);
        } else if constexpr (WORDS % 2 == 0) {
#pragma unroll
            for (int w = 0; w < WORDS; w += 2) *(uint2*)((u32*)p + w) = *(const uint2*)(word + w);
        } else {
#pragma unroll
            for (int w = 0; w < WORDS; ++w) ((u32*)p)[w] = word[w];
        }
    }

    // The first `live` elements at p, `stride` apart; zeros for the rest.
    __device__ __forceinline__ void load(const io_t* p, i64 stride, int live) {
#if ALIGNED
        if (live > 0)
            load_vector(p);
        else
            clear();
#else
        clear();
#pragma unroll
        for (int k = 0; k < COUNT; ++k)
            if (k < live) put(k, p[k * stride]);
#endif
    }

    __device__ __forceinline__ void store(io_t* p, i64 stride, int live) const {
#if ALIGNED
        if (live > 0) store_vector(p);
#else
#pragma unroll
        for (int k = 0; k < COUNT; ++k)
            if (k < live) p[k * stride] = narrow(get(k));  // exact: get() widened the same element
#endif
    }

    // Of four elements: exchanges the two halves, and then the two elements of each half.
    __device__ __forceinline__ void exchange(bool halves, bool neighbours) {
        static_assert(COUNT == 4, "four elements");
        constexpr int HALF = WORDS / 2;
#pragma unroll
        for (int w = 0; w < HALF; ++w) {
            const u32 low = word[w], high = word[w + HALF];
            word[w] = halves ? high : low, word[w + HALF] = halves ? low : high;
        }
#if IO_BF16
#pragma unroll
        for (int w = 0; w < WORDS; ++w) word[w] = __funnelshift_l(word[w], word[w], neighbours ? 16 : 0);
#else
#pragma unroll
        for (int w = 0; w < WORDS; w += 2) {
            const u32 low = word[w], high = word[w + 1];
            word[w] = neighbours ? high : low, word[w + 1] = neighbours ? low : high;
        }
#endif
    }

    __device__ __forceinline__ void put(int k, io_t v) {
#if IO_BF16
        word[k >> 1] |= (u32)v << (k & 1 ? 16 : 0);
#else
        word[k] = __float_as_uint(v);
#endif
    }
};
