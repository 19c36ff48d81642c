"""`jaxformer plan`, from the command line to what it prints; compiled for eight CPU devices."""

import json

import pytest

from jaxformer.cli import main
from jaxformer.plan import command

TINY = (
    "text",
    "--data.length=16",
    "--model.max-length=16",
    "--model.layers=2",
    "--model.width=32",
    "--model.heads=2",
    "--model.feedforward=64",
    "--train.batch-size=16",
    "--eval.batch-size=16",
)


@pytest.fixture
def plan(capsys):
    """plan(*arguments) -> what was printed."""

    def run(*arguments):
        capsys.readouterr()
        main(["plan", *arguments])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refuse(capsys):
    """refuse(*arguments) -> the one line on standard error."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(["plan", *arguments])
        said = capsys.readouterr()
        assert stopped.value.code == 2
        assert said.err.startswith("error: ") and said.err.count("\n") == 1
        return said.err

    return run


def test_a_step_is_planned_for_eight_devices(plan):
    found = json.loads(
        plan(*TINY, "--topology=cpu:8", "--mesh.fsdp=4", "--mesh.tensor=2", "--json")
    )
    assert found["outcome"] == "ok"
    assert found["mesh"] == {"data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 2}
    assert found["needed"] == found["allotted"]["total"]
    parts = {
        name: size for name, size in found["allotted"].items() if name not in ("total", "peak")
    }
    assert sum(parts.values()) == found["allotted"]["total"]
    # What goes in is the state and the batch: the account agrees with the compiler.
    account = found["memory"]
    stored = account["parameters"] + account["optimizer"] + account["batch"]
    assert found["allotted"]["arguments"] == pytest.approx(stored, rel=0.02)
    assert account["optimizer"] == pytest.approx(2 * account["parameters"], rel=0.01)
    assert account["gradients"] == account["parameters"]
    assert found["fits"] is None  # nothing is known of a CPU's memory
    assert found["bound"] is None
    assert found["flops"]["total"] == sum(
        found["flops"][n] for n in ("layers", "attention", "output")
    )
    assert {"all-gather", "all-reduce"} <= {one["kind"] for one in found["collectives"]}
    assert found["unknown_loops"] == 0


def test_what_does_not_fit_is_followed_by_what_does(plan):
    options = ("--topology=cpu:2", "--model.remat=full", "--train.batch-size=256")
    halved = ("--train.batch-size=128", "--train.accumulation=2")
    # What either takes depends on the version of XLA; the limit lies between.
    whole, less = (
        json.loads(plan(*TINY, *options, *more, "--json"))["needed"] for more in ((), halved)
    )
    assert less < 0.9 * whole
    said = plan(*TINY, *options, f"--hbm-gib={(whole + less) / 2 / 2**30}")
    assert "does not fit" in said.split("a device:")[0]
    proposed, verdict = said.split("to fit, add:")[1].split("(", 1)
    assert proposed.split() == ["--train.batch-size", "128", "--train.accumulation", "2"]
    assert verdict.startswith("fits: ")


def test_the_sharding_is_printed_without_a_compiler(plan, monkeypatch):
    monkeypatch.setattr(command, "ask", None)
    said = plan(
        "llama2-7b", "--topology=v5p-1024", "--mesh.fsdp=256", "--mesh.tensor=2", "--print-sharding"
    )
    rows = {line.split()[0]: line for line in said.splitlines()}
    assert len(rows) == 13
    assert "D: fsdp, N: tensor" in rows["decoder.blocks.attention.query.kernel"]
    assert rows["decoder.blocks.feedforward.down.kernel"].endswith("1/512")
    assert rows["decoder.norm.scale"].endswith("1/1")


# ------------------------------------------------------------------ without a compiler


def pretend(monkeypatch, needed, outcome="ok"):
    """A compiler that allots `needed(config)` bytes; returns the configurations it was asked."""
    asked = []

    def ask(request):
        asked.append(request.config)
        size = int(needed(request.config))
        if outcome != "ok":
            return {"outcome": outcome, "why": "because"}
        names = ("parameters", "optimizer", "gradients", "activations", "batch")
        return {
            "outcome": "ok",
            "memory": dict.fromkeys(names, 1),
            "gathered": 1,
            "seconds": {"trace": 0.1, "compile": 0.2},
            "allotted": {"arguments": size, "temporaries": 30 * GIB, "total": 0, "peak": size},
            "collectives": [
                {
                    "kind": "all-gather",
                    "devices": 8,
                    "count": 2,
                    "sent": 1e9 * request.config.mesh.fsdp,
                    "between_hosts": False,
                }
            ],
            "kernels": {"attention": 32},
            "unknown_loops": 0,
        }

    monkeypatch.setattr(command, "ask", ask)
    return asked


GIB = 2**30
LIMIT = "--hbm-gib=15.75"  # else what a TPU's compiler compiles fits
LLAMA = ("llama2-7b", "--topology=v5e-256", LIMIT)


def test_a_plan_says_what_fits_how_fast_and_what_is_sent(plan, monkeypatch):
    pretend(monkeypatch, lambda config: 10 * GIB)
    said = plan(*LLAMA, "--mesh.fsdp=256")
    assert "fits: 10.00 GiB of 15.75 GiB a device, 5.75 GiB (37%) to spare" in said
    assert "1,024 rows in 1 micro-batch, remat full, vocabulary 32,000" in said
    assert "MFU 7" in said and "a bound, no measurement" in said
    assert "197 TFLOP/s" in said and "attention x 32" in said
    assert "all-gather         over    8:      2 a step, 238 GiB sent by a device" in said


def test_proposals_stop_at_the_first_that_fits(plan, monkeypatch):
    asked = pretend(monkeypatch, lambda config: config.train.batch_size * GIB / 20)
    said = plan(*LLAMA, "--mesh.fsdp=128", "--model.remat=none")
    assert "--model.remat full --train.batch-size 256 --train.accumulation 4" in said
    assert [config.train.batch_size for config in asked] == [1024, 1024, 1024, 512, 256]
    assert [config.model.remat for config in asked] == ["none", "dots", "full", "full", "full"]


def test_changes_that_leave_the_state_too_large_are_not_compiled(plan, monkeypatch):
    asked = pretend(monkeypatch, lambda config: 100 * GIB if config.mesh.fsdp < 8 else GIB)
    said = plan("llama2-70b", "--topology=v5p-128", "--mesh.fsdp=1", "--hbm-gib=95.73")
    # 16 bytes of each of 69 billion parameters: 1028 GiB, and a chip has 95.73.
    assert [config.mesh.fsdp for config in asked] == [1, 16]
    assert "to fit, add: --mesh.data 4 --mesh.fsdp 16" in said


def test_where_nothing_fits_the_state_is_named(plan, monkeypatch):
    pretend(monkeypatch, lambda config: 100 * GIB)
    said = plan("llama2-70b", "--topology=v5e-8", "--mesh.fsdp=8", LIMIT)
    assert "parameters, optimiser and gradients alone are 128 GiB" in said


def test_what_the_compiler_found_no_room_for_does_not_fit(plan, monkeypatch):
    answer = {"outcome": "too_large", "why": "no room", "needed": 9.0, "available": 10.0}
    monkeypatch.setattr(command, "ask", lambda request: dict(answer))
    found = json.loads(plan(*LLAMA, "--mesh.fsdp=256", "--no-propose", "--json"))
    assert (found["fits"], found["needed"], found["available"]) == (False, 9.0, 10.0)


def test_what_the_compiler_of_a_tpu_compiles_fits(plan, monkeypatch):
    pretend(monkeypatch, lambda config: 16 * GIB)  # more than a chip has
    arguments = ("llama2-7b", "--topology=v5e-256", "--mesh.fsdp=256", "--no-propose", "--json")
    assert json.loads(plan(*arguments))["fits"] is True
    assert json.loads(plan(*arguments, LIMIT))["fits"] is False


def test_a_refusal_is_one_line(plan, monkeypatch):
    pretend(monkeypatch, lambda config: 0, outcome="refused")
    assert "not compiled: because" in plan(*LLAMA, "--mesh.fsdp=256")


def test_a_sweep_ranks_what_fits_by_the_bound_and_then_by_what_it_hides(plan, monkeypatch):
    asked = pretend(monkeypatch, lambda config: 20 * GIB if config.mesh.tensor == 1 else GIB)
    ranked = json.loads(plan(*LLAMA, "--sweep", "--json"))
    assert len(ranked) == len(asked) == 20
    fits = [one["fits"] for one in ranked]
    assert fits == sorted(fits, reverse=True) and False in fits
    times = [one["bound"]["seconds"] for one in ranked if one["fits"]]
    assert times == sorted(times)
    sent = [one["mesh"]["fsdp"] for one in ranked if one["fits"]]  # all are bound by compute
    assert sent == sorted(sent)
    table = plan(*LLAMA, "--sweep").splitlines()
    assert len(table) == 2 + len(ranked)
    assert "--mesh.tensor" in table[2] and "does not fit" in table[-1]


def test_a_sweep_keeps_to_its_budget(plan, monkeypatch):
    asked = pretend(monkeypatch, lambda config: GIB)
    assert json.loads(plan(*LLAMA, "--sweep", "--json", "--budget=0")) == []
    assert asked == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("text", "--topology=v5q-8"), "did you mean"),
        (("txt", "--topology=cpu:8"), "did you mean 'text'"),
        (("text", "--topology=cpu:8", "--mesh.fsdp=3"), "does not divide 8 devices"),
        (("text", "--topology=cpu:8", "--mesh.data=2"), "takes 2 of the 8 devices"),
        (("text", "--topology=cpu:8", "--mesh.fsdp=16", "--mesh.data=1"), "needs 16 devices"),
        (("text", "--topology=cpu:8", "--data.tokenizer=word"), "give --vocabulary N"),
    ],
)
def test_bad_input_gets_one_line(refuse, monkeypatch, arguments, says):
    monkeypatch.setattr(command, "ask", None)
    assert says in refuse(*arguments)


def test_what_the_step_refuses_comes_back_from_the_compilers_process(refuse):
    said = refuse(*TINY, "--topology=cpu:8", "--train.batch-size=12")
    assert "train.batch_size=12 does not divide over 8 devices" in said


def test_help_lists_the_options_of_a_plan(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "--topology" in said and "--sweep" in said and "train.py PRESET" in said
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "plan" in capsys.readouterr().out
