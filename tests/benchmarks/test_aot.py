"""The ahead-of-time check: what it reads, what it calls a fault, what it survives."""

import json
import sys

import jax
import pytest

from benchmarks.aot import __main__ as aot
from benchmarks.aot import cases, h100, tpu, worker

PTXAS = """\
ptxas info    : Compiling entry function 'entry_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for entry_mosaic_gpu_kernel
    0 bytes stack frame, {spills} bytes spill stores, {spills} bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""
RESOURCES = (
    "Resources(smem_scratch_bytes={scratch}, tmem_scratch_cols=0, barrier_counts=Counter({{"
    "Barrier(arrival_count=1, num_barriers=2, orders_tensor_core=False): 3, "
    "Barrier(arrival_count=2, num_barriers=1, orders_tensor_core=False): 1}}), "
    "scoped_gmem_semaphores={{}})"
)


@pytest.fixture
def dumped(tmp_path):
    """Writes what Mosaic GPU dumps of one kernel, and reports on it."""

    def report(spills=0, scratch=1024, wgmma=2, name="attention_forward_0"):
        (tmp_path / f"{name}.ptxas").write_text(PTXAS.format(spills=spills))
        (tmp_path / f"{name}.resources.txt").write_text(RESOURCES.format(scratch=scratch))
        (tmp_path / f"{name}.ptx").write_text("wgmma.mma_async.sync.aligned\n" * wgmma)
        return h100.kernel_report(tmp_path / f"{name}.ptxas")

    return report


def test_a_gpu_kernel_is_read_from_its_dumps(dumped):
    assert dumped(spills=12) == {
        "name": "attention_forward",
        "registers": 168,
        "spills": 12,
        "shared_memory": 1024 + 8 * (2 * 3 + 1),
        "wgmma": 2,
    }


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({}, None),
        ({"spills": 4}, "4 bytes of spills"),
        ({"wgmma": 0}, "no wgmma"),
        ({"scratch": h100.SHARED_MEMORY}, "bytes of shared memory"),
    ],
)
def test_spills_no_tensor_cores_and_too_much_shared_memory_are_faults(dumped, changed, fault):
    faults = h100.faults({"kernels": [dumped(**changed)]}, "h100")
    assert [fault in found for found in faults] == [True] * (fault is not None)


def test_a_kernel_that_the_assembler_is_silent_about_is_a_fault(tmp_path):
    assert h100.assembler_report("") == {"registers": None, "spills": None}
    silent = {"name": "x", "registers": None, "spills": None, "shared_memory": 0, "wgmma": 1}
    assert h100.faults({"kernels": [silent]}, "h100") == ["x: the assembler said nothing"]


HLO = """\
  %fusion.2 = f32[8]{0} fusion(%p), kind=kLoop, calls=%c
  %jvp_attention_forward_.1 = (bf16[1,4]{1,0:T(8,128)(2,1)}, f32[1]{0}) custom-call(%a, %b), \
custom_call_target="tpu_custom_call", backend_config={}
  ROOT %transpose_jvp_attention_backward__.3 = bf16[8]{0} custom-call(%a), \
custom_call_target="tpu_custom_call"
  %other.1 = bf16[8]{0} custom-call(%a), custom_call_target="Sharding"
"""
LLO = """\
  #allocation0 [shape = 'u32[]', space=smem, size = 0x4, offset = 0x4]
  #allocation3 [shape = 'f32[1,128]', space=vmem, size = 0x10000, scoped, tag = 'scratch operand']
    #allocation6 [shape = 'u8[65536]{0}', space=vmem, size = 0x8000, scoped, tag = 'input window']
"""


def test_a_tpu_kernel_is_read_from_the_program_and_its_dumps(tmp_path):
    names = tpu.kernel_names(HLO)
    assert names == ["jvp_attention_forward_.1", "transpose_jvp_attention_backward__.3"]
    assert [tpu.plain_name(name) for name in names] == ["attention_forward", "attention_backward"]
    files = {
        f"17-{names[0]}-00-original.txt": LLO,
        f"17-{names[0]}-01-schedule-analysis_final_bundles.txt": (
            "Schedule analysis:\n\ttotal scheduled bundles:    497\n\tempty scheduled bundles: 14\n"
        ),
        "17-fusion.2-01-schedule-analysis_final_bundles.txt": "total scheduled bundles: 3",
    }
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    dumps = {path.name: path for path in tmp_path.iterdir()}
    assert tpu.kernel_report(names[0], dumps) == {"bundles": 497, "vmem": 0x18000}
    assert tpu.kernel_report(names[1], dumps) == {"bundles": None, "vmem": None}


def test_a_program_without_a_kernel_and_too_much_vector_memory_are_faults():
    assert "no kernel" in tpu.faults({"kernels": []}, "v5e")[0]
    large = {"kernels": [{"name": "x", "vmem": 65 * 2**20, "bundles": 1}]}
    assert tpu.faults(large, "v5e") == []
    assert "65.0 MiB" in tpu.faults(large, "v5p")[0]


class Target:
    """Stands for a target module; `result` is what compiling gives or raises."""

    def __init__(self, result):
        self.result = result

    def compile_case(self, case, chip):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def faults(self, result, chip):
        return result["faults"]


@pytest.mark.parametrize(
    ("result", "outcome"),
    [
        ({"faults": []}, "ok"),
        ({"faults": ["too large"]}, "failed"),
        (NotImplementedError("attention: implementation='x' does not support bias"), "refused"),
        (NotImplementedError("Unimplemented primitive in Pallas lowering: sort"), "failed"),
        (ValueError("shared memory"), "failed"),
    ],
)
def test_only_the_op_s_own_refusal_is_one(result, outcome, capsys):
    case = cases.Case("attention", "x", cases.FORWARD, "bfloat16", build=lambda: None)
    assert worker.attempt(Target(result), case, "v5e")["outcome"] == outcome


ANSWER = """
import json, sys, time
for line in sys.stdin:
    case = json.loads(line)["case"]
    if case == "hangs":
        time.sleep(60)
    if case == "crashes":
        sys.exit("out of registers")
    print(json.dumps({"outcome": "ok", "echo": case}), flush=True)
"""


def test_a_case_that_hangs_or_crashes_fails_alone(tmp_path):
    with (tmp_path / "errors").open("w+") as errors:
        pool = aot.Worker("tpu", seconds=3.0, dumps=str(tmp_path), errors=errors)
        pool._command = [sys.executable, "-c", ANSWER]
        try:
            assert pool.compile("first", "v5e") == {"outcome": "ok", "echo": "first"}
            assert "not done in 3 s" in pool.compile("hangs", "v5e")["why"]
            assert pool.compile("second", "v5e")["outcome"] == "ok"
            assert "out of registers" in pool.compile("crashes", "v5e")["why"]
            assert pool.compile("third", "v5e")["outcome"] == "ok"
        finally:
            pool.stop()


@pytest.fixture
def answered(monkeypatch, tmp_path):
    """Runs the command line with every case answered alike; (exit status, what was written)."""

    def run(outcome, *arguments):
        answer = {"outcome": outcome, "why": "because", "seconds": 1.0, "kernels": []}
        monkeypatch.setattr(aot.Worker, "compile", lambda self, case, chip: answer)
        output = tmp_path / "deep" / "aot.json"
        status = aot.main(["tpu", "--jobs", "2", "--output", str(output), *arguments])
        return status, json.loads(output.read_text())

    return run


@pytest.mark.parametrize(("outcome", "status"), [("ok", 0), ("refused", 0), ("failed", 1)])
def test_the_command_fails_if_a_case_does(answered, capsys, outcome, status):
    got, written = answered(outcome, "--small")
    assert got == status
    assert {answer["outcome"] for answer in written["cases"]} == {outcome}
    assert len({(answer["case"], answer["chip"]) for answer in written["cases"]}) == len(
        written["cases"]
    )
    said = capsys.readouterr().out
    assert ("because" in said) == (outcome != "ok")


def test_a_name_that_no_case_has_is_an_error(capsys):
    assert aot.main(["tpu", "--only", "no such case"]) == 1
    assert "no such case" in capsys.readouterr().out


def test_every_case_can_be_traced_and_has_a_name_of_its_own():
    found = cases.all_cases("xla")
    assert len({case.name for case in found}) == len(found)
    assert {case.passes for case in found} == {cases.FORWARD, cases.BACKWARD}
    assert 0 < sum(case.small for case in found) < len(found)
    for case in found:
        if case.small:
            function, arguments = case.build()
            jax.eval_shape(function, *arguments)
