"""What a checkpoint and a conversion are, as checked data: no bytes, no tensors, no torch."""
