"""What a transformers model is trained on here: an example batch, and a loss taken from its logits.

Losses never use the model's own ``labels``: our token data comes shifted, and models differ in whether they shift again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mutransfer.errors import RequestError

from .data.base import Batch, Data

__all__ = ["task_for"]

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
