"""The experiment: frozen dataclasses, one nested in the other, and how they are read and printed.

A preset is a function that returns a `Config`; the command line overrides single fields
(`--train.steps 500`); the resolved whole is saved as JSON in the run folder and can be given back.
"""

from jaxformer.config.check import check, check_decode
from jaxformer.config.files import ConfigError, from_dict, load, save, to_dict
from jaxformer.config.schema import (
    CheckpointConfig,
    Config,
    CTCConfig,
    DataConfig,
    DecodeConfig,
    DistributedConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RecurrentConfig,
    SamplingConfig,
    TokenizerName,
    TrackingConfig,
    TrainConfig,
)

__all__ = [
    "CTCConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DecodeConfig",
    "DistributedConfig",
    "EvalConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RecurrentConfig",
    "SamplingConfig",
    "TokenizerName",
    "TrackingConfig",
    "TrainConfig",
    "check",
    "check_decode",
    "from_dict",
    "load",
    "save",
    "to_dict",
]
