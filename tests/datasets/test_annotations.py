"""Caption files of every kind, whole and broken: what is read, what is refused, and with which words."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.datasets.annotations import Annotations, load
from captioner.errors import AnnotationError

SHARED = Path(__file__).resolve().parents[3] / "shared"


def photos(folder: Path, *names: str) -> None:
    """Put files there that stand for photos: their contents are not read."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"a photo")


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def coco(names: dict[int, str], captions: list[tuple[int, Any]]) -> dict[str, Any]:
    return {
        "info": {},
        "licenses": [],
        "images": [{"id": image_id, "file_name": name} for image_id, name in names.items()],
        "annotations": [
            {"id": n, "image_id": image_id, "caption": text} for n, (image_id, text) in enumerate(captions)
        ],
    }


def karpathy(*entries: tuple[int, str, str, list[str]], **more: Any) -> dict[str, Any]:
    return {
        "dataset": "flickr8k",
        "images": [
            {"imgid": i, "filename": name, "split": split, "sentences": [{"raw": raw} for raw in captions], **more}
            for i, name, split, captions in entries
        ],
    }


def splits(annotations: Annotations) -> dict[str, list[str]]:
    return {
        split: [example.path.name for example in annotations.examples if example.split == split]
        for split in ("train", "val", "test")
    }


def refusal(path: Path, **options: Any) -> str:
    """The message with which a file is refused: always one line."""
    with pytest.raises(AnnotationError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Layouts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("year", ["2014", "2017"])
def test_official_coco(tmp_path: Path, year: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(
        tmp_path / f"annotations/captions_train{year}.json", coco({9: "9.jpg", 7: "7.jpg"}, [(7, "a cat "), (9, "x")])
    )
    write(tmp_path / f"annotations/captions_val{year}.json", coco({8: "8.jpg"}, [(8, "b"), (8, "c")]))
    write(tmp_path / f"annotations/instances_val{year}.json", {"not": "captions"})
    photos(tmp_path / f"train{year}", "9.jpg", "7.jpg")
    photos(tmp_path / f"val{year}", "8.jpg")
    loaded = load(tmp_path)
    assert loaded.name == f"coco{year}"
    assert [(e.image_id, e.captions, e.split) for e in loaded.examples] == [
        (9, ("x",), "train"),
        (7, ("a cat",), "train"),
        (8, ("b", "c"), "val"),
    ]
    assert loaded.split("val")[0].path == tmp_path / f"val{year}/8.jpg"
    assert not loaded.problems
    assert capsys.readouterr().out == ""  # pycocotools prints; a library does not
    with pytest.raises(
        AnnotationError, match=r"holds no 'test' photos; the splits there are: train \(2\), val \(1\); choose one of"
    ):
        loaded.split("test")


def test_coco_years_are_not_mixed(tmp_path: Path) -> None:
    for year in ("2014", "2017"):
        write(tmp_path / f"annotations/captions_val{year}.json", coco({8: "8.jpg"}, [(8, year)]))
    assert "give each year a folder of its own" in refusal(tmp_path)
    photos(tmp_path / "val2017", "8.jpg")
    assert load(tmp_path).examples[0].captions == ("2017",)
    photos(tmp_path / "val2014", "8.jpg")
    assert "2014 and 2017 divide the same COCO photos differently" in refusal(tmp_path)
    assert load(tmp_path / "annotations/captions_val2014.json").name == "coco2014"


def test_karpathy_coco(tmp_path: Path) -> None:
    document = karpathy((0, "a.jpg", "train", ["a"]), (1, "b.jpg", "restval", ["b"]), (2, "c.jpg", "test", ["c"]))
    document["dataset"] = "coco"
    for entry, cocoid in zip(document["images"], (391895, 522418, 184613), strict=True):
        entry |= {"cocoid": cocoid, "filepath": "val2014"}
    photos(tmp_path / "val2014", "a.jpg", "b.jpg", "c.jpg")
    # The official files lie beside it in every real folder; the split used across the field is taken.
    write(tmp_path / "annotations/captions_val2014.json", coco({391895: "a.jpg"}, [(391895, "a")]))
    write(tmp_path / "dataset_coco.json", document)
    loaded = load(tmp_path)
    assert loaded.name == "coco"
    assert [(e.image_id, e.split) for e in loaded.examples] == [(391895, "train"), (522418, "train"), (184613, "test")]
    assert [e.image_id for e in load(tmp_path, restval="exclude").examples] == [391895, 184613]
    assert loaded.examples[0].path == tmp_path / "val2014/a.jpg"


@pytest.mark.parametrize("folder", ["images", "Flicker8k_Dataset", "flickr30k-images", "."])
def test_karpathy_flickr_finds_its_photos(tmp_path: Path, folder: str) -> None:
    photos(tmp_path / folder, "a.jpg", "b.jpg")
    path = write(tmp_path / "dataset_flickr8k.json", karpathy((4, "a.jpg", "train", ["x"]), (5, "b.jpg", "val", ["y"])))
    for data in (path, tmp_path):
        loaded = load(data)
        assert [(e.image_id, e.path) for e in loaded.examples] == [
            (4, tmp_path / folder / "a.jpg"),
            (5, tmp_path / folder / "b.jpg"),
        ]


@pytest.mark.parametrize("folder", ["Flicker8k_Dataset", "Flicker8k_photos", "images"])
@pytest.mark.parametrize("text", ["", "Flickr8k_text"])
def test_flickr8k(tmp_path: Path, folder: str, text: str) -> None:
    token = "a.jpg#0\tA dog .\na.jpg#1\tA dog runs .\nb.jpg#0\tB .\nc.jpg#0\tC .\nx.jpg.1#0\tOf a photo that is not.\n"
    write(tmp_path / text / "Flickr8k.token.txt", token.replace("\n", "\r\n"))
    for name, names in {"train": "a.jpg\n", "dev": "b.jpg\n", "test": "c.jpg\n"}.items():
        write(tmp_path / text / f"Flickr_8k.{name}Images.txt", names)
    photos(tmp_path / folder, "a.jpg", "b.jpg", "c.jpg")
    loaded = load(tmp_path)
    assert loaded.name == "flickr8k"
    assert splits(loaded) == {"train": ["a.jpg"], "val": ["b.jpg"], "test": ["c.jpg"]}
    assert loaded.examples[0].captions == ("A dog .", "A dog runs .")
    assert loaded.problems.summary() == "photos in no split list: 1"  # as in the data set as published: no error


def test_flickr8k_without_its_lists(tmp_path: Path) -> None:
    write(tmp_path / "Flickr8k.token.txt", "a.jpg#0\tA dog .\n")
    assert "holds no Flickr_8k.trainImages.txt" in refusal(tmp_path)


ROWS = [("sub/a.jpg", "a red, round ball"), ("b.jpg", 'a "big" dog'), ("sub/a.jpg", "a ball"), ("c.jpg", "été")]


def rows_as(kind: str) -> str:
    if kind == "jsonl":
        return "".join(json.dumps({"image": image, "caption": text}) + "\n" for image, text in ROWS)
    between = {"csv": ",", "tsv": "\t", "excel": ";"}[kind]
    quoted = [f"{image}{between}" + '"' + text.replace('"', '""') + '"' for image, text in ROWS]
    return "\r\n".join([between.join(("Image", "caption")), *quoted]) + "\r\n"


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "excel"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_rows(tmp_path: Path, kind: str, bom: str) -> None:
    path = write(tmp_path / "mine.txt", bom + rows_as(kind))  # the format is in the content, not in the name
    photos(tmp_path, "sub/a.jpg", "b.jpg", "c.jpg")
    loaded = load(path)
    assert loaded.name == "mine"
    assert [(e.image_id, e.captions) for e in loaded.examples] == [
        ("sub/a.jpg", ("a red, round ball", "a ball")),
        ("b.jpg", ('a "big" dog',)),
        ("c.jpg", ("été",)),
    ]
    assert loaded.examples[0].path == tmp_path / "sub/a.jpg"


def test_images_elsewhere(tmp_path: Path) -> None:
    path = write(tmp_path / "captions/mine.csv", "image,caption\na.jpg,a\n")
    assert f"looked in {path.parent}" in refusal(path)
    photos(tmp_path / "photos", "a.jpg")
    assert load(path, images=tmp_path / "photos").examples[0].path == tmp_path / "photos/a.jpg"
    assert "is not a folder; give the folder that holds the photos" in refusal(path, images=tmp_path / "nowhere")
    absolute = write(tmp_path / "captions/absolute.csv", f"image,caption\n{tmp_path / 'photos/a.jpg'},a\n")
    assert load(absolute).examples[0].path == tmp_path / "photos/a.jpg"


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path, "a.jpg")
    write(tmp_path / "captions.csv", "image,caption\n./a.jpg,a\na.jpg,b\n")
    monkeypatch.chdir(tmp_path)
    loaded = load(Path("captions.csv"))
    assert [(e.image_id, e.path, e.captions) for e in loaded.examples] == [("a.jpg", tmp_path / "a.jpg", ("a", "b"))]
    assert loaded.name == tmp_path.name  # "captions" says nothing


def test_split_column_and_split_files(tmp_path: Path) -> None:
    names = [f"{n}.jpg" for n in range(4)]
    photos(tmp_path, *names)
    said = zip(names, ("train", "dev", "validation", "test"), strict=True)
    one = write(tmp_path / "one.csv", "split,image,caption\n" + "".join(f"{split},{n},c\n" for n, split in said))
    assert splits(load(one)) == {"train": ["0.jpg"], "val": ["1.jpg", "2.jpg"], "test": ["3.jpg"]}
    one.unlink()
    write(tmp_path / "train.csv", "image,caption\n0.jpg,c\n1.jpg,c\n")
    write(tmp_path / "val.csv", "image,caption\n2.jpg,c\n")
    assert splits(load(tmp_path)) == {"train": ["0.jpg", "1.jpg"], "val": ["2.jpg"], "test": []}
    assert splits(load(tmp_path / "val.csv")) == {"train": [], "val": ["2.jpg"], "test": []}
    assert [len(names) for names in splits(load(tmp_path / "train.csv")).values()] == [1, 1, 0]


def test_share_for_validation(tmp_path: Path) -> None:
    names = [f"{n}.jpg" for n in range(400)]
    path = write(tmp_path / "mine.csv", "image,caption\n" + "".join(f"{n},a\n{n},b\n" for n in names))

    def val(**options: Any) -> set[str]:
        return set(splits(load(path, check_images=False, **options))["val"])

    chosen = val(val_share=0.1)
    assert chosen == val(val_share=0.1)
    assert 20 < len(chosen) < 60
    assert chosen < val(val_share=0.3)  # a larger share takes more, and gives none back
    assert len(val(val_share=1e-9)) == 1
    assert len(val(val_share=0.0)) == 0
    assert {"92.jpg", "100.jpg", "70.jpg"} <= chosen  # by their names alone, in every version and on every machine
    # Other photos come and go; those that stay keep their split.
    write(path, "image,caption\n" + "".join(f"{n},a\n" for n in names[:200]))
    assert val(val_share=0.1) == chosen & set(names[:200])
    assert "val_share is 1.5; expected a share from 0" in refusal(path, val_share=1.5)


# Problems ----------------------------------------------------------------------------------------------------------


def troubled(folder: Path) -> Path:
    """One of each problem, and one photo that is fine in either split."""
    names = {1: "fine.jpg", 2: "missing.jpg", 3: "shared.jpg", 4: "twice.jpg", 6: "mute.jpg", 7: "silent.jpg"}
    train = coco(
        names,
        [(1, "fine"), (1, "  "), (2, "m"), (3, "s"), (4, "t"), (5, "of nobody"), (5, "again"), (7, ""), (1, "fine")],
    )
    train["images"].append({"id": 4, "file_name": "twice.jpg"})
    train["annotations"].append({"id": 4, "image_id": 1, "caption": "under the id of another"})
    write(folder / "annotations/captions_train2017.json", train)
    write(folder / "annotations/captions_val2017.json", coco({3: "shared.jpg", 8: "val.jpg"}, [(3, "s"), (8, "v")]))
    photos(folder / "train2017", "fine.jpg", "shared.jpg", "twice.jpg", "mute.jpg", "silent.jpg")
    photos(folder / "val2017", "shared.jpg", "val.jpg")
    return folder


def test_every_problem_is_counted_in_one_error(tmp_path: Path) -> None:
    message = refusal(troubled(tmp_path))
    for part in (
        "captions_train2017.json",
        "missing photos: 1 (e.g. missing.jpg; looked in ",
        "photos in two splits: 1 (e.g. shared.jpg)",
        "photos listed twice: 1 (e.g. twice.jpg)",
        "caption ids given twice: 1 (e.g. caption 4 of image 1)",
        "captions for an unknown image: 2 (e.g. caption 5 of image 5)",
        "empty captions: 2 (e.g. of image 1)",
        "--images DIR",
        "leave these out with --on-problem skip, which keeps 4 of 9 photos",
    ):
        assert part in message


def test_skipping_leaves_out_what_is_wrong_and_only_that(tmp_path: Path) -> None:
    loaded = load(troubled(tmp_path), on_problem="skip")
    assert [(e.image_id, e.path.name, e.captions, e.split) for e in loaded.examples] == [
        (1, "fine.jpg", ("fine", "fine"), "train"),
        (4, "twice.jpg", ("t",), "train"),
        (3, "shared.jpg", ("s",), "val"),
        (8, "val.jpg", ("v",), "val"),
    ]
    assert loaded.examples[2].path.parent.name == "val2017"
    counts = {problem.kind: (problem.count, problem.serious) for problem in loaded.problems.found}
    assert counts == {
        "missing photos": (1, True),
        "photos in two splits": (1, True),
        "photos listed twice": (1, True),
        "caption ids given twice": (1, True),
        "captions for an unknown image": (2, True),
        "empty captions": (2, True),
        "photos without a caption": (2, False),
        "captions given twice for one photo": (1, False),
    }
    assert loaded.problems.count("empty captions") == 2
    assert len(loaded.problems.report().splitlines()) == 8
    assert "\n" not in loaded.problems.summary()


def test_one_photo_under_two_ids_is_leakage_too(tmp_path: Path) -> None:
    photos(tmp_path / "images", "a.jpg", "b.jpg", "c.jpg")
    entries = ((1, "a.jpg", "train", ["a"]), (2, "a.jpg", "test", ["a"]), (3, "b.jpg", "val", ["b"]))
    path = write(tmp_path / "dataset_flickr8k.json", karpathy(*entries, (3, "c.jpg", "test", ["c"])))
    assert "photos in two splits: 2 (e.g. a.jpg)" in refusal(path)
    assert splits(load(path, on_problem="skip")) == {"train": [], "val": [], "test": ["a.jpg", "c.jpg"]}


def test_rows_in_two_splits(tmp_path: Path) -> None:
    photos(tmp_path, "a.jpg", "b.jpg")
    write(tmp_path / "train.jsonl", '{"image": "a.jpg", "caption": "a"}\n{"image": "b.jpg", "caption": "b"}\n')
    write(tmp_path / "val.jsonl", '{"image": "./a.jpg", "caption": "a"}\n')
    assert "photos in two splits: 1 (e.g. a.jpg)" in refusal(tmp_path)
    assert splits(load(tmp_path, on_problem="skip")) == {"train": ["b.jpg"], "val": ["a.jpg"], "test": []}


def test_a_link_that_leads_to_itself_hides_no_other_photo(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.csv", "image,caption\na.jpg,a\nloop.jpg,b\nz.jpg,c\n")
    photos(tmp_path, "a.jpg", "z.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    assert "missing photos: 1 (e.g. loop.jpg; " in refusal(path)
    assert [example.image_id for example in load(path, on_problem="skip").examples] == ["a.jpg", "z.jpg"]


def test_no_photo_at_all(tmp_path: Path) -> None:
    path = write(tmp_path / "dataset_flickr8k.json", karpathy((1, "a.jpg", "train", ["a"])))
    for options in ({}, {"on_problem": "skip"}):
        message = refusal(path, **options)
        assert "missing photos: 1 (e.g. a.jpg; looked in " in message
        assert str(tmp_path / "Flicker8k_Dataset") in message
        assert "--on-problem skip" not in message  # it would not help
    unchecked = load(path, check_images=False)
    assert len(unchecked.examples) == 1
    assert not unchecked.problems


@settings(max_examples=60, deadline=None)
@given(
    entries=st.lists(
        st.tuples(
            st.integers(0, 5),
            st.sampled_from(["a.jpg", "b.jpg", "c.jpg", "d.jpg"]),
            st.sampled_from(["train", "restval", "val", "test"]),
            st.lists(st.sampled_from(["", " ", "x", "y z"]), max_size=3),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_whatever_is_wrong_what_is_left_is_right(tmp_path_factory: pytest.TempPathFactory, entries: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("any")
    photos(folder / "images", "a.jpg", "b.jpg", "c.jpg")
    path = write(folder / "dataset_any.json", karpathy(*entries))
    try:
        loaded = load(path, on_problem="skip")
    except AnnotationError:
        return
    for of in ("image_id", "path"):
        assert set(Counter(getattr(example, of) for example in loaded.examples).values()) == {1}
    assert all(example.path.is_file() for example in loaded.examples)
    assert all(example.captions and all(map(str.strip, example.captions)) for example in loaded.examples)
    strict = None
    try:
        strict = load(path)
    except AnnotationError:
        assert any(problem.serious for problem in loaded.problems.found)
    assert strict is None or strict.examples == loaded.examples


# Files that cannot be read -----------------------------------------------------------------------------------------

GOOD = '{"image": "a.jpg", "caption": "a"}\n'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is empty; expected captions"),
        ("\ufeff \n", "is empty; expected captions"),
        ("hello", "its first line is 'hello'; expected a header with the columns 'image' and 'caption'"),
        ("file,text\na.jpg,a\n", "its first line is 'file,text'; expected a header"),
        ("image,caption\na.jpg,red, green\n", "line 2 has 3 columns where the header has 2; put quotes"),
        ('image,caption\na.jpg,"never closed\n', "is not CSV"),
        ("image,caption\n", "holds no photo with a caption"),
        ("image,caption,split\na.jpg,a,holdout\n", "line 2 has the split 'holdout'; expected one of train, val, test"),
        ('{"images": [{"id": 1, "file_na', "ends in the middle; download or write it again: line 1, column 23"),
        ('{"images": [1,\n 2', "ends in the middle"),
        ('{"images" 1}', "is not JSON (Expecting ':' delimiter): line 1, column 11"),
        ('{"categories": [], "info": 1}', "is JSON of no known kind (an object with 'categories', 'info')"),
        ("[1, 2]", "is JSON of no known kind (a list)"),
        ("[" * 100_000, "is nested too deep"),
        ('{"images": [], "annotations": []}', "holds no photo with a caption"),
        ('{"images": [{"id": 1}], "annotations": []}', "images[0] has no 'file_name' but 'id'; expected a text"),
        ('{"images": [7], "annotations": []}', "images[0] is '7'; expected an object"),
        ('{"images": 7, "annotations": []}', "'images' is '7'; expected a list"),
        (
            '{"images": [{"id": [1], "file_name": "a"}], "annotations": []}',
            "'id' of images[0] is '[1]'; expected a number",
        ),
        ('{"images": [], "annotations": [{"id": 1, "image_id": 1, "bbox": []}]}', "annotations[0] has no 'caption'"),
        (GOOD + '{"image": "b.jpg"}\n', "line 2 has no 'caption' but 'image'"),
        (GOOD + '{"image": "b.jpg", "capt', "line 2, column 20 is not JSON"),
        (GOOD + '{"image": 3, "caption": "c"}', "'image' of line 2 is '3'; expected a text"),
        (GOOD + "\n\n3\n", "line 4 is '3'; expected an object"),
        ('{"image": "a.jpg", "caption": "\\ud83d"}', "captions with half a character: 1 (e.g. of a.jpg in line 1)"),
        ('{"image": "a\\u0000/b\\ud83d.jpg", "caption": "x"}', "missing photos: 1 "),
        (GOOD + '{"image": "b.jpg", "caption": "c", "split": "val"}', "of lines 1 and 2 only one has a 'split'"),
        (json.dumps(karpathy((1, "a.jpg", "trian", ["a"]))), "images[0] has the split 'trian'; expected one of train,"),
        ('{"images": [{"sentences": []}]}', "images[0] has no 'filename' but 'sentences'"),
        ('{"images": [{"filename": "a", "split": "val", "sentences": ["a"]}]}', "sentences of images[0] is 'a'"),
        ("a.jpg#0\tone\nb.jpg two\n", "line 2 is 'b.jpg two'; expected 'NAME.jpg#0<tab>a caption'"),
    ],
)
def test_unreadable(tmp_path: Path, content: str, expected: str) -> None:
    path = write(tmp_path / "mine.json", content)
    photos(tmp_path, "a.jpg", "b.jpg")
    message = refusal(path)
    assert str(path) in message
    assert expected in message


def test_wrong_encoding(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes("image,caption\na.jpg,a\nb.jpg,été\n".encode("latin-1"))
    assert refusal(path) == f"{path}: line 3 is not UTF-8; save the file in that encoding"


def test_folders_that_are_none(tmp_path: Path) -> None:
    assert "is not there; give a caption file or the folder of a data set" in refusal(tmp_path / "nowhere")
    for name in ("coco", "flickr8k"):
        message = refusal(tmp_path / name)
        command = f"python data/prepare.py {name} --folder {tmp_path / name}"
        assert f"make it with `{command}` (see data/README.md), or give a caption file" in message
    assert "holds no caption file; expected dataset_*.json" in refusal(tmp_path)
    for name in ("one.csv", "two.jsonl"):
        write(tmp_path / name, "image,caption\n")
    message = refusal(tmp_path)
    assert "one.csv" in message
    assert "two.jsonl), give" in message or "give the one that is meant" in message


def test_unreadable_file(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.csv", "image,caption\n")
    path.chmod(0)
    try:
        path.read_bytes()
    except PermissionError:
        assert (
            refusal(path) == f"{path}: cannot be read (Permission denied); see to its permissions, or give another file"
        )
    else:
        pytest.skip("this user may read everything")


def test_120_000_photos(tmp_path: Path) -> None:
    names = {n: f"{n:012}.jpg" for n in range(120_000)}
    (tmp_path / "images").mkdir()
    for name in list(names.values())[:100]:  # the check costs the same whether they are there or not
        (tmp_path / "images" / name).touch()
    write(tmp_path / "many.json", coco(names, [(n, "a man rides a horse") for n in names for _ in range(5)]))
    loaded = load(tmp_path / "many.json", on_problem="skip")
    assert len(loaded.examples) == 100
    assert loaded.problems.count("missing photos") == 119_900


# The real files ----------------------------------------------------------------------------------------------------


@pytest.mark.shared
@pytest.mark.skipif(not (SHARED / "flickr8k").is_dir(), reason="needs ../shared")
def test_real_flickr8k() -> None:
    loaded = load(SHARED / "flickr8k")
    assert loaded.name == "flickr8k"
    assert [len(loaded.split("train")), len(loaded.split("val"))] == [6000, 1000]
    assert {len(example.captions) for example in loaded.examples} == {5}
    assert not any(problem.serious for problem in loaded.problems.found)
    assert loaded.examples[0].captions[1] == "A girl going into a wooden building ."


@pytest.mark.shared
@pytest.mark.skipif(not (SHARED / "coco").is_dir(), reason="needs ../shared")
def test_real_coco() -> None:
    everything = load(SHARED / "coco", check_images=False)
    assert everything.name == "coco2017"
    assert len(everything.split("val")) == len(everything.examples) == 5000
    assert sum(len(example.captions) for example in everything.examples) == 25_014
    assert "missing photos: 4,890" in refusal(SHARED / "coco")
    assert refusal(SHARED / "coco").endswith("with --on-problem skip, which keeps 110 of 5,000 photos")
    there = load(SHARED / "coco", on_problem="skip")
    assert len(there.examples) == 110
    assert all(example.path.is_file() for example in there.examples)
    assert there.problems.count("missing photos") == 4_890
