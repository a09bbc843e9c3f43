"""Which tensors a checkpoint of each supported architecture holds, as tables."""
