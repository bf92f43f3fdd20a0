"""How a 2D base is asked about a volume without any adaptation: MedGemma 1.5's published protocol for CT.

One user turn holds an instruction, then at most 85 slices, each followed by its number, then the question
(google-health/medgemma, notebooks/high_dimensional_ct_hugging_face.ipynb). The notebook also puts each slice through
JPEG, which loses detail, and takes slices in the order of their InstanceNumber; here they go from the feet to the head.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from tghmoe_jax.bases.family import Views
from tghmoe_jax.errors import UserError
from tghmoe_jax.models.mllm import MLLM
from tghmoe_jax.reader.opening import open_base
from tghmoe_jax.reader.reader import Reader
from tghmoe_jax.samples import prompts
from tghmoe_jax.samples.chat import ChatTemplate
from tghmoe_jax.samples.tokenizer import Tokenizer

MOST = 85  # slices of a prompt
INSTRUCTION = (
    "You are an instructor teaching medical students. You are analyzing a contiguous block of CT slices from the "
    "center of the abdomen. Please review the slices provided below carefully."
)
BEGIN = "<start_of_image>"  # of the families that take several images


def load_slice_reader(folder: str | Path, tasks: tuple[str, ...], slices: int, batch: int = 1) -> Reader:
    """The 2D base in `folder`, to be asked about volumes of at most `slices` slices by the protocol.

    UserError names --base where the folder is no base, or one that takes a single image.
    """
    model, tokenizer, params, views_of = open_base(folder)
    chat = tokenizer.chat
    if model.cfg.volume.layout != "frames":
        raise UserError(
            f"--base={folder} takes one image a prompt; --protocol slices needs one that takes many, as Gemma 3."
        )
    after, number = chat.after_image + chat.before_question, min(MOST, slices)
    tokenizer.chat = protocol_template(chat)
    cfg = dataclasses.replace(
        model.cfg, tasks=tasks, labels=labels(tokenizer, after, number), **prompts.around_image(tokenizer)
    )
    views = functools.partial(slice_views, views_of=views_of, side=cfg.tower.image_size, most=number)
    return Reader(
        MLLM(cfg), tokenizer, jax.device_put(params), 0, batch, views_of=views_of, volume_views=views,
        name=f"{Path(folder).resolve().name}, slices",
    )  # fmt: skip


def protocol_template(chat: ChatTemplate) -> ChatTemplate:
    """A family's template with the instruction before the first image, and the question right after the last label."""
    begin = chat.before_question + BEGIN  # `before_question` is what the family puts around an image
    start = chat.before_image.removesuffix(begin) + INSTRUCTION
    return dataclasses.replace(
        chat, before_image=start + begin, between_images=begin, after_image="", before_question=""
    )


def labels(tokenizer: Tokenizer, before: str, number: int) -> tuple[tuple[int, ...], ...]:
    """Ids of the text after each of `number` slices, filled up with -1 to one length."""
    ids = [tokenizer.encode_template(f"{before}SLICE {k + 1}") for k in range(number)]
    longest = max(map(len, ids))
    return tuple((*one, *[-1] * (longest - len(one))) for one in ids)


def chosen(count: int) -> list[int]:
    """The slices of a volume of `count` that are shown."""
    if count <= MOST:
        return list(range(count))
    return [round(i / MOST * (count - 1)) for i in range(1, MOST + 1)]


def slice_views(
    slices: np.ndarray, mask: np.ndarray, views_of: Views, side: int, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Slices uint8 (D, S, S, 3) and their mask as views float32 (most, side, side, 3) in 0..1, and theirs."""
    shown = [views_of(Image.fromarray(slices[i]), side)[0][0] for i in chosen(int(mask.sum()))][:most]
    views = np.zeros((most, side, side, 3), np.float32)
    views[: len(shown)] = shown
    return views, np.arange(most) < len(shown)
