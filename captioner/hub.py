"""The model card: what a saved model is, what made it, and how good it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from captioner import __version__

if TYPE_CHECKING:
    from captioner.checkpoint import Checkpoint


def model_card(saved: Checkpoint) -> str:
    """The text of a model's README.md, with the front matter that the Hugging Face Hub reads."""
    training = saved.training
    scores, packed = training.get("scores", {}), training.get("scores_before_packing", {})
    named = f"`{Path(saved.encoder.weights).name}`, by reference"
    where = named if saved.encoder_state is None else "stored with the model"
    decoder = saved.decoder
    lines = [
        "---",
        "library_name: captioner",
        "pipeline_tag: image-to-text",
        "tags: [image-captioning]",
        "---",
        "",
        "# Image captioning model",
        "",
        f"Made with captioner {__version__}. A CNN turns a photo into 4096 numbers, which set the first hidden state",
        f"of a recurrent decoder (`{decoder.cell}`, {decoder.layers} layer(s) of {decoder.hidden_size} units), which",
        f"writes with {len(saved.vocabulary):,} words.",
        "",
        f"- encoder: `{saved.encoder.name}`, weights {where}, SHA-256 `{saved.encoder_sha256}`",
    ]
    if "data" in training:
        lines.append(f"- training data: {training['data']}; its terms hold for what is made from it")
    if "epoch" in training:
        lines.append(f"- epochs: {training['epoch']}, seed {training.get('seed')}")
    if training.get("start"):
        lines.append(f"- trained on from the model `{training['start']}`, to raise the {training['objective']}")
    if scores or packed:
        search = f"beam {saved.decoding.beam_size}" if saved.decoding.beam_size > 1 else "greedy search"
        when = ", before its weights were rounded to 8 bits" if packed else ""
        lines += ["", f"Scores on the validation split ({search}{when}):", "", "| score | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4f} |" for name, value in (scores or packed).items()]
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
