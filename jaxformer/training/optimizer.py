"""Optimisers and learning-rate schedules, all optax, chosen by name."""

import jax
import optax
from optax import contrib

from jaxformer.config import OptimizerConfig
from jaxformer.nn.parameters import Params

MATRICES = ("kernel", "table")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate as a function of the step: linear warm-up from 0, then the named shape.

    constant stays at the peak; cosine and linear fall to `final_fraction` of it at the last step;
    inverse_sqrt falls as sqrt(warmup / step) (Noam: Vaswani et al., 2017); wsd stays, then falls
    linearly over the last `decay_fraction` of the steps (Hu et al., 2024).
    """
    peak, warmup = config.learning_rate, max(config.warmup_steps, 1)
    final = peak * config.final_fraction
    # Steps are counted from 1 here: step `warmup` has the peak, step `steps` the final rate.
    after = max(steps - warmup, 1)
    if config.schedule == "constant":
        shape = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        shape = optax.cosine_decay_schedule(peak, after, alpha=config.final_fraction)
    elif config.schedule == "linear":
        shape = optax.linear_schedule(peak, final, after)
    elif config.schedule == "inverse_sqrt":

        def shape(step):
            return peak * (warmup / (step + warmup)) ** 0.5

    else:
        decay = max(round(config.decay_fraction * steps), 1)
        shape = optax.linear_schedule(peak, final, decay, transition_begin=max(after - decay, 0))
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, shape], [warmup - 1])


def make_optimizer(
    config: OptimizerConfig, steps: int, axes: Params
) -> optax.GradientTransformation:
    """The gradient transformation: clipping by global norm, then the named optimiser.

    `axes` names the axes of every parameter (`jaxformer.nn.parameter_axes`). Weight decay applies
    to matrices only. Muon (Jordan et al., 2024) orthogonalises the updates of the layers' matrices
    and leaves embeddings, output projections and vectors to AdamW.
    """
    rate = make_schedule(config, steps)
    decayed = _by_name(axes, lambda path, _: path[-1] in MATRICES)
    if config.name == "adamw":
        update = optax.adamw(
            rate,
            b1=config.b1,
            b2=config.b2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decayed,
        )
    elif config.name == "lion":
        update = optax.lion(
            rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decayed
        )
    elif config.name == "adafactor":
        # optax's own weight decay for it is not multiplied by the learning rate.
        update = optax.chain(
            optax.adafactor(None),
            optax.scale(-1.0),
            optax.add_decayed_weights(config.weight_decay, mask=decayed),
            optax.scale_by_learning_rate(rate),
        )
    elif config.name == "muon":
        # optax's own split of the parameters would decay the vectors that it gives to AdamW.
        orthogonal = contrib.muon(
            rate,
            beta=config.b1,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_by_name(axes, _matrix_axes),
            consistent_rms=0.2,
        )
        rest = optax.adamw(
            rate,
            b1=config.b1,
            b2=config.b2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decayed,
        )
        update = optax.partition(
            {"muon": orthogonal, "adamw": rest},
            _by_name(axes, lambda *leaf: "adamw" if _matrix_axes(*leaf) is None else "muon"),
        )
    else:
        update = optax.chain(
            optax.trace(config.b1),
            optax.add_decayed_weights(config.weight_decay, mask=decayed),
            optax.scale_by_learning_rate(rate),
        )
    if config.clip_norm is None:
        return update
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _by_name(axes: Params, function) -> Params:
    """A tree of function(path, axes) in the shape of the parameters."""
    return jax.tree.map_with_path(
        lambda path, names: function([entry.key for entry in path], names),
        axes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def _matrix_axes(path: list[str], names: tuple[str, ...]) -> contrib.MuonDimensionNumbers | None:
    if path[-1] != "kernel" or names[0] != "L":
        return None
    # Kernels are stored inputs first; those that return to the model width have several inputs.
    inputs = len(names) - 2 if names[-1] == "D" else 1
    return contrib.MuonDimensionNumbers(
        reduction_axis=tuple(range(1, 1 + inputs)),
        output_axis=tuple(range(1 + inputs, len(names))),
    )
