"""The table of attention problems that every backend is held against.

CASES is what to parametrize over: `@pytest.mark.parametrize("case", CASES, ids=str)`. A test on a
slow device picks from it, such as [c for c in CASES if c.work < 1e5].
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """An attention problem.

    value_dim: the head dimension of v, that of q by default.
    nq, nk: tokens of the dense layout, or a tuple with those of each packed sequence.
    mask: None, or kind:shape, with a kind of bool, float (some -inf), left (bool, left padding),
    right (bool, right padding) or none (bool, nothing visible), and a shape in letters of "bhqk",
    1 where it broadcasts. expand_mask: handed over as an expanded view of the full shape.
    strides: contiguous, transposed (as (B, N, H, D)), sliced (from a longer last dimension),
    reversed (a last stride that is not 1) or expanded (one head's keys for all).
    cotangent: random, expanded (one number for all, as of a sum), o or lse (the other has none).
    logits: the largest |score|, where it is to be set. rising: scores grow along the keys.
    tail: packed rows past the last sequence.
    mask_grad: the mask, of kind float, needs a gradient.
    segments: how many, drawn anew for each row. times: their dtype. alibi: slopes by "h" or "bh".
    relative: the largest distance L of a bias table.
    """

    id: str
    batch: int = 2
    heads: int = 2
    kv_heads: int | None = None
    nq: int | tuple[int, ...] = 65
    nk: int | tuple[int, ...] | None = None
    dim: int = 16
    value_dim: int | None = None
    causal: bool = False
    window: int | tuple[int | None, int | None] | None = None
    mask: str | None = None
    expand_mask: bool = False
    q_lengths: tuple[int, ...] | None = None
    kv_lengths: tuple[int, ...] | None = None
    scale: float | None = None
    strides: str = "contiguous"
    cotangent: str = "random"
    logits: float | None = None
    rising: bool = False
    tail: int = 0
    mask_grad: bool = False
    segments: int = 0
    times: str | None = None
    time_window: float | None = None
    time_decay: bool = False
    alibi: str | None = None
    relative: int | None = None
    softcap: float | None = None
    global_prefix: int = 0
    dropout: float | None = None

    @property
    def packed(self) -> bool:
        return isinstance(self.nq, tuple)

    @property
    def longest(self) -> int:
        """Queries of the longest sequence."""
        return max(self.nq) if isinstance(self.nq, tuple) else self.nq

    @property
    def work(self) -> int:
        """Multiply-adds of the scores, masked ones included."""
        nk = self.nq if self.nk is None else self.nk
        if isinstance(self.nq, tuple) and isinstance(nk, tuple):
            pairs = sum(a * b for a, b in zip(self.nq, nk, strict=True))
        else:
            pairs = self.batch * self.nq * nk
        return pairs * self.heads * (self.dim + self.width_of_v) // 2

    @property
    def width_of_v(self) -> int:
        return self.dim if self.value_dim is None else self.value_dim

    def __str__(self) -> str:
        return self.id


SIZES = [
    Case("one-key", batch=64, heads=4, nq=1, nk=1, dim=16),
    Case("one-query", nq=1, nk=113),
    Case("one-key-many-queries", nq=65, nk=1),
    *(Case(f"dim{d}", nq=63, nk=65, dim=d) for d in (1, 16, 24, 40, 64, 96, 128, 256)),
    Case("dim-odd", nq=33, nk=47, dim=37),
    Case("keys-longer", nq=17, nk=200, dim=40),
    Case("queries-longer", nq=200, nk=17, dim=40),
    Case("long", batch=1, heads=1, nq=1000, dim=24),
    Case("gqa", heads=6, kv_heads=2, nq=65, nk=33, dim=24),
    Case("mqa", heads=5, kv_heads=1, nq=31, nk=64, dim=16),
    Case("scale", nq=31, scale=0.7),
    Case("scale-negative", nq=31, scale=-0.3),
    Case("scale-zero", nq=31, scale=0.0),
]

WINDOWS = [
    Case("causal", nq=113, causal=True),
    Case("causal-keys-longer", nq=33, nk=130, causal=True),
    Case("causal-queries-longer", nq=130, nk=33, causal=True),
    Case("causal-gqa", heads=4, kv_heads=2, nq=65, causal=True),
    Case("window", nq=200, window=16),
    Case("window0", nq=65, window=0),
    Case("window-wide", nq=65, window=1000),
    Case("window-left", nq=130, window=(20, 0)),
    Case("window-right", nq=130, window=(0, 20)),
    Case("window-one-query", nq=1, nk=64, window=41),  # keys from 42 on hold NaN
    Case("window-left-open", nq=65, window=(None, 3)),
    Case("window-right-open", nq=65, window=(3, None)),
    Case("window-causal", nq=130, window=33, causal=True),
    Case("window-past-the-keys", nq=200, nk=33, window=5),
    Case("window-gqa-long", batch=1, heads=2, kv_heads=1, nq=1000, dim=24, window=64),
]

LENGTHS = [
    Case("kv-lengths", batch=3, nk=113, kv_lengths=(113, 40, 1)),
    Case("kv-lengths-empty", batch=3, kv_lengths=(65, 0, 7)),
    Case("q-lengths", batch=3, q_lengths=(65, 0, 30)),
    Case("lengths", batch=3, nq=113, q_lengths=(113, 40, 0), kv_lengths=(113, 40, 0)),
    Case("lengths-causal", batch=2, nq=113, q_lengths=(90, 64), kv_lengths=(100, 64), causal=True),
    Case("lengths-window", batch=2, nq=150, q_lengths=(150, 65), kv_lengths=(140, 65), window=9),
    Case("lengths-gqa", heads=4, kv_heads=2, nq=65, q_lengths=(65, 9), kv_lengths=(64, 9), dim=40),
    Case("kv-lengths-mask", batch=2, nq=65, kv_lengths=(65, 20), mask="bool:11qk"),
]

MASKS = [
    *(
        Case(f"mask-{kind}-{shape}", heads=3, nq=65, nk=70, mask=f"{kind}:{shape}")
        for kind in ("bool", "float")
        for shape in ("qk", "11qk", "b1qk", "1hqk", "bhqk", "b11k", "bh1k", "k", "bhq1", "1h11")
    ),
    Case("mask-bool-causal", nq=65, mask="bool:qk", causal=True),
    Case("mask-float-window", nq=113, mask="float:1hqk", window=20),
    Case("mask-bool-gqa", heads=4, kv_heads=2, nq=65, mask="bool:bhqk"),
    Case("mask-float-gqa", heads=4, kv_heads=2, nq=65, mask="float:bhqk"),
    Case("mask-bool-gqa-kv-lengths", heads=4, kv_heads=1, mask="bool:b11k", kv_lengths=(65, 31)),
    Case("mask-expanded", heads=3, nq=65, mask="bool:b11k", expand_mask=True),
    Case("mask-float-expanded", heads=3, nq=65, mask="float:1hqk", expand_mask=True),
    Case("mask-left-padding", batch=3, nq=113, mask="left:b11k"),
    Case("mask-right-padding", batch=3, nq=113, mask="right:b11k"),
    Case("mask-right-padding-causal", batch=3, nq=113, mask="right:b11k", causal=True),
    Case("mask-left-padding-window", batch=3, nq=113, mask="left:b11k", window=20),
    Case("mask-none-visible", nq=33, mask="none:qk"),
    Case("mask-none-visible-keys", nq=33, mask="none:b11k"),
]

MEMORY = [
    *(
        Case(f"strides-{strides}", heads=3, nq=65, nk=66, dim=24, strides=strides)
        for strides in ("transposed", "sliced", "reversed", "expanded")
    ),
    Case("cotangent-expanded", nq=65, cotangent="expanded"),
    Case("cotangent-o-only", nq=65, cotangent="o"),
    Case("cotangent-lse-only", nq=65, cotangent="lse"),
    Case("cotangent-lse-only-gqa", heads=4, kv_heads=2, nq=65, cotangent="lse", causal=True),
    Case("logits-100", nq=65, logits=1e2),
    Case("logits-1e4", nq=65, logits=1e4),
    Case("logits-1e4-causal", nq=65, logits=1e4, causal=True),
    Case("logits-tiny", nq=65, logits=1e-4),
    Case("logits-rising", batch=1, nq=40, nk=700, logits=50, rising=True),
    Case("logits-rising-causal", batch=1, nq=330, logits=300, rising=True, causal=True),
]

PACKED = [
    Case("packed-one", nq=(65,)),
    Case("packed", nq=(63, 1, 113, 16), dim=24),
    Case("packed-empty-sequences", nq=(0, 33, 0, 0, 65, 0)),
    Case("packed-all-empty", nq=(0, 0)),
    Case("packed-no-keys", nq=(7, 9), nk=(0, 9)),
    Case("packed-cross", nq=(5, 64, 1), nk=(33, 7, 100), dim=40),
    Case("packed-causal", nq=(113, 40, 1), causal=True),
    Case("packed-cross-causal", nq=(33, 64), nk=(64, 33), causal=True),
    Case("packed-window", nq=(200, 31, 64), window=10),
    Case("packed-window-causal", nq=(130, 31), window=(9, 4), causal=True),
    Case("packed-gqa", heads=6, kv_heads=2, nq=(65, 33), dim=40),
    Case("packed-mqa-window", heads=3, kv_heads=1, nq=(65, 33), window=7),
    Case("packed-many-short", nq=tuple(i % 4 for i in range(64))),
    Case("packed-tail", nq=(33, 20), tail=9),
    Case("packed-transposed", nq=(33, 20), strides="transposed"),
    Case("packed-sliced", nq=(33, 20), dim=24, strides="sliced"),
    Case("packed-expanded-cotangent", nq=(33, 20), cotangent="expanded"),
    Case("packed-lse-only", nq=(33, 20), cotangent="lse"),
    Case("packed-logits-1e4", nq=(65, 20), logits=1e4),
    Case("packed-dim128", nq=(65, 20), dim=128),
]

VALUES = [
    Case("values-wider", nq=65, nk=70, dim=24, value_dim=80),
    Case("values-narrower", nq=65, nk=70, dim=80, value_dim=24),
    Case("values-widest", batch=1, nq=33, dim=8, value_dim=256),
    Case("values-narrowest", batch=1, nq=33, dim=192, value_dim=1),
    Case("values-192-128", batch=1, nq=70, dim=192, value_dim=128, causal=True),
    Case("values-gqa-window", heads=4, kv_heads=2, nq=130, dim=40, value_dim=64, window=9),
    Case("values-mask", heads=3, nq=65, nk=70, dim=33, value_dim=16, mask="float:1hqk"),
    Case("values-left-padding", batch=3, nq=66, dim=16, value_dim=48, mask="left:b11k"),
    Case("values-packed", nq=(63, 1, 113, 16), dim=64, value_dim=96, tail=3),
    Case("values-packed-sliced", nq=(33, 20), dim=40, value_dim=24, strides="sliced"),
    Case("values-transposed", nq=65, dim=40, value_dim=72, strides="transposed"),
    Case("values-lengths", batch=3, nq=65, q_lengths=(65, 0, 30), kv_lengths=(60, 0, 30),
         dim=24, value_dim=40),
    Case("values-logits-1e4", nq=65, dim=24, value_dim=40, logits=1e4),
]  # fmt: skip

ADDED = [
    *(
        Case(f"mask-grad-{shape}", heads=3, nq=65, nk=70, mask=f"float:{shape}", mask_grad=True)
        for shape in ("qk", "11qk", "b1qk", "1hqk", "bhqk", "b11k", "bh1k", "k", "bhq1", "1h11")
    ),
    Case("mask-grad-causal", nq=65, mask="float:1hqk", mask_grad=True, causal=True),
    Case("mask-grad-expanded", heads=3, mask="float:1hqk", mask_grad=True, expand_mask=True),
    Case("mask-grad-gqa", heads=4, kv_heads=2, mask="float:bhqk", mask_grad=True, window=9),
    Case(
        "mask-grad-lengths", batch=2, mask="float:b1qk", mask_grad=True, q_lengths=(65, 9),
        kv_lengths=(60, 9),
    ),
    Case("alibi", nq=113, alibi="h"),
    Case("alibi-batch", batch=3, heads=4, kv_heads=2, nq=65, nk=40, alibi="bh"),
    Case("alibi-causal", nq=113, alibi="h", causal=True),
    Case("alibi-packed", nq=(65, 33), alibi="bh", dim=40),
    Case("alibi-packed-cross", nq=(5, 64, 1), nk=(33, 7, 100), alibi="h"),
    Case("relative", nq=113, relative=16),
    Case("relative-0", nq=65, relative=0),
    Case("relative-far", nq=40, nk=70, relative=100),
    Case("relative-gqa-window", heads=4, kv_heads=2, nq=130, relative=7, window=20),
    Case("relative-packed", nq=(65, 0, 33), relative=12, tail=3),
    Case("softcap", nq=113, softcap=3.0, logits=10),
    Case("softcap-small", nq=65, softcap=0.1),
    Case("softcap-mask", nq=65, softcap=5.0, mask="float:1hqk", scale=1.0),
    Case("softcap-packed", nq=(65, 33), softcap=2.0, logits=20, causal=True),
]  # fmt: skip

INTERVALS = [
    Case("segments", batch=3, nq=113, segments=6),
    Case("segments-one", nq=65, segments=1),
    Case("segments-many", nq=200, segments=150, dim=24),
    Case("segments-causal", nq=113, segments=5, causal=True),
    Case("segments-gqa-window", heads=4, kv_heads=2, nq=130, segments=5, window=9),
    Case(
        "segments-lengths", batch=3, nq=65, segments=4, q_lengths=(65, 20, 0),
        kv_lengths=(60, 20, 0),
    ),
    Case("segments-q-lengths", batch=2, nq=65, segments=4, q_lengths=(65, 20)),
    Case("segments-mask", nq=65, segments=4, mask="bool:bhqk"),
    *(
        Case(f"times-{dtype}", nq=113, times=dtype, time_window=5.0)
        for dtype in ("float32", "float64", "int64")
    ),
    Case("times-window-0", nq=113, times="float64", time_window=0.0),
    Case("times-window-infinite", nq=65, times="float64", time_window=float("inf")),
    Case("times-window-causal", nq=113, times="float64", time_window=3.0, causal=True),
    Case("times-segments", nq=113, times="float32", time_window=9.0, segments=4),
    Case(
        "times-lengths", batch=3, nq=65, times="float64", time_window=4.0, time_decay=True,
        q_lengths=(65, 20, 0), kv_lengths=(64, 20, 0),
    ),
    Case("times-left-padding", batch=3, nq=66, mask="left:b11k", times="float64", time_window=6.0),
    Case("times-packed", nq=(113, 0, 40, 1), times="float64", time_window=5.0, tail=4),
    Case("decay", nq=113, times="float64", time_decay=True),
    Case("decay-int64", heads=4, kv_heads=2, nq=65, times="int64", time_decay=True, causal=True),
    Case("decay-window", nq=113, times="float32", time_window=8.0, time_decay=True, dim=40),
    Case("decay-packed", nq=(65, 33), times="float64", time_window=7.0, time_decay=True),
    Case("prefix", nq=113, window=9, global_prefix=3),
    Case("prefix-causal", nq=65, causal=True, global_prefix=5),
    Case("prefix-keys-longer", nq=33, nk=130, window=4, global_prefix=40 - 20),
    Case("prefix-everything", nq=33, window=1, global_prefix=33),
    Case("prefix-segments", nq=113, segments=7, global_prefix=2),
    Case("prefix-gqa-long", batch=1, heads=4, kv_heads=2, nq=700, window=32, global_prefix=17),
    Case("prefix-lengths", batch=3, nq=65, window=3, global_prefix=9, kv_lengths=(65, 20, 4)),
    Case("prefix-left-padding", batch=3, nq=66, mask="left:b11k", window=5, global_prefix=6),
    Case("prefix-mask", nq=65, mask="bool:11qk", window=5, global_prefix=6),
    Case("prefix-packed", nq=(113, 5, 0, 64), window=5, global_prefix=7),
    Case("prefix-biases", nq=113, window=7, global_prefix=5, alibi="h", relative=9, softcap=4.0),
]  # fmt: skip

DROPOUT = [
    Case("dropout", nq=65, dropout=0.1),
    Case("dropout-half", nq=33, nk=70, dropout=0.5, dim=40),
    Case("dropout-rare", nq=65, dropout=1e-3),
    Case("dropout-all", nq=33, dropout=1.0),
    Case("dropout-gqa-causal", heads=4, kv_heads=2, nq=65, dropout=0.2, causal=True),
    Case(
        "dropout-lengths", batch=3, nq=40, dropout=0.3, q_lengths=(40, 9, 0),
        kv_lengths=(33, 9, 1),
    ),
    Case("dropout-packed", nq=(65, 0, 33), dropout=0.2, tail=2),
    Case("dropout-values", nq=65, dropout=0.2, dim=24, value_dim=40),
    Case("values-added", nq=65, dim=40, value_dim=24, alibi="h", relative=9, softcap=5.0),
    Case("values-mask-grad", nq=65, dim=24, value_dim=40, mask="float:1hqk", mask_grad=True),
    Case("dropout-prefix", nq=65, dropout=0.2, window=6, global_prefix=9),
    Case(
        "everything", heads=4, kv_heads=2, nq=113, mask="float:1hqk", mask_grad=True, segments=4,
        times="float64", time_window=12.0, time_decay=True, alibi="bh", relative=9, softcap=5.0,
        global_prefix=3, dropout=0.1, window=(40, None), q_lengths=(113, 50), kv_lengths=(113, 50),
    ),
    Case(
        "everything-packed", heads=4, kv_heads=2, nq=(65, 0, 40), times="float64", time_window=12.0,
        time_decay=True, alibi="bh", relative=9, softcap=5.0, global_prefix=3, dropout=0.1,
        causal=True,
    ),
]  # fmt: skip

FEATURES = [*ADDED, *INTERVALS, *DROPOUT]
DENSE = [*SIZES, *WINDOWS, *LENGTHS, *MASKS, *MEMORY]
CASES = [*DENSE, *PACKED, *VALUES]
