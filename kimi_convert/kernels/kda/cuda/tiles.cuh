// What the CUDA stages of KDA share: tiles of a chunk in shared memory, 16 x 16 x 16 products, gates.
//
// A tile is 64 tokens x 128 channels of bf16, in chunks of 16 bytes whose place in a row depends on
// the row, so that 8 rows of one column lie in different banks. compiler.py puts this text before
// that of a stage, and defines these macros: LAW (0 log decay, 1 softplus, 2 bounded), QK_NORM,
// BETA_LOGITS, PACKED, and G_SINGLE, BETA_SINGLE where those inputs are fp32 and not bf16. Nothing is
// included: NVRTC has no headers.

#define TOKENS 64
#define WIDTH 128
#define ROW_BYTES (WIDTH * 2)
#define TILE_BYTES (TOKENS * ROW_BYTES)
#define LOG2_E 1.4426950408889634f

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
typedef long long i64;

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float rsqrt_fast(float x) {
    float y;
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float max_nan(float a, float b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + exp2_fast(-x * LOG2_E)); }
__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ u32 bf16_pair(float a, float b) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
    return pair;
}
__device__ __forceinline__ u32 fp16_pair(float a, float b) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
    return pair;
}
__device__ __forceinline__ u32 mul_bf16(u32 a, u32 b) {
    u32 y;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(0x80008000u));
    return y;
}
__device__ __forceinline__ u32 address_of(const void* x) {
    return (u32)__cvta_generic_to_shared(x);
}
// Where 16 bytes of a row of 256 lie in a tile.
__device__ __forceinline__ u32 in_tile(int row, int chunk) {
    return row * ROW_BYTES + ((chunk ^ (row & 7) ^ ((row >> 5) << 2)) << 4);
}
// The same for a square of 64 x 64 16-bit values.
__device__ __forceinline__ u32 in_square(int row, int chunk) {
    return row * 128 + ((chunk ^ (row & 7)) << 4);
}
__device__ __forceinline__ void load4(u32 (&x)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load4_transposed(u32 (&x)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ u32 transposed(u32 x) {
    u32 y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
__device__ __forceinline__ void copy16(u32 to, const void* from, bool present) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(to), "l"(from), "r"(present ? 16 : 0) : "memory");
}
// c [16, 16] += a [16, 16] b [16, 16]; c is two tiles of 8 columns.
__device__ __forceinline__ void mma_bf16(float (&c)[8], const u32 (&a)[4], const u32 (&b)[4]) {
#pragma unroll
    for (int n = 0; n < 2; n++)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[4 * n]), "+f"(c[4 * n + 1]), "+f"(c[4 * n + 2]), "+f"(c[4 * n + 3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[2 * n]), "r"(b[2 * n + 1]));
}
__device__ __forceinline__ void mma_fp16(float (&c)[8], const u32 (&a)[4], const u32 (&b)[4]) {
#pragma unroll
    for (int n = 0; n < 2; n++)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[4 * n]), "+f"(c[4 * n + 1]), "+f"(c[4 * n + 2]), "+f"(c[4 * n + 3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[2 * n]), "r"(b[2 * n + 1]));
}
// A result as a left operand in fp16, and a left operand as a right one.
__device__ __forceinline__ void as_left(u32 (&a)[4], const float (&c)[8]) {
    a[0] = fp16_pair(c[0], c[1]);
    a[1] = fp16_pair(c[2], c[3]);
    a[2] = fp16_pair(c[4], c[5]);
    a[3] = fp16_pair(c[6], c[7]);
}
__device__ __forceinline__ void as_right(u32 (&b)[4], const u32 (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) b[i] = transposed(a[i]);
}

__device__ __forceinline__ float log2_decay(float f, float rate, float bias, float bound) {
#if LAW == 0
    float decay = f * LOG2_E;
#elif LAW == 1
    float y = (f + bias) * LOG2_E;
    float soft = y > 24.0f ? y : log2_fast(1.0f + exp2_fast(y));
    float decay = -rate * soft;
#else
    float decay = bound * LOG2_E * sigmoid(rate * (f + bias));
#endif
    return max_nan(decay, -200.0f);
}

// The tokens of a chunk: where they start among all, and how many there are.
struct Place {
    i64 start;
    int present;
};
__device__ __forceinline__ Place locate_chunk(int chunk, const void* cu_seqlens, const int* chunk_offsets,
                                              int length, int num_chunks, int num_sequences) {
    i64 start, stop;
#if PACKED
    int first = 0, last = num_sequences - 1;  // the first sequence that ends after the chunk starts
    while (first < last) {
        const int middle = (first + last) >> 1;
        if (chunk_offsets[middle + 1] <= chunk) first = middle + 1; else last = middle;
    }
    const i64* bounds = static_cast<const i64*>(cu_seqlens);
    start = bounds[first] + (i64)(chunk - chunk_offsets[first]) * TOKENS;
    stop = bounds[first + 1];
#else
    const int n = chunk / num_chunks;
    start = (i64)n * length + (i64)(chunk - n * num_chunks) * TOKENS;
    stop = (i64)(n + 1) * length;
#endif
    const i64 left_over = stop - start;
    return {start, left_over < 0 ? 0 : left_over > TOKENS ? TOKENS : (int)left_over};
}

// Start to copy rows of 128 values to a tile, 16 bytes a thread and turn; absent rows become 0.
__device__ __forceinline__ void copy_rows(u32 tile, const u16* rows, i64 row_stride, int present) {
#pragma unroll
    for (int turn = 0; turn < 8; turn++) {
        const int row = turn * 8 + (threadIdx.x >> 4), part = threadIdx.x & 15;
        const bool here = row < present;
        copy16(tile + in_tile(row, part), here ? rows + row * row_stride + part * 8 : rows, here);
    }
}

// What q and k of each row are multiplied with. A thread has half a row, and starts in the middle of
// it where that half is the second, so that 8 threads read from 8 different places.
__device__ __forceinline__ void find_norms(float (*norm)[2], const unsigned char* q, const unsigned char* k,
                                           float scale) {
    const int row = threadIdx.x >> 1, side = threadIdx.x & 1;
    float q_factor = scale, k_factor = 1.0f;
#if QK_NORM
    float q_sum = 0, k_sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const u32 at = in_tile(row, side * 8 + (i ^ (side * 4)));
        const uint4 a = *reinterpret_cast<const uint4*>(q + at);
        const uint4 b = *reinterpret_cast<const uint4*>(k + at);
        const u32 qs[4] = {a.x, a.y, a.z, a.w}, ks[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            q_sum += low(qs[j]) * low(qs[j]) + high(qs[j]) * high(qs[j]);
            k_sum += low(ks[j]) * low(ks[j]) + high(ks[j]) * high(ks[j]);
        }
    }
    q_sum += __shfl_xor_sync(0xffffffffu, q_sum, 1);
    k_sum += __shfl_xor_sync(0xffffffffu, k_sum, 1);
    q_factor *= rsqrt_fast(q_sum + 1e-6f);
    k_factor = rsqrt_fast(k_sum + 1e-6f);
#endif
    norm[row][side] = side ? k_factor : q_factor;
}

// A gate input pair: two channels of a row.
__device__ __forceinline__ float2 gate_pair(const void* g, i64 at) {
#if G_SINGLE
    return *reinterpret_cast<const float2*>(static_cast<const float*>(g) + at);
#else
    const u32 pair = *reinterpret_cast<const u32*>(static_cast<const u16*>(g) + at);
    return make_float2(low(pair), high(pair));
#endif
}

__device__ __forceinline__ float load_beta(const void* beta, i64 at) {
#if BETA_SINGLE
    float b = static_cast<const float*>(beta)[at];
#else
    float b = __uint_as_float((u32)static_cast<const u16*>(beta)[at] << 16);
#endif
#if BETA_LOGITS
    b = sigmoid(b);
#endif
    return b;
}

// What a thread knows of the gates: two channels of 32 tokens, which are one half of the chunk.
struct Gates {
    float sum0[32], sum1[32];  // log2 decay from the half's first token to each, inclusive
    float middle0, middle1;    // to the half's reference, its 16th token
    float rest0, rest1;        // from there to the half's last
    float other0, other1;      // of the whole other half

    // The least of what factors span, log2.
    __device__ __forceinline__ float least() const {
        return fminf(fminf(middle0, middle1), fminf(rest0, rest1));
    }
};

// `rows` are those of the thread's half in shared memory (bf16), `direct` where they lie in fp32.
__device__ __forceinline__ void sum_gates(Gates& gates, const unsigned char* tile, const u32 (&at)[8],
                                          const void* direct, i64 row_stride, int present,
                                          float rate, float bias0, float bias1, float bound) {
    float total0 = 0, total1 = 0;
#pragma unroll
    for (int i = 0; i < 32; i++) {
        if (i < present) {
#if G_SINGLE
            const float2 f = *reinterpret_cast<const float2*>(static_cast<const float*>(direct) + i * row_stride);
#else
            const u32 pair = *reinterpret_cast<const u32*>(tile + at[i & 7] + (i >> 3) * 8 * ROW_BYTES);
            const float2 f = make_float2(low(pair), high(pair));
#endif
            total0 += log2_decay(f.x, rate, bias0, bound);
            total1 += log2_decay(f.y, rate, bias1, bound);
        }
        gates.sum0[i] = total0;
        gates.sum1[i] = total1;
    }
    gates.middle0 = gates.sum0[15];
    gates.middle1 = gates.sum1[15];
    gates.rest0 = gates.sum0[31] - gates.middle0;
    gates.rest1 = gates.sum1[31] - gates.middle1;
    gates.other0 = __shfl_xor_sync(0xffffffffu, gates.sum0[31], 16);
    gates.other1 = __shfl_xor_sync(0xffffffffu, gates.sum1[31], 16);
}

// Call do_chunk(place) for every place of which marks[place] is set. Few are, mostly none: a block
// looks at 128 marks at once. `found` is shared by the block.
template <typename Function>
__device__ __forceinline__ void for_marked(const int* marks, i64 total, u32 (&found)[4], Function do_place) {
    for (i64 first = blockIdx.x; first < total; first += (i64)gridDim.x * 128) {
        const i64 mine = first + (i64)threadIdx.x * gridDim.x;
        const u32 set = __ballot_sync(0xffffffffu, mine < total && marks[mine]);
        if ((threadIdx.x & 31) == 0) found[threadIdx.x >> 5] = set;
        __syncthreads();
        for (int i = 0; i < 128; i++) {
            if (!(found[i >> 5] >> (i & 31) & 1)) continue;
            do_place(first + (i64)i * gridDim.x);
            __syncthreads();
        }
        __syncthreads();
    }
}
