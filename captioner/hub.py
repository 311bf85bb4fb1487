"""Names -> folders of saved models: the model in the box, a training run, the Hugging Face Hub; and the model card."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from captioner import __version__, checkpoint, files
from captioner.errors import CheckpointError, missing_extra, printable

if TYPE_CHECKING:
    from captioner.checkpoint import Checkpoint

REMEDY = 'give the folder of one, use the one in the box ("mini"), or train one: python train.py shapes'

#: The files of a model that are fetched from the Hub: no pickles, no code.
_FETCHED = [checkpoint.CONFIG, checkpoint.TOKENIZER, checkpoint.CARD, checkpoint.WEIGHTS, *checkpoint.EXPORTED_FILES]


def find(model: str | Path) -> Path:
    """The folder of a saved model: of one in the box, itself, the best of a training run, or a download from the Hub.

    Raises:
        CheckpointError: there is none.
    """
    if model == "mini":  # a folder of that name is "./mini"
        return files.PRETRAINED / model
    folder = Path(model)
    try:
        there, on_hub = checkpoint.recover(folder), _is_hub_name(str(model))
    except (OSError, ValueError) as error:  # a name that is too long or holds a zero, a folder that may not be entered
        raise CheckpointError(f"{model}: no such model ({getattr(error, 'strerror', error)}); {REMEDY}") from None
    if not there and on_hub:
        return _download(str(model))
    if not there:
        raise CheckpointError(f"{model}: no such model; {REMEDY}")
    if (folder / "last").exists() or checkpoint.recover(folder / "best"):
        best = folder / "best"
        if not checkpoint.recover(best):
            raise CheckpointError(f"{folder}: has no best checkpoint yet; wait for its first validation")
        return best
    return folder


def push(write: Callable[[Path], None], repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload a model to the Hugging Face Hub.

    Args:
        write: writes the files of the model into the folder that it is given.
        repo_id: `owner/name` on the Hub.
        private: whether only the owner may see it, where it is new.
        token: of an account; by default the one of `hf auth login`.

    Returns:
        The address of the model.

    Raises:
        CheckpointError: the Hub cannot be reached, or refuses.
        CaptionerError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise missing_extra("train", "huggingface_hub") from None
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload captioner model")
    except Exception as error:  # what there is besides its own errors depends on the Hub's version: httpx, requests
        raise CheckpointError(
            f"{repo_id}: cannot be uploaded ({_first_line(error)}); see `hf auth login`, or save it to a folder"
        ) from None
    return str(url)


def _is_hub_name(model: str) -> bool:
    """Whether a name can be one of the Hub: `owner/name`, and not the path of what is not, or not yet, on this disk."""
    parts = model.split("/")
    named = len(parts) == 2 and all(part and part not in (".", "..") for part in parts)
    return named and parts[0] != "runs" and not Path(parts[0]).is_dir()


def _download(repo_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{repo_id}: no such model here, nor can the Hugging Face Hub be asked: "
            f"{missing_extra('train', 'huggingface_hub')}"
        ) from None
    try:
        return Path(snapshot_download(repo_id, allow_patterns=_FETCHED))
    except Exception as error:  # see `push`
        raise CheckpointError(
            f"{repo_id}: no such model here, nor on the Hugging Face Hub ({_first_line(error)}); {REMEDY}"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# The model card ------------------------------------------------------------------------------------------------------


def model_card(saved: Checkpoint) -> str:
    """The text of a model's README.md, with the front matter that the Hugging Face Hub reads.

    Raises:
        CaptionerError: huggingface_hub, which writes the front matter, is not installed.
    """
    try:
        from huggingface_hub import EvalResult, ModelCardData
    except ImportError:
        raise missing_extra("train", "huggingface_hub") from None
    training, export = saved.training, saved.export or {}
    exported = export.get("scores_after", {})
    trained = training.get("scores", {})
    scores = exported or trained
    name = "image captioning model"
    results = [
        EvalResult(
            task_type="image-to-text",
            dataset_type=_plain(training["data"]),
            dataset_name=_plain(training["data"]),
            dataset_split="validation",
            metric_type=_plain(metric),
            metric_value=round(value, 4),
        )
        for metric, value in (exported or trained).items()
        if "data" in training
    ]
    front = ModelCardData(
        library_name="captioner",
        pipeline_tag="image-to-text",
        tags=["image-captioning"],
        model_name=name if results else None,
        eval_results=results or None,
    )
    lines = ["---", front.to_yaml(line_break="\n").strip(), "---", "", f"# {name.capitalize()}", "", *_about(saved)]
    if scores:
        search = f"beam {saved.decoding.beam_size}" if saved.decoding.beam_size > 1 else "greedy search"
        lines += ["", f"Scores on the validation split ({search}):", ""]
        before = export.get("scores_before", {})
        if exported and before:
            lines += ["| score | before the export | exported |", "|---|---|---|"]
            lines += [
                f"| {_plain(metric)} | {f'{before[metric]:.4f}' if metric in before else ''} | {value:.4f} |"
                for metric, value in exported.items()
            ]
        else:
            lines += ["| score | value |", "|---|---|"]
            lines += [f"| {_plain(metric)} | {value:.4f} |" for metric, value in scores.items()]
    lines += [
        "",
        "```python",
        "from captioner import Captioner",
        "",
        'print(Captioner.from_pretrained("DIR").caption("photo.jpg"))',
        "```",
        "",
    ]
    return "\n".join(lines)


def _about(saved: Checkpoint) -> list[str]:
    """The lines of a card that say how a model is built and how it was made."""
    training, decoder = saved.training, saved.decoder
    named = f"`{_plain(Path(saved.encoder.weights).name)}`, by reference"
    where = named if saved.encoder_state is None else "stored with the model"
    lines = [
        f"Made with captioner {__version__}. A CNN turns a photo into 4096 numbers, which set the first hidden state",
        f"of a recurrent decoder (`{decoder.cell}`, {decoder.layers} layer(s) of {decoder.hidden_size} units), which",
        f"writes with {len(saved.vocabulary):,} words.",
        "",
        f"- encoder: `{saved.encoder.name}`, weights {where}, SHA-256 `{_plain(saved.encoder_sha256)}`",
    ]
    if "data" in training:
        lines.append(f"- training data: {_plain(training['data'])}; its terms hold for what is made from it")
    if "epoch" in training:
        lines.append(f"- epochs: {training['epoch']}, seed {training.get('seed')}")
    if training.get("start"):
        objective = _plain(training.get("objective", "likelihood"))
        lines.append(f"- trained on from the model `{_plain(training['start'])}`, to raise the {objective}")
    if saved.export is not None:
        lines.append(
            f"- graphs for onnxruntime in `onnx/`: {_plain(saved.export.get('precision', 'unknown precision'))}"
        )
    return lines


def _plain(text: str) -> str:
    """A text from a folder or a command, as one line of a card."""
    return printable(text).replace("`", "'").replace("|", "/")
