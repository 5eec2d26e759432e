"""Start of a run: its corpus, its objective, and its encoder, fresh or of a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from clinattn.encoder import EncoderConfig, PretrainingModel
from clinattn.encoder.checkpoints import Pretrained, config_of, take_pretrained
from clinattn.workloads import Vocabulary
from clinattn.workloads.opening import KINDS, of_timelines, parse_data
from clinattn.workloads.timelines import Progress, silent
from clinattn.workloads.tokenizer import TextTokenizer, of_json, read_tokenizer

from .checkpoint import take_weights
from .corpus import read_corpus
from .data import Corpus
from .labelled import read_labelled
from .next_sentence import MaskedPairs
from .objectives import Classification, MaskedTokens, NextTokens, Objective
from .pairs import Pairs
from .regression import Regression
from .settings import DEFAULT_LR, DEFAULT_PRESET, FINE_TUNING_LR, TrainingSettings
from .standard import Standard


class Published(NamedTuple):
    """A folder of transformers: its encoder, tokenizer (None for data of codes) and model type."""

    folder: Path
    config: EncoderConfig
    tokenizer: TextTokenizer | None
    model_type: str


def read_published(folder: Path, settings: TrainingSettings) -> Published:
    """Reads config.json and the tokenizer of a folder to start from.

    Raises ValueError for a folder that cannot be read, or settings that contradict.
    """
    where = f"init={str(folder)!r}"
    if settings.preset is not None:
        raise ValueError(f"preset={settings.preset!r}: expected none, as {where} has its own shape")
    assert settings.data is not None
    if parse_data(settings.data).kind != "text":
        raise ValueError(f"data={settings.data!r}: {where} reads texts, expected text:FILE")
    try:
        config, model_type = config_of(folder)
    except FileNotFoundError as error:
        raise ValueError(f"{where}: {error}") from None
    tokenizer = read_tokenizer(Path(settings.tokenizer or folder))
    tokens = len(tokenizer.vocabulary)
    if tokens > config.vocab_size:
        raise ValueError(
            f"tokenizer of {where} has {tokens:,} tokens: expected at most the "
            f"{config.vocab_size:,} of its config.json"
        )
    return Published(folder, config, tokenizer, model_type)


def make_corpus(
    settings: TrainingSettings,
    saved: dict[str, Any] | None,
    published: Published | None = None,
    progress: Progress = silent,
) -> Corpus:
    """The corpus as the encoder needs it, with the vocabulary and scales of what it starts from."""
    vocabulary, standard, tokenizer = None, None, None
    if published is not None:
        config, tokenizer = published.config, published.tokenizer
    elif saved is not None:
        config, vocabulary, standard = of_checkpoint(saved)
        tokenizer = tokenizer_of(saved)
    else:
        config = EncoderConfig.preset(settings.preset or DEFAULT_PRESET)
    check_source(config, settings)
    known: dict[str, Any] = {
        "times": config.positions == "rotary_time",
        "values": config.numeric_values,
        "standard": standard,
        "progress": progress,
    }
    assert settings.data is not None
    if settings.labels is not None and of_timelines(parse_data(settings.data).kind):
        return read_labelled(settings, vocabulary, **known)
    # tokens of a length profile are drawn from as many ids as when the run of a checkpoint began,
    # whose config has those that were seen
    began = None if saved is None else saved["settings"]["preset"]
    ids = config.vocab_size if began is None else EncoderConfig.preset(began).vocab_size
    return read_corpus(settings, vocabulary, **known, vocab_size=ids, tokenizer=tokenizer)


def of_checkpoint(saved: dict[str, Any]) -> tuple[EncoderConfig, Vocabulary, Standard | None]:
    """Returns a checkpoint's configuration, vocabulary and scales of values."""
    scales = saved.get("standard")
    standard = None if scales is None else Standard(**scales)
    tokenizer = tokenizer_of(saved)
    if tokenizer is None:
        vocabulary = Vocabulary(tuple(saved["tokens"]))
    else:
        vocabulary = tokenizer.vocabulary
    return EncoderConfig(**saved["config"]), vocabulary, standard


def tokenizer_of(saved: dict[str, Any]) -> TextTokenizer | None:
    """Returns a checkpoint's tokenizer; None for codes, words, or one older than tokenizers."""
    content = saved.get("tokenizer")
    return None if content is None else of_json(content, "the tokenizer of the checkpoint")


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
            "not: expected meds:DIR or meds-torch:DIR, or a preset of token ids"
        )


def make_objective(settings: TrainingSettings, corpus: Corpus, config: EncoderConfig) -> Objective:
    if settings.task == "classify":
        numeric = corpus.target is not None and corpus.target.mean is not None
        return Regression(corpus) if numeric else Classification(corpus, settings.pool)
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
    settings: TrainingSettings,
    corpus: Corpus,
    saved: dict[str, Any] | None,
    published: Published | None = None,
) -> EncoderConfig:
    """The preset for this vocabulary and these lengths, or the encoder that is started from."""
    if published is not None:
        return _for_task(_fits(published.config, settings), settings.task)
    if saved is not None:
        if settings.preset not in (None, saved["settings"]["preset"]):
            raise ValueError(
                f"preset={settings.preset!r}: expected {saved['settings']['preset']!r} as in the "
                "checkpoint of init"
            )
        check_split(settings, corpus, saved)
        return _for_task(_fits(EncoderConfig(**saved["config"]), settings), settings.task)
    preset = settings.preset or DEFAULT_PRESET
    known = EncoderConfig.preset(preset)
    rows = settings.max_tokens + known.position_offset
    config = EncoderConfig.preset(
        preset,
        vocab_size=len(corpus.tokens),
        max_positions=max(known.max_positions, rows),
        causal=known.causal or settings.task == "clm",
    )
    return _for_task(config, settings.task)


class Settled(NamedTuple):
    """Settings that follow from the start of a run. preset: None for a shape that was published.

    architecture: the preset, or else the model type. lr: at its peak.
    """

    preset: str | None
    architecture: str
    lr: float


def settled(
    settings: TrainingSettings, saved: dict[str, Any] | None, published: Published | None
) -> Settled:
    """The settings that were given, and for the others what suits where the run starts."""
    preset: str | None
    if published is not None:
        preset, architecture = None, published.model_type
    elif saved is not None:
        preset = saved["settings"]["preset"]
        architecture = preset or saved["architecture"]
    else:
        preset = architecture = settings.preset or DEFAULT_PRESET
    lr = FINE_TUNING_LR if preset is None else DEFAULT_LR
    if settings.resume and saved is not None:
        lr = saved["settings"]["lr"]
    return Settled(preset, architecture, lr if settings.lr is None else settings.lr)


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


def _fits(config: EncoderConfig, settings: TrainingSettings) -> EncoderConfig:
    """Raises ValueError where sequences are longer than learned positions."""
    positions = config.max_positions - config.position_offset
    if config.positions == "learned" and settings.max_tokens > positions:
        raise ValueError(
            f"max_tokens={settings.max_tokens}: expected at most the {positions} positions of init"
        )
    return config


def _for_task(config: EncoderConfig, task: str) -> EncoderConfig:
    """The encoder for a task's head; a causal one is classified by its last token."""
    causal = config.causal
    if causal and task == "classify":
        return EncoderConfig(**asdict(config) | {"pooling": "last"})
    if causal != (task == "clm"):
        raise ValueError(f"task={task!r}: the encoder has causal={causal}, expected {not causal}")
    return config


def take_published(model: nn.Module, published: Published) -> list[str]:
    """Loads the weights of a folder; returns the names of those it lacks, which stay as drawn."""
    target = model.masked if isinstance(model, PretrainingModel) else model
    assert isinstance(target, Pretrained)
    return take_pretrained(target, published.folder)


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
