"""What is read from files is not trusted: bounds and kinds of JSON, cells of tables, the terminal, pages, links."""

import csv
import io
import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tghmoe_jax import terminal, untrusted, writing
from tghmoe_jax.errors import UserError, command
from tghmoe_jax.training import kinds

GOLDEN = sorted((Path(__file__).resolve().parent / "golden").glob("*.txt"))
KIND = {"step": range(1, 9), "names": [str], "pair": ([float, float], None), "of": {str: bool}}
TEXTS = st.one_of(st.text(), st.text(alphabet="'=+-@\t\r\n a\uff1d"))


@given(TEXTS)
def test_a_cell_is_no_formula_and_is_read_back_as_it_was(text):
    cell = untrusted.cell(text)
    assert untrusted.from_cell(cell) == text and not re.match(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]", cell)
    written = io.StringIO(newline="")
    csv.writer(written, quoting=csv.QUOTE_ALL).writerow([cell])
    ((found,),) = csv.reader(io.StringIO(written.getvalue(), newline=""))
    assert untrusted.from_cell(found) == text


@pytest.mark.parametrize("number", [-3.5, 0, 1, True, None])
def test_numbers_stay_numbers(number):
    assert untrusted.cell(number) is number


@pytest.mark.parametrize(
    "value, said",
    [
        ({"step": 9}, "step is 9, not a whole number from 1 to 8"), ({"step": True}, "step is true"),
        ({"step": 1.0}, "step is 1.0"), ({"names": "x"}, 'names is "x", not a list'), ({"names": ["x", 1]}, "names[1]"),
        ({"pair": [0, float("nan")]}, "pair[1] is NaN, not a finite number"),
        ({"pair": [1]}, "pair is a list, not a list of 2 or null"),
        ({"of": {"a": 1}}, "of.a is 1, not true or false"), ([], "what it holds is a list, not an object"),
        ({"names": ["\ud800"]}, "names[0]"), ({"step": 8, "names": [], "pair": None, "of": {}, "more": [1]}, ""),
    ],
)  # fmt: skip
def test_the_first_value_of_another_kind_is_named(value, said):
    found = untrusted.fault(value, KIND)
    assert said in found and bool(said) == bool(found)


@pytest.mark.parametrize("content", [b"[" * 200_000, b"\xff", b"", b"{" + b" " * (1 << 24), b"[]", b"9" * 5000])
def test_a_file_that_is_no_such_json_is_one_sentence(content, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(file))) as error:
        untrusted.read_json(file, KIND)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no file"):
        untrusted.read_json(tmp_path, KIND)


@given(st.text(alphabet="#[]()<>!*_`|~:.\\\n\r abc@&-=", max_size=40))
def test_a_name_stays_within_its_line_of_a_page(text):
    line = untrusted.markdown(text)
    assert "\n" not in line and "\r" not in line
    assert not re.search(r"[#\[\]()<>!*_`|~:.@&=]", re.sub(r"\\.", "", line))


def test_a_command_prints_nothing_that_moves_the_cursor(capsys):
    @command
    def main(argv):
        print("a\x1b[2J\tb\u202ec\rd\ud800\nä")
        print("\x07", file=sys.stderr)
        raise UserError("line\nerror: \x1b]0;x\x07")

    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == "a\\x1b[2J\tb\\u202ec\\rd\\ud800\nä\n"
    assert err == "\\x07\nerror: line\\nerror: \\x1b]0;x\\x07\n"


def test_a_letter_that_the_terminal_lacks_is_written_out():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    terminal.Shielded(stream).write("Ä\x1b")
    stream.flush()
    assert stream.buffer.getvalue() == b"\\xc4\\x1b"


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    writing.write(tmp_path / "link", "new")
    assert (tmp_path / "mine").read_text() == "kept" and (tmp_path / "link").read_text() == "new"
    assert not (tmp_path / "link").is_symlink() and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(OSError), writing.renamed(tmp_path / "link") as part:
        part.write_text("half")
        raise OSError
    assert (tmp_path / "link").read_text() == "new" and len(list(tmp_path.iterdir())) == 2


def test_links_below_what_is_written_are_refused(tmp_path):
    (tmp_path / "eval" / "2").mkdir(parents=True)
    (tmp_path / "other").symlink_to(tmp_path)
    writing.refuse_links(tmp_path, ("eval", "model"), "--to")
    (tmp_path / "eval" / "2" / "metrics.json").symlink_to("nowhere")
    with pytest.raises(UserError, match="--to .* link eval/2/metrics.json"):
        writing.refuse_links(tmp_path, ("eval", "model"), "--to")


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_every_key_of_every_config_has_a_kind(file):
    lines = [line.partition(" = ") for line in file.read_text().splitlines() if " = " in line]
    for key, _, text in lines:
        if key.startswith("base_config."):  # as a base's config.json has them
            continue
        kind = kinds.CONFIG
        for part in key.split("."):
            kind = kind.get(part, kind.get(str)) if isinstance(kind, dict) else None
        assert kind is not None, key
        assert not untrusted.fault(json.loads(text), kind, key)
