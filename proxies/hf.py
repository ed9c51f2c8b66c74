"""Load any transformers architecture as a family from its config alone (``hf:config.json``).

The file describes one size of the model. `hf_config` infers which of its numbers grow, and every other size is the same config
with these numbers changed. Nothing is downloaded, and only transformers' own code is run. Losses never pass ``labels`` to the
model: the token data is already shifted, and models differ in whether they shift again.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import multiprocessing
import sys
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mutransfer._torch_internals import detect_fake_mode
from mutransfer.errors import BuildError, DataError, FileError, RequestError, nearest
from mutransfer.family import Family
from mutransfer.recipe import Scale

from .data.base import Batch, Data
from .hf_config import Fields, Whole, flat, infer, resized
from .importing import describe_exception

__all__ = ["Sized", "load_transformers", "task_for"]

logger = logging.getLogger(__name__)

Loss = Callable[[torch.nn.Module, Any], Tensor]

LENGTH = 32  # tokens in a generated sequence
MASKED = slice(3, None, 7)  # always the same tokens: every seventh, close to BERT's 15% (1810.04805)
SAMPLES = 4000  # samples in a generated audio input: a quarter of a second


def task_for(model: str, cls: type, config: Any, data: Data | None, batch_size: int) -> tuple[Batch, Loss]:
    """Return an example batch ``(inputs, targets)`` for a model class, and its loss function.

    Causal language models predict ``targets``, masked language models predict the masked tokens of the inputs,
    encoder-decoders read the first half of a sequence and predict the second half, and image classifiers get images resized
    to the size in the config. The batch comes from ``data``; without data it is random, but always the same.

    Args:
        model: how the user referred to the model; used in messages.
        cls: the model class.
        config: its transformers config.
        data: source of the examples, if any.
        batch_size: number of examples in the batch.

    Raises:
        DataError: if the data does not fit the model.
        RequestError: if no example can be generated for its kind of input.
    """
    reads = cls.main_input_name  # type: ignore[attr-defined]
    name = cls.__name__
    draw = torch.Generator().manual_seed(0)
    if reads == "pixel_values" and name.endswith("ForImageClassification"):
        images = _Images(config)
        if data is not None:
            images.check(model, data)
            return data.batch(0, batch_size, 0), images.loss
        shape = (batch_size, images.channels, *images.size)
        return (torch.randn(shape, generator=draw), _random_integers((batch_size,), images.classes, draw)), images.loss
    text = config.get_text_config(decoder=True)
    if reads == "input_ids" and (loss := _token_loss(cls, config, text.vocab_size)) is not None:
        if data is not None:
            _check_tokens(model, data, text)
            return data.batch(0, batch_size, 0), loss
        length = min(LENGTH, _max_positions(text) or LENGTH)
        tokens = _random_integers((batch_size, length + 1), text.vocab_size, draw)
        return (tokens[:, :-1], tokens[:, 1:]), loss
    if data is not None:
        raise DataError(
            f"{name} of {model} needs {reads} with matching labels, which the data {data.name!r} does not have: omit --data, "
            "or write a Family with your batch and loss in a file.py and pass file.py:name."
        )
    batch_size = min(batch_size, 4)  # audio inputs are long
    match reads:
        case "input_ids":
            inputs = _random_integers((batch_size, LENGTH), text.vocab_size, draw)
        case "input_values":
            inputs = torch.randn(batch_size, SAMPLES, generator=draw)
        case "input_features" if hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins"):
            inputs = torch.randn(batch_size, config.num_mel_bins, 2 * config.max_source_positions, generator=draw)
        case _:
            raise RequestError(
                f"no example batch is known for {name}, which reads {reads}: write a Family with your batch and loss in a "
                "file.py and pass file.py:name."
            )
    if config.is_encoder_decoder:
        return (inputs, _random_integers((batch_size, LENGTH + 1), text.vocab_size, draw)), _transcript(reads)
    return (inputs, torch.zeros(batch_size, dtype=torch.long)), _position_loss(reads)


def _token_loss(cls: type, config: Any, vocabulary: int) -> Loss | None:
    """Return the loss of a language model, or None for a model with another head."""
    name = cls.__name__
    if config.is_encoder_decoder and name.endswith(("ForConditionalGeneration", "Seq2SeqLM", "LMHeadModel")):
        return _second_half
    if name.endswith("ForMaskedLM"):
        return _fill_in(vocabulary - 1)
    if name.endswith(("ForCausalLM", "LMHeadModel", "LMHead", "ForConditionalGeneration")):
        return _next_token
    return None


def _next_token(model: torch.nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    return _cross_entropy(model(input_ids=inputs).logits, targets)


def _second_half(model: torch.nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    half = inputs.shape[1] // 2
    logits = model(input_ids=inputs[:, :half], decoder_input_ids=inputs[:, half:]).logits
    return _cross_entropy(logits, targets[:, half:])


def _fill_in(mask: int) -> Loss:
    def loss(model: torch.nn.Module, batch: Any) -> Tensor:
        inputs, _ = batch
        hidden = inputs.clone()
        hidden[:, MASKED] = mask
        return _cross_entropy(model(input_ids=hidden).logits[:, MASKED], inputs[:, MASKED])

    return loss


def _transcript(reads: str) -> Loss:
    def loss(model: torch.nn.Module, batch: Any) -> Tensor:
        inputs, tokens = batch
        return _cross_entropy(model(**{reads: inputs}, decoder_input_ids=tokens[:, :-1]).logits, tokens[:, 1:])

    return loss


def _position_loss(reads: str) -> Loss:
    """Return a loss for heads without labels in our data: the label of each logit vector is its position in the batch."""

    def loss(model: torch.nn.Module, batch: Any) -> Tensor:
        logits = model(**{reads: batch[0]}).logits.flatten(0, -2)
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device) % logits.shape[-1])

    return loss


class _Images:
    """Check of image data against an image classifier's config, and the loss on images resized to it."""

    def __init__(self, config: Any) -> None:
        vision = getattr(config, "vision_config", config)  # models that also read text nest the vision config
        size = getattr(vision, "image_size", 64)
        self.size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        self.channels: int = getattr(vision, "num_channels", 3)
        self.classes: int = config.num_labels

    def check(self, model: str, data: Data) -> None:
        if data.kind != "images":
            raise DataError(
                f"{model} reads images, but the data {data.name!r} holds {data.kind}: choose data that holds images."
            )
        if data.classes > self.classes:
            raise DataError(
                f"the data {data.name!r} has {data.classes} classes, but {model} distinguishes {self.classes}: set "
                f'"num_labels": {data.classes} in the config or in the experiment\'s options.'
            )
        if data.inputs not in (1, self.channels):
            raise DataError(
                f"the data {data.name!r} has {data.inputs} channels, but {model} reads {self.channels}: choose other data."
            )

    def loss(self, model: torch.nn.Module, batch: Any) -> Tensor:
        images, labels = batch
        images = images.expand(-1, self.channels, -1, -1)
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, size=self.size, mode="bilinear")
        return _cross_entropy(model(pixel_values=images).logits, labels)


def _check_tokens(model: str, data: Data, text: Any) -> None:
    if data.kind != "tokens":
        raise DataError(
            f"{model} reads tokens, but the data {data.name!r} holds {data.kind}: choose data that holds tokens."
        )
    if data.classes > text.vocab_size:
        raise DataError(
            f"the data {data.name!r} has {data.classes} different tokens, but the vocab_size of {model} is {text.vocab_size}: "
            "choose data with fewer, or a larger vocab_size."
        )
    length, limit = data.batch(0, 1, 0)[0].shape[1], _max_positions(text)
    if limit and length > limit:
        raise DataError(
            f"the data's sequences have {length} tokens, but the max_position_embeddings of {model} is {limit}: shorten "
            "sequence_length, or raise max_position_embeddings."
        )


def _max_positions(text: Any) -> int | None:
    """Return the maximum sequence length of a text config, or None for no limit, which some configs write as -1."""
    limit = getattr(text, "max_position_embeddings", None)
    return limit if limit and limit > 0 else None


def _random_integers(shape: tuple[int, ...], below: int, draw: torch.Generator) -> Tensor:
    return torch.randint(below, shape, generator=draw)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


Make = Callable[[dict[str, Whole], Container[str]], torch.nn.Module]

# Heads in order of preference, by the names of transformers' auto classes. Heads of models with an encoder come before
# CAUSAL_LM: an encoder attends in both directions, so a causal loss would show it the answer.
HEADS = (
    "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM", "CAUSAL_LM", "IMAGE_CLASSIFICATION", "IMAGE_TEXT_TO_TEXT", "CTC",
    "AUDIO_CLASSIFICATION", "SEQUENCE_CLASSIFICATION",
)  # fmt: skip


@dataclass(frozen=True)
class Sized:
    """Builds a transformers model at any size when called with a `Scale`.

    Args:
        reference: how the user referred to the model; used in messages.
        make: builds the model from the changed fields and the names of the fields that count layers.
        fields: the fields of the config that grow; the scale is in units of the first of them.
    """

    reference: str
    make: Make
    fields: Fields

    def __call__(self, scale: Scale) -> torch.nn.Module:
        """Return the model at ``scale``, with every growing field set to its value there."""
        changes = self.fields.at(scale.width, scale.depth)
        try:
            return self.make(changes, self.fields.depth)
        except Exception as error:
            raise BuildError(
                f"{self.reference} could not be built at width {scale.width}, depth {scale.depth}: it raised "
                f"{describe_exception(error)}."
            ) from error


def load_transformers(
    reference: str,
    data: Data | None,
    base: Scale | None,
    *,
    batch_size: int = 32,
    options: dict[str, Any] | None = None,
) -> Family:
    """Return the `Family` of the transformers config that ``reference`` names.

    Dropout is set to 0 and the cache is disabled, so that a forward pass depends only on its input. Attention and experts use
    the implementations that transformers prefers. Values that the config derives from its width (such as a head dim) keep the
    value that they have at the file's size.

    Args:
        reference: ``hf:path/to/config.json``, or ``hf:`` and a folder with that file.
        data: source of the example batch; without it the batch is generated.
        base: the base scale, at which µP changes nothing; by default the size in the file.
        batch_size: number of examples in the example batch.
        options: ``width_fields`` and ``depth_fields`` list the fields that grow; any other key replaces a field of the config.

    Raises:
        RequestError: if transformers is not installed, the file is not a config that it knows, or the fields that grow cannot be
            inferred.
        FileError: if the file cannot be read.
        BuildError: if the model cannot be built.
        DataError: if the data does not fit the model.
    """
    options = dict(options or {})
    width, depth = (_names(key, options.pop(key, [])) for key in ("width_fields", "depth_fields"))
    raw = _read(Path(reference.removeprefix("hf:")).expanduser())
    config_class, model_class = _classes(reference, raw, _transformers())
    full_config = _config(reference, config_class, raw, options)

    def make(changes: dict[str, Whole], layers: Container[str]) -> torch.nn.Module:
        config = config_class.from_dict(resized(full_config, changes, layers))
        if detect_fake_mode() is not None and "experts_implementation" not in options:
            config._experts_implementation = "batched_mm"  # the default, grouped_mm, has no fake kernel in float32
        model: torch.nn.Module = model_class(config)
        return model

    fields = infer(dict(flat(full_config)), config_class.attribute_map, make, width, depth)
    batch, loss = task_for(reference, model_class, config_class.from_dict(full_config), data, batch_size)
    return Family(Sized(reference, make, fields), batch, loss, base or Scale(*fields.size), model_class.__name__)


def _names(key: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise RequestError(f"options.{key} is {value!r}: give a list of field names of the config.")
    return value


def _parse_constant(name: str) -> float:
    """Return a non-finite JSON constant as a float: Infinity limits Mamba-2's time steps, but NaN has no use in a config."""
    if name == "NaN":
        raise ValueError("a number is NaN")
    return float(name)


def _read(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(file.read_text(encoding="utf-8"), parse_constant=_parse_constant)
    except FileNotFoundError:
        raise FileError(f"there is no file {file}: give the config.json of a transformers model as hf:PATH.") from None
    except OSError as error:
        raise FileError(f"{file} cannot be read ({error.strerror}): give the config.json of a model.") from None
    except ValueError as error:
        raise FileError(f"{file} is not JSON ({error}): give the config.json of a transformers model.") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise FileError(f'{file} has no "model_type": give the config.json of a transformers model.')
    return raw


def _transformers() -> Any:
    """Import transformers, hiding a torchvision that does not work with the installed torch (mup installs a torchvision)."""
    if importlib.util.find_spec("transformers") is None:
        raise RequestError("hf: models need transformers, which is not installed: pip install 'mutransfer[hf]'.")
    if "transformers" not in sys.modules and importlib.util.find_spec("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
        except Exception:
            sys.modules["torchvision"] = None  # type: ignore[assignment]
            if multiprocessing.parent_process() is None:
                logger.warning("torchvision does not work with this torch and is ignored: see `mutransfer doctor`.")
    try:
        module = importlib.import_module("transformers")
        # Its messages are about checkpoints and tokenizers, which are not used here.
        module.logging.set_verbosity_error()
        importlib.import_module("transformers.models.auto.modeling_auto")
    except Exception as error:
        raise RequestError(
            f"transformers cannot be imported ({describe_exception(error)}): see `mutransfer doctor`."
        ) from error
    return module


def _classes(reference: str, raw: dict[str, Any], transformers: Any) -> tuple[Any, Any]:
    """Return the config class and the model class: ``architectures[0]``, or else the first head in `HEADS` of the model type."""
    configs = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    kind = raw["model_type"]
    if kind not in configs:
        if "auto_map" in raw:
            raise RequestError(
                f"{reference} needs custom code (auto_map), and transformers has no model_type {kind!r}: import its class in "
                "a file.py with a mutransfer.Family and pass file.py:name."
            )
        raise RequestError(f"{reference}: transformers has no model_type {kind!r}: {nearest(kind, configs)[:400]}")
    config_class = configs[kind]
    heads = [head for head in HEADS if head != "MASKED_LM" or not raw.get("is_decoder")]
    mappings = (getattr(auto, f"MODEL_FOR_{head}_MAPPING_NAMES") for head in heads)
    known = [name for names in mappings for name in _several(names.get(kind))]
    name = (raw.get("architectures") or known or [None])[0]
    if name is None:
        raise RequestError(f"{reference}: no model with logits is known for {kind!r}: name its class in architectures.")
    if not isinstance(name, str) or not hasattr(transformers, name):
        raise RequestError(f"{reference}: transformers has no {name!r} (architectures): {nearest(str(name), known)}")
    if name in _several(auto.MODEL_MAPPING_NAMES.get(kind)):
        hint = f"such as {known[0]}" if known else "one whose output has logits"
        raise RequestError(
            f"{reference}: {name} has no head and thus no logits: name a class in architectures, {hint}."
        )
    return config_class, getattr(transformers, name)


def _several(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return names if isinstance(names, tuple) else (names,) if names else ()


def _config(reference: str, config_class: Any, raw: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return the config with all defaults filled in, ``options`` applied, and randomness and caching disabled."""
    try:
        defaults = config_class.from_dict(raw).to_dict()
        known = {*defaults, *config_class.attribute_map, "num_labels", "attn_implementation", "experts_implementation"}
        if unknown := sorted(options.keys() - known):
            raise RequestError(f"{reference} has no field {unknown[0]!r}: {nearest(unknown[0], known)}")
        config: dict[str, Any] = config_class.from_dict(raw | options).to_dict()
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(
            f"{reference} is not a valid {raw['model_type']!r} config: it raised {describe_exception(error)}."
        ) from error
    kept = {key: options[key] for key in ("attn_implementation", "experts_implementation") if key in options}
    return _deterministic(config) | kept


def _deterministic(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config without dropout, cache and augmentation: randomness and state would blur every comparison."""
    result: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and "model_type" in value:
            value = _deterministic(value)
        elif isinstance(value, float) and ("drop" in name or name.endswith("pdrop")):
            value = 0.0
        elif name in ("use_cache", "apply_spec_augment") and isinstance(value, bool):
            value = False
        result[name] = value
    return result
