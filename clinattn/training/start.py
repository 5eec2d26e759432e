"""Start of a run: its corpus, its objective, and its encoder, fresh or of a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn

from clinattn.encoder import EncoderConfig
from clinattn.workloads import Vocabulary
from clinattn.workloads.opening import KINDS, parse_data

from .checkpoint import take_weights
from .corpus import read_corpus
from .data import Corpus
from .labelled import read_labelled
from .next_sentence import MaskedPairs
from .objectives import Classification, MaskedTokens, NextTokens, Objective
from .pairs import Pairs
from .regression import Regression
from .settings import TrainingSettings
from .standard import Standard


def make_corpus(settings: TrainingSettings, saved: dict[str, Any] | None) -> Corpus:
    """The corpus as the encoder needs it, with the checkpoint's vocabulary and scales, if any."""
    if saved is None:
        config, vocabulary, standard = EncoderConfig.preset(settings.preset), None, None
    else:
        config, vocabulary, standard = of_checkpoint(saved)
    check_source(config, settings)
    known: dict[str, Any] = {
        "times": config.positions == "rotary_time",
        "values": config.numeric_values,
        "standard": standard,
    }
    if settings.labels is not None:
        return read_labelled(settings, vocabulary, **known)
    return read_corpus(settings, vocabulary, **known, vocab_size=config.vocab_size)


def of_checkpoint(saved: dict[str, Any]) -> tuple[EncoderConfig, Vocabulary, Standard | None]:
    """Returns a checkpoint's configuration, vocabulary and scales of values."""
    scales = saved.get("standard")
    standard = None if scales is None else Standard(**scales)
    return EncoderConfig(**saved["config"]), Vocabulary(tuple(saved["tokens"])), standard


def check_source(config: EncoderConfig, settings: TrainingSettings) -> None:
    """Raise where the corpus cannot have what the encoder asks for."""
    if config.channels:
        raise NotImplementedError(
            f"preset={settings.preset!r} asks for a signal (channels={config.channels}), which "
            "training does not give it: expected one of tokens"
        )
    assert settings.data is not None
    kind = KINDS[parse_data(settings.data).kind]
    asks = {"times": config.positions == "rotary_time", "values": config.numeric_values}
    lacking = [name for name, asked in asks.items() if asked and name not in kind.has]
    if lacking:
        raise ValueError(
            f"preset={settings.preset!r} asks for {' and '.join(lacking)}, which {kind.word} has "
            "not: expected meds:DIR, or a preset of token ids alone"
        )


def make_objective(settings: TrainingSettings, corpus: Corpus, config: EncoderConfig) -> Objective:
    if settings.task == "classify":
        numeric = corpus.target is not None and corpus.target.mean is not None
        return Regression(corpus) if numeric else Classification(corpus)
    if settings.task == "clm":
        return NextTokens(corpus, settings.mask_share, settings.seed)
    if corpus.sep is None:
        return MaskedTokens(corpus, settings.mask_share, settings.seed)
    train, held_out = (
        Pairs(corpus.source, split, corpus.sep) for split in (corpus.train, corpus.held_out)
    )
    typed = config.token_types >= 2
    return MaskedPairs(corpus, settings.mask_share, settings.seed, train, held_out, typed)


def make_config(
    settings: TrainingSettings, corpus: Corpus, saved: dict[str, Any] | None
) -> EncoderConfig:
    """The preset for this vocabulary and these lengths, or what the checkpoint was made with."""
    if saved is not None:
        if saved["settings"]["preset"] != settings.preset:
            raise ValueError(
                f"preset={settings.preset!r}: expected {saved['settings']['preset']!r} as in the "
                "checkpoint of init"
            )
        check_split(settings, corpus, saved)
        config = EncoderConfig(**saved["config"])
        if config.positions == "learned" and settings.max_tokens > config.max_positions:
            raise ValueError(
                f"max_tokens={settings.max_tokens}: expected at most the {config.max_positions} "
                "positions of the checkpoint of init"
            )
        return _for_task(config, settings.task)
    published = EncoderConfig.preset(settings.preset)
    rows = settings.max_tokens + published.position_offset
    config = EncoderConfig.preset(
        settings.preset,
        vocab_size=len(corpus.tokens),
        max_positions=max(published.max_positions, rows),
        causal=published.causal or settings.task == "clm",
    )
    return _for_task(config, settings.task)


def check_split(settings: TrainingSettings, corpus: Corpus, saved: dict[str, Any]) -> None:
    """Raises ValueError where the encoder of a checkpoint may have seen who is held out now.

    A checkpoint without a record of its split is older than owners' lists, and went by the hash.
    """
    if settings.other_patients:
        return
    before = saved.get("split", {"by": "hash"})
    if before != corpus.split:
        said = {"hash": "a hash of each subject", "list": "a list of splits"}
        other = "another list" if corpus.split["by"] == before["by"] else said[corpus.split["by"]]
        raise ValueError(
            f"init: its checkpoint was split by {said[before['by']]}, and the data are by {other}: "
            "its encoder may have seen who is held out now; expected the same split, or "
            "other_patients where the data are of other patients"
        )
    share = saved["settings"]["held_out"]
    if share < settings.held_out:
        raise ValueError(
            f"held_out={settings.held_out}: expected at most {share} as in the checkpoint of init, "
            "whose encoder has seen the others"
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
    """Loads the encoder's weights from a checkpoint; the head keeps its own."""
    encoder = model.encoder
    assert isinstance(encoder, nn.Module)
    whole = {name.removeprefix("masked."): weight for name, weight in start["model"].items()}
    prefix = "encoder."
    take_weights(
        encoder,
        {n.removeprefix(prefix): w for n, w in whole.items() if n.startswith(prefix)},
        "the checkpoint of init",
    )
