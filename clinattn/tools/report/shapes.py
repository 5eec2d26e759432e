"""Shapes of the JSON of each kind of benchmark, as far as the report shows it."""

from __future__ import annotations

import math
from typing import Any

from clinattn.files.shapes import (
    ANYTHING,
    COUNT,
    FLAG,
    NOT_NEGATIVE,
    NOTHING,
    NUMBER,
    POSITIVE,
    TEXT,
    Each,
    Kind,
    Named,
    Shape,
    is_number,
)

Record = dict[str, Any]

FACT = Kind("a text, a number, a list of them or null", lambda x: not isinstance(x, dict))
FACTS = Named({}, {"date": TEXT | NOTHING}, others=FACT)
QUARTILES = Named({"median": POSITIVE, "q1": POSITIVE, "q3": POSITIVE})
LENGTH = Kind("a length, in digits", lambda x: x.isdecimal() and 0 < len(x) < 10 and int(x) > 0)

ROW = Named(
    {
        "mode": TEXT,
        "variant": TEXT,
        "tokens_per_s": QUARTILES,
        "rounds": COUNT,
        "padding_share": NOT_NEGATIVE,
        "peak_memory_bytes": NOT_NEGATIVE | NOTHING,
    },
    {"cpu_share": NOT_NEGATIVE},
)
# Fields of a row on other work: of every row, of one that measured it, of one that it slowed.
BESIDE = Named({}, {"other_cpus": NOT_NEGATIVE | NOTHING, "disturbed": FLAG})
KNOWN = Named({"cpus": COUNT})
DISTURBED = Named({"other_cpus": NOT_NEGATIVE, "noted_from": NOT_NEGATIVE, "cpus": COUNT})
WORKLOAD = Named(
    {
        "source": TEXT,
        "sequences": COUNT,
        "available": COUNT,
        "real_tokens": COUNT,
        "vocab_size": COUNT,
        "mean_length": NOT_NEGATIVE,
        "quantiles": Named({}, others=NOT_NEGATIVE),
        "histogram": Named({"edges": Each(NUMBER, 2), "counts": Each(NOT_NEGATIVE, 1)}),
    }
)
AGREEMENT = Named(
    {
        "sequences": COUNT,
        "tokens": COUNT,
        "errors": Named(
            {"allowed": Named({}, others=NUMBER)}, others=Named({}, others=NUMBER)
        ),
    }
)
ENCODER = Named(
    {
        "interrupted": FLAG,
        "environment": Named(
            {"date": TEXT, "clinattn": TEXT, "torch": TEXT, "cpu": TEXT, "threads": COUNT},
            {"gpu": TEXT | NOTHING, "commit": TEXT | NOTHING},
            others=FACT,
        ),
        "settings": Named({}, others=FACT),
        "rows": Each(ROW),
        "speedups": Each(Named({"mode": TEXT, "label": TEXT, "ratio": NOT_NEGATIVE})),
    },
    {"encoder": Named({}, others=FACT), "workload": WORKLOAD, "time_over": FLAG},
)

KERNELS = Named(
    {
        "rows": Each(
            Named(
                {
                    "case": TEXT,
                    "dtype": TEXT,
                    "passes": TEXT,
                    "ours_ms": POSITIVE,
                    "torch_ms": POSITIVE,
                    "ratio": NUMBER,
                    "ours_of_peak": NUMBER,
                    "torch_of_peak": NUMBER,
                    "peak": NUMBER,
                    "peak_loop": TEXT,
                },
                {"date": TEXT | NOTHING},
            )
        )
    }
)
COMPARE = Named(
    {
        "base": FACTS,
        "here": FACTS,
        "rows": Each(
            Named(
                {
                    "case": TEXT,
                    "dtype": TEXT,
                    "passes": TEXT,
                    "base_s": Each(POSITIVE, 1),
                    "here_s": Each(POSITIVE, 1),
                    "ratio": NUMBER,
                }
            )
        ),
    }
)
AGAINST_TRANSFORMERS = Named(
    {
        "environment": FACTS,
        "rows": Each(
            Named(
                {
                    "preset": TEXT,
                    "dtype": TEXT,
                    "inputs": TEXT,
                    "layers": COUNT,
                    "longest": COUNT,
                    "padding": NUMBER,
                    "ratio": NUMBER,
                    "tokens_per_s": Named({"transformers": POSITIVE, "clinattn": POSITIVE}),
                }
            )
        ),
    }
)
ENGINES = Named(
    {
        "environment": FACTS,
        "interrupted": FLAG,
        "absent": Each(TEXT),
        "rows": Each(
            Named(
                {
                    "title": TEXT,
                    "model": TEXT,
                    "layers": COUNT,
                    "published_layers": COUNT,
                    "kind": TEXT,
                    "engine": TEXT,
                    "batching": TEXT,
                    "padding_share": NOT_NEGATIVE,
                    "not_finite": NOT_NEGATIVE,
                    "error": NOT_NEGATIVE | NOTHING,
                    "tokens_per_s": ANYTHING,
                    "latency_s": POSITIVE | NOTHING,
                    "compile_seconds": NOT_NEGATIVE,
                    "start_seconds": POSITIVE | NOTHING,
                    "peak_memory_bytes": POSITIVE | NOTHING,
                    "package_bytes": NOT_NEGATIVE,
                }
            ),
            1,
        ),
    }
)
SUITES = Named(
    {
        "machine_info": Named({}, {"clinattn": FACTS}),
        "datetime": TEXT,
        "benchmarks": Each(
            Named({"name": TEXT, "extra_info": Named({}, {"kind": TEXT, "way": TEXT})}), 1
        ),
    }
)
SPEED = Named(
    {"tokens_per_s": QUARTILES},
    {
        "ratio_to_peer": NUMBER | NOTHING,
        "of_peak": NUMBER | NOTHING,
        "padding_share": NUMBER | NOTHING,
    },
)
ATTENTION = Named(
    SPEED.required | {"dtype": TEXT, "passes": TEXT, "longest": POSITIVE}, SPEED.optional
)
# Further fields of a benchmark of pytest-benchmark, by its kind.
EXTRAS: dict[str, Shape] = {
    "attention": ATTENTION,
    "encoder": SPEED,
    "memory": Named({"passes": TEXT, "peak_bytes": Named({}, others=NOT_NEGATIVE)}),
    "linear": Named(
        {
            "case": TEXT,
            "passes": TEXT,
            "gflop_per_s": NUMBER,
            "ratio_to_peer": NUMBER,
            "of_peak": NUMBER | NOTHING,
        }
    ),
    "startup": Named({"seconds": Named({}, others=Named({"median": NUMBER}))}),
}
# A share of the error allowed; NaN and inf are results of a comparison that failed.
SHARE = Kind("a number", lambda x: is_number(x) or (isinstance(x, float) and not math.isfinite(x)))
PARITY = Named(
    {
        "environment": FACTS,
        "rows": Each(
            Named(
                {
                    "architecture": TEXT,
                    "model": TEXT,
                    "dtype": TEXT,
                    "mode": TEXT,
                    "padding": TEXT,
                    "replaced": COUNT,
                    "attentions": COUNT,
                    "outputs": SHARE,
                    "gradients": SHARE | NOTHING,
                    "passed": FLAG,
                }
            )
        ),
    },
    {"left": Named({}, others=TEXT)},
)
PRETRAINED = Named(
    {
        "environment": FACTS,
        "rows": Each(
            Named(
                {
                    "workload": TEXT,
                    "pass": TEXT,
                    "padding": NUMBER,
                    "largest_difference": NOT_NEGATIVE,
                    "tokens_per_s": Named(
                        {"eager": QUARTILES, "sdpa": QUARTILES, "clinattn": QUARTILES}
                    ),
                }
            )
        ),
    }
)
KINDS: dict[str, Shape] = {
    "encoder": ENCODER,
    "suites": SUITES,
    "compare": COMPARE,
    "against_transformers": AGAINST_TRANSFORMERS,
    "engines": ENGINES,
    "kernels": KERNELS,
    "parity": PARITY,
    "pretrained": PRETRAINED,
}
