"""CTC's recursions for TPU: Pallas kernels that keep the states in registers from frame to frame.

A block of rows lies along sublanes, its states along lanes: a label's neighbours are one rotation
away. Blocks of frames come and go while the states stay on the chip; as a scan, every frame would
carry them through memory. What is done for a frame is what `xla` does.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxformer_kernels import _compat, dispatch, hardware
from jaxformer_kernels.ctc import xla
from jaxformer_kernels.ctc.call import FEATURES

_LANES = 128
_SUBLANES = 8
_STATES = 4096  # of a block of rows: enough to fill the pipeline, few enough for registers
_FRAMES = 64  # of a block
_BYTES = 12 << 20  # of VMEM for the blocks of all operands, of which `back` has most
_MOST_PLACES = 2048


def _block(B, places):
    """(rows, frames) of a block."""
    rows = min(max(_STATES // places, _SUBLANES), -(-B // _SUBLANES) * _SUBLANES)
    # Eight arrays of float32, each twice: one is fetched or stored while the other is used.
    frames = _BYTES // (8 * 2 * 4 * rows * places)
    return rows, max(1, min(frames, _FRAMES))


def _places(N):
    return -(-(N + 1) // _LANES) * _LANES


def _spread(x, places, fill):
    """[..., N + 1] with places added before the last."""
    widths = [(0, 0)] * (x.ndim - 1) + [(0, places - x.shape[-1])]
    return jnp.concatenate(
        [jnp.pad(x[..., :-1], widths, constant_values=fill), x[..., -1:]], axis=-1
    )


def _operands(rows):
    """Frames' mantissa and exponent, skips [B, places], and counts [B, 1]."""
    places = _places(rows.skip.shape[1] - 1)
    return (
        _spread(rows.frames[0], places, 0.0),
        _spread(rows.frames[1], places, -jnp.inf),
        _spread(rows.skip, places, -jnp.inf),
        rows.frame_count[:, None],
        rows.label_count[:, None],
    )


def ahead(rows, keep):
    """As `xla.ahead`; with a few more places of no meaning."""
    operands = _operands(rows)
    T, B, places = operands[0].shape
    R, F = _block(B, places)
    of_frames = pl.BlockSpec((F, R, places), lambda i, j: (j, i, 0))
    of_states = pl.BlockSpec((R, places), lambda i, j: (i, 0))
    of_row = pl.BlockSpec((R, 1), lambda i, j: (i, 0))
    found = _call(
        functools.partial(_ahead_kernel, F, keep),
        (B, T, R, F, places),
        operands,
        [of_frames, of_frames, of_states, of_row, of_row],
        [((B, places), of_states)] * 4 + [((T, B, places), of_frames)] * (4 if keep else 0),
        "ctc_ahead",
    )
    return _state(found[:4]), _state(found[4:]) if keep else None


def back(rows, path, probability):
    """As `xla.back`."""
    operands = _operands(rows)
    T, B, places = operands[0].shape
    R, F = _block(B, places)
    blocks = -(-T // F)
    of_frames = pl.BlockSpec((F, R, places), lambda i, j: (blocks - 1 - j, i, 0))
    of_states = pl.BlockSpec((R, places), lambda i, j: (i, 0))
    of_row = pl.BlockSpec((R, 1), lambda i, j: (i, 0))
    found = _call(
        functools.partial(_back_kernel, F, blocks),
        (B, T, R, F, places),
        (*operands, *(x[:, None] for x in probability), *jax.tree.leaves(path)),
        [of_frames, of_frames, of_states, *[of_row] * 4, *[of_frames] * 4],
        [((T, B, places), of_frames)] * 2,
        "ctc_back",
    )
    return tuple(x[..., : rows.skip.shape[1]] for x in found)


def _call(kernel, sizes, operands, in_specs, outputs, name):
    B, T, R, F, places = sizes
    shapes, out_specs = zip(*outputs, strict=True)
    return pl.pallas_call(
        kernel,
        grid=(-(-B // R), -(-T // F)),
        in_specs=in_specs,
        out_specs=list(out_specs),
        out_shape=[_compat.shape_like(shape, jnp.float32, operands[0]) for shape in shapes],
        scratch_shapes=[pltpu.VMEM((R, places), jnp.float32)] * 4,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=4 * _BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=60 * T * B * places,
            transcendentals=0,
            bytes_accessed=4 * T * B * places * (len(operands) + len(shapes) - 6),
        ),
        interpret=dispatch.interpreter() or False,
        name=name,
    )(*operands)


def _ahead_kernel(F, keep, mantissa, exponent, skip, frame_count, _, *refs):
    """One block of frames of one block of rows."""
    last, path, scratch = refs[:4], refs[4:-4], refs[-4:]
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _():
        _put(scratch, xla.beginning(skip[...]))

    count, skips = frame_count[...], skip[...]

    def step(k, state):
        after = xla.advance(state, (mantissa[k], exponent[k]), skips, _up)
        now = jnp.broadcast_to(j * F + k < count, skips.shape)
        state = jax.tree.map(lambda x, y: jnp.where(now, x, y), after, state)
        if keep:
            _put([ref.at[k] for ref in path], state)
        return state

    state = lax.fori_loop(0, F, step, _state([ref[...] for ref in scratch]))
    _put(scratch, state)

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        _put(last, state)


def _back_kernel(F, blocks, mantissa, exponent, skip, frame_count, label_count, *refs):
    """One block of frames of one block of rows, its last frame first."""
    whole, path, shares, scratch = refs[:2], refs[2:6], refs[6:8], refs[8:]
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _():
        # Where to begin is the frame that is a row's last.
        _put(scratch, xla.ending_states(label_count[...], skip[...]))

    count, skips = frame_count[...], _down(skip[...], -jnp.inf)
    ending = xla.ending_states(label_count[...], skips)
    whole = tuple(jnp.broadcast_to(ref[...], skips.shape) for ref in whole)
    first = (blocks - 1 - j) * F

    def step(k, state):
        k = F - 1 - k
        is_last = jnp.broadcast_to(first + k == count - 1, skips.shape)
        rest = jax.tree.map(lambda x, y: jnp.where(is_last, x, y), ending, state)
        here = _state([ref[k] for ref in path])
        for out, of_here, of_rest in zip(shares, here, rest, strict=True):
            out[k] = xla.share(whole, of_here, of_rest)
        frame = mantissa[k], exponent[k]
        return xla.retreat(xla.with_frame(rest, frame), skips, _down)

    _put(scratch, lax.fori_loop(0, F, step, _state([ref[...] for ref in scratch])))


def _state(arrays):
    """Four arrays as (blanks, labels)."""
    return (arrays[0], arrays[1]), (arrays[2], arrays[3])


def _put(refs, state):
    for ref, value in zip(refs, jax.tree.leaves(state), strict=True):
        ref[...] = value


def _up(x, fill):
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(lane == 0, fill, pltpu.roll(x, 1, 1))


def _down(x, fill):
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    last = x.shape[1] - 1
    return jnp.where(lane == last, fill, pltpu.roll(x, last, 1))


def _limits(call):
    """What keeps `mosaic_tpu` from doing `call`."""
    yield from hardware.tpu_lacks(call.dtype)
    if _places(call.N) > _MOST_PLACES:
        yield f"{call.N} labels a row (at most {_MOST_PLACES - 1})"


IMPLEMENTATION = dispatch.Implementation(
    run=xla.differentiable(ahead, back),
    supports=FEATURES - {"float64"},
    limits=lambda call: tuple(_limits(call)),
)
