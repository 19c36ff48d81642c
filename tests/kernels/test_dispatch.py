"""The platform compiled for, the interpreter, and the choice between implementations."""

import contextlib
import contextvars
import logging

import jax
import pytest

from jaxformer_kernels import compiling_for, dispatch, interpreting
from jaxformer_kernels.dispatch import Implementation, choose

ORDER = {"default": ("plain",), "tpu": ("fast", "plain")}


def limits(call):
    return () if dispatch.platform() == "tpu" or dispatch.interpreter() else ("the platform",)


TABLE = {
    "plain": Implementation(run=lambda: "plain", supports=frozenset({"mask", "bias"})),
    "fast": Implementation(run=lambda: "fast", supports=frozenset({"mask"}), limits=limits),
}


def chosen(name=None, features=frozenset()):
    return choose("some_op", TABLE, ORDER, name, frozenset(features)).run()


def test_the_platform_is_this_process_s_unless_told_otherwise():
    assert dispatch.platform() == jax.default_backend()
    with compiling_for("tpu"):
        assert dispatch.platform() == "tpu"
        with compiling_for("gpu"):
            assert dispatch.platform() == "gpu"
        assert dispatch.platform() == "tpu"
    assert dispatch.platform() == jax.default_backend()


def test_no_interpreter_is_on_unless_asked_for():
    assert dispatch.interpreter() is None
    parameters = object()
    with interpreting(parameters):
        assert dispatch.interpreter() is parameters
    with interpreting():
        assert dispatch.interpreter() is True
    assert dispatch.interpreter() is None


@pytest.mark.parametrize(
    ("context", "now"),
    [(compiling_for("tpu"), dispatch.platform), (interpreting(), dispatch.interpreter)],
)
def test_a_context_ends_with_an_exception_and_is_this_thread_s_alone(context, now):
    before = now()
    inside = []
    with contextlib.suppress(KeyError), context:
        inside += [now(), contextvars.Context().run(now)]
        raise KeyError
    assert inside[0] != before
    assert inside[1] == before
    assert now() == before


def test_the_choice_follows_the_platform_compiled_for():
    assert chosen() == "plain"
    with compiling_for("tpu"):
        assert chosen() == "fast"
        assert chosen(features={"bias"}) == "plain"
    with pytest.raises(
        NotImplementedError, match=r"'fast' does not support the platform; use .*'plain'"
    ):
        chosen("fast")
    with interpreting():
        assert chosen("fast") == "fast"


def test_what_nothing_can_do_names_every_reason():
    with compiling_for("tpu"), pytest.raises(NotImplementedError) as refusal:
        chosen(features={"dropout", "bias"})
    assert "fast does not support bias, dropout" in str(refusal.value)
    assert "plain does not support dropout" in str(refusal.value)
    with pytest.raises(NotImplementedError, match="none can"):
        chosen("plain", features={"dropout"})


def test_a_name_that_does_not_exist_gets_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'plain'"):
        chosen("plane")


def test_a_choice_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_said", set())
    with caplog.at_level(logging.INFO, logger="jaxformer_kernels"), compiling_for("tpu"):
        chosen()
        chosen()
        chosen(features={"bias"})
        chosen(features={"bias"})
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert "falling back to 'plain' on tpu: fast does not support bias" in caplog.text
    assert dispatch.picked("some_op") == ["fast", "plain"]
