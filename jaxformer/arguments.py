"""The command line of training: a preset or a saved configuration, and single options over it."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from jaxformer import config as configuration
from jaxformer import presets
from jaxformer.config import Config, ConfigError

USAGE = "usage: train.py PRESET|CONFIG.json|RUN [--group.key value ...]"


def parse(argv: Sequence[str], program: str = "train.py") -> Config:
    """The configuration that a command line describes, checked.

    The first argument is a preset's name, a `config.json`, or a run folder; the rest override
    single options. Raises ConfigError; exits with tyro's message on an unknown option, and after
    `--help`.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{USAGE}\n\npresets:")
        for name in presets.names():
            print(f"  {name:<24}{presets.description(name)}")
        print("\ntrain.py PRESET --help lists every option with its default.")
        sys.exit(0 if argv else 2)
    start = _start(argv[0])
    config = tyro.cli(
        Config,
        prog=f"{program} {argv[0]}",
        description=presets.description(start.preset)
        if start.preset in presets.names()
        else "A saved configuration.",
        default=start,
        args=list(argv[1:]),
    )
    return configuration.check(config)


def _start(name: str) -> Config:
    if name.startswith("-"):
        raise ConfigError(f"the first argument is a preset or a run, not {name!r}. {USAGE}")
    if name in presets.names():
        return presets.get(name)
    path = Path(name)
    if path.is_dir():
        saved = configuration.load(path / "config.json")
        return dataclasses.replace(saved, run=str(path), resume=False)
    if path.suffix == ".json":
        return dataclasses.replace(configuration.load(path), run=None, resume=False)
    return presets.get(name)
