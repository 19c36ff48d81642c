"""The interpreters in which tests run Pallas kernels."""

import contextlib
import dataclasses

import jax

from jaxformer_kernels import interpreting


@contextlib.contextmanager
def racing_gpu():
    """Simulate warpgroups, barriers, TMA and uninitialised memory; fail if anything raced.

    Every kernel that runs inside has a record of races of its own; all of them are looked at. On a
    GPU (JAXFORMER_TEST_PLATFORM=gpu) kernels run there, and nothing is simulated.
    """
    if jax.default_backend() == "gpu":
        yield
        return
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax.experimental.pallas import mosaic_gpu as plgpu

    original, records = gpu_callbacks.GPURaceDetectionState, []

    @dataclasses.dataclass
    class Recorded(original):
        def __post_init__(self):
            records.append(self)

    gpu_callbacks.GPURaceDetectionState = Recorded
    try:
        with interpreting(plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")):
            yield
    finally:
        gpu_callbacks.GPURaceDetectionState = original
    assert records, "no kernel was interpreted"
    assert not any(record.races_found for record in records), "a kernel raced: see its output"
