"""The words of the page that a reader need not know, explained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Word:
    """signs: texts on the page, lower case, that show that it is used.

    link: who says more, and where. heads: columns that it explains.
    """

    name: str
    text: str
    signs: tuple[str, ...]
    link: tuple[str, str] | None = None
    heads: tuple[str, ...] = ()


SDPA = "https://docs.pytorch.org/docs/stable/generated/"
SDPA += "torch.nn.functional.scaled_dot_product_attention.html"

WORDS = (
    Word(
        "Attention",
        "The step of a language model in which each token looks at other tokens. On long texts "
        "most time goes into it.",
        ("attention", "clinattn"),
    ),
    Word("clinattn", "The library that is measured here: exact attention.", ("clinattn",)),
    Word(
        "torch SDPA",
        "The attention that PyTorch itself brings, scaled_dot_product_attention: the rival.",
        ("sdpa",),
        ("PyTorch on SDPA", SDPA),
    ),
    Word(
        "Eager attention",
        "Attention as separate steps, with a score for each pair of tokens in memory.",
        ("eager",),
    ),
    Word(
        "Token, tokens/s",
        "A word, a part of a word or an event of a patient, as the model reads it. Tokens a second "
        "is the speed; padding is not counted as a token.",
        ("token",),
        heads=("tokens/s",),
    ),
    Word(
        "Padding, padded",
        "Filler that makes the sequences of a batch equally long. A padded way computes it as if "
        "it were text; the percentage is its share of what is computed.",
        ("padd",),
        heads=("padding",),
    ),
    Word(
        "Length-bucketed",
        "Padded, with sequences of similar length in one batch, so that there is less filler.",
        ("bucketed",),
    ),
    Word("Packed", "Sequences one after the other, without filler.", ("packed", "packing")),
    Word(
        "Kernels",
        "The compiled functions that do the work. Their gain is that of clinattn over torch with "
        "the same padding on both sides.",
        ("kernel",),
    ),
    Word(
        "With linear layers",
        "Not only attention is clinattn's, but the products with weights around it too.",
        ("with linear layers",),
    ),
    Word(
        "Pass: training, inference, forward, backward",
        "Training changes the model's weights; inference uses the finished model. Inference is a "
        "forward pass; training has a backward pass too, which computes how to change the weights.",
        ("training", "inference", "forward", "backward"),
        heads=("pass",),
    ),
    Word(
        "Median, quartiles",
        "Half of the rounds were slower than the median, half were faster. The middle half of the "
        "rounds lies between the quartiles: the closer they are, the surer is the number.",
        ("median", "quartiles"),
        heads=("quartiles",),
    ),
    Word(
        "Times as fast",
        "2.00 means twice as fast, 1.00 no difference, and less than 1 slower.",
        ("times",),
        heads=("times as fast",),
    ),
    Word(
        "Geometric mean",
        "The mean of ratios, in which twice and half as fast cancel out.",
        ("geometric mean",),
    ),
    Word(
        "Peak memory, MiB",
        "The most memory that was needed at one time. A MiB is 1,048,576 bytes.",
        ("mib",),
        heads=("peak MiB",),
    ),
    Word(
        "CPU share, other work",
        "How much of the processor the measurement had, and how many of its CPUs other programs "
        "kept busy meanwhile. A star marks rows that are slower for that reason.",
        ("cpu share", "other work"),
        heads=("CPU share", "other work, CPUs"),
    ),
    Word(
        "Load average",
        "How many programs ran or waited for a CPU in the minute before.",
        ("load average",),
    ),
    Word(
        "fp32, bf16, 16 bit, 8 bit",
        "How many bits a number has. Fewer are faster and less exact.",
        ("fp32", "bf16", "16 bit"),
    ),
    Word(
        "% of peak, GFLOP/s",
        "Billions of computing steps a second; the peak is what the processor can do at most.",
        ("gflop",),
        heads=("% of peak", "GFLOP/s", "peak, GFLOP/s"),
    ),
    Word(
        "Error, as a share of what is allowed",
        "Computers round numbers. What is allowed follows from the rounding that the model's own "
        "attention has, so that 1.00 is the limit.",
        ("as a share of what is allowed", "error allowed"),
    ),
    Word(
        "RMS error",
        "How far results are from those in fp32 on the average, relative to their size.",
        ("rms error",),
        heads=("rms error",),
    ),
    Word(
        "transformers",
        "The library of Hugging Face with the published models.",
        ("transformers",),
        ("Its documentation", "https://huggingface.co/docs/transformers/"),
    ),
    Word(
        "OpenVINO",
        "Intel's program for running finished models.",
        ("openvino",),
        ("Its documentation", "https://docs.openvino.ai/"),
    ),
    Word(
        "ONNX Runtime",
        "Microsoft's program for running finished models.",
        ("onnx runtime",),
        ("Its documentation", "https://onnxruntime.ai/docs/"),
    ),
)
HEADS = {head: i for i, word in enumerate(WORDS) for head in word.heads}


def words_in(texts: Iterable[str]) -> list[tuple[int, Word]]:
    """The words that texts of a page use, with their places among WORDS."""
    given = set(texts)
    text = "\n".join(given).lower()
    return [
        (i, word)
        for i, word in enumerate(WORDS)
        if given & set(word.heads) or any(sign in text for sign in word.signs)
    ]


def word_of(head: str) -> int | None:
    """The place of the word that explains the head of a column; None where it needs no word."""
    return HEADS.get(head)
