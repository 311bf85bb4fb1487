"""The captioner: encoder, decoder and vocabulary together."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from captioner import checkpoint, images
from captioner.config import DecodingOptions
from captioner.decoding.explain import Explanation, explain
from captioner.decoding.search import decode
from captioner.errors import CheckpointError, WeightsError
from captioner.hub import model_card
from captioner.networks import weights
from captioner.networks.decoder import Decoder
from captioner.networks.encoder import Encoder, is_file
from captioner.networks.inference import PreparedDecoder
from captioner.networks.prepared_encoder import PreparedEncoder
from captioner.vocabulary import Vocabulary

Photo = Path | str | Image.Image

_REMEDY = 'give the folder of one, use the one in the box ("mini"), or train one: python train.py shapes'

_NO_FILE = ("default", "random")  # what `EncoderConfig.weights` may be besides a path


@dataclass(frozen=True)
class Caption:
    """A sentence about a photo."""

    text: str
    tokens: tuple[str, ...]  # the words, as the decoder wrote them
    logprob: float  # natural log of the caption's probability given the photo
    score: float  # what captions are ranked by: the log-probability after length normalisation
    finished: bool  # ended by the model, rather than cut at the longest length
    satisfied: bool  # has every required word

    def __str__(self) -> str:
        return self.text


class Captioner:
    """Looks at photos and writes sentences about them.

    Weights are arranged for speed when the first photo is looked at and the first caption is written: after changing
    them, make another.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        vocabulary: Vocabulary,
        options: DecodingOptions | None = None,
        training: Mapping[str, Any] | None = None,
    ) -> None:
        """Put a model together.

        Args:
            encoder: photo -> feature.
            decoder: feature -> ids of words.
            vocabulary: ids -> text.
            options: how captions are searched for.
            training: what made the model, in JSON's types; it is saved with it and told in its model card.
        """
        self.encoder = encoder
        self.decoder = decoder
        self.vocabulary = vocabulary
        self.decoder.eval()
        self.options = options or DecodingOptions()
        self.training = dict(training or {})
        self._encoders: dict[str, PreparedEncoder] = {}  # by precision
        self._decoders: dict[str, PreparedDecoder] = {}

    @classmethod
    def from_pretrained(
        cls, model: str | Path = "mini", *, encoder_weights: str | None = None, device: str | torch.device | None = None
    ) -> Captioner:
        """Load a saved model.

        Args:
            model: its folder, the folder of a training run (its best checkpoint is taken), `owner/name` on the
                Hugging Face Hub, or "mini", which comes with this package.
            encoder_weights: where the weights of the CNN are, if not where the model says.
            device: where to compute; by default a GPU if there is one.

        Raises:
            CheckpointError: the model is missing, incomplete or altered, the encoder's weights are not those that
                it was trained with, or some are given for a model that has its own.
            WeightsError: the encoder's weights are not there.
        """
        folder = find(model)
        saved = checkpoint.read(folder)
        config = saved.encoder
        stored = saved.encoder_state is not None
        if encoder_weights is not None and stored:
            raise CheckpointError(
                f"{folder}: has the weights of its encoder in itself; leave out those given ({encoder_weights})"
            )
        if encoder_weights is not None:
            config = dataclasses.replace(config, weights=encoder_weights)
        elif not stored and config.weights not in _NO_FILE and not is_file(Path(config.weights)):
            raise WeightsError(
                f"{config.weights}: no such weight file for {config.name}, which {folder} was trained with; give a "
                f"file of these weights (SHA-256 {saved.encoder_sha256[:12]}) with --encoder.weights FILE, or use the "
                "model in the box: --model mini"
            )
        try:
            encoder = Encoder(config, saved.encoder_state)
        except WeightsError as error:
            if not stored:
                raise
            raise CheckpointError(f"{folder / checkpoint.WEIGHTS}: {error}; fetch the model again") from None
        if encoder.weights_sha256 != saved.encoder_sha256:
            source = "it has in itself" if stored else f"those of {config.weights!r}"
            remedy = "fetch the model again" if stored else "give the right file with --encoder.weights FILE"
            raise CheckpointError(
                f"{folder}: was trained with other {config.name} weights than {source} "
                f"({saved.encoder_sha256[:12]}, not {encoder.weights_sha256[:12]}); {remedy}"
            )
        decoder = Decoder(saved.decoder, len(saved.vocabulary))
        checkpoint.fill(decoder, saved.decoder_state, str(folder / checkpoint.WEIGHTS))
        captioner = cls(encoder, decoder, saved.vocabulary, saved.decoding, saved.training)
        return captioner.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def save_pretrained(self, folder: str | Path, *, packed: bool = False) -> None:
        """Save the model as a folder; a model that is there already is replaced as a whole.

        Args:
            folder: of the model.
            packed: write all weights, those of the CNN too, in 8 bits: a quarter of what both take otherwise.

        Raises:
            CheckpointError: it cannot be written, or the folder holds anything but a model; it stays as it was.
        """
        folder = Path(folder).absolute()
        if foreign := checkpoint.foreign(folder):
            raise CheckpointError(f"{folder}: holds what is not of a model ({foreign}); choose another folder")
        with checkpoint.replacing(folder) as new:
            self.write(new, packed=packed)

    def write(self, folder: Path, *, packed: bool = False) -> None:
        """Write the model's files into a folder that exists."""
        state, training = self.encoder.body.state_dict(), dict(self.training)
        if packed:  # what is identified is what will be read
            state = weights.unpack(weights.pack(state))
            if "scores" in training:
                training["scores_before_packing"] = training.pop("scores")
        stored = packed or not self.encoder.elsewhere  # others are named, and known again by their hash
        config = self.encoder.config
        if config.weights not in _NO_FILE:  # the model is to load from any working directory
            path = Path(config.weights)
            config = dataclasses.replace(config, weights=path.name if stored else str(path.absolute()))
        saved = checkpoint.Checkpoint(
            encoder=config,
            encoder_sha256=weights.fingerprint(state) if stored else self.encoder.weights_sha256,
            decoder=self.decoder.config,
            decoding=self.options,
            vocabulary=self.vocabulary,
            decoder_state=self.decoder.state_dict(),
            encoder_state=state if stored else None,
            training=training,
        )
        checkpoint.write(folder, saved, model_card(saved), packed=packed)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the model to the Hugging Face Hub, and return its address.

        Raises:
            CheckpointError: the Hub cannot be reached, or refuses.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            with tempfile.TemporaryDirectory() as folder:
                self.write(Path(folder))
                api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload captioner model")
        except Exception as error:  # what there is besides its own errors depends on the Hub's version: httpx, requests
            raise CheckpointError(
                f"{repo_id}: cannot be uploaded ({_first_line(error)}); see `hf auth login`, or save it to a folder"
            ) from None
        return str(url)

    def to(self, device: str | torch.device) -> Captioner:
        """Move the model to a device."""
        self.encoder.to(device)
        self.decoder.to(device)
        self._encoders.clear()
        self._decoders.clear()
        return self

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.decoder.output.weight.device

    def caption(self, photo: Photo, options: DecodingOptions | None = None) -> Caption:
        """Write the best sentence about one photo.

        Args:
            photo: a file, or an image in memory.
            options: how to search; by default as the model was validated.

        Raises:
            ImageError: the photo cannot be decoded.
        """
        pixels = images.load(photo, self.encoder.config.image_size)
        return self.describe(self.features(pixels[None].to(self.device), options), options)[0][0]

    def features(
        self,
        photos: Float[Tensor, "batch 4096"] | UInt8[Tensor, "batch 3 height width"],
        options: DecodingOptions | None = None,
    ) -> Float[Tensor, "batch 4096"]:
        """What the encoder sees in photos, in the precision of the options.

        Features are what it has seen already, and stay as they are.
        """
        if photos.dtype != torch.uint8:
            return photos
        precision = (options or self.options).precision
        if precision not in self._encoders:
            self._encoders[precision] = PreparedEncoder(self.encoder, precision)
        return self._encoders[precision](photos)

    @torch.inference_mode()
    def describe(
        self, features: Float[Tensor, "batch 4096"], options: DecodingOptions | None = None
    ) -> list[list[Caption]]:
        """Write captions from features.

        Args:
            features: what the encoder saw, `(batch, 4096)`, of any float type.
            options: how to search; by default as the model was validated.

        Returns:
            `options.num_captions` captions a photo, best first.
        """
        options = options or self.options
        features = features.to(self.device, torch.float32)
        return [
            [
                Caption(
                    text=self.vocabulary.decode(hypothesis.tokens),
                    tokens=tuple(self.vocabulary.words(hypothesis.tokens)),
                    logprob=hypothesis.logprob,
                    score=hypothesis.score,
                    finished=hypothesis.finished,
                    satisfied=hypothesis.satisfied,
                )
                for hypothesis in hypotheses
            ]
            for hypotheses in decode(self._ready(options), features, self.vocabulary, options)
        ]

    def explain(self, photo: Photo, options: DecodingOptions | None = None) -> Explanation:
        """Caption one photo and keep how the search went.

        Args:
            photo: a file, or an image in memory.
            options: how to search; by default as the model was validated.

        Raises:
            ImageError: the photo cannot be decoded.
        """
        options = options or self.options
        pixels = images.load(photo, self.encoder.config.image_size)
        features = self.features(pixels[None].to(self.device), options)
        return explain(self._ready(options), features, self.vocabulary, options)

    def _ready(self, options: DecodingOptions) -> PreparedDecoder:
        if options.precision not in self._decoders:
            self._decoders[options.precision] = PreparedDecoder(self.decoder, options.precision)
        return self._decoders[options.precision]


def find(model: str | Path) -> Path:
    """The folder of a saved model: of one in the box, itself, the best of a training run, or a download from the Hub.

    Raises:
        CheckpointError: there is none.
    """
    if model == "mini":  # a folder of that name is "./mini"
        return weights.PRETRAINED / model
    folder = Path(model)
    try:
        there, on_hub = checkpoint.recover(folder), _is_hub_name(str(model))
    except OSError as error:  # a name that is too long, or a folder that may not be entered
        raise CheckpointError(f"{model}: no such model ({error.strerror}); {_REMEDY}") from None
    if not there and on_hub:
        return _download(str(model))
    if not there:
        raise CheckpointError(f"{model}: no such model; {_REMEDY}")
    if (folder / "last").exists() or checkpoint.recover(folder / "best"):
        best = folder / "best"
        if not checkpoint.recover(best):
            raise CheckpointError(f"{folder}: has no best checkpoint yet; wait for its first validation")
        return best
    return folder


def _is_hub_name(model: str) -> bool:
    """Whether a name can be one of the Hub: `owner/name`, and not the path of what is not, or not yet, on this disk."""
    parts = model.split("/")
    named = len(parts) == 2 and all(part and part not in (".", "..") for part in parts)
    return named and parts[0] != "runs" and not Path(parts[0]).is_dir()


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=["*.json", "*.safetensors", "README.md"]))
    except Exception as error:  # see `push_to_hub`
        raise CheckpointError(
            f"{repo_id}: no such model here, nor on the Hugging Face Hub ({_first_line(error)}); {_REMEDY}"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
