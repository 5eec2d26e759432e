"""What a run starts from: its corpus, its objective, and its encoder, fresh or of a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn

from clinattn.encoder import EncoderConfig
from clinattn.workloads import Vocabulary

from .data import Corpus
from .meds_corpus import meds_corpus
from .objectives import Classification, MaskedTokens, NextTokens, Objective
from .settings import Settings
from .text_corpus import text_corpus


def make_corpus(settings: Settings, saved: dict[str, Any] | None) -> Corpus:
    """With the vocabulary of the checkpoint, if there is one."""
    vocabulary = None if saved is None else Vocabulary(tuple(saved["tokens"]))
    read = meds_corpus if settings.meds_dir is not None else text_corpus
    return read(settings, vocabulary)


def make_objective(settings: Settings, corpus: Corpus) -> Objective:
    if settings.task == "classify":
        return Classification(corpus)
    kind = NextTokens if settings.task == "clm" else MaskedTokens
    return kind(corpus, settings.mask_share, settings.seed)


def make_config(settings: Settings, corpus: Corpus, saved: dict[str, Any] | None) -> EncoderConfig:
    """The preset for this vocabulary and these lengths, or what the checkpoint was made with."""
    if saved is not None:
        if saved["settings"]["preset"] != settings.preset:
            raise ValueError(
                f"preset={settings.preset!r}: expected {saved['settings']['preset']!r} as in the "
                "checkpoint of init"
            )
        if saved["settings"]["held_out"] < settings.held_out:
            raise ValueError(
                f"held_out={settings.held_out}: expected at most {saved['settings']['held_out']} "
                "as in the checkpoint of init, whose encoder has seen the others"
            )
        config = EncoderConfig(**saved["config"])
        if config.positions == "learned" and settings.max_tokens > config.max_positions:
            raise ValueError(
                f"max_tokens={settings.max_tokens}: expected at most the {config.max_positions} "
                "positions of the checkpoint of init"
            )
        return _for_task(config, settings.task)
    published = EncoderConfig.preset(settings.preset)
    check_tokens_alone(published, settings.preset)
    rows = settings.max_tokens + published.position_offset
    config = EncoderConfig.preset(
        settings.preset,
        vocab_size=len(corpus.tokens),
        max_positions=max(published.max_positions, rows),
        causal=published.causal or settings.task == "clm",
    )
    return _for_task(config, settings.task)


def check_tokens_alone(config: EncoderConfig, preset: str) -> None:
    """Raise NotImplementedError for an encoder that asks for more than token ids."""
    if config.positions == "rotary_time" or config.numeric_values or config.channels:
        raise NotImplementedError(
            f"preset={preset!r} asks for times, values or a signal beside token ids, which "
            "training does not give it: expected a preset of token ids alone"
        )


def _for_task(config: EncoderConfig, task: str) -> EncoderConfig:
    """The encoder for a task's head; a causal one is classified by its last token."""
    causal = config.causal
    if causal and task == "classify":
        return EncoderConfig(**asdict(config) | {"pooling": "last"})
    if causal != (task == "clm"):
        raise ValueError(f"task={task!r}: the encoder has causal={causal}, expected {not causal}")
    return config


def take_encoder(model: nn.Module, start: dict[str, Any]) -> None:
    """The encoder's weights of a checkpoint; the head keeps its own."""
    own = model.state_dict()
    own.update({n: w for n, w in start["model"].items() if n.startswith("encoder.")})
    model.load_state_dict(own)
