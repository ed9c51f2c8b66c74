"""``hf:config.json``: any transformers architecture as a family, from the config alone.

The file describes one size of the model; `hf_config` tells which of its numbers grow, and every other size is the same config
with these numbers changed. Nothing is downloaded and no code but transformers' own is run. Losses never use the
model's own ``labels``: our token data comes shifted, and models differ in whether they shift again.
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
from mutransfer.errors import RequestError, nearest
from mutransfer.family import Family
from mutransfer.scale import Scale

from .data.base import Batch, Data
from .hf_config import Fields, Whole, flat, infer, resized
from .importing import said

__all__ = ["Sized", "load", "task_for"]

logger = logging.getLogger(__name__)

Loss = Callable[[torch.nn.Module, Any], Tensor]

LENGTH = 32  # tokens of a made-up sequence
MASKED = slice(3, None, 7)  # every seventh token, about the 15% of BERT (1810.04805), the same ones every time
SAMPLES = 4000  # of a made-up sound: a quarter of a second


def task_for(model: str, cls: type, config: Any, data: Data | None, batch_size: int) -> tuple[Batch, Loss]:
    """Return an example batch ``(inputs, targets)`` for a model class, and its loss.

    Causal language models predict ``targets``; masked ones the inputs' masked tokens; encoder-decoders read the first half
    of a sequence and predict the second; image classifiers see images resized to what the config asks for. The batch is
    the data's or, without data, random but always the same.

    Args:
        model: what the user called it, for the sentences.
        cls: the model class.
        config: its transformers config.
        data: where examples come from, if any.
        batch_size: examples in the batch.

    Raises:
        RequestError: the data does not fit the model, or no example can be made up for its kind of input.
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
        return (torch.randn(shape, generator=draw), _whole((batch_size,), images.classes, draw)), images.loss
    text = config.get_text_config(decoder=True)
    if reads == "input_ids" and (loss := _token_loss(cls, config, text.vocab_size)) is not None:
        if data is not None:
            _check_tokens(model, data, text)
            return data.batch(0, batch_size, 0), loss
        length = min(LENGTH, _most(text) or LENGTH)
        tokens = _whole((batch_size, length + 1), text.vocab_size, draw)
        return (tokens[:, :-1], tokens[:, 1:]), loss
    if data is not None:
        raise RequestError(
            f"{name} of {model} needs {reads} and labels of its own, which the data {data.name!r} does not have: leave --data "
            "out, or write a Family with your batch and loss in a file.py and pass file.py:name."
        )
    batch_size = min(batch_size, 4)  # sounds are long
    match reads:
        case "input_ids":
            inputs = _whole((batch_size, LENGTH), text.vocab_size, draw)
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
        return (inputs, _whole((batch_size, LENGTH + 1), text.vocab_size, draw)), _transcript(reads)
    return (inputs, torch.zeros(batch_size, dtype=torch.long)), _by_place(reads)


def _token_loss(cls: type, config: Any, vocabulary: int) -> Loss | None:
    """Loss of a language model, or None for another head."""
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


def _by_place(reads: str) -> Loss:
    """For heads whose labels nothing here has: the label of a logit is its place in the batch."""

    def loss(model: torch.nn.Module, batch: Any) -> Tensor:
        logits = model(**{reads: batch[0]}).logits.flatten(0, -2)
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device) % logits.shape[-1])

    return loss


class _Images:
    """Images as an image classifier's config asks for them."""

    def __init__(self, config: Any) -> None:
        vision = getattr(config, "vision_config", config)  # of a model that reads text too
        size = getattr(vision, "image_size", 64)
        self.size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        self.channels: int = getattr(vision, "num_channels", 3)
        self.classes: int = config.num_labels

    def check(self, model: str, data: Data) -> None:
        if data.kind != "images":
            raise RequestError(
                f"{model} reads images and the data {data.name!r} holds {data.kind}: choose data of that kind."
            )
        if data.classes > self.classes:
            raise RequestError(
                f"the data {data.name!r} has {data.classes} classes and {model} tells {self.classes} apart: put "
                f'"num_labels": {data.classes} into the config, or into the experiment\'s options.'
            )
        if data.inputs not in (1, self.channels):
            raise RequestError(
                f"the data {data.name!r} has {data.inputs} channels and {model} reads {self.channels}: choose other data."
            )

    def loss(self, model: torch.nn.Module, batch: Any) -> Tensor:
        images, labels = batch
        images = images.expand(-1, self.channels, -1, -1)
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, size=self.size, mode="bilinear")
        return _cross_entropy(model(pixel_values=images).logits, labels)


def _check_tokens(model: str, data: Data, text: Any) -> None:
    if data.kind != "tokens":
        raise RequestError(
            f"{model} reads tokens and the data {data.name!r} holds {data.kind}: choose data of that kind."
        )
    if data.classes > text.vocab_size:
        raise RequestError(
            f"the data {data.name!r} has {data.classes} different tokens and the vocab_size of {model} is {text.vocab_size}: "
            "choose data with fewer, or a larger vocab_size."
        )
    length, most = data.batch(0, 1, 0)[0].shape[1], _most(text)
    if most and length > most:
        raise RequestError(
            f"the data's sequences have {length} tokens and the max_position_embeddings of {model} is {most}: shorten "
            "sequence_length, or raise max_position_embeddings."
        )


def _most(text: Any) -> int | None:
    """Return how many positions a model knows; some configs say -1 for no limit."""
    most = getattr(text, "max_position_embeddings", None)
    return most if most and most > 0 else None


def _whole(shape: tuple[int, ...], below: int, draw: torch.Generator) -> Tensor:
    return torch.randint(below, shape, generator=draw)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


Make = Callable[[dict[str, Whole], Container[str]], torch.nn.Module]

# Heads in the order of preference, as transformers' auto classes call them. A model with an encoder reads both ways, so
# that a causal loss would show it the answer.
HEADS = (
    "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM", "CAUSAL_LM", "IMAGE_CLASSIFICATION", "IMAGE_TEXT_TO_TEXT", "CTC",
    "AUDIO_CLASSIFICATION", "SEQUENCE_CLASSIFICATION",
)  # fmt: skip


@dataclass(frozen=True)
class Sized:
    """A transformers model at any size: call it with a `Scale`.

    Args:
        reference: what the user wrote, for the sentences.
        make: config, changed fields and those of them that count layers → the model.
        fields: which of the config's numbers grow; the scale counts in the first of them.
    """

    reference: str
    make: Make
    fields: Fields

    def __call__(self, scale: Scale) -> torch.nn.Module:
        """Return the model with every growing field at its value for ``scale``."""
        changes = self.fields.at(scale.width, scale.depth)
        try:
            return self.make(changes, self.fields.depth)
        except Exception as error:
            raise RequestError(
                f"{self.reference} could not be built at width {scale.width}, depth {scale.depth}: it raised {said(error)}."
            ) from error


def load(
    reference: str,
    data: Data | None,
    base: Scale | None,
    *,
    batch_size: int = 32,
    options: dict[str, Any] | None = None,
) -> Family:
    """Return the family of the transformers config that ``reference`` names.

    Dropout is 0 and the cache off, so that a pass is a function of its input; attention and experts are computed in the way
    that transformers itself prefers. What the config derives from its width (a head dim) stays as the file's size has it.

    Args:
        reference: ``hf:path/to/config.json``, or a folder with one.
        data: where the example batch comes from; without it the batch is made up.
        base: the scale at which µP changes nothing; the file's own by default.
        batch_size: examples in the example batch.
        options: ``width_fields`` and ``depth_fields`` name what grows; any other key replaces a field of the config.

    Raises:
        RequestError: transformers is not there, the file is no config that it knows, the data does not fit the model, or it
            cannot be told what grows.
    """
    options = dict(options or {})
    width, depth = (_names(key, options.pop(key, [])) for key in ("width_fields", "depth_fields"))
    raw = _read(Path(reference.removeprefix("hf:")).expanduser())
    config_class, model_class = _classes(reference, raw, _transformers())
    spelled = _config(reference, config_class, raw, options)

    def make(changes: dict[str, Whole], layers: Container[str]) -> torch.nn.Module:
        config = config_class.from_dict(resized(spelled, changes, layers))
        if detect_fake_mode() is not None and "experts_implementation" not in options:
            config._experts_implementation = "batched_mm"  # the default, grouped_mm, has no fake kernel in float32
        model: torch.nn.Module = model_class(config)
        return model

    fields = infer(dict(flat(spelled)), config_class.attribute_map, make, width, depth)
    batch, loss = task_for(reference, model_class, config_class.from_dict(spelled), data, batch_size)
    return Family(Sized(reference, make, fields), batch, loss, base or Scale(*fields.size), model_class.__name__)


def _names(key: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise RequestError(f"options.{key} is {value!r}: give a list of names of the config's fields.")
    return value


def _constant(name: str) -> float:
    """Mamba-2's time steps go to Infinity, and nothing to NaN."""
    if name == "NaN":
        raise ValueError("a number is NaN")
    return float(name)


def _read(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(file.read_text(encoding="utf-8"), parse_constant=_constant)
    except FileNotFoundError:
        raise RequestError(
            f"there is no file {file}: give the config.json of a transformers model as hf:PATH."
        ) from None
    except OSError as error:
        raise RequestError(f"{file} cannot be read ({error.strerror}): give the config.json of a model.") from None
    except ValueError as error:
        raise RequestError(f"{file} is no JSON ({error}): give the config.json of a transformers model.") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise RequestError(f'{file} has no "model_type": give the config.json of a transformers model.')
    return raw


def _transformers() -> Any:
    """Import transformers, past a torchvision that is broken beside this torch (mup brings one along)."""
    if importlib.util.find_spec("transformers") is None:
        raise RequestError("hf: models need transformers, which is not installed: pip install 'mutransfer[hf]'.")
    if "transformers" not in sys.modules and importlib.util.find_spec("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
        except Exception:
            sys.modules["torchvision"] = None  # type: ignore[assignment]
            if multiprocessing.parent_process() is None:
                logger.warning("torchvision is broken beside this torch and left out: see `mutransfer doctor`.")
    try:
        module = importlib.import_module("transformers")
        # It speaks of checkpoints and tokenizers, and there are none here.
        module.logging.set_verbosity_error()
        importlib.import_module("transformers.models.auto.modeling_auto")
    except Exception as error:
        raise RequestError(f"transformers cannot be imported ({said(error)}): see `mutransfer doctor`.") from error
    return module


def _classes(reference: str, raw: dict[str, Any], transformers: Any) -> tuple[Any, Any]:
    """Return the classes of config and model: ``architectures[0]``, else the type's first head in `HEADS`."""
    configs = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    kind = raw["model_type"]
    if kind not in configs:
        if "auto_map" in raw:
            raise RequestError(
                f"{reference} needs code of its own (auto_map) and transformers has no model_type {kind!r}: import its class in "
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
        raise RequestError(f"{reference}: {name} has no head and so no logits: name a class in architectures, {hint}.")
    return config_class, getattr(transformers, name)


def _several(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return names if isinstance(names, tuple) else (names,) if names else ()


def _config(reference: str, config_class: Any, raw: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return the config with every default spelled out, ``options`` put in and everything random or cached left out."""
    try:
        defaults = config_class.from_dict(raw).to_dict()
        known = {*defaults, *config_class.attribute_map, "num_labels", "attn_implementation", "experts_implementation"}
        if unknown := sorted(options.keys() - known):
            raise RequestError(f"{reference} has no field {unknown[0]!r}: {nearest(unknown[0], known)}")
        config: dict[str, Any] = config_class.from_dict(raw | options).to_dict()
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(f"{reference} is no config of {raw['model_type']!r}: it raised {said(error)}.") from error
    kept = {key: options[key] for key in ("attn_implementation", "experts_implementation") if key in options}
    return _quiet(config) | kept


def _quiet(config: dict[str, Any]) -> dict[str, Any]:
    """Dropout of every kind at 0, no cache, no augmentation: what is random or remembered would blur every comparison."""
    quiet: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and "model_type" in value:
            value = _quiet(value)
        elif isinstance(value, float) and ("drop" in name or name.endswith("pdrop")):
            value = 0.0
        elif name in ("use_cache", "apply_spec_augment") and isinstance(value, bool):
            value = False
        quiet[name] = value
    return quiet
