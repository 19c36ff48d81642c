"""Calls of context_attention beside attention of the whole sequence: what the tests here share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jaxformer_kernels import Mask, attention, context_attention, zigzag

B, T, N, K, H, HV = 2, 32, 4, 2, 8, 6
CROSS = 48  # keys of the call with another number of them
OURS = P(None, "context")


def draw(seed, *shape):
    return np.random.RandomState(seed).standard_normal(shape)


def segments(seed, length, count):
    """Ids of documents that begin anywhere, on the border of a device's share or not."""
    return jnp.asarray(np.sort(np.random.RandomState(seed).randint(0, count, (B, length))))


def make_call(name):
    """(differentiable operands in float64, options) of a call by its name."""
    S = CROSS if name == "cross" else T
    operands = {"q": draw(0, B, T, N, H), "k": draw(1, B, S, K, H), "v": draw(2, B, S, K, HV)}
    ids = segments(3, T, 3)
    packed = {"q_segment_ids": ids, "kv_segment_ids": ids}
    options = {}
    if name == "causal":
        fields = {"causal": True}
    elif name == "packed":
        fields = {"causal": True, **packed}
    elif name == "window":
        fields = {"window": (3, 5)}
    elif name == "everything":
        fields = {"causal": True, "window": (9, 0), **packed}
        options["softcap"] = 1.5
        operands["sinks"] = draw(4, N)
    else:
        # No key has the ids 3 and 4: their queries see nothing.
        fields = {"q_segment_ids": segments(3, T, 5), "kv_segment_ids": segments(5, S, 3)}
        operands["sinks"] = draw(4, N)
    return operands, {"mask": Mask(**fields), **options}


def ring_mesh(C, data=1):
    """A mesh of `data` rows of C devices."""
    devices = np.array(jax.devices()[: data * C]).reshape(data, C)
    return Mesh(devices, ("data", "context"), axis_types=(AxisType.Auto,) * 2)


def split(
    C,
    order="zigzag",
    *,
    mesh=None,
    rows=None,
    check_vma=True,
    axis_names=None,
    dealt_out=False,
    **how,
):
    """`attention` of a whole sequence by `context_attention` on C devices.

    Args:
        C, order, how: as for `context_attention`.
        mesh, axis_names, check_vma: of `jax.shard_map`.
        rows: the mesh axis that the batch is split over.
        dealt_out: whether operands and output are in `order`, not in the sequence's own.
    """
    mesh = mesh or ring_mesh(C)
    ours = P(rows, "context")

    def run(q, k, v, *, mask, sinks=None, softcap=None):
        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(ours, ours, ours, P(), jax.tree.map(lambda _: ours, mask)),
            out_specs=ours,
            check_vma=check_vma,
            axis_names=axis_names or frozenset(mesh.axis_names),
        )
        def sharded(q, k, v, sinks, mask):
            options = {"mask": mask, "sinks": sinks, "softcap": softcap}
            return context_attention(q, k, v, axis_name="context", order=order, **options, **how)

        if dealt_out or order != "zigzag":
            return sharded(q, k, v, sinks, mask)
        q, k, v, mask = jax.tree.map(lambda x: x[:, zigzag(C, x.shape[1])], (q, k, v, mask))
        out = sharded(q, k, v, sinks, mask)
        return out[:, np.argsort(zigzag(C, out.shape[1]))]

    return run


def whole(implementation):
    """`attention` itself."""
    return functools.partial(attention, implementation=implementation)


def outcome(run, operands, options):
    """Output, and the gradients of a loss that weighs every element of it."""

    def loss(operands, mask):
        out = run(**operands, **{**options, "mask": mask})
        return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

    # The mask is an argument, so that its ids are not constants to fold.
    call = jax.jit(jax.grad(loss, has_aux=True))
    gradients, out = call(operands, options["mask"])
    return {"out": out, **{f"d{name}": x for name, x in gradients.items()}}


def cast(operands, dtype):
    return {name: jnp.asarray(x, dtype) for name, x in operands.items()}


@functools.cache
def expected(name):
    """The reference's outcome in float64."""
    operands, options = make_call(name)
    with jax.enable_x64(True):
        result = outcome(whole("reference"), cast(operands, jnp.float64), options)
    return {name: np.asarray(x) for name, x in result.items()}


@functools.cache
def unsplit_errors(name):
    """The largest errors of `xla` on one device, in float32."""
    operands, options = make_call(name)
    return errors(outcome(whole("xla"), cast(operands, jnp.float32), options), expected(name))


def errors(got, want):
    """The largest error of every result."""
    return {name: np.abs(np.asarray(got[name], np.float64) - x).max() for name, x in want.items()}
