"""Experiments by name: one file a preset, whose docstring says what it is and what it reaches.

A preset module has `config() -> Config`. Its name on the command line is the file's, with hyphens.
"""

import difflib
import importlib
import pkgutil
from types import ModuleType

from jaxformer.config import Config, ConfigError


def names() -> list[str]:
    """The names of all presets, sorted."""
    return sorted(info.name.replace("_", "-") for info in pkgutil.iter_modules(__path__))


def module(name: str) -> ModuleType:
    """The module of a preset. Raises ConfigError on an unknown name, naming the nearest."""
    if name not in names():
        nearest = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ConfigError(f"no preset {name!r}{hint} Presets: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def get(name: str) -> Config:
    """The configuration of a preset."""
    return module(name).config()


def description(name: str) -> str:
    """The first line of a preset's docstring."""
    return (module(name).__doc__ or "").strip().splitlines()[0]
