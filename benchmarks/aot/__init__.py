"""Compile every kernel ahead of time for hardware that is not there, and say what came out.

`python -m benchmarks.aot tpu` takes the TPU's own compiler, for v5e, v5p and v6e; `h100` NVIDIA's
assembler, to sm_90a machine code. `make aot-tpu` and `make aot-h100` bring the environments along.
A compile proves that a kernel fits the device and what it takes of it; numerics and speed it does
not.
"""
