"""A functional transformer for JAX: pure-function models, one trainer, measured kernels.

```
import jaxformer

config = jaxformer.presets.get("g2p").model
model = jaxformer.models.build(config, vocabulary=50, source_vocabulary=40)
apply, params = jaxformer.pure(model)      # apply(params, source, inputs) -> logits [B, T, V]
```

Submodules load when they are first used, so that a process that only prepares data stays small.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
_SUBMODULES = (
    "config",
    "data",
    "decoding",
    "losses",
    "metrics",
    "models",
    "nn",
    "presets",
    "training",
)

__all__ = ["__version__", "pure", *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"jaxformer.{name}")
    if name == "pure":
        return importlib.import_module("jaxformer.nn").pure
    raise AttributeError(f"module 'jaxformer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
