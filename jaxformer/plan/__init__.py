"""What a training step needs of hardware that is not there, as that hardware's compiler says.

`jaxformer plan PRESET --topology v5p:8x8x16 --mesh.fsdp 512 --mesh.tensor 2`. The step that would
train is compiled ahead of time in a process of its own (`worker`), and what came out is read:
memory, collectives, kernels. Times are bounds from the hardware's peaks (`estimate`), measured by
nobody.
"""
