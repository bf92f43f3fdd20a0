"""`evaluate score` and `compare`: leaked items left out, a BERTScore model, files for every sample."""

import csv
import hashlib
import json

import numpy as np
import pytest

from tests.evaluation.test_protocols import small_run
from tghmoe_jax import evaluate
from tghmoe_jax.datasets import leaks, prepared
from tghmoe_jax.datasets.leaks import Leak
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import bert
from tghmoe_jax.evaluation.outputs import write_predictions
from tghmoe_jax.evaluation.protocols import score


def keyed():
    """The small run with the name of each volume."""
    return {
        kind: [one.__class__(**one.__dict__ | {"key": f"case{one.index}/scan"}) for one in small_run()[kind]]
        for kind in ("closed", "open", "report")
    }


@pytest.fixture
def run(tmp_path):
    write_predictions(tmp_path / "run", keyed())
    return str(tmp_path / "run")


@pytest.fixture
def leaked(tmp_path):
    """Volume 1 of the test split shares its text with training; volume 0 only with validation."""
    file = tmp_path / "leaks.csv"
    file.write_bytes(prepared.table(leaks.rows([
        Leak("text_exact", "train", "case7/scan", "test", "case1/scan", 1.0),
        Leak("case", "validation", "case9/scan", "test", "case0/scan", 1.0),
        Leak("case", "train", "case2/scan", "validation", "case9/scan", 1.0),
    ])))  # fmt: skip
    return str(file)


def scored(capsys, *argv):
    assert evaluate.main(["score", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_leaked_volumes_are_left_out_of_every_score(run, leaked, capsys):
    found = scored(capsys, run, "--leaks", leaked)
    rest = {kind: [one for one in ones if one.index != 1] for kind, ones in keyed().items()}
    expected = {key: value for key, value in score(rest).items() if value is not None}
    assert found.pop("leaked_removed") == {"closed": 1, "open": 0, "report": 1}
    assert (found.pop("leaked_volumes"), found.pop("leaked_volumes_found")) == (2, 1)
    assert found == expected
    assert evaluate.main(["score", run, "--leaks", leaked]) == 0
    out = capsys.readouterr().out
    assert "leaked items removed: closed 1, open 0, report 1" in out and "leaked volumes found: 1 of the 2" in out
    assert "no leaked volume occurs" not in out
    assert evaluate.main(["compare", run, run, "--leaks", leaked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["closed/accuracy"]["items"] == 3


def test_a_run_stands_for_its_newest_evaluation(run, tmp_path, capsys):
    for step, output in ((90, "wrong"), (800, None)):
        own = {kind: [one.__class__(**one.__dict__ | ({"output": output} if output else {})) for one in ones]
               for kind, ones in keyed().items()}  # fmt: skip
        write_predictions(tmp_path / "trained" / "eval" / str(step), own)
    assert evaluate.main(["compare", str(tmp_path / "trained"), run, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows and all(row["a"] == row["b"] for row in rows.values())
    (tmp_path / "unscored").mkdir()
    assert evaluate.main(["compare", str(tmp_path / "unscored"), run]) == 2
    assert "nor a run that was evaluated" in capsys.readouterr().err


def test_m3ds_image_path_names_a_volume_too(tmp_path, leaked, capsys):
    file = tmp_path / "open.csv"
    rows = [["case1/scan", "q", "a", "a"], ["case3/scan", "q", "a", "b"], ["case3/scan", "p", "a", "a"]]
    with open(file, "w", newline="") as out:
        csv.writer(out).writerows([["Image Path", "Question", "Answer", "Pred"], *rows])
    found = scored(capsys, str(file), "--leaks", leaked)
    assert found["open/bleu1"] == 0.5 and found["leaked_removed"] == {"open": 1}
    assert "open/bleu1_ci95" not in found  # both questions are about one volume


def test_the_files_hold_every_sample_and_what_was_scored(run, leaked, tmp_path, capsys):
    target = tmp_path / "scores"
    metrics = scored(capsys, run, "--to", str(target), "--leaks", leaked)
    assert {path.name for path in target.iterdir()} == {
        "predictions_closed.csv", "predictions_open.csv", "predictions_report.csv", "metrics.json", "manifest.json",
        "scores.txt",
    }  # fmt: skip
    with open(target / "predictions_open.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for column, key in (("bleu", "bleu1"), ("rougeL", "rougeL"), ("cider", "cider")):
        assert np.mean([float(row[column]) for row in rows]) == pytest.approx(metrics[f"open/{key}"])
    assert [row["Key"] for row in rows] == ["case3/scan", "case4/scan"] and rows[0]["meteor"] == ""
    stored = json.loads((target / "metrics.json").read_text())
    leaks_of = {key: metrics[key] for key in metrics if key.startswith("leaked_")}
    assert {key: value for key, value in stored.items() if value is not None} | leaks_of == metrics
    manifest = json.loads((target / "manifest.json").read_text())
    with open(leaked, "rb") as file:
        assert manifest["leaks"] == {
            "sha256": hashlib.sha256(file.read()).hexdigest(), "removed": {"closed": 1, "open": 0, "report": 1},
            "volumes": 2, "volumes_found": 1,
        }  # fmt: skip
    assert manifest["items"] == {"closed": 3, "open": 2, "report": 1} and manifest["empty_outputs"]["open"] == 1
    assert manifest["libraries"]["sacrebleu"] and "case" not in json.dumps(manifest["predictions"])
    again = scored(capsys, str(target))  # what was written scores the same
    assert again == {key: value for key, value in metrics.items() if key not in leaks_of}


def test_scores_never_replace_what_was_scored_or_what_a_run_left(run, tmp_path, capsys):
    file = f"{run}/predictions_open.csv"
    with open(file, "rb") as before:
        content = before.read()
    assert evaluate.main(["score", file, "--to", run]) == 2
    assert "holds the predictions themselves" in capsys.readouterr().err
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "report.html").write_text("")
    assert evaluate.main(["score", file, "--to", str(tmp_path / "eval")]) == 2
    assert "that `run` or a training left" in capsys.readouterr().err
    with open(file, "rb") as after:
        assert after.read() == content


def test_a_leak_table_of_other_names_is_no_clean_bill(tmp_path, leaked, capsys):
    file = tmp_path / "p.csv"
    file.write_text("Image Path,Question,Answer,Pred\nv1,q,a,a\nv2,q,a,b\n")
    assert evaluate.main(["score", str(file), "--leaks", leaked]) == 0
    assert "no leaked volume occurs: either they were left out before" in capsys.readouterr().out


def test_systems_are_paired_by_the_names_of_their_volumes(tmp_path, run, capsys):
    columns = ["Key", "Question", "Answer", "Pred"]
    rows = [[f"v{i}", "q", f"answer {i}", f"answer {i}"] for i in range(4)]
    for name, order in (("a", rows), ("b", rows[::-1])):
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([columns, *order])
    assert evaluate.main(["compare", str(tmp_path / "a.csv"), str(tmp_path / "b.csv"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["open/bleu2"] == {
        "a": 1, "b": 1, "difference": 0, "ci95": [0, 0], "items": 4, "units": 4,
    }  # fmt: skip


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """A small random BERT with its word pieces."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a the left right kidney cyst in . stone liver".split()
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    torch.manual_seed(0)
    BertModel(BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )).save_pretrained(folder)  # fmt: skip
    return folder


def test_bertscore_is_the_greedy_match_of_the_layers_outputs(tiny_bert):
    import torch
    from transformers import BertModel, BertTokenizer

    model, tokenizer = BertModel.from_pretrained(tiny_bert).eval(), BertTokenizer.from_pretrained(tiny_bert)

    def vectors(text):  # of layer 2, the two marks around the text included, which weigh nothing
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[2][0]
        return hidden.numpy() / np.linalg.norm(hidden.numpy(), axis=1, keepdims=True)

    found = bert.add({"a": small_run()}, bert.BertModel(tiny_bert, 2))["a"]
    assert found["open"][1].output == "" and found["open"][1].bert_f1 == 0
    for one in (found["open"][0], *found["report"]):
        alike = vectors(one.output) @ vectors(one.answer).T
        precision, recall = alike.max(1)[1:-1].mean(), alike.max(0)[1:-1].mean()
        assert one.bert_f1 == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-5)
    assert 0 < found["open"][0].bert_f1 < 1 and found["closed"][0].bert_f1 is None


def test_the_command_scores_with_a_model_folder(run, tiny_bert, tmp_path, capsys):
    options = ["--bert-model", str(tiny_bert), "--bert-layers", "2"]
    found = scored(capsys, run, *options, "--to", str(tmp_path / "to"))
    assert 0 < found["report/bert_f1"] <= 1 and found["open/bert_f1"] < 0.51
    manifest = json.loads((tmp_path / "to" / "manifest.json").read_text())
    assert manifest["bert"] == {"sha256": bert.BertModel(tiny_bert, 2).digest, "layer": 2}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--leaks", "absent.csv"], "absent.csv is missing or damaged"),
        (["--bert-model", "roberta-large"], "--bert-model roberta-large holds no model"),
        (["--bert-layers", "3"], "--bert-layers belongs to --bert-model"),
        (["--bert-model", "BERT"], "--bert-layers 17 must lie in 1 to 3"),
        (["--bert-model", "BERT", "--bert-layers", "0"], "--bert-layers 0 must lie in 1 to 3"),
        (["--to", "RUN"], "holds the predictions themselves"),
        (["--to", "FILE"], "cannot be created"),
    ],
)
def test_a_wrong_option_is_one_sentence(run, tiny_bert, tmp_path, argv, said, capsys):
    (tmp_path / "file").write_text("")
    places = {"BERT": str(tiny_bert), "RUN": run, "FILE": str(tmp_path / "file")}
    assert evaluate.main(["score", run, *(places.get(one, one) for one in argv)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and said in err, err


def test_leaks_need_named_volumes_and_must_leave_some(tmp_path, run, leaked, capsys):
    write_predictions(tmp_path / "bare", small_run())
    assert evaluate.main(["score", str(tmp_path / "bare"), "--leaks", leaked]) == 2
    assert "its rows name no volume; add a column Key" in capsys.readouterr().err
    file = tmp_path / "p.csv"
    file.write_text("Key,Question,Answer,Pred\ncase1/scan,q,a,a\n")
    assert evaluate.main(["score", str(file), "--leaks", leaked]) == 2
    assert "removes every item" in capsys.readouterr().err
    file.write_text("Key,Question,Answer,Pred\ncase1/scan,q,a,a\n,q,a,a\n")
    assert evaluate.main(["score", str(file)]) == 2
    assert "names the volume of some rows only" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["pickled", "code"])
def test_a_model_with_pickled_weights_or_code_is_refused(tiny_bert, run, tmp_path, fault, capsys):
    config = json.loads((tiny_bert / "config.json").read_text())
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | ({"auto_map": {}} if fault == "code" else {})))
    (folder / ("model.safetensors" if fault == "code" else "pytorch_model.bin")).write_bytes(b"")
    assert evaluate.main(["score", run, "--bert-model", str(folder), "--bert-layers", "2"]) == 2
    assert {"code": "never run", "pickled": "no safetensors"}[fault] in capsys.readouterr().err


def test_without_the_library_the_command_says_what_to_install(run, tiny_bert, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "bert_score", None)
    assert evaluate.main(["score", run, "--bert-model", str(tiny_bert), "--bert-layers", "2"]) == 2
    assert "pip install bert-score torch" in capsys.readouterr().err


def test_a_run_whose_data_are_elsewhere_is_asked_by_the_command_that_takes_their_folder(tmp_path, monkeypatch):
    config = {"eval": {"items": 4}, "data": {"name": "manifest", "root": str(tmp_path / "gone"), "slices": 16}}
    monkeypatch.setattr(evaluate.run_folder, "find", lambda run, flag: tmp_path)
    monkeypatch.setattr(evaluate.run_folder, "read_config", lambda folder: config)
    with pytest.raises(UserError, match="gone, which is not there; .*--config.init_from=model --config.data.root=DIR"):
        evaluate.run_again("model", None, None)
