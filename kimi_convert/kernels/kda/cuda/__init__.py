"""Stages of KDA in CUDA C++, where Triton was measured to be the limit; see docs/kernels/kda.md."""
