// The stage of key_gradients.cu for the chunks that it has marked: gates so strong that no reference
// row serves 16 tokens. Every pair of tokens is taken by itself, exp(G_i - G_j) for each channel, in
// fp32, a thread per channel. Slow and plain: such chunks are few.
//
// Macros: those of tiles.cuh, SHARED_BYTES. docs/kernels/kda.md derives the formulas.

#define ROWS 16  // tokens whose products with a state are added up together

struct Shared {
    float sum[TOKENS][WIDTH];     // G, log2
    float q[TOKENS][WIDTH];       // of unit length, scaled; then dq
    float k[TOKENS][WIDTH];       // of unit length; then dk
    float column[TOKENS][WIDTH];  // gradients of k as a column of pairs
    u16 values[3][TOKENS][WIDTH]; // d_o, d_v and deltas, bf16
    float norm[TOKENS][2];
    float beta[TOKENS];
    float dot[3][TOKENS][4];      // a warp's parts of q . dq, k . dk and the gradient of beta
    float rate[4];
    u32 marks[4];
};

static_assert(sizeof(Shared) == SHARED_BYTES, "the host asks for another size");

__device__ __forceinline__ float single(u16 x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ u16 rounded(float x) { return (u16)bf16_pair(x, 0.0f); }
__device__ __forceinline__ float of_warp(float x) {
#pragma unroll
    for (int apart = 1; apart < 32; apart *= 2) x += __shfl_xor_sync(0xffffffffu, x, apart);
    return x;
}

__device__ void do_chunk(const Arguments& p, Shared& s, int chunk, int head) {
    const int c = threadIdx.x, lane = c & 31, warp = c >> 5, H = p.H;
    const i64 place = (i64)chunk * H + head;
    const Place where = locate_chunk(chunk, p.cu_seqlens, p.chunk_offsets, p.length, p.num_chunks, p.num_sequences);
    const int present = where.present;
    const i64 stride = (i64)H * WIDTH, rows = (where.start * H + head) * WIDTH;
    float rate = 0, bias = 0;
#if LAW
    rate = exp2_fast(p.A_log[head] * LOG2_E);
    bias = p.dt_bias[head * WIDTH + c];
#endif

    // Inputs, one token after another.
    float total = 0;
    for (int i = 0; i < TOKENS; i++) {
        const bool here = i < present;
        const i64 at = rows + i * stride + c;
        float q = 0, k = 0;
        if (here) {
            q = single(p.q[at]);
            k = single(p.k[at]);
#if G_SINGLE
            const float f = static_cast<const float*>(p.g)[at];
#else
            const float f = single(static_cast<const u16*>(p.g)[at]);
#endif
            total += log2_decay(f, rate, bias, p.bound);
        }
        s.sum[i][c] = total;
        s.q[i][c] = q;
        s.k[i][c] = k;
        s.values[0][i][c] = here ? p.d_o[at] : 0;
        s.values[1][i][c] = here ? p.d_v[at] : 0;
        s.values[2][i][c] = p.deltas[(place * WIDTH + c) * TOKENS + i];
        s.column[i][c] = 0;
#if QK_NORM
        const float q_part = of_warp(q * q), k_part = of_warp(k * k);
        if (lane == 0) {
            s.dot[0][i][warp] = q_part;
            s.dot[1][i][warp] = k_part;
        }
#endif
    }
    __syncthreads();
    if (c < TOKENS) {
        float q_factor = p.scale, k_factor = 1.0f;
#if QK_NORM
        q_factor *= rsqrt_fast(s.dot[0][c][0] + s.dot[0][c][1] + s.dot[0][c][2] + s.dot[0][c][3] + 1e-6f);
        k_factor = rsqrt_fast(s.dot[1][c][0] + s.dot[1][c][1] + s.dot[1][c][2] + s.dot[1][c][3] + 1e-6f);
#endif
        s.norm[c][0] = q_factor;
        s.norm[c][1] = k_factor;
        s.beta[c] = c < present ? load_beta(p.beta, (where.start + c) * H + head) : 0.0f;
    }
    __syncthreads();
    for (int i = 0; i < TOKENS; i++) {
        s.q[i][c] *= s.norm[i][0];
        s.k[i][c] *= s.norm[i][1];
    }

    // Columns of pairs first: they need all q and k, which rows then write over.
    const u16* d_reads = p.d_reads + place * TOKENS * TOKENS;
    const u16* d_a = p.d_a + place * TOKENS * TOKENS;
    for (int i = 0; i < TOKENS; i++) {
        const float q = s.q[i][c], k = s.k[i][c] * s.beta[i], sum = s.sum[i][c];
        for (int j = 0; j < i; j++)
            s.column[j][c] += exp2_fast(sum - s.sum[j][c]) *
                              (single(d_reads[i * TOKENS + j]) * q + single(d_a[i * TOKENS + j]) * k);
    }

    // From the last token to the first, so that the sums of dG from a token on are at hand; what passes
    // through the chunk's end is added up before, from the first.
    const u16* state = p.states + place * WIDTH * WIDTH + c;
    const u16* d_state = p.d_states + place * WIDTH * WIDTH + c;
    float of_decay = 0, passed = 0;
    for (int v = 0; v < WIDTH; v++) of_decay += single(state[v * WIDTH]) * single(d_state[v * WIDTH]);
    of_decay *= exp2_fast(total);
    float after[TOKENS], before[TOKENS];  // in local memory
    for (int first = 0; first < TOKENS; first += ROWS) {
        float sums[ROWS] = {};
        for (int v = 0; v < WIDTH; v++) {
            const float x = single(d_state[v * WIDTH]);
#pragma unroll
            for (int i = 0; i < ROWS; i++) sums[i] += single(s.values[2][first + i][v]) * x;
        }
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            before[first + i] = passed;
            after[first + i] = exp2_fast(total - s.sum[first + i][c]) * sums[i];
            passed += s.k[first + i][c] * after[first + i];
        }
    }
    float from_here = 0, bias_sum = 0, by_rate = 0;
    for (int first = TOKENS - ROWS; first >= 0; first -= ROWS) {
        float by_do[ROWS] = {}, by_dv[ROWS] = {};
        for (int v = 0; v < WIDTH; v++) {
            const float x = single(state[v * WIDTH]);
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                by_do[i] += single(s.values[0][first + i][v]) * x;
                by_dv[i] += single(s.values[1][first + i][v]) * x;
            }
        }
#pragma unroll
        for (int in_rows = ROWS - 1; in_rows >= 0; in_rows--) {
            const int i = first + in_rows;
            const float sum = s.sum[i][c], q = s.q[i][c], k = s.k[i][c], decay = exp2_fast(sum);
            float q_row = 0, k_pairs = 0;
            for (int j = 0; j < i; j++) {
                const float x = exp2_fast(sum - s.sum[j][c]) * s.k[j][c];
                q_row += single(d_reads[i * TOKENS + j]) * x;
                k_pairs += single(d_a[i * TOKENS + j]) * x;
            }
            q_row += decay * by_do[in_rows];
            const float k_row = s.beta[i] * k_pairs - decay * by_dv[in_rows];
            const float column = s.column[i][c], own = single(d_reads[i * TOKENS + i]);
            from_here += q * q_row + k * k_row - k * column;
            const float dg = from_here + before[i] + of_decay;
            const float dq = q_row + own * k, dk = k_row + column + after[i] + own * q;
            const float q_dot = of_warp(q * dq), k_dot = of_warp(k * dk), of_beta = of_warp(k * k_pairs);
            if (lane == 0) {
                s.dot[0][i][warp] = q_dot;
                s.dot[1][i][warp] = k_dot;
                s.dot[2][i][warp] = of_beta;
            }
            const i64 at = rows + i * stride + c;
            if (i < present) {
                float f = 0;
#if LAW && G_SINGLE
                f = static_cast<const float*>(p.g)[at];
#elif LAW
                f = single(static_cast<const u16*>(p.g)[at]);
#endif
                const float df = through_law(dg, f, rate, bias, p.bound, by_rate);
                bias_sum += df;
#if G_SINGLE
                static_cast<float*>(p.d_g)[at] = df;
#else
                static_cast<u16*>(p.d_g)[at] = rounded(df);
#endif
            }
            s.column[i][c] = dq;   // this token is no column of an earlier row
            s.sum[i][c] = dk;      // nor are its gates asked for again
        }
    }
    by_rate = of_warp(by_rate);
    if (lane == 0) s.rate[warp] = by_rate;
    __syncthreads();
#if LAW
    p.d_bias[place * WIDTH + c] = bias_sum;
    if (c == 0) p.d_rate[place] = s.rate[0] + s.rate[1] + s.rate[2] + s.rate[3];
#endif
    for (int i = 0; i < present; i++) {
        float dq = s.column[i][c], dk = s.sum[i][c];
#if QK_NORM
        dq -= s.q[i][c] * (s.dot[0][i][0] + s.dot[0][i][1] + s.dot[0][i][2] + s.dot[0][i][3]) / (p.scale * p.scale);
        dk -= s.k[i][c] * (s.dot[1][i][0] + s.dot[1][i][1] + s.dot[1][i][2] + s.dot[1][i][3]);
#endif
        const i64 at = rows + i * stride + c;
        p.d_q[at] = rounded(dq * s.norm[i][0]);
        p.d_k[at] = rounded(dk * s.norm[i][1]);
    }
    if (c < present) {
        const i64 at = (where.start + c) * H + head;
        float whole = p.value_beta[at] + s.dot[2][c][0] + s.dot[2][c][1] + s.dot[2][c][2] + s.dot[2][c][3];
#if BETA_LOGITS
        whole *= s.beta[c] * (1.0f - s.beta[c]);
#endif
        p.d_beta[at] = whole;
    }
}

extern "C" __global__ void __launch_bounds__(128) kda_key_gradients(const __grid_constant__ Arguments p) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared& s = *reinterpret_cast<Shared*>(memory);
    for_marked(p.steep, (i64)p.total_chunks * p.H, s.marks,
               [&](i64 place) { do_chunk(p, s, (int)(place / p.H), (int)(place % p.H)); });
}
