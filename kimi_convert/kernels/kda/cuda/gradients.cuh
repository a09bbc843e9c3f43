// What the kernels of the stage `key_gradients` share: their arguments, and the way through the gate.

#define LN_2 0.6931471805599453f

// What both kernels of this stage are given.
struct Arguments {
    const u16* q;              // [T, H, 128] bf16
    const u16* k;              // [T, H, 128] bf16
    const void* g;             // [T, H, 128]
    const void* beta;          // [T, H]
    const float* A_log;        // [H], where LAW
    const float* dt_bias;      // [H, 128], where LAW
    const void* cu_seqlens;    // [N + 1] int64, where PACKED
    const int* chunk_offsets;  // [N + 1], where PACKED
    const u16* d_o;            // [T, H, 128] bf16
    const u16* d_v;            // [T, H, 128] bf16
    const u16* d_reads;        // [chunks, H, 64, 64] bf16, 0 above the diagonal
    const u16* d_a;            // [chunks, H, 64, 64] bf16, 0 on it too
    const u16* states;         // [chunks, H, 128 values, 128 channels] bf16, before each chunk
    const u16* deltas;         // [chunks, H, 128 values, 64] bf16
    const u16* d_states;       // as states, after each chunk
    u16* d_q;                  // [T, H, 128] bf16
    u16* d_k;                  // [T, H, 128] bf16
    void* d_g;                 // [T, H, 128], as g
    const float* value_beta;   // [T, H]: the gradient of beta in (0, 1), but for the part of the keys
    float* d_beta;             // [T, H], of the input
    float* d_rate;             // [chunks, H], parts of the gradient of A_log, where LAW
    float* d_bias;             // [chunks, H, 128], parts of that of dt_bias, where LAW
    int* steep;                // [chunks, H]: 1 where a factor leaves the range
    int length, num_chunks, num_sequences, total_chunks, H;
    float scale, bound;
};

// The gradients of a gate input and, added to `by_rate`, of A_log, from that of the log decay.
__device__ __forceinline__ float through_law(float dg, float f, float rate, float bias, float bound, float& by_rate) {
#if LAW == 0
    return dg;
#elif LAW == 1
    const float x = f + bias, y = x * LOG2_E;
    const float soft = y > 24.0f ? y : log2_fast(1.0f + exp2_fast(y));
    by_rate -= dg * rate * soft * LN_2;
    return -dg * rate * sigmoid(x);
#else
    const float x = f + bias, s = sigmoid(rate * x);
    const float df = dg * bound * s * (1.0f - s) * rate;
    by_rate += df * x;
    return df;
#endif
}

__device__ __forceinline__ void store_gate_pair(void* d_g, i64 at, float a, float b) {
#if G_SINGLE
    *reinterpret_cast<float2*>(static_cast<float*>(d_g) + at) = make_float2(a, b);
#else
    *reinterpret_cast<u32*>(static_cast<u16*>(d_g) + at) = bf16_pair(a, b);
#endif
}
