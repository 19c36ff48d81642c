"""The configuration: read, refused with the nearest name, printed, and given back."""

import dataclasses
import json

import pytest

from jaxformer import config as configuration
from jaxformer import presets
from jaxformer.arguments import parse
from jaxformer.config import (
    Config,
    ConfigError,
    CTCConfig,
    DataConfig,
    ModelConfig,
    SamplingConfig,
    TrainConfig,
)
from jaxformer.errors import JaxformerError


def changed(group, **options):
    """The default configuration with options of one group changed."""
    base = Config()
    return dataclasses.replace(
        base, **{group: dataclasses.replace(getattr(base, group), **options)}
    )


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_is_whole(name):
    config = presets.get(name)
    assert config.preset == name
    assert len(presets.description(name)) > 20
    if config.data.kind == "pairs" and not config.data.files:
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, files=("pairs.tsv",))
        )
    configuration.check(config)
    assert configuration.from_dict(Config, configuration.to_dict(config)) == config


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_comes_back_from_its_file(name, tmp_path):
    path = tmp_path / "config.json"
    configuration.save(presets.get(name), path)
    assert configuration.load(path) == presets.get(name)


def test_command_line_overrides_single_options():
    line = "g2p --train.steps 7 --model.window None --data.on-bad skip --seed=3 --run here"
    config = parse([*line.split(), "--train.ema", "0.9", "--eval.every", "5"])
    base = presets.get("g2p")
    assert (config.train.steps, config.seed, config.run) == (7, 3, "here")
    assert config.eval.every == 5
    assert (config.train.ema, config.model.window, config.data.on_bad) == (0.9, None, "skip")
    assert config.optimizer == base.optimizer
    assert config.train == dataclasses.replace(base.train, steps=7, ema=0.9)


def test_resume_is_a_flag():
    assert parse(["g2p", "--run", "here", "--resume"]).resume
    assert not parse(["g2p"]).resume


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["g2p", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for group in dataclasses.fields(Config):
        if not dataclasses.is_dataclass(group.type):
            continue
        for option in dataclasses.fields(group.type):
            assert f"--{group.name}.{option.name.replace('_', '-')}" in shown
    assert f"(default: {presets.get('g2p').train.steps})" in " ".join(shown.split())


def test_help_without_a_preset_lists_the_presets(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in presets.names())


def test_nothing_at_all_is_refused_with_the_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse([])
    assert stopped.value.code == 2
    assert "usage: train.py" in capsys.readouterr().out


def test_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="no preset 'g2pp'; did you mean 'g2p'"):
        parse(["g2pp"])


@pytest.mark.parametrize(
    ("option", "nearest"),
    [("--train.stepz", "--train.steps"), ("--model.witdh", "--model.width")],
)
def test_unknown_option_is_refused_with_the_nearest(option, nearest, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["g2p", option, "5"])
    assert stopped.value.code == 2
    assert nearest in capsys.readouterr().err


def test_value_of_the_wrong_type_is_refused_with_its_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["g2p", "--train.steps", "many"])
    assert stopped.value.code == 2
    assert "--train.steps" in capsys.readouterr().err


def test_option_before_the_preset_is_refused():
    with pytest.raises(ConfigError, match="the first argument is a preset"):
        parse(["--train.steps", "5"])


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        ("model", dict(kind="decoder"), "trains model.kind='encoder_decoder' or "),
        ("model", dict(layers=0), "model.layers must be positive"),
        ("model", dict(heads=4, kv_heads=3), "multiple of model.kv_heads=3"),
        ("model", dict(kv_heads=0), "model.kv_heads"),
        ("model", dict(kv_heads=-2), "model.kv_heads"),
        ("model", dict(width=30, heads=4), "multiple of model.heads=4"),
        ("model", dict(head_dim=5), "even head size, not 5"),
        ("model", dict(window=0), "model.window=0"),
        ("model", dict(shared_embeddings=True), "data.shared_vocabulary"),
        ("model", dict(max_length=10), "model.max_length=10"),
        ("model", dict(dropout=1.0), "model.dropout=1.0"),
        ("model", dict(attention_dropout=-0.1), "model.attention_dropout"),
        ("train", dict(batch_size=0), "train.batch_size must be positive"),
        ("train", dict(accumulation=0), "train.accumulation must be positive"),
        ("train", dict(steps=-1), "train.steps must not be negative"),
        ("train", dict(label_smoothing=1.0), "train.label_smoothing=1.0"),
        ("train", dict(ema=1.0), "train.ema=1.0"),
        ("data", dict(dev_fraction=0.6, test_fraction=0.4), "leave something"),
        ("data", dict(kind="pairs"), "--data.files pairs.tsv"),
        ("data", dict(buckets=0), "data.buckets must be positive"),
        ("data", dict(split="tail"), "for text only"),
        ("model", dict(ctc=CTCConfig(upsample=0)), "model.ctc.upsample=0"),
        ("model", dict(ctc=CTCConfig(channels=())), "model.ctc.channels=()"),
        ("model", dict(ctc=CTCConfig(weight=1.5)), "model.ctc.weight=1.5"),
        ("model", dict(kind="ctc", max_length=100), "is 128 frames, more than model.max_length"),
        ("train", dict(sampling=SamplingConfig("linear")), "needs model.kind='recurrent'"),
        ("train", dict(sampling=SamplingConfig(rate=2.0)), "train.sampling.rate=2.0"),
        ("train", dict(sampling=SamplingConfig(decay=0.0)), "train.sampling.decay=0.0"),
        ("decode", dict(ctc_weight=0.5), "is for model.kind='hybrid' alone"),
        ("decode", dict(beam=0), "decode.beam must be positive"),
        ("eval", dict(batch_size=0), "eval.batch_size must be positive"),
        ("checkpoint", dict(keep=0), "checkpoint.keep must be positive"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_cannot_work_is_refused_with_field_and_fix(group, options, message):
    configuration.check(Config())
    with pytest.raises(ConfigError) as caught:
        configuration.check(changed(group, **options))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["label_smoothing", "z_loss"])
def test_options_of_a_softmax_are_refused_with_ctc(option):
    config = Config(model=ModelConfig(kind="ctc"), train=TrainConfig(**{option: 0.1}))
    with pytest.raises(ConfigError, match=f"train.{option} is of a softmax"):
        configuration.check(config)


def test_text_longer_than_the_model_is_refused():
    config = Config(data=DataConfig(kind="text", length=512), model=ModelConfig(kind="decoder"))
    with pytest.raises(ConfigError, match=r"data.length=512 is more than model.max_length=256"):
        configuration.check(config)


def test_errors_are_values_and_one_family():
    assert issubclass(ConfigError, JaxformerError)
    assert issubclass(JaxformerError, ValueError)


def write(path, edit):
    values = configuration.to_dict(Config())
    edit(values)
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v["train"].update(stepz=5), "unknown option 'stepz' of TrainConfig; did you"),
        (lambda v: v.update(modle={}), "unknown option 'modle' of Config; did you mean 'model'"),
        (lambda v: v["train"].update(steps="5"), "TrainConfig.steps='5' does not fit"),
        (lambda v: v["train"].update(steps=True), "TrainConfig.steps=True does not fit"),
        (lambda v: v["train"].update(ema="slow"), "TrainConfig.ema='slow' does not fit"),
        (lambda v: v["model"].update(position="rotery"), "'rotery' does not fit"),
        (lambda v: v["optimizer"].update(learning_rate=None), "learning_rate=None does not fit"),
        (lambda v: v["data"].update(files="a.tsv"), "DataConfig.files='a.tsv' does not fit"),
        (lambda v: v.update(model=3), "3 is no ModelConfig"),
    ],
)
def test_file_that_does_not_fit_is_refused_by_field(edit, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        configuration.load(write(tmp_path / "config.json", edit))
    assert message in str(caught.value)


def test_file_without_a_field_takes_its_default(tmp_path):
    path = write(tmp_path / "config.json", lambda values: values["train"].pop("steps"))
    assert configuration.load(path).train.steps == TrainConfig().steps


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"[1]", r"\[1\] is no Config"),
        (b"\xff\xfe", "is not valid JSON"),
    ],
)
def test_file_that_is_no_configuration_is_refused(content, message, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        parse([str(tmp_path / "config.json")])


def test_missing_file_and_empty_folder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        parse([str(tmp_path / "config.json")])
    with pytest.raises(ConfigError, match="is this a run folder"):
        parse([str(tmp_path)])


def test_saved_configuration_starts_anew_and_a_run_folder_names_itself(tmp_path):
    saved = dataclasses.replace(presets.get("g2p"), run="elsewhere", resume=True, seed=9)
    configuration.save(saved, tmp_path / "config.json")
    given_back = parse([str(tmp_path / "config.json")])
    assert given_back == dataclasses.replace(saved, run=None, resume=False)
    of_the_folder = parse([str(tmp_path)])
    assert of_the_folder == dataclasses.replace(saved, run=str(tmp_path), resume=False)
    assert parse([str(tmp_path), "--resume"]).resume
