"""Scores must not depend on the NLTK data that a machine happens to hold."""

import pytest

from tghmoe_jax.evaluation import text_metrics


def forget():
    for cached in (text_metrics._wordnet, text_metrics._meteor):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def no_nltk_data(monkeypatch):
    import nltk.data
    from nltk.tokenize import _get_punkt_tokenizer

    monkeypatch.setattr(nltk.data, "path", [])
    _get_punkt_tokenizer.cache_clear()
    forget()
    yield
    forget()


@pytest.fixture
def wordnet(no_nltk_data, monkeypatch, tmp_path):
    """A WordNet of one noun synset {lump, mass}, in WordNet's format, and an untrained sentence splitter."""
    import nltk.data

    folder = tmp_path / "nltk_data" / "corpora" / "wordnet"
    punkt = tmp_path / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    for path in (folder, punkt):
        path.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (punkt / name).write_text("")
    for part in ("noun", "verb", "adj", "adv"):
        for name in (f"index.{part}", f"data.{part}", f"{part}.exc"):
            (folder / name).write_text("")
    licence = "  1 Made for a test.  \n"  # lines of the head begin with two spaces
    synset = f"{len(licence):08d} 14 n 02 lump 0 mass 0 000 | a compact body  \n"
    (folder / "data.noun").write_text(licence + synset)
    (folder / "index.noun").write_text("".join(f"{word} n 1 0 1 0 {len(licence):08d}  \n" for word in ("lump", "mass")))
    (folder / "lexnames").write_text("".join(f"{i:02d}\tname.{i}\t1\n" for i in range(45)))
    for name in ("index.sense", "cntlist.rev"):
        (folder / name).write_text("")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])
    forget()
    return folder
