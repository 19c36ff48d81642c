"""A configuration as JSON, there and back, strictly."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from jaxformer.config.schema import Config
from jaxformer.errors import JaxformerError

ConfigType = typing.TypeVar("ConfigType")


class ConfigError(JaxformerError):
    """A configuration that cannot work; the message names the field and the fix."""


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested plain values (what `config.json` holds)."""
    return dataclasses.asdict(config)


def from_dict(cls: type[ConfigType], values: Any) -> ConfigType:
    """The inverse of `to_dict`. Raises ConfigError on an unknown field, naming the nearest."""
    hints = typing.get_type_hints(cls)
    if not isinstance(values, dict):
        raise ConfigError(f"{values!r} is no {cls.__name__}: options by name are needed")
    arguments = {}
    for name, value in values.items():
        if name not in hints:
            raise ConfigError(f"unknown option {name!r} of {cls.__name__}{_nearest(name, hints)}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            arguments[name] = from_dict(hint, value)
        elif isinstance(value, list):
            arguments[name] = tuple(value)
        else:
            arguments[name] = value
        _check_type(f"{cls.__name__}.{name}", arguments[name], hint)
    return cls(**arguments)


def _nearest(name: str, names: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _check_type(name: str, value: Any, hint: Any) -> None:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        fits = value in options
    elif origin in (typing.Union, types.UnionType):
        fits = any(option is not float and isinstance(value, option) for option in options) or (
            float in options and isinstance(value, int | float)
        )
    elif origin is tuple:
        fits = isinstance(value, tuple)
    elif hint is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    elif hint is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = isinstance(value, hint)
    if not fits:
        raise ConfigError(f"{name}={value!r} does not fit {hint}")


def save(config: Config, path: Path) -> None:
    """Writes the configuration as JSON."""
    path.write_text(json.dumps(to_dict(config), indent=2) + "\n")


def load(path: Path) -> Config:
    """Reads what `save` wrote. Raises ConfigError on a missing file, bad JSON or unknown field."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: is this a run folder?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    return from_dict(Config, values)
