"""Programs that an earlier process traced give the same answers, bit for bit, and are not traced again."""

import jax
import numpy as np
import pytest

from tghmoe_jax.models import generation
from tghmoe_jax.models.mllm import MLLM
from tghmoe_jax.reader import programs
from tghmoe_jax.reader.batches import BatchReader, Request
from tghmoe_jax.samples.questions import Question
from tghmoe_jax.training import compile_cache, loading
from tghmoe_jax.training.loading import load_run


class Volumes:
    """Two drawn volumes of the run's size."""

    def __init__(self, data):
        rng = np.random.default_rng(0)
        self._slices = rng.integers(0, 255, (2, data["slices"], data["size"], data["size"], 3), np.uint8)

    def slices(self, index):
        return self._slices[index], np.ones(len(self._slices[index]), bool)

    def slice_spacing(self, index):
        return 2.0


def answers(run) -> list:
    """Every kind of request, by a reader that has answered nothing yet."""
    asked = Question("vqa", "closed", "organ", "Which organ ?", ("liver", "lung"), "")
    requests = [
        Request(0, asked), Request(1, asked, asked.choices), Request(0, asked, visible=False),
        Request(1, asked, group=1), Request(0, asked, routing=True),
    ]  # fmt: skip
    reader = BatchReader(run.model, run.tokenizer, jax.device_put(run.params), run.config["data"]["text_length"])
    found = reader.answer(Volumes(run.config["data"]), requests, 4)
    return [
        (one.text, one.task_probabilities, one.group, *map(np.asarray, jax.tree.leaves((one.likelihoods, one.load))))
        for one in found
    ]  # fmt: skip


def same(one: list, other: list) -> bool:
    return all(np.array_equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.slow
def test_recalled_programs_answer_as_traced_ones_and_nothing_is_traced(tiny_stage2, kept_programs, monkeypatch):
    run = load_run(tiny_stage2, "--checkpoint")
    monkeypatch.setattr(compile_cache, "keeps", lambda: False)
    plain = answers(run)
    monkeypatch.undo()
    assert same(answers(run), plain)
    kept = sorted(kept_programs.glob("*-recalled"))
    assert len(kept) >= 4
    jax.clear_caches()

    def traced(*_, **__):
        raise AssertionError("traced again")

    for name in ("encode", "decode", "prefill", "text_scores"):
        monkeypatch.setattr(MLLM, name, traced)
    assert same(answers(run), plain) and sorted(kept_programs.glob("*-recalled")) == kept


def test_the_shapes_of_a_model_are_those_that_tracing_gives(tiny_stage2, kept_programs, monkeypatch):
    run = load_run(tiny_stage2, "--checkpoint")
    model, sizes = (
        generation.inference(run.model),
        [run.config["data"][key] for key in ("slices", "size", "text_length")],
    )
    first, again = (loading._param_shapes.__wrapped__(model, *sizes) for _ in range(2))
    monkeypatch.setattr(compile_cache, "keeps", lambda: False)
    traced = loading._param_shapes.__wrapped__(model, *sizes)
    assert list(first.items()) == list(again.items()) == list(traced.items())


@pytest.mark.parametrize("name", ["generate", "encode"])
def test_a_mesh_has_programs_of_its_own(name, kept_programs):
    function = getattr(generation, name)
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        program, _ = programs.prepare(function, None, {}, ())
    assert program is function
