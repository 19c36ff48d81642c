"""Collectives and kernels are read of compiled programs, with how often loops run them."""

import functools
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxformer.plan.hlo import Collective, read_program, shape_bytes

HEAD = "HloModule jit_step, is_scheduled=true, num_partitions=16\n\n"


def program(entry, *computations, **options):
    """What is read of a program of these instructions and other computations."""
    main = "ENTRY %main (p: f32[8]) -> f32[8] {\n" + textwrap.indent(entry, "  ") + "\n}\n"
    return read_program(HEAD + "\n\n".join([*computations, main]), **options)


def only(read):
    (collective,) = read.collectives
    return collective


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("bf16[2,3]{1,0:T(8,128)(2,1)}", 12),
        ("(f32[4]{0}, (s8[3]{0}, pred[2]{0}))", 21),
        ("s4[10]{0}", 5),
        ("f8e4m3fn[7]{0}", 7),
        ("token[]", 0),
    ],
)
def test_bytes_of_a_shape(shape, size):
    assert shape_bytes(shape) == size


@pytest.mark.parametrize(
    ("instruction", "kind", "devices", "sent"),
    [
        (
            "%g = f32[64]{0} all-gather(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}",
            "all-gather",
            4,
            256 * 3 / 4,
        ),
        (
            "%g = f32[64]{0} all-reduce(%p), replica_groups=[2,8]<=[16], to_apply=%add",
            "all-reduce",
            8,
            2 * 256 * 7 / 8,
        ),
        (
            "%g = bf16[64]{0} reduce-scatter(%p), replica_groups=[8,2]<=[2,8]T(1,0)",
            "reduce-scatter",
            2,
            128,
        ),
        (
            "%g = f32[64]{0} all-reduce(%p), replica_groups=mesh['data'=2,'fsdp'=8] {'fsdp'}",
            "all-reduce",
            8,
            2 * 256 * 7 / 8,
        ),
        (
            "%g = f32[64]{0} all-to-all(%p), replica_groups=mesh['x'=16] {'x':(2)4}",
            "all-to-all",
            4,
            256 * 3 / 4,
        ),
        ("%g = f32[64]{0} all-gather(%p), replica_groups={}", "all-gather", 16, 256 * 15 / 16),
        (
            "%g = f32[64]{0} collective-permute(%p), source_target_pairs={{0,1},{1,2},{2,0}}",
            "collective-permute",
            3,
            256,
        ),
        (
            "%g = (f32[4]{0}, f32[64]{0}) all-gather-start(%p), replica_groups=[1,16]<=[16]",
            "all-gather",
            16,
            256 * 15 / 16,
        ),
        (
            "%g = ((f32[64]{0}), f32[4]{0}) reduce-scatter-start(%p), replica_groups=[1,16]<=[16]",
            "reduce-scatter",
            16,
            16 * 15,
        ),
        (
            "%g = (f32[16]{0}, f32[48]{0}) all-reduce-start(%p, %q), replica_groups=[2,8]<=[16]",
            "all-reduce",
            8,
            2 * 256 * 7 / 8,
        ),
        (
            "%g = (f32[64]{0}, f32[64]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p)"
            ", source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            2,
            256,
        ),
    ],
)
def test_a_collective_is_read(instruction, kind, devices, sent):
    done = "%d = f32[64]{0} all-gather-done(%g)"  # the end of the same collective
    assert only(program(f"{instruction}\n{done}")) == Collective(kind, devices, 1, float(sent))


def test_what_stays_on_a_device_is_no_collective():
    assert program("%g = f32[8]{0} all-reduce(%p), replica_groups=[16,1]<=[16]").collectives == ()
    pairs = "%g = f32[8]{0} collective-permute(%p), source_target_pairs={{0,0},{1,1}}"
    assert program(pairs).collectives == ()


def test_a_sum_that_keeps_a_share_is_a_reduce_scatter():
    body = "%all-reduce-scatter.1 (x: f32[64]) -> f32[4] {\n" + textwrap.indent(
        "%x = f32[64]{0} parameter(0)\n"
        "%r = f32[4]{0} all-reduce(%x), replica_groups=[1,16]<=[16], to_apply=%add\n"
        "ROOT %s = f32[4]{0} bitcast(%r)",
        "  ",
    )
    read = program(
        "%f = f32[4]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1", body + "\n}"
    )
    assert only(read) == Collective("reduce-scatter", 16, 1, 16.0 * 15)


def test_what_is_wrapped_to_run_aside_counts_once():
    wrapped = (
        "%aside (x: f32[64]) -> f32[64] {\n"
        "  %x = f32[64]{0} parameter(0)\n"
        "  ROOT %r = f32[64]{0} all-gather(%x), replica_groups=[1,16]<=[16], dimensions={0}\n}"
    )
    pair = (
        "%s = ((f32[64]{0}), f32[64]{0}, s32[]) async-start(%p), calls=%aside\n"
        "%d = f32[64]{0} async-done(%s), calls=%aside"
    )
    assert only(program(pair, wrapped)).count == 1


BODY = textwrap.dedent("""\
    %body (c: (s32[], f32[64])) -> (s32[], f32[64]) {
      %c = (s32[], f32[64]{0}) parameter(0)
      %g = f32[64]{0} all-gather(%c), replica_groups=[1,16]<=[16], dimensions={0}
      %k = f32[64]{0} custom-call(%g), custom_call_target="tpu_custom_call"
      ROOT %t = (s32[], f32[64]{0}) tuple(%c, %g)
    }""")
LOOP = "%w = (s32[], f32[64]{0}) while(%p), condition=%condition, body=%body"


def condition(limit):
    return textwrap.dedent(f"""\
        %condition (c: (s32[], f32[64])) -> pred[] {{
          %n = {limit}
          %c = (s32[], f32[64]{{0}}) parameter(0)
          %i = s32[]{{:T(128)}} get-tuple-element(%c), index=0
          ROOT %lt = pred[]{{:T(512)}} compare(%i, %n), direction=LT
        }}""")


def test_a_loop_counts_as_often_as_its_condition_says():
    read = program(LOOP, BODY, condition("s32[] constant(32)"))
    assert only(read).count == 32
    assert only(read).sent == 32 * 256 * 15 / 16
    assert (read.kernels, read.unknown_loops) == ({"k": 32}, 0)


def test_the_compilers_note_of_a_loop_goes_before_its_condition():
    noted = LOOP + ', backend_config={"known_trip_count":{"n":"7"}}'
    assert only(program(noted, BODY, condition("s32[] constant(32)"))).count == 7


def test_a_loop_in_a_loop_multiplies():
    outer = BODY.replace("%body ", "%outer ").replace(
        "%g = f32[64]{0} all-gather(%c), replica_groups=[1,16]<=[16], dimensions={0}", LOOP
    )
    read = program(LOOP.replace("%body", "%outer"), outer, BODY, condition("s32[] constant(3)"))
    assert only(read).count == 9


def test_a_loop_that_does_not_say_is_counted_once_and_reported():
    limit = "s32[] get-tuple-element(%c), index=0"
    read = program(LOOP, BODY, condition(limit))
    assert (only(read).count, read.unknown_loops) == (1, 1)
    silent = BODY.replace("all-gather(%c)", "negate(%c)")
    assert program(LOOP, silent, condition(limit)).unknown_loops == 0


@pytest.mark.parametrize(
    ("group", "between"), [("[2,8]<=[16]", False), ("[8,2]<=[2,8]T(1,0)", True)]
)
def test_what_leaves_a_host_is_told_apart(group, between):
    line = f"%g = f32[64]{{0}} all-gather(%p), replica_groups={group}, dimensions={{0}}"
    assert only(program(line, devices_a_host=8)).between_hosts == between


def test_kernels_are_named_as_they_were_written():
    read = program(
        "%transpose_jvp_attention_backward__.3 = f32[8]{0} custom-call(%p), "
        'custom_call_target="tpu_custom_call"\n'
        '%x = f32[8]{0} custom-call(%p), custom_call_target="AllocateBuffer"\n'
        '%y = f32[8]{0} custom-call(%p), custom_call_target="__cublas$lt$matmul"'
    )
    assert read.kernels == {"__cublas$lt$matmul": 1, "attention_backward": 1}


def compiled_text(body, **specs):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    mapped = jax.shard_map(body, mesh=mesh, check_vma=False, **specs)
    shape = jax.ShapeDtypeStruct((64, 16), jnp.float32)
    return jax.jit(mapped).lower(shape).compile().as_text()


@pytest.mark.parametrize(
    ("body", "out", "expected"),
    [
        (lambda x: lax.all_gather(x, "x"), (), Collective("all-gather", 4, 1, 4096 * 3 / 4)),
        (lambda x: lax.psum(x, "y"), ("x",), Collective("all-reduce", 2, 1, 1024.0)),
        (
            lambda x: lax.psum_scatter(x, "x", tiled=True),
            ("x",),
            Collective("reduce-scatter", 4, 1, 256.0 * 3),
        ),
        (
            lambda x: lax.ppermute(x, "x", [(i, (i + 1) % 4) for i in range(4)]),
            ("x",),
            Collective("collective-permute", 4, 1, 1024.0),
        ),
        (
            lambda x: lax.scan(lambda c, _: (lax.psum(jnp.sin(c), "x"), None), x, length=5)[0],
            ("x",),
            Collective("all-reduce", 4, 5, 5 * 2 * 1024 * 3 / 4),
        ),
    ],
    ids=["all-gather", "all-reduce", "reduce-scatter", "permute", "scan"],
)
def test_collectives_that_were_asked_for_are_found_in_a_compiled_program(body, out, expected):
    text = compiled_text(body, in_specs=PartitionSpec("x"), out_specs=PartitionSpec(*out))
    assert only(read_program(text)) == expected


@functools.cache
def step_program(layers, **mesh):
    """A really compiled training step of a small model, scanned over its layers."""
    from dataclasses import replace

    from jaxformer import presets
    from jaxformer.config import MeshConfig
    from jaxformer.plan.build import Sizes, make_step

    config = presets.get("text")
    config = replace(
        config,
        data=replace(config.data, length=16),
        model=replace(
            config.model,
            layers=layers,
            width=32,
            heads=2,
            feedforward=64,
            max_length=16,
            tied_embeddings=False,
            scan=True,
        ),
        train=replace(config.train, batch_size=8),
        eval=replace(config.eval, batch_size=8),
        mesh=MeshConfig(**mesh),
    )
    step = make_step(config, Sizes(64), jax.devices()[:8], "cpu")
    return step, read_program(step.trace().lower().compile().as_text())


def test_a_data_parallel_step_sums_each_gradient_once():
    step, read = step_program(2)
    bytes_of_parameters = sum(4 * leaf.size for leaf in jax.tree.leaves(step.state.params))
    kinds = {one.kind for one in read.collectives}
    assert kinds == {"all-reduce"}
    sent = sum(one.sent for one in read.collectives)
    assert sent == pytest.approx(2 * 7 / 8 * bytes_of_parameters, rel=0.01)


def test_every_layer_of_a_scanned_step_counts():
    counts = []
    for layers in (2, 4, 6):
        _, read = step_program(layers, fsdp=8, data=1)
        assert read.unknown_loops == 0
        counts.append(sum(one.count for one in read.collectives if one.kind == "all-gather"))
    assert counts[2] - counts[1] == counts[1] - counts[0] > 0
