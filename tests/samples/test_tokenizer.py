import importlib.resources
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tghmoe_jax.bases.phi3v import CHAT
from tghmoe_jax.drawn import train_tokenizer
from tghmoe_jax.errors import UserError
from tghmoe_jax.samples import prompts
from tghmoe_jax.samples.tokenizer import FILES, Tokenizer

BASE = Path(str(importlib.resources.files("tghmoe_jax"))) / "assets" / "base"
PHI3V = Path(__file__).resolve().parents[3] / "shared" / "data" / "tokenizers" / "phi3v"
needs_phi3v = pytest.mark.skipif(
    not PHI3V.is_dir(), reason="../shared/data is absent: the Phi-3-V vocabulary is not tested"
)

TOKENIZER = Tokenizer.from_folder(BASE, CHAT)
SPECIAL_IDS = {TOKENIZER._template.token_to_id(s) for s in train_tokenizer.SPECIALS}


@settings(deadline=None)
@given(st.text())
@example("")
@example(" ")
@example("  A.  a A. ")
@example("▁ U+2581 stays ▁")
@example("<|end|><s></s> <0x0A> <|assistant|>\n\n next")
@example("\n\tÄpfel 肝臓 🩻 e\u0301 \x00")
def test_every_unicode_text_comes_back_unchanged(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@settings(deadline=None)
@given(st.lists(st.sampled_from([*train_tokenizer.SPECIALS, "<", "|", " ", "\n", "A.", "end", "<0x41>"]), max_size=8))
def test_plain_text_never_yields_a_special_id(parts):
    text = "".join(parts)
    assert not SPECIAL_IDS & set(TOKENIZER.encode(text))
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_template_text_yields_special_ids_and_decode_leaves_them_out():
    ids = TOKENIZER.encode_template("<|user|>\n<|end|>")
    assert ids[0] == TOKENIZER.id_of("<|user|>") and ids[-1] == TOKENIZER.id_of("<|end|>")
    answer = [TOKENIZER.bos_id, *TOKENIZER.encode("liver cyst"), TOKENIZER.id_of("<|end|>"), TOKENIZER.eos_id]
    assert TOKENIZER.decode(answer) == "liver cyst"


def test_option_letters_are_single_tokens_apart_from_the_article():
    letters = [TOKENIZER.encode(f"{letter}.") for letter in "ABCD"]
    assert all(len(ids) == 1 for ids in letters) and len({ids[0] for ids in letters}) == 4
    listed = TOKENIZER.encode("Choices: A. axial B. coronal C. sagittal D. oblique")
    assert [i for i in listed if i in {ids[0] for ids in letters}] == [ids[0] for ids in letters]
    assert not set(TOKENIZER.encode("A cyst and a stone. A Vitamin")) & {ids[0] for ids in letters}
    # The target starts with the very token that the choices show.
    assert TOKENIZER.encode("B. coronal") == TOKENIZER.encode(" Choices: B. coronal")[-2:]


def test_words_of_the_embedded_texts_are_single_tokens():
    text = (
        "Axial portal venous CT of the abdomen. There is a liver cyst in the right upper liver. The spleen is normal."
    )
    assert len(TOKENIZER.encode(text)) == len(text.replace(".", " .").split())
    for word in ("disc", "striped", "triangle", "calcification", "sagittal", "non-contrast"):
        assert len(TOKENIZER.encode(word)) == (3 if "-" in word else 1), word


def test_listed_radiology_words_are_not_shredded():
    lengths = [len(TOKENIZER.encode(word)) for word in train_tokenizer.CT_WORDS]
    assert sum(lengths) / len(lengths) < 3.5


def test_training_again_gives_the_same_tokeniser():
    small = train_tokenizer.word_pieces(200)
    assert small == train_tokenizer.word_pieces(200)
    stored = json.loads((BASE / FILES[0]).read_text(encoding="utf-8"))
    assert len(stored["model"]["vocab"]) == train_tokenizer.SIZE == TOKENIZER.vocab_size
    assert set(map("".join, stored["model"]["merges"])) <= set(stored["model"]["vocab"])


def test_auto_tokenizer_loads_the_files_and_agrees():
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoTokenizer.from_pretrained(BASE, trust_remote_code=False)
    for text in ("Which plane is this? Choices: A. axial B. coronal", "▁ Äpfel\n  A. a", "The liver  is clear."):
        ids = other.encode(text, add_special_tokens=False)
        assert ids == TOKENIZER.encode(text)
        assert other.decode(ids) == text
    assert (other.bos_token_id, other.eos_token_id, other.pad_token_id) == (
        TOKENIZER.bos_id,
        TOKENIZER.eos_id,
        TOKENIZER.pad_id,
    )


def test_specials_of_the_embedded_tokeniser():
    t = TOKENIZER
    user, end, assistant = (t.id_of(name) for name in ("<|user|>", "<|end|>", "<|assistant|>"))
    assert len({t.bos_id, t.eos_id, end, user, assistant}) == 5
    assert t.pad_id == t.eos_id and t.stop_ids == {end, t.eos_id, assistant}


@needs_phi3v
def test_phi3v_vocabulary_matches_its_golden_texts():
    phi = Tokenizer.from_folder(PHI3V, CHAT)
    golden = json.loads((PHI3V / "golden.json").read_text(encoding="utf-8"))
    assert len(golden) == 47
    assert [phi.encode(row["text"]) for row in golden] == [row["ids"] for row in golden]
    assert (phi.bos_id, phi.id_of("<|user|>"), phi.stop_ids) == (1, 32010, {32007, 32000, 32001})
    assert not {1, 2, 32007, 32010} & set(phi.encode("<s></s><|end|><|user|>"))


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(UserError, match="tokenizer.json is missing"):
        Tokenizer.from_folder(tmp_path, CHAT)
    (tmp_path / FILES[1]).write_text("{}")
    (tmp_path / FILES[0]).write_text("{")
    with pytest.raises(UserError, match="tokenizer.json"):
        Tokenizer.from_folder(tmp_path, CHAT)
    (tmp_path / FILES[0]).write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}})
    )
    with pytest.raises(UserError, match="no token <s>"):
        Tokenizer.from_folder(tmp_path, CHAT)
    (tmp_path / FILES[1]).write_text("[]")
    with pytest.raises(UserError, match="tokenizer_config.json"):
        Tokenizer.from_folder(tmp_path, CHAT)


def test_half_a_surrogate_pair_is_a_user_error():
    with pytest.raises(UserError, match="Unicode"):
        TOKENIZER.encode("\ud800")


def test_worker_processes_encode_prompts_without_transformers_jax_or_the_code_of_a_family(tmp_path):
    (tmp_path / "sent").write_bytes(pickle.dumps(TOKENIZER))
    code = (
        "import pickle, sys, tghmoe_jax.samples.prompts as prompts, tghmoe_jax.drawn.scenes; "
        f"tokenizer = pickle.load(open({str(tmp_path / 'sent')!r}, 'rb')); "
        "print(prompts.encode(tokenizer, 'Which plane?', 'axial').tokens, "
        "{'jax', 'transformers', 'tghmoe_jax.bases'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert said == f"{prompts.encode(TOKENIZER, 'Which plane?', 'axial').tokens} set()"


def test_a_tokeniser_without_a_special_token_of_the_template_is_refused(tmp_path):
    for name in FILES:
        (tmp_path / name).write_text((BASE / name).read_text(encoding="utf-8").replace("<|user|>", "<|other|>"))
    with pytest.raises(UserError, match=r"tokenizer.json has no token <\|user\|>"):
        Tokenizer.from_folder(tmp_path, CHAT)
