// Products of bfloat16 on the tensor cores, and x_proj or dt_proj as their operand. Macro: WEIGHT_BF16 (the weight is
// stored in bfloat16, else in float32).

#if WEIGHT_BF16
typedef unsigned short weight_t;
#else
typedef float weight_t;
#endif

__device__ __forceinline__ u32 bf16_pair(float lo, float hi) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
    return pair;
}

// sum (16 x 8) += a (16 x 16) b (16 x 8). In terms of g = lane / 4 and c = lane % 4: a0, a2 are elements of the row g, a1,
// a3 of the row g + 8; b of the column g; sum of the columns 2c, 2c + 1. A lane's a and b have the same four of the 16.
__device__ __forceinline__ void multiply(float* sum, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
