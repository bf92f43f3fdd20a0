"""Questions in batches: each is answered as if alone, whatever it is asked beside and however its text is padded."""

import dataclasses

import numpy as np
import pytest

from tghmoe_jax.datasets.sources import make_source
from tghmoe_jax.models import generation
from tghmoe_jax.reader import batches as reading
from tghmoe_jax.reader.examination import questions
from tghmoe_jax.training import compile_cache
from tghmoe_jax.training.loading import load_run, param_shapes

LONG = "Look at every slice from the first to the last one and at all organs before you answer. "


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """The embedded reader; seven closed questions of different volumes, every other one long."""
    run = load_run("embedded", "--checkpoint")
    data = run.config["data"] | {"root": str(tmp_path_factory.mktemp("phantom"))}
    source = make_source(data, "test", 7)
    asked = questions(source, "closed", 7, 0, ["phase", "organ"])
    asked = [
        (volume, dataclasses.replace(q, question=LONG + q.question) if i % 2 else q)
        for i, (volume, q) in enumerate(asked)
    ]
    return run, source, asked


def widths(monkeypatch, name: str) -> list[int]:
    """Text columns of each later call of a function of `generation`."""
    found, function = [], getattr(generation, name)

    def spy(model, variables, batch, *rest):
        found.append(batch["tokens"].shape[1])
        return function(model, variables, batch, *rest)

    spy.lower = function.lower
    monkeypatch.setattr(generation, name, spy)
    monkeypatch.setattr(compile_cache, "keeps_traced", lambda: False)  # what an earlier process traced calls no spy
    return found


@pytest.mark.parametrize("ranked", [False, True])
def test_every_question_is_answered_as_if_alone(case, ranked, monkeypatch):
    run, source, asked = case
    requests = [reading.Request(v, q, options=q.choices if ranked else ()) for v, q in asked]
    reader = reading.BatchReader(run.model, run.tokenizer, run.params, 120, 1)
    alone = [reader.answer(source, [request], 4)[0] for request in requests]

    monkeypatch.setattr(reading, "BUCKET", 16)
    shapes = widths(monkeypatch, "answer_likelihood" if ranked else "generate")
    reader = reading.BatchReader(run.model, run.tokenizer, run.params, 120, 3)
    for one, beside in zip(alone, reader.answer(source, requests, 4), strict=True):
        assert one.text == beside.text and one.group == beside.group
        np.testing.assert_allclose(one.likelihoods, beside.likelihoods, rtol=1e-4, atol=1e-5)
    assert len({one.text for one in alone}) > 1 or ranked  # else any order would do
    assert shapes[0] < shapes[-1] < 120, shapes  # short questions first, none padded to the whole text


@pytest.mark.parametrize("positions", [20, 70, 120, 4096])
def test_shorter_text_stays_in_the_rope_regime_of_the_whole(case, positions, monkeypatch):
    run, _, _ = case
    monkeypatch.setattr(reading, "BUCKET", 8)
    cfg = run.model.cfg
    decoder = dataclasses.replace(cfg.decoder, original_positions=positions, max_positions=8192)
    for others in (0, 45, 90):
        for tokens in range(1, 61):
            length = reading.padded_length(decoder, tokens, others, 60)
            assert tokens <= length <= 60
            assert (length + others > positions) == (60 + others > positions)
            if positions == 4096:
                assert length < tokens + 8


def test_a_list_of_all_kinds_of_requests_is_answered_one_by_one(case):
    """Forced and free groups, ranked and generated, blind and seeing, with two and four options, in one list."""
    run, source, asked = case
    (v, q), (w, other) = asked[:2]
    requests = [
        reading.Request(v, q), reading.Request(w, other, q.choices), reading.Request(v, other, group=0),
        reading.Request(w, q, visible=False), reading.Request(v, q, other.choices[:2]), reading.Request(w, q, group=1),
        reading.Request(v, other, visible=False), reading.Request(w, q, routing=True),
    ]  # fmt: skip
    alone = reading.BatchReader(run.model, run.tokenizer, run.params, 120, 1)
    together = reading.BatchReader(run.model, run.tokenizer, run.params, 120, 3).answer(source, requests, 4)
    for request, answer in zip(requests, together, strict=True):
        (expected,) = alone.answer(source, [request], 4)
        assert (answer.text, answer.group, answer.task) == (expected.text, expected.group, expected.task)
        assert answer.options == request.options and bool(answer.text) == (not request.options)
        np.testing.assert_allclose(answer.likelihoods, expected.likelihoods, rtol=1e-4, atol=1e-5)
        assert (answer.routing is not None) == request.routing and bool(answer.load.size) == request.visible
    assert together[2].group == 0 and together[5].group == 1


@pytest.mark.slow
def test_each_prompt_is_routed_with_its_own_volume(case):
    """... where the task router reads the image: a score over prompts about one volume would say nothing."""
    run, source, asked = case
    cfg = run.model.cfg.with_tgh(task_input="image")
    model = type(run.model)(cfg)
    shapes = param_shapes(model, run.config["data"])
    rng = np.random.default_rng(0)
    params = {
        path: run.params[path] if path in run.params and run.params[path].shape == leaf.shape
        else rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in shapes.items()
    }  # fmt: skip
    reader = reading.BatchReader(model, run.tokenizer, params, 120, 3)
    question = asked[0][1]
    found = reader.route(source, [(volume, question) for volume, _ in asked])
    assert len({row.tobytes() for row in found}) == len(asked)
    for (volume, _), row in zip(asked, found, strict=True):
        np.testing.assert_allclose(reader.route(source, [(volume, question)])[0], row, rtol=1e-5)
