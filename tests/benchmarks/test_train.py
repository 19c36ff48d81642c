"""The training benchmark: both sides train the same model, and its records have their shape."""

import importlib.util
import json

import numpy as np
import pytest

from benchmarks import growth, train, train_contenders, train_shapes, train_weights

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed"
)


def record(folder, part):
    (path,) = folder.glob(f"*_{part}_*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def losses_of_both(tmp_path, name, **options):
    import torch

    from benchmarks import torch_models

    torch.set_num_threads(1)  # more would wait for each other where tests share the cores
    path = str(tmp_path / "weights.npz")
    train_contenders.save_weights(train_shapes.named(name, tiny=True), path)
    options |= {"tiny": True, "weights": path, "first_steps": train.FIRST_STEPS}
    _, ours = train_contenders.jaxformer_trainer(name, **options)
    _, theirs = torch_models.trainer(name, **options)
    return np.array(ours["losses"]), np.array(theirs["losses"])


@needs_torch
@pytest.mark.parametrize("name", list(train_shapes.SHAPES))
def test_pytorch_s_model_has_our_losses_before_and_after_three_updates(tmp_path, name):
    ours, theirs = losses_of_both(tmp_path, name)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    # Another b2, weight decay, epsilon or clipping differs by 1.4e-6 or more.
    np.testing.assert_allclose(ours[-1], theirs[-1], rtol=1e-6)
    # The updates matter: what is compared is not the initial loss four times.
    assert np.ptp(ours) > 1e-3 * ours[0]


@needs_torch
def test_autocast_stays_near_our_bfloat16(tmp_path):
    ours, theirs = losses_of_both(tmp_path, "llama", precision="bfloat16")
    np.testing.assert_allclose(ours, theirs, rtol=5e-3)


def test_a_turn_goes_on_training_and_starts_from_the_given_weights(tmp_path):
    shape = train_shapes.named("small", tiny=True)
    path = str(tmp_path / "weights.npz")
    train_contenders.save_weights(shape, path)
    kept = train_weights.load(path)
    _, state = train_contenders.make_step(shape, weights=path)
    np.testing.assert_array_equal(state.params["embedding"]["table"], kept["embedding"]["table"])
    turn, facts = train_contenders.jaxformer_trainer(
        "small", tiny=True, weights=path, steps_per_turn=21
    )
    turn()
    assert turn()["loss"] < facts["losses"][0] - 0.1


def test_a_race_has_a_row_for_each_contender_and_precision(tmp_path, capsys):
    assert train.main(["--small", "--shape", "small", "--output", str(tmp_path)]) == 0
    found = record(tmp_path, "train")
    contenders = [train.OURS]
    if importlib.util.find_spec("torch"):
        contenders.append(train.EAGER)
    else:
        assert "torch is not installed" in capsys.readouterr().out
    rows = found["rows"]
    assert {(row["contender"], row["precision"]) for row in rows} == {
        (contender, precision) for contender in contenders for precision in train.PRECISIONS
    }
    for row in rows:
        assert row["ms"] > 0 and row["peak_mib"] > 100 and 0 < row["mfu"] < 1
        assert row["tokens_per_s"] == pytest.approx(3 * 12 / row["ms"] * 1000, rel=1e-2)
    ours = next(row for row in rows if row["contender"] == train.OURS)
    assert ours["ours_to_this"] == 1.0 and ours["loss_difference"] == 0.0
    assert found["ceilings"]["matmul_float32_tflops"] > 0


def test_models_that_differ_fail_the_run():
    row = {"shape": "small", "contender": train.EAGER, "precision": "float32"}
    agreeing = row | {"loss_difference": 9e-6, "after_3_steps": 9e-5}
    train._check([agreeing])
    for name in train.TOLERANCES:
        with pytest.raises(train.DisagreementError, match=name):
            train._check([agreeing | {name: 1e-3}])
        with pytest.raises(train.DisagreementError, match=name):
            train._check([agreeing | {name: float("nan")}])


def test_presets_have_batches_of_their_own_and_images_are_refused(tmp_path, capsys):
    for name in ("g2p", "text", "shakespeare-char", "g2p-hybrid"):
        shape = train_shapes.named(name)
        (batch,) = train_shapes.batches(shape, 1)
        assert batch["inputs"].shape == (shape.batch, shape.length)
        assert ("source" in batch) == (shape.model.kind != "decoder")
    arguments = ["--small", "--preset", "digits-ctc", "--output", str(tmp_path)]
    assert train.main(arguments) == 2
    assert "digits-ctc reads images" in capsys.readouterr().err


def test_a_power_is_found():
    sizes = [1, 2, 4, 8]
    factor, exponent = growth.fit(sizes, [3 * size**1.5 for size in sizes])
    assert (factor, exponent) == (pytest.approx(3), pytest.approx(1.5))


def test_growth_is_measured_fitted_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    assert train.main(["--growth", "batch", "--small", "--output", str(tmp_path)]) == 0
    found = record(tmp_path, "growth")
    assert [(row["axis"], row["size"]) for row in found["rows"]] == [("batch", 1), ("batch", 4)]
    assert found["rows"][0]["temporary_mib"] < found["rows"][1]["temporary_mib"]
    assert found["fits"][0]["axis"] == "batch"
    (picture,) = tmp_path.glob("*_growth_*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("axis", growth.AXES)
def test_one_size_grows(axis):
    sizes = growth.SIZES[axis]
    shapes = [growth.of_size(axis, size) for size in sizes]
    grown = [
        {
            "length": shape.length,
            "width": shape.model.width,
            "depth": shape.model.layers,
            "batch": shape.batch,
        }[axis]
        for shape in shapes
    ]
    assert grown == list(sizes)
    assert all(shape.length <= shape.model.max_length for shape in shapes)
