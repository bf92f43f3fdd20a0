"""Pictures of a 2D base through the same Reader: every kind of request, in batches and alone."""

import numpy as np
import pytest
from PIL import Image

from tghmoe_jax.bases import pictures
from tghmoe_jax.drawn.scenes import ScenesSource
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import DISCLAIMER
from tghmoe_jax.reader.batches import PictureViews, Request
from tghmoe_jax.reader.opening import load_picture_reader
from tghmoe_jax.reader.reader import Reader


@pytest.fixture(scope="module")
def reader() -> Reader:
    return load_picture_reader("embedded")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A picture file, and a closed question about it."""
    source, file = ScenesSource("test", 1), tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.fromarray(source.slices(0)[0][0]).save(file)
    return file, source.question(0, "closed", np.random.default_rng(0))


@pytest.fixture(scope="module")
def views(reader, case) -> PictureViews:
    return PictureViews(*reader.views_of(pictures.read_picture(case[0]), reader.model.cfg.tower.image_size))


def test_a_list_of_all_kinds_of_requests_about_a_picture_is_answered_one_by_one(reader, case, views, monkeypatch):
    _, question = case
    bare = question.without_choices()
    requests = [
        Request(0, question), Request(0, bare, question.choices), Request(0, question, visible=False), Request(0, bare),
        Request(0, bare, question.choices[:2], visible=False),
    ]  # fmt: skip
    alone = [reader.answer(views, [request], 8)[0] for request in requests]
    monkeypatch.setattr(reader, "batch", 3)
    for one, beside in zip(alone, reader.answer(views, requests, 8), strict=True):
        assert one.text == beside.text
        np.testing.assert_allclose(one.likelihoods, beside.likelihoods, rtol=1e-4, atol=1e-5)
    assert alone[0].text == question.target and alone[0].text != alone[2].text


def test_a_blind_answer_does_not_depend_on_the_picture(reader, case, views):
    _, question = case
    request = Request(0, question.without_choices(), question.choices, visible=False)
    grey = PictureViews(np.full_like(views.views, 0.5), views.crops)
    (one,), (other,) = (reader.answer(source, [request], 0) for source in (views, grey))
    np.testing.assert_array_equal(one.likelihoods, other.likelihoods)


def test_choices_are_ranked_and_the_answer_can_be_printed(reader, case):
    file, question = case
    answer = reader.ask(file, question.question, question.choices)
    assert list(answer.option_likelihoods) == list(question.choices)
    assert max(answer.option_likelihoods, key=answer.option_likelihoods.get) == question.answer
    assert str(answer).startswith(f"{question.target}\n\noptions     {question.answer} ")
    assert str(answer).endswith(f"\n\n{DISCLAIMER}")


def test_what_belongs_to_scans_is_refused_in_one_sentence(reader, case, tmp_path):
    file, question = case
    with pytest.raises(UserError, match="--report belongs to --volume"):
        reader.report(file)
    for more in ({"task": "vqa"}, {"series": 1}, {"assume_hu": True}, {"evidence": True}):
        with pytest.raises(UserError, match="--assume-hu and --evidence belong to --volume"):
            reader.ask(file, question.question, **more)
    with pytest.raises(UserError, match="nothing to show"):
        reader.ask(file, question.question, new_tokens=1).draw_routing(tmp_path / "routing.png")
