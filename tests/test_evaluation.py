"""Scores of a model and of files of results: the numbers, what they depend on, and what is wrong with a file."""

# ruff: noqa: F811

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import ENCODER, data, isolated, make_data, make_model  # noqa: F401
from metrics import small_meteor

from captioner import Captioner, cli, evaluation, metrics
from captioner.config import DataConfig, DecodingOptions, Statistics
from captioner.datasets.annotations import Example, captions_sha256, load
from captioner.errors import CaptionerError, ImageError
from captioner.evaluation import (
    Hypotheses,
    Measures,
    References,
    compare,
    evaluate_model,
    evaluate_results,
    read_references,
    read_results,
    references_of,
)
from captioner.runtime import OnnxEngine

ROOT = Path(__file__).resolve().parents[1]
COCO = {
    "images": [{"id": number, "file_name": f"{number}.jpg"} for number in (1, 2, 3)],
    "annotations": [
        {"image_id": 1, "id": 1, "caption": "A dog runs on the beach."},
        {"image_id": 1, "id": 2, "caption": "a brown dog on sand"},
        {"image_id": 2, "id": 3, "caption": "Two cats sleep on a red sofa."},
        {"image_id": 3, "id": 4, "caption": "a man rides a horse"},
        {"image_id": 3, "id": 5, "caption": "a horse and its rider"},
    ],
}
GOOD = {1: "a dog on the beach", 2: "two cats on a sofa", 3: "a man rides a horse"}
POOR = {1: "a car", 2: "two men on a bench", 3: "a man"}


def results(path: Path, captions: dict[Any, str]) -> Path:
    path.write_text(json.dumps([{"image_id": name, "caption": text} for name, text in captions.items()]))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def references(tmp_path: Path) -> Path:
    """Human captions in COCO's format, without photos."""
    path = tmp_path / "captions_val2017.json"
    path.write_text(json.dumps(COCO))
    return path


@pytest.fixture
def known(references: Path) -> dict[Any, tuple[str, ...]]:
    return references_of(load(references, check_images=False).examples)


def run(*arguments: object) -> int:
    return cli.run("evaluate", [str(argument) for argument in arguments])


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a request ends with that is not possible."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert "Traceback" not in captured.err
    return line


# A model on a split ------------------------------------------------------------------------------------------------


@pytest.fixture
def model(data: Path, tmp_path: Path) -> Path:
    known = captions_sha256(load(data).split("train"))
    options = DecodingOptions(max_words=6, beam_size=2, min_words=2)
    captioner = make_model(options=options, data="tiny", epoch=2, train_sha256=known)
    captioner.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_is_scored_on_a_split(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, captions, rows = (tmp_path / name for name in ("scores.json", "captions.json", "rows.jsonl"))
    files = ("--output", output, "--captions", captions, "--per-image", rows)
    common = ("--model", model, "--data", data, "--features", tmp_path / "features", "--statistics.resamples", 50)
    assert run(*common, *files) == 0
    shown = capsys.readouterr().out
    found = json.loads(output.read_text())
    (one,) = found["evaluations"]

    written = {row["image_id"]: row["caption"] for row in json.loads(captions.read_text())}
    examples = load(data).split("val")
    scores = metrics.score(references_of(examples), written)
    assert one["scores"] == pytest.approx(scores, abs=1e-12)
    loaded = Captioner.from_pretrained(model)
    assert written == {example.image_id: loaded.caption(example.path).text for example in examples}

    assert f"{scores['bleu_1']:.4f} [{one['intervals']['bleu_1'][0]:.4f}" in shown
    assert "truncated" in shown
    assert "in_training" in shown
    assert one["diversity"]["captions"] == found["photos"] == 4
    assert 0 <= one["diversity"]["truncated"] <= 1
    for low, high in one["intervals"].values():
        assert low <= high

    # Everything that the numbers depend on.
    saved = json.loads((model / "config.json").read_text())
    assert one["encoder"]["weights_sha256"] == saved["encoder"]["weights_sha256"]
    assert one["encoder"]["name"] == "tiny"
    assert one["vocabulary_sha256"] == sha256(model / "tokenizer.json")
    assert len(one["decoder_sha256"]) == 64
    assert one["decoding"] == saved["decoding"]
    assert (one["training"]["data"], one["training"]["epoch"]) == ("tiny", 2)
    assert found["references"] == {str(data / "captions.jsonl"): sha256(data / "captions.jsonl")}
    assert found["statistics"] == {"resamples": 50, "confidence": 0.95, "seed": 0}
    assert found["split"] == "val"
    assert found["idf"] is None
    assert found["captioner_version"]

    singles = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {row["image_id"]: row["caption"] for row in singles} == written
    assert sum(row["cider"] for row in singles) / 4 == pytest.approx(scores["cider"])
    assert set(metrics.METRICS) <= set(singles[0])

    # The captions are a file of results, which gives the same scores; no photo is needed for that.
    again = tmp_path / "again.json"
    assert run(captions, "--references", data, "--output", again, "--statistics.resamples", 50) == 0
    assert json.loads(again.read_text())["evaluations"][0]["scores"] == pytest.approx(scores, abs=1e-12)


def test_options_change_what_is_given_and_nothing_else(data: Path, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    common = ("--model", model, "--data", data, "--features", tmp_path / "features", "--output", output)
    assert run(*common, "--max-words", 3, "--split", "train", "--statistics.resamples", 0) == 0
    found = json.loads(output.read_text())
    (one,) = found["evaluations"]
    saved = json.loads((model / "config.json").read_text())["decoding"]
    assert one["decoding"] == {**saved, "max_words": 3}
    assert (found["split"], found["photos"]) == ("train", 12)
    assert one["diversity"]["in_training"] is None  # of the photos that it is scored on, all are of training
    assert one["intervals"] == {}


def test_photos_that_cannot_be_read_are_left_out_and_named(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_data(tmp_path / "data")
    bad = load(folder).split("val")[0]
    bad.path.write_text("no photo")
    common = ("--model", model, "--data", folder, "--features", tmp_path / "features")
    assert run(*common, "--output", tmp_path / "scores.json") == 1
    assert f"left out: {bad.path}: not a photo" in caplog.text
    capsys.readouterr()
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["photos"] == 3
    assert len(found["unreadable"]) == 1
    for example in load(folder).split("val"):
        example.path.write_text("no photo")
    assert "none of the 4 photos can be read" in fails(capsys, *common, "--features", tmp_path / "new")


def test_photos_of_another_encoder_are_not_mixed(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(ENCODER, image_size=40)
    make_model(config).save_pretrained(tmp_path / "other")
    common = ("--data", data, "--features", tmp_path / "features")
    assert run("--model", model, *common) == 0
    capsys.readouterr()
    line = fails(capsys, "--model", tmp_path / "other", *common)
    assert "made differently: image_size is 32 there and 40 here; choose another folder with --features" in line


def test_the_same_from_python(data: Path, model: Path, tmp_path: Path) -> None:
    captioner = Captioner.from_pretrained(model)
    found = evaluate_model(
        captioner, DataConfig(data, features=tmp_path / "features"), measures=Measures(statistics=Statistics(50))
    )
    output = tmp_path / "scores.json"
    common = ("--model", model, "--data", data, "--features", tmp_path / "features", "--statistics.resamples", 50)
    assert run(*common, "--output", output) == 0
    (one,) = json.loads(output.read_text())["evaluations"]
    assert json.loads(json.dumps(found.as_json(), default=str)) == one
    path = results(tmp_path / "results.json", dict(found.hypotheses.captions))
    again = evaluate_results(path, read_references(data, "val"), measures=Measures(statistics=Statistics(50)))
    assert again.scores.corpus == pytest.approx(found.scores.corpus, abs=1e-12)
    assert again.references.captions == found.references.captions


def test_an_exported_model_needs_no_store(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Photos are captioned as `captioner caption` does it, and those that cannot be read are left out."""
    from captioner.bulk import pipeline

    val = load(data).split("val")
    bad = val[1].path

    def caption_photos(captioner: Any, paths: Sequence[Path], options: DecodingOptions) -> Any:
        assert options == captioner.options
        for path in paths:
            error = ImageError(f"{path}: not a photo") if path == bad else None
            caption = SimpleNamespace(text="a red circle", finished=True)
            yield SimpleNamespace(path=path, error=error, captions=[caption])

    monkeypatch.setattr(pipeline, "caption_photos", caption_photos)
    engine = OnnxEngine.__new__(OnnxEngine)  # which has loaded no graph
    engine.folder = tmp_path / "onnx"
    engine.folder.mkdir()
    (engine.folder / "model.safetensors").write_bytes(b"weights")
    captioner: Any = SimpleNamespace(
        engine=engine,
        options=DecodingOptions(beam_size=2),
        vocabulary=SimpleNamespace(sha256="1234"),
        training={},
    )
    found = evaluate_model(captioner, DataConfig(data), measures=Measures(statistics=Statistics(0)))
    assert found.hypotheses.captions == {e.image_id: "a red circle" for e in val if e.path != bad}
    assert found.references.unreadable == (f"{bad}: not a photo",)
    graphs = {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    assert found.as_json().items() >= {"engine": "onnx", "graphs_sha256": graphs, "vocabulary_sha256": "1234"}.items()
    with pytest.raises(CaptionerError, match="--features is of the engine torch only"):
        evaluate_model(captioner, DataConfig(data, features=tmp_path))


# Files of results --------------------------------------------------------------------------------------------------


def test_a_file_of_results(references: Path, known: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = results(tmp_path / "good.json", GOOD)
    assert run(path, "--references", references, "--output", tmp_path / "scores.json") == 0
    scores = metrics.score(known, GOOD)
    found = json.loads((tmp_path / "scores.json").read_text())
    (one,) = found["evaluations"]
    assert one["scores"] == pytest.approx(scores, abs=1e-12)
    assert one["results"] == str(path)
    assert one["results_sha256"] == sha256(path)
    assert found["references"] == {str(references): sha256(references)}
    assert found["comparison"] == {}
    assert one["diversity"]["truncated"] is None
    assert f"{scores['cider']:.4f} [" in capsys.readouterr().out


def test_scores_are_added_to_where_standard_output_goes(references: Path, tmp_path: Path) -> None:
    """`--output /dev/stdout >> FILE` must not replace FILE."""
    good, where = results(tmp_path / "good.json", GOOD), tmp_path / "all"
    where.write_text("of earlier commands\n")
    command = [
        sys.executable,
        "-m",
        "captioner",
        "evaluate",
        good,
        "--references",
        references,
        "--output",
        "/dev/stdout",
    ]
    with where.open("a") as out:
        subprocess.run(command, stdout=out, check=True, timeout=120, cwd=ROOT)
    assert where.read_text().startswith("of earlier commands\n")
    assert '"evaluations"' in where.read_text()


def test_references_without_splits_are_all_compared(
    references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = references.rename(tmp_path / "people.json")
    good, output = results(tmp_path / "good.json", GOOD), tmp_path / "scores.json"
    assert run(good, "--references", path, "--output", output) == 0
    found = json.loads(output.read_text())
    assert (found["split"], found["photos"]) == ("all", 3)
    assert found["evaluations"][0]["diversity"]["in_training"] is None
    capsys.readouterr()
    # What a training run on these captions kept back is "val" here too.
    kept_back = [example.image_id for example in load(path, check_images=False).split("val")]
    val = results(tmp_path / "captions_val.json", {name: GOOD[name] for name in kept_back})
    assert len(kept_back) == 1
    assert run(val, "--references", path, "--split", "val") == 0
    capsys.readouterr()
    assert "1 photos that the references lack" in fails(capsys, good, "--references", path, "--split", "train")


def test_order_and_more_keys_do_not_matter(references: Path, known: Any, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    rows = [{"id": 7, "image_id": n, "caption": text, "score": 0.5} for n, text in reversed(GOOD.items())]
    path.write_text(json.dumps(rows))
    found = read_results(path, known)
    assert found.captions == GOOD
    assert found.results() == [{"image_id": n, "caption": text} for n, text in reversed(GOOD.items())]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", r"not JSON \(.*\); expected COCO's result format"),
        ("", r"not JSON"),
        ("[" * 100_000, r"not JSON"),
        ("\ud800", r"not JSON"),
        ("[]", r"holds nothing; expected a list of"),
        ("{}", r"holds nothing; expected a list of"),
        ('{"annotations": []}', r"holds dict; expected a list of"),
        ("3", r"holds int; expected a list of"),
        ('["a dog"]', r'entry 1 is "a dog"; expected a list of'),
        ('[{"image_id": 1, "caption": "a"}, {"image_id": 2}]', r'entry 2 is \{"image_id": 2\}; expected'),
        ('[{"image_id": 1, "caption": null}]', r"entry 1 is"),
        ('[{"image_id": 1.5, "caption": "a"}]', r"entry 1 is"),
        ('[{"caption": "a"}]', r"entry 1 is"),
        ('[{"image_id": [1], "caption": "a"}]', r"entry 1 is"),
    ],
)
def test_what_is_no_file_of_results(known: Any, tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(CaptionerError, match=f"results.json: {said}") as caught:
        read_results(path, known)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ((1, 2), r"1 photos missing \(3\); expected one caption for each of the 3 photos"),
        ((1,), r"2 photos missing \(2, 3\)"),
        ((1, 2, 3, 4), r"1 photos that the references lack \(4\)"),
        ((1, 2, 3, 3, 3), r"1 photos more than once \(3\)"),
        ((4, 5, 6, 7, 1, 1), r"4 photos that the references lack \(4, 5, 6, \.\.\.\); 1 .* once \(1\); 2 .* missing"),
        (("1", "2", "3"), r"lack \('1', '2', '3'\); 3 photos missing \(1, 2, 3\); an id is a number in one and a text"),
    ],
)
def test_photos_that_do_not_fit_are_named(known: Any, tmp_path: Path, ids: Sequence[Any], said: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{"image_id": image_id, "caption": "a dog"} for image_id in ids]))
    with pytest.raises(CaptionerError, match=f"results.json: .*{said}"):
        read_results(path, known)


def test_ids_that_are_text(data: Path, tmp_path: Path) -> None:
    """As in data sets that name photos by their files."""
    captions = {example.image_id: "a red circle" for example in load(data).split("val")}
    assert all(isinstance(image_id, str) for image_id in captions)
    assert run(results(tmp_path / "results.json", captions), "--references", data) == 0


def test_odd_captions_are_scored(references: Path, known: Any, tmp_path: Path) -> None:
    path = results(tmp_path / "results.json", {1: "", 2: "🐕 \ud83d \u0000 ½", 3: "a man " * 2000})
    assert run(path, "--references", references, "--per-image", tmp_path / "rows.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows[0]["caption"] == ""
    assert rows[0]["cider"] == 0


def test_two_files_are_compared(
    references: Path, known: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = results(tmp_path / "good.json", GOOD), results(tmp_path / "poor.json", POOR)
    output = tmp_path / "scores.json"
    options = ("--statistics.resamples", 200, "--statistics.seed", 3, "--statistics.confidence", 0.9)
    assert run(*pair, "--references", references, "--output", output, "--per-image", tmp_path / "r", *options) == 0
    found = json.loads(output.read_text())
    first, second = found["evaluations"]
    shown = capsys.readouterr().out
    for name, value in found["comparison"].items():
        assert value["difference"] == pytest.approx(first["scores"][name] - second["scores"][name])
        assert value["interval"]["low"] <= value["interval"]["high"]
        assert value["interval"]["confidence"] == 0.9
        assert 1 / 201 <= value["p_value"] <= 1
        assert f"{value['difference']:+.4f} [" in shown
    assert set(found["comparison"]) == set(metrics.METRICS)
    assert first["scores"]["cider"] > second["scores"]["cider"]
    assert len((tmp_path / "r").read_text().splitlines()) == 6
    before = output.read_bytes()
    assert run(*pair, "--references", references, "--output", output, *options) == 0
    assert output.read_bytes() == before  # the seed decides
    assert run(pair[0], pair[0], "--references", references, "--output", output) == 0
    same = json.loads(output.read_text())["comparison"]
    assert {value["p_value"] for value in same.values()} == {1.0}
    assert {value["difference"] for value in same.values()} == {0.0}


def test_different_photos_are_not_compared(known: Any) -> None:
    one = evaluation.evaluate(References(known), Hypotheses(GOOD, {}))
    less = {image_id: known[image_id] for image_id in (1, 2)}
    two = evaluation.evaluate(References(less), Hypotheses({1: "a", 2: "b"}, {}))
    with pytest.raises(CaptionerError, match="3 is in one only"):
        compare(one, two, Statistics(resamples=10))


# Document frequencies ----------------------------------------------------------------------------------------------


def test_one_photo_is_scored_with_frequencies_of_many(references: Path, known: Any, tmp_path: Path) -> None:
    idf, output = tmp_path / "coco.idf", tmp_path / "scores.json"
    good = results(tmp_path / "good.json", GOOD)
    assert run(good, "--references", references, "--save-idf", idf, "--per-image", tmp_path / "rows.jsonl") == 0
    singles = {row["image_id"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}

    alone = tmp_path / "one.json"
    alone.write_text(
        json.dumps(
            {
                "images": COCO["images"][:1],
                "annotations": [entry for entry in COCO["annotations"] if entry["image_id"] == 1],
            }
        )
    )
    one = results(tmp_path / "first.json", {1: GOOD[1]})
    assert run(one, "--references", alone, "--output", output) == 0
    assert json.loads(output.read_text())["evaluations"][0]["scores"]["cider"] == 0  # of one photo, it says nothing
    assert run(one, "--references", alone, "--idf", idf, "--output", output) == 0
    found = json.loads(output.read_text())
    assert found["evaluations"][0]["scores"]["cider"] == pytest.approx(singles[1]["cider"], abs=1e-9)
    assert singles[1]["cider"] > 0.5
    assert found["idf"] == {str(idf): sha256(idf)}


@pytest.mark.parametrize("content", [None, b"", b"12345678", b"x" * 1000])
def test_what_holds_no_frequencies(
    references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "idf").write_bytes(content)
    good = results(tmp_path / "good.json", GOOD)
    line = fails(capsys, good, "--references", references, "--idf", tmp_path / "idf")
    assert f"{tmp_path / 'idf'} cannot be read as document frequencies" in line
    assert "expected a file that --save-idf wrote" in line


def test_a_model_is_no_file_of_frequencies(
    references: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = results(tmp_path / "good.json", GOOD)
    line = fails(capsys, good, "--references", references, "--idf", model / "model.safetensors")
    assert "holds no document frequencies" in line


# What is asked for -------------------------------------------------------------------------------------------------


def test_what_to_score_must_be_clear(
    references: Path, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = results(tmp_path / "good.json", GOOD)
    unclear = "what to score is not clear; give --model DIR with --data, or one or two files of results"
    assert unclear in fails(capsys)
    assert unclear in fails(capsys, good, "--model", model)
    assert unclear in fails(capsys, good, good, good, "--references", references)
    assert "the human captions are missing; give them with --references" in fails(capsys, good)
    assert "the human captions are missing; give them with --data" in fails(capsys, "--model", model)
    assert "nothing: is not there" in fails(capsys, good, "--references", tmp_path / "nothing")
    assert "nothing.json: cannot be read (No such file" in fails(
        capsys, tmp_path / "nothing.json", "--references", references
    )
    assert "good.json: " in fails(capsys, good, "--references", good)
    idle = fails(capsys, good, "--references", references, "--engine", "torch", "--beam-size", 5, "--images", tmp_path)
    assert "--images, --beam-size, --engine has no meaning with files of results; leave it out" in idle
    assert "no such model" in fails(capsys, "--model", tmp_path / "nothing", "--data", data)


@pytest.mark.parametrize("option", ["--output", "--per-image", "--save-idf"])
def test_a_file_that_cannot_be_written(
    references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    good = results(tmp_path / "good.json", GOOD)
    assert run(good, "--references", references, option, tmp_path / "nothing" / "file") == 2
    captured = capsys.readouterr()
    assert f"error: {tmp_path / 'nothing' / 'file'}: its folder does not exist" in captured.err
    assert not captured.out  # said before anything is computed
    (tmp_path / "folder").mkdir()
    assert run(good, "--references", references, option, tmp_path / "folder") == 2
    captured = capsys.readouterr()
    assert "folder: cannot be written" in captured.err
    assert "cider" in captured.out  # the scores are not lost


def test_java_scores_without_java(
    references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = results(tmp_path / "good.json", GOOD)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    line = fails(capsys, good, "--references", references, "--java", "spice")
    assert "spice needs" in line
    assert "install" in line


def test_java_scores_are_shown_beside_the_others(
    references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    good, poor = results(tmp_path / "good.json", GOOD), results(tmp_path / "poor.json", POOR)
    monkeypatch.setattr(metrics, "why_not", lambda _: None)
    monkeypatch.setattr(metrics, "java_scores", lambda *_: (0.25, np.array([0.1, 0.2, 0.45])))
    files = ("--output", tmp_path / "scores.json", "--per-image", tmp_path / "rows.jsonl")
    assert run(good, poor, "--references", references, "--java", "spice", *files) == 0
    assert "spice" in capsys.readouterr().out
    assert json.loads((tmp_path / "scores.json").read_text())["evaluations"][0]["scores"]["spice"] == 0.25
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["spice"] for row in rows] == [0.1, 0.2, 0.45] * 2


def test_meteor_beside_the_others(
    references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of the table with interval and comparison, and a column of the scores of each photo."""
    pytest.importorskip("nltk")
    small_meteor.install(tmp_path, monkeypatch)
    good, poor = results(tmp_path / "good.json", GOOD), results(tmp_path / "poor.json", POOR)
    files = ("--output", tmp_path / "scores.json", "--per-image", tmp_path / "rows.jsonl")
    assert run(good, poor, "--references", references, "--meteor", "--statistics.resamples", 20, *files) == 0
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["meteor"]]
    assert row.count("[") == 3  # two intervals and that of the difference
    told = json.loads((tmp_path / "scores.json").read_text())
    first, second = (evaluation["scores"]["meteor"] for evaluation in told["evaluations"])
    assert 1 >= first > second
    assert told["comparison"]["meteor"]["difference"] == pytest.approx(first - second)
    assert told["arguments"]["meteor"] is True
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert all(0 <= row["meteor"] <= 1 for row in rows)


def test_meteor_without_its_data(
    references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_meteor.find(None, monkeypatch)
    line = fails(capsys, results(tmp_path / "good.json", GOOD), "--references", references, "--meteor")
    assert "meteor needs the data of pycocoevalcap, which is not installed; install it: pip install" in line


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("resamples", -1, "statistics.resamples is -1; expected 0 or more"),
        ("confidence", 1.5, "statistics.confidence is 1.5; expected"),
        ("confidence", 0, "confidence is 0"),
        ("seed", -1, "expected non-negative"),
    ],
)
def test_statistics_out_of_range(
    references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: float, said: str
) -> None:
    good = results(tmp_path / "good.json", GOOD)
    assert said in fails(capsys, good, "--references", references, f"--statistics.{option}", value)


def test_copies_of_training_captions_are_counted(known: Any) -> None:
    found = evaluation.evaluate(References(known, training=("A dog on the beach.", "another")), Hypotheses(GOOD, {}))
    assert found.diversity.in_training == pytest.approx(1 / 3)


def test_a_photo_without_a_caption(known: Any) -> None:
    with pytest.raises(CaptionerError, match="1 images have references but no caption, the first is 3"):
        evaluation.evaluate(References(known), Hypotheses({1: "a", 2: "b"}, {}))


@pytest.mark.shared
def test_people_score_as_well_as_people_do(shared: Path, tmp_path: Path) -> None:
    """Of each photo of COCO's validation one caption against the others, on the official file."""
    official = shared / "coco" / "annotations" / "captions_val2017.json"
    examples: Sequence[Example] = load(official, check_images=False).split("val")[:1000]
    kept = tmp_path / "captions_val2017.json"
    left = {example.image_id: example.captions[1:] for example in examples}
    kept.write_text(
        json.dumps(
            {
                "images": [{"id": image_id, "file_name": f"{image_id}.jpg"} for image_id in left],
                "annotations": [
                    {"id": number, "image_id": image_id, "caption": caption}
                    for number, (image_id, caption) in enumerate(
                        (image_id, caption) for image_id, captions in left.items() for caption in captions
                    )
                ],
            }
        )
    )
    out = {example.image_id: example.captions[0] for example in examples}
    path = results(tmp_path / "people.json", out)
    assert run(path, "--references", kept, "--output", tmp_path / "scores.json", "--statistics.resamples", 20) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["evaluations"][0]["scores"]
    assert scores == pytest.approx(metrics.score(left, out))
    assert 0.15 < scores["bleu_4"] < 0.3
    assert 0.7 < scores["cider"] < 1.1


@pytest.mark.shared
def test_the_official_file_is_read_whole(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    official = shared / "coco" / "annotations" / "captions_val2017.json"
    path = results(tmp_path / "results.json", {1: "a", 2: "b"})
    line = fails(capsys, path, "--references", official)
    assert "2 photos that the references lack (1, 2); 5,000 photos missing (" in line
    assert "expected one caption for each of the 5,000 photos" in line
