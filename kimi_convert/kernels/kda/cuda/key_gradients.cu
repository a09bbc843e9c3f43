// Gradients of a chunk over its key channels, down to q, k, the gate's inputs and its parameters, for
// bf16 heads of 128 channels, as one block of 4 warps per chunk and head.
//
// With a = G - ref (ref the middle of the token's half, as in intra.cu), qr = q exp(a), kr = k exp(a),
// kf = k exp(-a), S the state before the chunk and dS the gradient of the one after it:
//
//   dq = exp(a)  (dreads kf + exp(ref) do S^T)
//   dk = exp(a)  (beta dA kf - exp(ref) dv S^T)
//      + exp(-a) (dreads^T qr + (beta dA)^T kr + exp(G_C - ref) delta dS^T)
//   dG = qr (.) + kr (.) - kf (.)   the same sums, without the last, so that what a pair gives its row
//                                   and takes from its column cancels exactly
//   dg_t = sum_{i >= t} dG_i + sum_{j < t} (kf exp(G_C - ref) delta dS^T)_j + exp(G_C) S . dS
//
// and from there through the unit norms and the gate's law. q is scaled throughout.
//
// A warp owns 16 tokens and goes through the channels 16 at a time. States come 16 channels at a time
// too, a group ahead. Chunks whose factors leave 2^-LIMIT .. 2^LIMIT are marked: their results are not
// valid, and key_gradients_steep.cu does them.
//
// Macros: those of tiles.cuh, SHARED_BYTES. docs/kernels/kda.md derives the formulas.

#define LIMIT 117.0f
#define GROUP 16
#define GROUPS (WIDTH / GROUP)
#define STAGE_BYTES (WIDTH * GROUP * 2)
#define BLOCK_BYTES (16 * 16 * 2)

struct Shared {
    unsigned char q[TILE_BYTES];  // q, then qr, then dq
    unsigned char k[TILE_BYTES];  // k, then kr
    unsigned char f[TILE_BYTES];  // gate inputs, then kf, then dk
    float apart[TOKENS * WIDTH];  // a; see in_apart
    unsigned char states[2][2][STAGE_BYTES];  // by stage: S^T and dS^T [128 values, 16 channels]
    unsigned char d_reads[10][BLOCK_BYTES];   // blocks of 16 x 16 on and under the diagonal
    unsigned char d_a[10][BLOCK_BYTES];
    float norm[TOKENS][2];
    float beta[TOKENS];
    u32 beta_pair[TOKENS / 2];  // bf16
    float own[TOKENS];          // the diagonal of dreads
    float factor[4][WIDTH];     // exp over the quarters of the chunk
    float later[4][GROUP];      // sums of a warp's dG
    float earlier[4][GROUP];    // sums of what counts for later tokens
    float of_decay[4][GROUP];   // parts of S . dS
    float bias[4][WIDTH];       // sums of a warp's gradients of dt_bias
    float dot[TOKENS][2];       // q . dq and k . dk
};

__device__ __forceinline__ int in_apart(int row, int channel) {
    return row * WIDTH + (channel ^ ((row & 3) << 3));
}
// Where 16 bytes of a row of 32 lie in a block or a stage.
__device__ __forceinline__ u32 in_narrow(int row, int part) {
    return row * 32 + ((part ^ ((row >> 2) & 1)) << 4);
}
__device__ __forceinline__ int block_of(int row_block, int column_block) {
    return row_block * (row_block + 1) / 2 + column_block;
}

static_assert(sizeof(Shared) == SHARED_BYTES, "the host asks for another size");

extern "C" __global__ void __launch_bounds__(128, 2) kda_key_gradients(const __grid_constant__ Arguments p) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared& s = *reinterpret_cast<Shared*>(memory);
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int chunk = blockIdx.x, head = blockIdx.y;
    const int H = p.H;
    const float scale = p.scale, bound = p.bound;
    const i64 place = (i64)chunk * H + head;
    const Place chunk_place = locate_chunk(chunk, p.cu_seqlens, p.chunk_offsets, p.length, p.num_chunks, p.num_sequences);
    const i64 start = chunk_place.start;
    const int present = chunk_place.present;
    const i64 row_stride = (i64)H * WIDTH;
    const i64 rows = present ? (start * H + head) * WIDTH : 0;

    const u32 q_tile = address_of(s.q), k_tile = address_of(s.k), f_tile = address_of(s.f);
    copy_rows(q_tile, p.q + rows, row_stride, present);
    copy_rows(k_tile, p.k + rows, row_stride, present);
    asm volatile("cp.async.commit_group;" ::: "memory");
#if !G_SINGLE
    copy_rows(f_tile, static_cast<const u16*>(p.g) + rows, row_stride, present);
#endif
    asm volatile("cp.async.commit_group;" ::: "memory");
    const u16* stage_sources[2] = {p.states + (place * WIDTH + thread) * WIDTH, p.d_states + (place * WIDTH + thread) * WIDTH};
    auto fetch = [&](int group) {
#pragma unroll
        for (int which = 0; which < 2; which++) {
            const u32 target = address_of(s.states[group & 1][which]);
#pragma unroll
            for (int part = 0; part < 2; part++)
                copy16(target + in_narrow(thread, part), stage_sources[which] + group * GROUP + part * 8, true);
        }
    };
    fetch(0);
    asm volatile("cp.async.commit_group;" ::: "memory");
    if (thread < TOKENS) {
        const float b = thread < present ? load_beta(p.beta, (start + thread) * H + head) : 0.0f;
        s.beta[thread] = b;
        const float next = __shfl_down_sync(0xffffffffu, b, 1);
        if (!(thread & 1)) s.beta_pair[thread >> 1] = bf16_pair(b, next);
    }
    for (int i = thread; i < 320; i += 128) {
        const int block = i >> 5, row = (i >> 1) & 15, part = i & 1;
        const int row_block = block < 1 ? 0 : block < 3 ? 1 : block < 6 ? 2 : 3;
        const int column_block = block - row_block * (row_block + 1) / 2;
        const i64 at = (place * TOKENS + row_block * 16 + row) * TOKENS + column_block * 16 + part * 8;
        uint4 x = *reinterpret_cast<const uint4*>(p.d_reads + at);
        if (row_block == column_block && (row >> 3) == part) {
            u32* words = reinterpret_cast<u32*>(&x);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if ((row & 7) >> 1 != j) continue;
                s.own[row_block * 16 + row] = (row & 1) ? high(words[j]) : low(words[j]);
                words[j] &= (row & 1) ? 0x0000ffffu : 0xffff0000u;
            }
        }
        *reinterpret_cast<uint4*>(s.d_reads[block] + in_narrow(row, part)) = x;
        *reinterpret_cast<uint4*>(s.d_a[block] + in_narrow(row, part)) = *reinterpret_cast<const uint4*>(p.d_a + at);
    }
    float rate = 0;
#if LAW
    rate = exp2_fast(p.A_log[head] * LOG2_E);
#endif

    // As in intra.cu: a thread has two channels of one half of the tokens.
    asm volatile("cp.async.wait_group 2;" ::: "memory");
    __syncthreads();
    find_norms(s.norm, s.q, s.k, scale);
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncthreads();
    {
        const int half = lane >> 4, channel = warp * 32 + (lane & 15) * 2, first_row = half * 32;
        float bias0 = 0, bias1 = 0;
#if LAW
        bias0 = p.dt_bias[head * WIDTH + channel];
        bias1 = p.dt_bias[head * WIDTH + channel + 1];
#endif
        u32 at[8];
#pragma unroll
        for (int i = 0; i < 8; i++) at[i] = in_tile(first_row + i, channel >> 3) + (channel & 7) * 2;
        Gates gates;
        const void* direct = static_cast<const float*>(p.g) + rows + (i64)first_row * row_stride + channel;
        sum_gates(gates, s.f, at, direct, row_stride, present - first_row, rate, bias0, bias1, bound);
        *reinterpret_cast<float2*>(&s.factor[half * 2][channel]) =
            make_float2(exp2_fast(gates.middle0), exp2_fast(gates.middle1));
        *reinterpret_cast<float2*>(&s.factor[half * 2 + 1][channel]) =
            make_float2(exp2_fast(gates.rest0), exp2_fast(gates.rest1));
#pragma unroll
        for (int i = 0; i < 32; i++) {
            const u32 offset = at[i & 7] + (i >> 3) * 8 * ROW_BYTES;
            const float2 factor = *reinterpret_cast<const float2*>(s.norm[first_row + i]);
            const u32 q_pair = *reinterpret_cast<const u32*>(s.q + offset);
            const u32 k_pair = *reinterpret_cast<const u32*>(s.k + offset);
            const float apart0 = gates.sum0[i] - gates.middle0, apart1 = gates.sum1[i] - gates.middle1;
            const float rises0 = exp2_fast(apart0), rises1 = exp2_fast(apart1);
            const float falls0 = exp2_fast(-apart0), falls1 = exp2_fast(-apart1);
            const float k0 = low(k_pair) * factor.y, k1 = high(k_pair) * factor.y;
            *reinterpret_cast<u32*>(s.q + offset) =
                bf16_pair(low(q_pair) * factor.x * rises0, high(q_pair) * factor.x * rises1);
            *reinterpret_cast<u32*>(s.k + offset) = bf16_pair(k0 * rises0, k1 * rises1);
            *reinterpret_cast<u32*>(s.f + offset) = bf16_pair(k0 * falls0, k1 * falls1);
            *reinterpret_cast<float2*>(&s.apart[in_apart(first_row + i, channel)]) = make_float2(apart0, apart1);
        }
        const int marked = __syncthreads_or(gates.least() < -LIMIT);
        if (thread == 0) p.steep[place] = marked ? 1 : 0;
    }

    // Left operands of the products with states: 16 tokens x 128 values.
    const int row = lane >> 2, pair = lane & 3;  // of a result: rows row and row + 8, columns 2 pair (+ 8)
    const int first_token = warp * 16;
    u32 do_left[8][4], dv_left[8][4], delta_left[8][4];
#pragma unroll
    for (int step = 0; step < 8; step++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = first_token + row + (i & 1) * 8, value = step * 16 + pair * 2 + (i >> 1) * 8;
            const bool here = token < present;
            const i64 at = rows + (here ? token * row_stride + value : 0);
            do_left[step][i] = here ? *reinterpret_cast<const u32*>(p.d_o + at) : 0;
            dv_left[step][i] = here ? *reinterpret_cast<const u32*>(p.d_v + at) : 0;
            const i64 transposed_at =
                (place * WIDTH + step * 16 + row + (i >> 1) * 8) * TOKENS + first_token + pair * 2 + (i & 1) * 8;
            delta_left[step][i] = transposed(*reinterpret_cast<const u32*>(p.deltas + transposed_at));
        }
    }

    const int load_row = lane & 15, load_part = lane >> 4;  // ldmatrix, not transposed or as a right operand
    const int turned_row = ((lane >> 4) << 3) + (lane & 7), turned_part = (lane >> 3) & 1;  // transposed left
    const bool second_half = warp >= 2;
    float beta_of[2], own_of[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        beta_of[i] = s.beta[first_token + row + i * 8];
        own_of[i] = s.own[first_token + row + i * 8];
    }
    float q_dot[2] = {}, k_dot[2] = {}, beta_sum[2] = {}, rate_sum = 0;

    for (int group = 0; group < GROUPS; group++) {
        if (group + 1 < GROUPS) fetch(group + 1);
        asm volatile("cp.async.commit_group;" ::: "memory");
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        __syncthreads();

        const unsigned char* stage = s.states[group & 1][0];
        const unsigned char* d_stage = s.states[group & 1][1];
        float by_do[8] = {}, by_dv[8] = {}, by_delta[8] = {};
#pragma unroll
        for (int step = 0; step < 8; step++) {
            u32 right[4];
            const u32 at = in_narrow(step * 16 + load_row, load_part);
            load4_transposed(right, address_of(stage) + at);
            mma_bf16(by_do, do_left[step], right);
            mma_bf16(by_dv, dv_left[step], right);
            load4_transposed(right, address_of(d_stage) + at);
            mma_bf16(by_delta, delta_left[step], right);
        }
        {
            const int two = thread & 7, range = thread >> 3;
            float sum0 = 0, sum1 = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const u32 at = in_narrow(range * 8 + i, two >> 2) + (two & 3) * 4;
                const u32 a = *reinterpret_cast<const u32*>(stage + at);
                const u32 b = *reinterpret_cast<const u32*>(d_stage + at);
                sum0 += low(a) * low(b);
                sum1 += high(a) * high(b);
            }
#pragma unroll
            for (int apart = 8; apart < 32; apart *= 2) {
                sum0 += __shfl_xor_sync(0xffffffffu, sum0, apart);
                sum1 += __shfl_xor_sync(0xffffffffu, sum1, apart);
            }
            if (lane < 8) {
                s.of_decay[warp][two * 2] = sum0;
                s.of_decay[warp][two * 2 + 1] = sum1;
            }
        }

        // Pairs in which the warp's tokens are rows, and those in which they are columns; apart those
        // of tokens in different halves.
        float q_near[8] = {}, q_far[8] = {}, k_near[8] = {}, k_far[8] = {}, c_near[8] = {}, c_far[8] = {};
        const int part = group * 2 + load_part;
#pragma unroll
        for (int block = 0; block < 4; block++) {
            if (block > warp) continue;
            u32 left[4], right[4];
            load4_transposed(right, f_tile + in_tile(block * 16 + load_row, part));
            const bool far = second_half && block < 2;
            load4(left, address_of(s.d_reads[block_of(warp, block)]) + in_narrow(load_row, load_part));
            if (far) mma_bf16(q_far, left, right); else mma_bf16(q_near, left, right);
            load4(left, address_of(s.d_a[block_of(warp, block)]) + in_narrow(load_row, load_part));
            if (far) mma_bf16(k_far, left, right); else mma_bf16(k_near, left, right);
        }
#pragma unroll
        for (int block = 0; block < 4; block++) {
            if (block < warp) continue;
            u32 left[4], right[4];
            const bool far = !second_half && block >= 2;
            load4_transposed(right, q_tile + in_tile(block * 16 + load_row, part));
            load4_transposed(left, address_of(s.d_reads[block_of(block, warp)]) + in_narrow(turned_row, turned_part));
            if (far) mma_bf16(c_far, left, right); else mma_bf16(c_near, left, right);
            load4_transposed(right, k_tile + in_tile(block * 16 + load_row, part));
            load4_transposed(left, address_of(s.d_a[block_of(block, warp)]) + in_narrow(turned_row, turned_part));
            const u32 beta0 = s.beta_pair[block * 8 + pair], beta1 = s.beta_pair[block * 8 + 4 + pair];
            left[0] = mul_bf16(left[0], beta0);
            left[1] = mul_bf16(left[1], beta0);
            left[2] = mul_bf16(left[2], beta1);
            left[3] = mul_bf16(left[3], beta1);
            if (far) mma_bf16(c_far, left, right); else mma_bf16(c_near, left, right);
        }

        float d_sum[8], after[8];
        u32 dq_pair[4], dk_pair[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {  // two channels of one token: registers 2 i and 2 i + 1
            const int low_high = i & 1, token = first_token + row + low_high * 8;
            const int channel = group * GROUP + (i >> 1) * 8 + pair * 2;
            float2 quarter[4];
#pragma unroll
            for (int j = 0; j < 4; j++) quarter[j] = *reinterpret_cast<const float2*>(&s.factor[j][channel]);
            const u32 at = in_tile(token, channel >> 3) + (channel & 7) * 2;
            const u32 qr_pair = *reinterpret_cast<const u32*>(s.q + at);
            const u32 kr_pair = *reinterpret_cast<const u32*>(s.k + at);
            const u32 kf_pair = *reinterpret_cast<const u32*>(s.f + at);
            const float2 apart = *reinterpret_cast<const float2*>(&s.apart[in_apart(token, channel)]);
            float dq[2], dk[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int x = 2 * i + j;
                const float f0 = j ? quarter[0].y : quarter[0].x, f1 = j ? quarter[1].y : quarter[1].x;
                const float f2 = j ? quarter[2].y : quarter[2].x, f3 = j ? quarter[3].y : quarter[3].x;
                const float to_start = second_half ? f0 * f1 * f2 : f0;
                const float to_end = second_half ? f3 : f1 * f2 * f3;
                const float qr = j ? high(qr_pair) : low(qr_pair), kr = j ? high(kr_pair) : low(kr_pair);
                const float kf = j ? high(kf_pair) : low(kf_pair);
                const float a = j ? apart.y : apart.x;
                const float rises = exp2_fast(a), falls = exp2_fast(-a);
                const float q_row = q_near[x] + q_far[x] * f1 * f2 + by_do[x] * to_start;
                const float k_pairs = k_near[x] + k_far[x] * f1 * f2;
                const float k_row = beta_of[low_high] * k_pairs - by_dv[x] * to_start;
                const float column = c_near[x] + c_far[x] * f2 * f1;
                const float end = by_delta[x] * to_end;
                const float by_q = qr * q_row, by_k = kr * k_row, by_column = kf * column;
                d_sum[x] = by_q + by_k - by_column;
                after[x] = kf * end;
                const float own = own_of[low_high], q_here = qr * falls, k_here = kr * falls;
                dq[j] = rises * q_row + own * k_here;
                dk[j] = rises * k_row + falls * (column + end) + own * q_here;
                q_dot[low_high] += by_q + own * q_here * k_here;
                k_dot[low_high] += by_k + by_column + after[x] + own * q_here * k_here;
                beta_sum[low_high] += kr * k_pairs;
            }
            dq_pair[i] = bf16_pair(dq[0], dq[1]);
            dk_pair[i] = bf16_pair(dk[0], dk[1]);
        }

        // Sums over tokens: of dG from a token on, of `after` up to the one before it. Registers x and
        // x + 2 are rows row and row + 8 of one channel.
#pragma unroll
        for (int x = 0; x < 8; x++) {
            if (x & 2) continue;
            float low_sum = d_sum[x], high_sum = d_sum[x + 2];
            float low_after = after[x], high_after = after[x + 2];
#pragma unroll
            for (int apart = 4; apart < 32; apart *= 2) {
                const float a = __shfl_down_sync(0xffffffffu, low_sum, apart);
                const float b = __shfl_down_sync(0xffffffffu, high_sum, apart);
                const float c = __shfl_up_sync(0xffffffffu, low_after, apart);
                const float d = __shfl_up_sync(0xffffffffu, high_after, apart);
                if (lane + apart < 32) {
                    low_sum += a;
                    high_sum += b;
                }
                if (lane >= apart) {
                    low_after += c;
                    high_after += d;
                }
            }
            low_sum += __shfl_sync(0xffffffffu, high_sum, pair);
            const float low_total = __shfl_sync(0xffffffffu, low_after, 28 + pair);
            const float high_total = __shfl_sync(0xffffffffu, high_after, 28 + pair);
            const float before_low = __shfl_up_sync(0xffffffffu, low_after, 4);
            const float before_high = __shfl_up_sync(0xffffffffu, high_after, 4);
            const int column = (x >> 2) * 8 + pair * 2 + (x & 1);
            if (lane < 4) {
                s.later[warp][column] = low_sum;
                s.earlier[warp][column] = low_total + high_total;
            }
            d_sum[x] = low_sum + (row ? before_low : 0.0f);
            d_sum[x + 2] = high_sum + low_total + (row ? before_high : 0.0f);
        }
        __syncthreads();

        // All warps are done with these channels of the tiles, and every sum is known.
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int channel = group * GROUP + n * 8 + pair * 2;
            float dg[4];  // tokens row, row, row + 8, row + 8; channels alternate
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int column = n * 8 + pair * 2 + j;
                float more = 0;
#pragma unroll
                for (int other = 0; other < 4; other++) {
                    if (other > warp) more += s.later[other][column];
                    if (other < warp) more += s.earlier[other][column];
                }
                const float decay = s.factor[0][channel + j] * s.factor[1][channel + j] *
                                    s.factor[2][channel + j] * s.factor[3][channel + j];
                more += decay * (s.of_decay[0][column] + s.of_decay[1][column] + s.of_decay[2][column] + s.of_decay[3][column]);
                dg[j] = d_sum[n * 4 + j] + more;
                dg[2 + j] = d_sum[n * 4 + 2 + j] + more;
            }
            float bias_sum0 = 0, bias_sum1 = 0;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int token = first_token + row + i * 8;
                const u32 at = in_tile(token, channel >> 3) + (channel & 7) * 2;
                *reinterpret_cast<u32*>(s.q + at) = dq_pair[n * 2 + i];
                *reinterpret_cast<u32*>(s.f + at) = dk_pair[n * 2 + i];
                if (token >= present) continue;
                const i64 out = rows + token * row_stride + channel;
                float2 f = make_float2(0.0f, 0.0f);
                float bias0 = 0, bias1 = 0;
#if LAW
                f = gate_pair(p.g, out);
                bias0 = p.dt_bias[head * WIDTH + channel];
                bias1 = p.dt_bias[head * WIDTH + channel + 1];
#endif
                const float df0 = through_law(dg[i * 2], f.x, rate, bias0, bound, rate_sum);
                const float df1 = through_law(dg[i * 2 + 1], f.y, rate, bias1, bound, rate_sum);
                bias_sum0 += df0;
                bias_sum1 += df1;
                store_gate_pair(p.d_g, out, df0, df1);
            }
#if LAW
#pragma unroll
            for (int apart = 4; apart < 32; apart *= 2) {
                bias_sum0 += __shfl_xor_sync(0xffffffffu, bias_sum0, apart);
                bias_sum1 += __shfl_xor_sync(0xffffffffu, bias_sum1, apart);
            }
            if (lane < 4) *reinterpret_cast<float2*>(&s.bias[warp][channel]) = make_float2(bias_sum0, bias_sum1);
#endif
        }
    }

    // The unit norms, and what is summed over channels or tokens.
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int apart = 1; apart < 4; apart *= 2) {
            q_dot[i] += __shfl_xor_sync(0xffffffffu, q_dot[i], apart);
            k_dot[i] += __shfl_xor_sync(0xffffffffu, k_dot[i], apart);
            beta_sum[i] += __shfl_xor_sync(0xffffffffu, beta_sum[i], apart);
        }
        const int token = first_token + row + i * 8;
        if (pair == 0) {
            s.dot[token][0] = q_dot[i] / (scale * scale);
            s.dot[token][1] = k_dot[i];
            if (token < present) {
                const i64 at = (start + token) * H + head;
                float whole = p.value_beta[at] + beta_sum[i];
#if BETA_LOGITS
                whole *= beta_of[i] * (1.0f - beta_of[i]);
#endif
                p.d_beta[at] = whole;
            }
        }
    }
#if LAW
#pragma unroll
    for (int apart = 1; apart < 32; apart *= 2) rate_sum += __shfl_xor_sync(0xffffffffu, rate_sum, apart);
    if (lane == 0) s.later[warp][0] = rate_sum;
#endif
    __syncthreads();
#if LAW
    if (thread == 0) p.d_rate[place] = s.later[0][0] + s.later[1][0] + s.later[2][0] + s.later[3][0];
    p.d_bias[place * WIDTH + thread] = s.bias[0][thread] + s.bias[1][thread] + s.bias[2][thread] + s.bias[3][thread];
#endif
#pragma unroll 2
    for (int turn = 0; turn < 8; turn++) {
        const int token = first_token + turn * 2 + (lane >> 4), chunk16 = lane & 15;
        if (token >= present) continue;
        const i64 at = rows + token * row_stride + chunk16 * 8;
        const float2 factor = *reinterpret_cast<const float2*>(s.norm[token]);
        uint4 dq = *reinterpret_cast<const uint4*>(s.q + in_tile(token, chunk16));
        uint4 dk = *reinterpret_cast<const uint4*>(s.f + in_tile(token, chunk16));
#if QK_NORM
        const float2 dot = *reinterpret_cast<const float2*>(s.dot[token]);
        const uint4 q_in = *reinterpret_cast<const uint4*>(p.q + at);
        const uint4 k_in = *reinterpret_cast<const uint4*>(p.k + at);
#endif
        u32* dqs = reinterpret_cast<u32*>(&dq);
        u32* dks = reinterpret_cast<u32*>(&dk);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float dq0 = low(dqs[j]), dq1 = high(dqs[j]), dk0 = low(dks[j]), dk1 = high(dks[j]);
#if QK_NORM
            const u32 qs = reinterpret_cast<const u32*>(&q_in)[j], ks = reinterpret_cast<const u32*>(&k_in)[j];
            dq0 -= low(qs) * factor.x * dot.x;
            dq1 -= high(qs) * factor.x * dot.x;
            dk0 -= low(ks) * factor.y * dot.y;
            dk1 -= high(ks) * factor.y * dot.y;
#endif
            dqs[j] = bf16_pair(dq0 * factor.x, dq1 * factor.x);
            dks[j] = bf16_pair(dk0 * factor.y, dk1 * factor.y);
        }
        *reinterpret_cast<uint4*>(p.d_q + at) = dq;
        *reinterpret_cast<uint4*>(p.d_k + at) = dk;
    }
}
