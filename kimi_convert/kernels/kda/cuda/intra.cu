// What a chunk of 64 tokens does by itself, before any state is known: the stage of intra.py, for
// bf16 keys of 128 channels, as one block of 4 warps per chunk and value head.
//
//   qg = scale exp(G) q     kg = exp(G_C - G) k     reads_ij = scale q_i . exp(G_i - G_j) k_j, i >= j
//   solve = (I + A)^-1 diag(beta)                   A_ij = beta_i k_i . exp(G_i - G_j) k_j, i > j
//   w = solve exp(G) k                              decay = exp(G_C)
//
// Halves of 32 tokens have a reference row each, their middle: a factor relative to it spans 16
// tokens. Pairs across the halves meet at the chunk's middle, where both factors are at most 1.
// Chunks whose factors leave 2^-LIMIT .. 2^LIMIT are marked, and done by a second launch.
//
// Threads. Elementwise, a thread owns two channels of one half: sums along tokens need no other
// thread. Products are mma.m16n8k16, a warp per 16 rows.
//
// Macros: those of tiles.cuh; KEEP: kd and inverse are written too; STEEP: do the marked chunks, whose
// pairs within a half are added up one by one; SHARED_BYTES; BLOCKS of a multiprocessor.
// docs/kernels/kda.md derives the formulas.

#define LIMIT 120.0f

struct Shared {
    unsigned char q[TILE_BYTES];  // q, then q exp(G - ref), then A, then w
    unsigned char k[TILE_BYTES];  // k, then k exp(G - ref)
    unsigned char f[TILE_BYTES];  // gate inputs, then k exp(ref - G), then reads and solve
    float norm[TOKENS][2];        // what q and k of a row are multiplied with
    float beta[TOKENS];
    float to_start[2][WIDTH];     // exp(ref of half) relative to the chunk's start
    u32 to_middle[2][WIDTH / 2];  // bf16 pairs: from a half's ref to the chunk's middle
    u16 diagonal[4][16][16];      // fp16, inverses of the blocks on the diagonal
    u32 marks[4];                 // of the chunks to do, where STEEP
};

// Inverse of the unit lower triangular I + a [16, 16], by doubling blocks from 1 to 16.
__device__ __forceinline__ void invert_diagonal(float (&x)[8], const u32 (&a)[4], int lane) {
    const int row = lane >> 2, column = (lane & 3) * 2;
    u32 right[4];
    as_right(right, a);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int r = row + ((i >> 1) & 1) * 8, c = column + (i & 1) + (i >> 2) * 8;
        const u32 pair = a[i >> 1];
        float value;
        const u16 bits = (i & 1) ? (u16)(pair >> 16) : (u16)pair;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
        x[i] = r == c ? 1.0f : (r ^ c) == 1 ? -value : 0.0f;
    }
#pragma unroll
    for (int level = 1; level < 4; level++) {
        u32 known[4], block[4], left[4], known_right[4];
        as_left(known, x);
        as_right(known_right, known);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            // right[i] holds rows 2t, 2t + 1 (+ 8 for odd i) of column g (+ 8 for i >= 2).
            const int c = row + (i >> 1) * 8, r = column + (i & 1) * 8;
            const u32 keep = ((r ^ c) >> level) == 1 ? 0xffffffffu : 0;  // r, r + 1 differ in bit 0
            block[i] = right[i] & keep;
        }
        float t[8] = {};
        mma_fp16(t, known, block);
#pragma unroll
        for (int i = 0; i < 8; i++) t[i] = -t[i];
        as_left(left, t);
        mma_fp16(x, left, known_right);
    }
}

#if STEEP
// The pairs of tokens of one half, without factors: exp(G_i - G_j) for each pair and channel. A thread
// has up to 5 of the 528 pairs of each half; the tile f holds one half's sums of gates.
__device__ __forceinline__ void pair_of(int number, int& row, int& column) {
    row = (int)((sqrtf(8.0f * number + 1.0f) - 1.0f) * 0.5f);
    if (row * (row + 1) / 2 > number) row--;
    if ((row + 1) * (row + 2) / 2 <= number) row++;
    column = number - row * (row + 1) / 2;
}

__device__ __forceinline__ void do_near_pairs(Shared& s, const Gates& gates, float (&reads)[2][5], float (&a)[2][5],
                                              int half, int channel) {
    float2* sums = reinterpret_cast<float2*>(s.f);  // [32 tokens, 64 pairs of channels]
#pragma unroll
    for (int which = 0; which < 2; which++) {
        __syncthreads();
        if (half == which) {
#pragma unroll
            for (int i = 0; i < 32; i++) sums[i * 64 + (channel >> 1)] = make_float2(gates.sum0[i], gates.sum1[i]);
        }
        __syncthreads();
#pragma unroll
        for (int turn = 0; turn < 5; turn++) {
            reads[which][turn] = a[which][turn] = 0;
            const int number = turn * 128 + threadIdx.x;
            if (number >= 528) continue;
            int row, column;
            pair_of(number, row, column);
            const int i = which * 32 + row, j = which * 32 + column;
            float by_q = 0, by_k = 0;
            for (int x = 0; x < 64; x++) {
                const int two = (x + threadIdx.x) & 63;  // neighbours start at other banks
                const u32 q_pair = *reinterpret_cast<const u32*>(s.q + in_tile(i, two >> 2) + (two & 3) * 4);
                const u32 k_row = *reinterpret_cast<const u32*>(s.k + in_tile(i, two >> 2) + (two & 3) * 4);
                const u32 k_column = *reinterpret_cast<const u32*>(s.k + in_tile(j, two >> 2) + (two & 3) * 4);
                const float2 to = sums[row * 64 + two], from = sums[column * 64 + two];
                const float y0 = exp2_fast(to.x - from.x) * low(k_column);
                const float y1 = exp2_fast(to.y - from.y) * high(k_column);
                by_q += low(q_pair) * y0 + high(q_pair) * y1;
                by_k += low(k_row) * y0 + high(k_row) * y1;
            }
            const float of_column = s.norm[j][1];
            reads[which][turn] = by_q * s.norm[i][0] * of_column;
            a[which][turn] = row > column ? by_k * s.norm[i][1] * of_column * s.beta[i] : 0.0f;
        }
    }
    __syncthreads();
}

__device__ __forceinline__ void store_near_pairs(Shared& s, const float (&reads)[2][5], const float (&a)[2][5],
                                                 unsigned char* reads_square, unsigned char* a_square) {
#pragma unroll
    for (int which = 0; which < 2; which++) {
#pragma unroll
        for (int turn = 0; turn < 5; turn++) {
            const int number = turn * 128 + threadIdx.x;
            if (number >= 528) continue;
            int row, column;
            pair_of(number, row, column);
            const u32 at = in_square(which * 32 + row, (which * 32 + column) >> 3) + (column & 7) * 2;
            *reinterpret_cast<u16*>(reads_square + at) = (u16)bf16_pair(reads[which][turn], 0.0f);
            *reinterpret_cast<u16*>(a_square + at) = (u16)fp16_pair(a[which][turn], 0.0f);
        }
    }
}
#endif

struct Arguments {
    const u16* q;             // [T, H, 128] bf16
    const u16* k;             // [T, H, 128] bf16
    const void* g;            // [T, HV, 128]
    const void* beta;         // [T, HV]
    const float* A_log;       // [HV], where LAW
    const float* dt_bias;     // [HV, 128], where LAW
    const void* cu_seqlens;   // [N + 1] int64, where PACKED
    const int* chunk_offsets; // [N + 1], where PACKED
    u16* w;                   // [chunks, HV, 64, 128] bf16, as the next two
    u16* qg;
    u16* kg;
    u16* reads;               // [chunks, HV, 64, 64] bf16
    u16* solve;               // [chunks, HV, 64, 64] bf16
    float* decay;             // [chunks, HV, 128]
    u16* kd;                  // [chunks, HV, 64, 128] bf16, exp(G) k, where KEEP
    u16* inverse;             // [chunks, HV, 64, 64] bf16, where KEEP
    int* steep;               // [chunks, HV]: 1 where a factor leaves the range
    int length, num_chunks, num_sequences, total_chunks, H, HV;
    float scale, bound;
};

static_assert(sizeof(Shared) == SHARED_BYTES, "the host asks for another size");

__device__ __forceinline__ void do_chunk(const Arguments& p, Shared& s, int chunk, int head) {
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int H = p.H, HV = p.HV;
    const i64 place = (i64)chunk * HV + head;
    const Place chunk_place = locate_chunk(chunk, p.cu_seqlens, p.chunk_offsets, p.length, p.num_chunks, p.num_sequences);
    const i64 start = chunk_place.start;
    const int present = chunk_place.present;

    const i64 key_rows = (start * H + head / (HV / H)) * WIDTH, gate_rows = (start * HV + head) * WIDTH;
    const u32 q_tile = address_of(s.q), k_tile = address_of(s.k), f_tile = address_of(s.f);
    copy_rows(q_tile, p.q + (present ? key_rows : 0), (i64)H * WIDTH, present);
    copy_rows(k_tile, p.k + (present ? key_rows : 0), (i64)H * WIDTH, present);
    asm volatile("cp.async.commit_group;" ::: "memory");
#if !G_SINGLE
    copy_rows(f_tile, static_cast<const u16*>(p.g) + (present ? gate_rows : 0), (i64)HV * WIDTH, present);
#endif
    asm volatile("cp.async.commit_group;" ::: "memory");
    if (thread < TOKENS)
        s.beta[thread] = thread < present ? load_beta(p.beta, (start + thread) * HV + head) : 0.0f;
    // A thread's two channels of one half of the tokens.
    const int half = lane >> 4, channel = warp * 32 + (lane & 15) * 2;
    const int first_row = half * 32;
    float bias0 = 0, bias1 = 0, rate = 0;
#if LAW
    bias0 = p.dt_bias[head * WIDTH + channel];
    bias1 = p.dt_bias[head * WIDTH + channel + 1];
    rate = exp2_fast(p.A_log[head] * LOG2_E);
#endif
    u32 at[8];  // of the thread's channels in rows 0 to 7 of its half
#pragma unroll
    for (int i = 0; i < 8; i++)
        at[i] = in_tile(first_row + i, channel >> 3) + (channel & 7) * 2;

    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncthreads();
    find_norms(s.norm, s.q, s.k, p.scale);
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    Gates gates;
    {
        const i64 first = gate_rows + (i64)first_row * HV * WIDTH + channel;
        const void* direct = static_cast<const float*>(p.g) + first;
        sum_gates(gates, s.f, at, direct, (i64)HV * WIDTH, present - first_row, rate, bias0, bias1, p.bound);
    }
    const float middle0 = gates.middle0, middle1 = gates.middle1, rest0 = gates.rest0, rest1 = gates.rest1;
    const float other0 = gates.other0, other1 = gates.other1;
#if STEEP
    // Rows are taken relative to the ends of their half, so that no factor is above 1.
    const float start0 = exp2_fast(half ? other0 : 0.0f), start1 = exp2_fast(half ? other1 : 0.0f);
    const float end0 = exp2_fast(half ? 0.0f : other0), end1 = exp2_fast(half ? 0.0f : other1);
    const float half0 = gates.sum0[31], half1 = gates.sum1[31];
#else
    const float start0 = exp2_fast(half ? other0 + middle0 : middle0);
    const float start1 = exp2_fast(half ? other1 + middle1 : middle1);
    const float end0 = exp2_fast(half ? rest0 : rest0 + other0);
    const float end1 = exp2_fast(half ? rest1 : rest1 + other1);
#endif
    s.to_start[half][channel] = start0;
    s.to_start[half][channel + 1] = start1;
#if STEEP
    s.to_middle[half][channel >> 1] = 0x3f803f80u;
#else
    s.to_middle[half][channel >> 1] =
        half ? bf16_pair(exp2_fast(middle0), exp2_fast(middle1)) : bf16_pair(exp2_fast(rest0), exp2_fast(rest1));
#endif
    if (half == 0)
        *reinterpret_cast<float2*>(p.decay + place * WIDTH + channel) =
            make_float2(exp2_fast(gates.sum0[31] + other0), exp2_fast(gates.sum1[31] + other1));

#if STEEP
    float near_reads[2][5], near_a[2][5];
    do_near_pairs(s, gates, near_reads, near_a, half, channel);
#endif
    // Rows times their decays, in shared memory and as they are stored.
    u16* qg_rows = p.qg + (place * TOKENS + first_row) * WIDTH + channel;
    u16* kg_rows = p.kg + (place * TOKENS + first_row) * WIDTH + channel;
#if KEEP
    u16* kd_rows = p.kd + (place * TOKENS + first_row) * WIDTH + channel;
#endif
#pragma unroll
    for (int i = 0; i < 32; i++) {
        const u32 offset = at[i & 7] + (i >> 3) * 8 * ROW_BYTES;
        const float2 factor = *reinterpret_cast<const float2*>(s.norm[first_row + i]);
        const u32 q_pair = *reinterpret_cast<const u32*>(s.q + offset);
        const u32 k_pair = *reinterpret_cast<const u32*>(s.k + offset);
#if STEEP
        const float rises0 = exp2_fast(gates.sum0[i]), rises1 = exp2_fast(gates.sum1[i]);
        const float falls0 = exp2_fast(half0 - gates.sum0[i]), falls1 = exp2_fast(half1 - gates.sum1[i]);
#else
        const float apart0 = gates.sum0[i] - middle0, apart1 = gates.sum1[i] - middle1;
        const float rises0 = exp2_fast(apart0), rises1 = exp2_fast(apart1);
        const float falls0 = exp2_fast(-apart0), falls1 = exp2_fast(-apart1);
#endif
        const float q0 = low(q_pair) * factor.x * rises0, q1 = high(q_pair) * factor.x * rises1;
        const float k0 = low(k_pair) * factor.y, k1 = high(k_pair) * factor.y;
        const float kr0 = k0 * rises0, kr1 = k1 * rises1, kf0 = k0 * falls0, kf1 = k1 * falls1;
        *reinterpret_cast<u32*>(s.q + offset) = bf16_pair(q0, q1);
        *reinterpret_cast<u32*>(s.k + offset) = bf16_pair(kr0, kr1);
        *reinterpret_cast<u32*>(s.f + offset) = bf16_pair(kf0, kf1);
        *reinterpret_cast<u32*>(qg_rows + i * WIDTH) = bf16_pair(q0 * start0, q1 * start1);
        *reinterpret_cast<u32*>(kg_rows + i * WIDTH) = bf16_pair(kf0 * end0, kf1 * end1);
#if KEEP
        *reinterpret_cast<u32*>(kd_rows + i * WIDTH) = bf16_pair(kr0 * start0, kr1 * start1);
#endif
    }
#if !STEEP
    const int marked = __syncthreads_or(gates.least() < -LIMIT);
    if (thread == 0) p.steep[place] = marked ? 1 : 0;
#endif

#if STEEP
    __syncthreads();
#endif
    // Pairs: rows of reads for block `warp` of 16 rows, of A for block 3 - warp: 5 blocks each.
    float r[4][8] = {}, a[4][8] = {};
    const int r_block = warp, a_block = 3 - warp;
    {
        const int left_row = lane & 15, left_part = lane >> 4;
        const int right_row = (lane & 7) + ((lane >> 4) << 3), right_part = (lane >> 3) & 1;
        const int pair = lane & 3;
#pragma unroll 2
        for (int step = 0; step < 8; step++) {
            u32 q_left[4], k_left[4], far_left[4];
            load4(q_left, q_tile + in_tile(r_block * 16 + left_row, step * 2 + left_part));
            load4(k_left, k_tile + in_tile(a_block * 16 + left_row, step * 2 + left_part));
            const u32 down0 = s.to_middle[1][step * 8 + pair], down1 = s.to_middle[1][step * 8 + 4 + pair];
            const u32 up0 = s.to_middle[0][step * 8 + pair], up1 = s.to_middle[0][step * 8 + 4 + pair];
            // Of the two blocks one is in the second half: its rows also meet those of the first.
            const bool reads_far = r_block >= 2;
#pragma unroll
            for (int i = 0; i < 4; i++)
                far_left[i] = mul_bf16(reads_far ? q_left[i] : k_left[i], i < 2 ? down0 : down1);
#pragma unroll
            for (int block = 0; block < 4; block++) {
                if (block > r_block && block > a_block) continue;
                u32 right[4];
                load4(right, f_tile + in_tile(block * 16 + right_row, step * 2 + right_part));
                if (block < 2) {
                    const u32 far_right[4] = {mul_bf16(right[0], up0), mul_bf16(right[1], up1),
                                              mul_bf16(right[2], up0), mul_bf16(right[3], up1)};
                    if (reads_far) mma_bf16(r[block], far_left, far_right);
                    else mma_bf16(a[block], far_left, far_right);
#if STEEP
                } else if (false) {
#else
                    if (!reads_far && block <= r_block) mma_bf16(r[block], q_left, right);
                    if (reads_far && block <= a_block) mma_bf16(a[block], k_left, right);
                } else {
#endif
                    if (block <= r_block) mma_bf16(r[block], q_left, right);
                    if (block <= a_block) mma_bf16(a[block], k_left, right);
                }
            }
        }
    }
    __syncthreads();

    // reads to shared memory and out; A as a square of fp16 in place of q.
    const int row = lane >> 2, column = (lane & 3) * 2;
    unsigned char* reads_square = s.f;
    unsigned char* solve_square = s.f + TILE_BYTES / 2;
    unsigned char* a_square = s.q;
#pragma unroll
    for (int block = 0; block < 4; block++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {  // registers 2i, 2i + 1: row + 8 (i & 1), column + 8 (i >> 1)
            const int in_row = row + (i & 1) * 8, in_column = column + (i >> 1) * 8;
            const int part = block * 2 + (i >> 1);
            float x0 = r[block][2 * i], x1 = r[block][2 * i + 1];
            if (block > r_block || (block == r_block && in_column > in_row)) x0 = 0;
            if (block > r_block || (block == r_block && in_column + 1 > in_row)) x1 = 0;
            *reinterpret_cast<u32*>(reads_square + in_square(r_block * 16 + in_row, part) + (lane & 3) * 4) =
                bf16_pair(x0, x1);
            const float b = s.beta[a_block * 16 + in_row];
            x0 = a[block][2 * i] * b;
            x1 = a[block][2 * i + 1] * b;
            if (block > a_block || (block == a_block && in_column >= in_row)) x0 = 0;
            if (block > a_block || (block == a_block && in_column + 1 >= in_row)) x1 = 0;
            *reinterpret_cast<u32*>(a_square + in_square(a_block * 16 + in_row, part) + (lane & 3) * 4) =
                fp16_pair(x0, x1);
        }
    }
#if STEEP
    __syncthreads();
    store_near_pairs(s, near_reads, near_a, reads_square, a_square);
#endif
    __syncthreads();
    {
        u16* out = p.reads + place * TOKENS * TOKENS;
#pragma unroll
        for (int turn = 0; turn < 4; turn++) {
            const int out_row = warp * 16 + turn * 4 + (lane >> 3), part = lane & 7;
            *reinterpret_cast<uint4*>(out + out_row * TOKENS + part * 8) =
                *reinterpret_cast<const uint4*>(reads_square + in_square(out_row, part));
        }
    }

    // The inverse: blocks of 16 on the diagonal, a warp each; then a column of blocks for each warp.
    const u32 a_address = address_of(a_square);
    const int left_row = lane & 15, left_part = lane >> 4;
    float x[4][8];
    u32 x_right[4][4];
    {
        u32 block[4], left[4];
        load4(block, a_address + in_square(warp * 16 + left_row, warp * 2 + left_part));
        float inverted[8];
        invert_diagonal(inverted, block, lane);
        as_left(left, inverted);
        u32* kept = reinterpret_cast<u32*>(s.diagonal[warp]);  // rows of 8 pairs
        kept[row * 8 + (lane & 3)] = left[0];
        kept[(row + 8) * 8 + (lane & 3)] = left[1];
        kept[row * 8 + 4 + (lane & 3)] = left[2];
        kept[(row + 8) * 8 + 4 + (lane & 3)] = left[3];
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (i == warp) {
#pragma unroll
                for (int j = 0; j < 8; j++) x[i][j] = inverted[j];
                as_right(x_right[i], left);
            }
    }
    __syncthreads();
#pragma unroll
    for (int i = 1; i < 4; i++) {
        if (i <= warp) continue;
        float gathered[8] = {};
#pragma unroll
        for (int j = 0; j < i; j++) {
            if (j < warp) continue;
            u32 left[4];
            load4(left, a_address + in_square(i * 16 + left_row, j * 2 + left_part));
            mma_fp16(gathered, left, x_right[j]);
        }
        u32 left[4], right[4], inverted[4];
#pragma unroll
        for (int j = 0; j < 8; j++) gathered[j] = -gathered[j];
        as_left(left, gathered);
        as_right(right, left);
        const u32* kept = reinterpret_cast<const u32*>(s.diagonal[i]);
        inverted[0] = kept[row * 8 + (lane & 3)];
        inverted[1] = kept[(row + 8) * 8 + (lane & 3)];
        inverted[2] = kept[row * 8 + 4 + (lane & 3)];
        inverted[3] = kept[(row + 8) * 8 + 4 + (lane & 3)];
#pragma unroll
        for (int j = 0; j < 8; j++) x[i][j] = 0;
        mma_fp16(x[i], inverted, right);
        as_left(left, x[i]);
        as_right(x_right[i], left);
    }
#pragma unroll
    for (int block = 0; block < 4; block++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int in_row = block * 16 + row + (i & 1) * 8, part = warp * 2 + (i >> 1);
            const int in_column = warp * 16 + column + (i >> 1) * 8;
            const float x0 = block < warp ? 0.0f : x[block][2 * i], x1 = block < warp ? 0.0f : x[block][2 * i + 1];
            *reinterpret_cast<u32*>(solve_square + in_square(in_row, part) + (lane & 3) * 4) =
                bf16_pair(x0 * s.beta[in_column], x1 * s.beta[in_column + 1]);
#if KEEP
            *reinterpret_cast<u32*>(p.inverse + (place * TOKENS + in_row) * TOKENS + in_column) = bf16_pair(x0, x1);
#endif
        }
    }
    __syncthreads();

    // w = solve exp(G) k, 16 rows a warp, 16 channels at a time; out through shared memory.
    const u32 solve_address = address_of(solve_square);
    u32 solve_left[4][4];
#pragma unroll
    for (int block = 0; block < 4; block++)
        if (block <= warp) load4(solve_left[block], solve_address + in_square(warp * 16 + left_row, block * 2 + left_part));
#pragma unroll
    for (int turn = 0; turn < 4; turn++) {
        const int out_row = warp * 16 + turn * 4 + (lane >> 3), part = lane & 7;
        *reinterpret_cast<uint4*>(p.solve + (place * TOKENS + out_row) * TOKENS + part * 8) =
            *reinterpret_cast<const uint4*>(solve_square + in_square(out_row, part));
    }
#pragma unroll 2
    for (int group = 0; group < 8; group++) {
        float near[8] = {}, far[8] = {};
#pragma unroll
        for (int block = 0; block < 4; block++) {
            if (block > warp) continue;
            u32 right[4];
            load4_transposed(right, k_tile + in_tile(block * 16 + left_row, group * 2 + left_part));
            if (block < 2) mma_bf16(far, solve_left[block], right);
            else mma_bf16(near, solve_left[block], right);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int in_channel = group * 16 + column + (i >> 1) * 8;
            const float2 first = *reinterpret_cast<const float2*>(&s.to_start[0][in_channel]);
            const float2 second = *reinterpret_cast<const float2*>(&s.to_start[1][in_channel]);
            float y0 = far[2 * i] * first.x, y1 = far[2 * i + 1] * first.y;
            if (warp >= 2) {
                y0 += near[2 * i] * second.x;
                y1 += near[2 * i + 1] * second.y;
            }
            *reinterpret_cast<u32*>(s.q + in_tile(warp * 16 + row + (i & 1) * 8, in_channel >> 3) + (lane & 3) * 4) =
                bf16_pair(y0, y1);
        }
    }
    __syncwarp();
#pragma unroll
    for (int turn = 0; turn < 8; turn++) {
        const int out_row = warp * 16 + turn * 2 + (lane >> 4), part = lane & 15;
        *reinterpret_cast<uint4*>(p.w + (place * TOKENS + out_row) * WIDTH + part * 8) =
            *reinterpret_cast<const uint4*>(s.q + in_tile(out_row, part));
    }
}

extern "C" __global__ void __launch_bounds__(128, BLOCKS) kda_intra(const __grid_constant__ Arguments p) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared& s = *reinterpret_cast<Shared*>(memory);
#if STEEP
    for_marked(p.steep, (i64)p.total_chunks * p.HV, s.marks,
               [&](i64 place) { do_chunk(p, s, (int)(place / p.HV), (int)(place % p.HV)); });
#else
    do_chunk(p, s, blockIdx.x, blockIdx.y);
#endif
}
