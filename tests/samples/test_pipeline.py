"""Batches are a function of (seed, step) alone, and every device holds the same mixture of samples."""

import dataclasses
import itertools

import numpy as np
import pytest

from tghmoe_jax.bases.base import EMBEDDED
from tghmoe_jax.bases.phi3v import CHAT
from tghmoe_jax.drawn import binding
from tghmoe_jax.errors import UserError
from tghmoe_jax.samples import pipeline, prompts
from tghmoe_jax.samples.augment import Augment
from tghmoe_jax.samples.questions import Question
from tghmoe_jax.samples.tokenizer import Tokenizer

TASKS = ("report", "vqa")
MIXTURE = (("report", 1), ("open", 1), ("closed", 2))


class Numbers:
    """Volume i shows i everywhere; its question holds i and a number that the generator draws."""

    aux_names = ("odd",)

    def __init__(self, count: int):
        self.count = count

    def __len__(self):
        return self.count

    def slices(self, index):
        return np.full((2, 8, 8, 3), index, np.uint8), np.array([True, index % 3 > 0])

    def slice_spacing(self, index):
        return 1.0 + index

    def question(self, index, kind, rng, type=None):
        if kind == "binding":
            return binding.ask(rng)
        task = "report" if kind == "report" else "vqa"
        choices = ("yes", "no") if kind == "closed" else ()
        return Question(task, kind, "organ", f"Is {kind} {index} or {rng.integers(100)}?", choices, "yes")

    def aux(self, index):
        return np.array([index % 2], np.float32)

    def aux_cells(self, index, cell):
        return np.full((2 // cell[0], 8 // cell[1], 8 // cell[2], 1), index % 2 == 1)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(EMBEDDED, CHAT)


def spec(**changes) -> pipeline.BatchSpec:
    values = {"rows": 16, "microbatches": 2, "devices": 2, "text_length": 64, "mixture": MIXTURE, "tasks": TASKS}
    return pipeline.BatchSpec(**(values | changes))


def batches(tokenizer, steps=6, seed=3, count=20, columns=None, cell=(1, 4, 4), **changes):
    source = Numbers(count)
    return pipeline.train_iterator(source, tokenizer, spec(**changes), seed, steps, columns, cell=cell)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def shown(batch: dict) -> list[int]:
    """Volumes of a batch in order."""
    return batch["slices"][..., 0, 0, 0, 0].reshape(-1).tolist()


def test_a_batch_holds_the_keys_that_the_model_reads(tokenizer):
    batch = next(batches(tokenizer))
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "slices": ((2, 8, 2, 8, 8, 3), "uint8"), "slice_mask": ((2, 8, 2), "bool"),
        "slice_spacing": ((2, 8), "float32"), "tokens": ((2, 8, 64), "int32"), "token_mask": ((2, 8, 64), "bool"),
        "question_mask": ((2, 8, 64), "bool"), "loss_mask": ((2, 8, 64), "bool"), "task": ((2, 8), "int32"),
        "aux": ((2, 8, 1), "float32"), "aux_cells": ((2, 8, 2, 2, 2, 1), "bool"), "image_visible": ((2, 8), "bool"),
    }  # fmt: skip
    volumes = np.array(shown(batch)).reshape(2, 8)
    assert np.array_equal(batch["slice_spacing"], 1 + volumes) and np.array_equal(batch["aux"][..., 0], volumes % 2)
    assert np.array_equal(batch["slice_mask"][..., 1], volumes % 3 > 0) and batch["image_visible"].all()
    assert np.array_equal(batch["aux_cells"].all(axis=(2, 3, 4))[..., 0], volumes % 2 == 1)
    assert not {"aux", "aux_cells"} & next(batches(tokenizer, cell=None)).keys()
    for place in np.ndindex(2, 8):  # text and picture belong together
        asked = tokenizer.decode(batch["tokens"][place][batch["question_mask"][place]])
        assert f" {volumes[place]} or" in asked
        answer = tokenizer.decode(batch["tokens"][place][batch["loss_mask"][place]])
        assert answer == ("A. yes" if "closed" in asked else "yes")
        assert batch["task"][place] == TASKS.index("report" if "report" in asked else "vqa")


def test_labels_of_a_picture_that_is_shifted_have_no_place(tokenizer):
    given = (Numbers(20), tokenizer, spec(), 3, range(8), (1, 4, 4))
    still, moved = (pipeline.TrainBatches(*given, augment).map(0) for augment in (Augment(0.1), Augment(shift=0.1)))
    assert not still["aux_cells"].all() and moved["aux_cells"].all()
    np.testing.assert_array_equal(still["aux"], moved["aux"])


def test_the_order_is_a_function_of_seed_and_step(tokenizer):
    one, again, other = (list(batches(tokenizer, seed=seed)) for seed in (3, 3, 4))
    assert len(one) == 6 and all(map(same, one, again))
    assert not any(map(same, one, other))
    longer = list(itertools.islice(batches(tokenizer, steps=99), 6))
    assert all(map(same, one, longer)), "the number of steps changes nothing before its end"
    source, whole = Numbers(20), range(8)
    direct = pipeline.TrainBatches(source, tokenizer, spec(), 3, whole, (1, 4, 4))
    assert same(direct.map(4), one[4]), "a step needs none of the steps before it"


@pytest.mark.parametrize("processes", [2, 4])
def test_the_batch_is_the_same_for_any_number_of_processes(tokenizer, processes):
    whole = list(batches(tokenizer, rows=32, devices=4))
    own = [range(16)[i::processes] for i in range(processes)]  # a mesh may give a process any of the rows
    parts = [list(batches(tokenizer, rows=32, devices=4, columns=columns)) for columns in own]
    order = np.argsort(np.concatenate(own))
    for step, batch in enumerate(whole):
        columns = [part[step] for part in parts]
        assert columns[0]["task"].shape == (2, 16 // processes)
        assert same(batch, {key: np.concatenate([c[key] for c in columns], axis=1)[:, order] for key in batch})


@pytest.mark.parametrize("count", [20, 16, 7])
def test_an_epoch_shows_each_volume_once_in_an_order_of_its_own(tokenizer, count):
    steps = 3 * count // 16 + 1
    order = [volume for batch in batches(tokenizer, steps=steps, count=count) for volume in shown(batch)]
    epochs = [order[i : i + count] for i in range(0, 3 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_volume_is_asked_anew_in_each_epoch(tokenizer):
    asked = set()
    for batch in batches(tokenizer, count=4, steps=4):
        for place in np.ndindex(batch["task"].shape):
            asked.add(tokenizer.decode(batch["tokens"][place][batch["question_mask"][place]]))
    assert len(asked) > 32


@pytest.mark.parametrize(
    ("mixture", "rows", "kinds"),
    [
        (MIXTURE, 16, {"report": 1, "open": 1, "closed": 2}),
        ((("report", 2), ("open", 2), ("closed", 4)), 16, {"report": 1, "open": 1, "closed": 2}),  # in lowest terms
        ((("report", 1), ("closed", 1)), 24, {"report": 3, "closed": 3}),
        ((("closed", 1),), 8, {"closed": 2}),
    ],
)
def test_each_device_gets_the_same_number_of_each_kind_in_every_microbatch(tokenizer, mixture, rows, kinds):
    for batch in batches(tokenizer, mixture=mixture, rows=rows):
        for micro in range(2):
            for device in np.split(np.arange(rows // 2), 2):
                texts = [tokenizer.decode(batch["tokens"][micro, row]) for row in device]
                assert {kind: sum(f"Is {kind} " in text for text in texts) for kind in kinds} == kinds
                assert sum(kinds.values()) == len(device)


def test_binding_rows_ask_for_the_letter_of_a_stated_answer_whatever_the_volume(tokenizer):
    batch = next(batches(tokenizer, mixture=(("closed", 1), ("binding", 1))))
    text = [tokenizer.decode(batch["tokens"][place][batch["question_mask"][place]]) for place in np.ndindex(2, 8)]
    bound = [t for t in text if "Is closed " not in t]
    assert len(bound) == 8
    for place, t in zip(np.ndindex(2, 8), text, strict=True):
        if t in bound:
            answer = tokenizer.decode(batch["tokens"][place][batch["loss_mask"][place]])
            letter, said = answer[0], answer[3:].split("<|end|>")[0]
            stated, listed = t.split("Choices:")
            assert said in stated and f"{letter}. {said}" in listed and TASKS[batch["task"][place]] == "vqa"


def test_the_shares_of_the_tasks_are_those_of_the_rows(tokenizer):
    one = spec()
    assert one.pattern == ("report", "open", "closed", "closed") and one.task_shares == (0.25, 0.75)
    assert np.bincount(next(batches(tokenizer))["task"].reshape(-1)).tolist() == [4, 12]
    assert dataclasses.replace(one, mixture=(("closed", 3),)).task_shares == (0.0, 1.0)


def test_a_restored_iterator_goes_on_with_the_very_next_batch(tokenizer):
    first = batches(tokenizer)
    for _ in range(3):
        next(first)
    state = first.get_state()
    rest = list(first)
    second = batches(tokenizer)
    next(second)
    second.set_state(state)
    assert len(rest) == 3 and all(map(same, rest, second))


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": 18}, "--config.train.batch=18 must be a multiple of 16"),
        ({"rows": 16, "devices": 4}, "x devices (4)"),
        ({"rows": 16, "microbatches": 3}, "train.accumulate (3)"),
        ({"mixture": ()}, "--config.data.mixture gives no kind"),
        ({"mixture": (("open", 0),)}, "--config.data.mixture gives no kind"),
    ],
)
def test_a_batch_that_does_not_divide_names_its_factors(changes, words):
    with pytest.raises(UserError) as error:
        spec(**changes)
    assert words in str(error.value)


@pytest.mark.parametrize("mixture", [{"closed": -1}, {"poem": 1}])
def test_a_wrong_mixture_is_named(mixture):
    with pytest.raises(UserError, match="--config.data.mixture"):
        pipeline.mixture_of(mixture)


def test_the_mixture_has_one_order_whatever_the_config_says():
    assert pipeline.mixture_of({"closed": 2, "report": 1, "open": 0}) == (("report", 1), ("closed", 2))


def test_text_that_does_not_fit_is_refused_before_the_first_step(tokenizer):
    question = Numbers(20).question(3, "closed", np.random.default_rng(0))
    needed = len(prompts.encode(tokenizer, question.prompt, question.target).tokens)
    pipeline.check_text(Numbers(20), tokenizer, spec(text_length=needed + 8), 3)
    with pytest.raises(UserError, match=f"--config.data.text_length={needed - 8}; raise it to"):
        pipeline.check_text(Numbers(20), tokenizer, spec(text_length=needed - 8), 3)


def test_an_error_of_the_user_keeps_its_kind_on_the_way_through_the_reader(tokenizer):
    with pytest.raises(UserError, match="--config.data.text_length=20"):
        next(batches(tokenizer, text_length=20))
