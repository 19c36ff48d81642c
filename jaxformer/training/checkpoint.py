"""Checkpoints by Orbax: written in the background, the newest few and the best kept."""

import functools
import logging
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.errors import JaxformerError
from jaxformer.nn.parameters import Params, with_statistics
from jaxformer.training.state import TrainState

METRIC = "dev_loss"


class CheckpointError(JaxformerError):
    """A checkpoint that is missing or does not fit the model; the message says what to do."""


class Checkpoints:
    """The folder `<folder>/<step>/`, one Orbax checkpoint a step.

    A checkpoint holds the items `params`, `optimizer`, `statistics` (if the model has any), `ema`
    (if kept) and `progress` (JSON values: the state of the input pipeline and what else the caller
    keeps), so that prediction reads the first and third alone.

    Orbax, which takes most of a second to import, is loaded when it is first needed: training has
    then begun.
    """

    def __init__(self, folder: Path, *, keep: int = 2, read_only: bool = False):
        self.folder = Path(folder).absolute()
        self.keep, self.read_only = keep, read_only

    @functools.cached_property
    def manager(self) -> Any:
        """Orbax's CheckpointManager."""
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers

        # Orbax warns through absl of every checkpoint that is saved without a score.
        logging.getLogger("absl").setLevel(logging.ERROR)
        policies = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(n=self.keep),
                checkpoint_managers.BestN(
                    n=1,
                    get_metric_fn=lambda metrics: metrics[METRIC],
                    reverse=True,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies,
                best_fn=lambda metrics: metrics[METRIC],
                best_mode="min",
                keep_checkpoints_without_metrics=False,
                create=not self.read_only,
                read_only=self.read_only,
                # Orbax would decide by itself which steps are worth saving.
                should_save_fn=lambda step, latest: True,
            ),
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint."""
        return self.manager.latest_step()

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the lowest dev loss; the newest if none was scored."""
        best = self.manager.best_step()
        return self.latest if best is None else best

    def save(
        self, state: TrainState, progress: dict[str, Any], dev_loss: float | None = None
    ) -> None:
        """Starts saving; training may go on at once. A step that is already saved stays."""
        import orbax.checkpoint as ocp

        step = int(state.step)
        if step in self.manager.all_steps():
            return
        items = {
            "params": ocp.args.StandardSave(state.params),
            "optimizer": ocp.args.StandardSave(state.optimizer_state),
            "progress": ocp.args.JsonSave(progress),
        }
        if state.statistics:
            items["statistics"] = ocp.args.StandardSave(state.statistics)
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        metrics = None if dev_loss is None else {METRIC: dev_loss}
        self.manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def restore(self, template: TrainState, step: int | None = None) -> tuple[TrainState, Any]:
        """The state (in the shape of `template`) and the progress of a step, by default the last.

        Raises CheckpointError if there is none or it does not fit.
        """
        import orbax.checkpoint as ocp

        step = self._step(step)
        items = {
            "params": ocp.args.StandardRestore(placed(template.params)),
            "optimizer": ocp.args.StandardRestore(placed(template.optimizer_state)),
            "progress": ocp.args.JsonRestore(),
        }
        if template.statistics:
            items["statistics"] = ocp.args.StandardRestore(placed(template.statistics))
        if template.ema is not None:
            items["ema"] = ocp.args.StandardRestore(placed(template.ema))
        read = self._read(step, items)
        state = TrainState(
            # Placed as the parameters are: an array left free would compile the step twice.
            step=jax.device_put(jnp.asarray(step, jnp.int32), _scalar_sharding(read["params"])),
            params=read["params"],
            optimizer_state=read["optimizer"],
            statistics=read["statistics"] if template.statistics else {},
            ema=read["ema"] if template.ema is not None else None,
        )
        return state, read["progress"]

    def restore_evaluated(
        self,
        params: Params,
        *,
        statistics: Params | None = None,
        ema: bool,
        step: int | None = None,
    ) -> Params:
        """What to score and decode with (`TrainState.evaluated`) of a step, by default the best.

        `params` and `statistics` are templates.
        """
        import orbax.checkpoint as ocp

        step = self._step(self.best if step is None else step)
        name = "ema" if ema else "params"
        dtype = jnp.float32 if ema else None
        templates = {name: placed(params, dtype)}
        if statistics:
            templates["statistics"] = statistics
        read = self._read(
            step,
            {
                item: ocp.args.StandardRestore(placed(template))
                for item, template in templates.items()
            },
        )
        return with_statistics(read[name], read["statistics"] if statistics else {})

    def wait(self) -> None:
        """Waits until everything is written."""
        if "manager" in vars(self):
            self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and gives back what writing needs."""
        if "manager" in vars(self):
            self.manager.wait_until_finished()
            self.manager.close()

    def _step(self, step: int | None) -> int:
        step = self.latest if step is None else step
        if step is None:
            raise CheckpointError(f"{self.folder} holds no checkpoint yet")
        if step not in self.manager.all_steps():
            raise CheckpointError(
                f"{self.folder} has no step {step}, only {sorted(self.manager.all_steps())}"
            )
        return step

    def _read(self, step: int, items: dict[str, Any]) -> Any:
        import orbax.checkpoint as ocp

        try:
            return self.manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, FileNotFoundError) as error:
            reason = textwrap.shorten(str(error), 300)
            raise CheckpointError(
                f"checkpoint {self.folder / str(step)} does not fit this model: were model or "
                f"optimizer options changed? ({reason})"
            ) from error


def placed(tree: Any, dtype: Any = None) -> Any:
    """The shapes of a tree, each with the sharding it has, else on the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or device
        return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, tree)


def _scalar_sharding(params: Params) -> jax.sharding.Sharding:
    sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding
