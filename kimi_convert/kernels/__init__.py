"""The arithmetic of Kimi-Linear layers: tensors in, tensors out.

This package knows no checkpoint, no config and no model. Names of dims, everywhere below:

    B batch    T tokens    H heads         K key dim        V value dim
    C chunk    D features  P channels      W conv width     N chunks     M = N * B * H

    q, k       [B, T, H, K]   queries and keys, already normalised
    v          [B, T, H, V]   values
    g          [B, T, H, K]   log decay, natural log, <= 0; exp(g) multiplies the state
    beta       [B, T, H]      write strength in (0, 1), not logits
    state      [B, H, K, V]   fp32; the KDA memory, keys before values
    state      [B, P, W - 1]  the last inputs of a short convolution, oldest first
    A_log      [H]            natural log of the decay rate of a head
    dt_bias    [H, K]         added to the gate's projection

Every public function checks its arguments and is differentiable; those whose names end in `_`
write over states and have no gradients, the others write to no argument.
Half and single precision compute in fp32, double in fp64.
"""
