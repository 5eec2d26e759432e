"""Encoder steps on clinical length profiles: tokens/s by preset, workload and layout.

    pytest bench/suites/bench_encoder.py --benchmark-only
    pytest bench/suites/bench_encoder.py -k "infer and packed" --sizes large --benchmark-json FILE

The layouts are checked to agree before they are timed. `clinattn bench` is the run on real data.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch

from clinattn.encoder import MaskedLanguageModel
from clinattn.tools.benchmark.agreement import check_agreement
from clinattn.tools.benchmark.run import encoder_config
from clinattn.tools.benchmark.settings import MODES, BenchmarkSettings
from clinattn.tools.benchmark.variants import VARIANTS, Runner, Variant
from clinattn.tools.benchmark.workload import MaskedExample, profile_workload, shortened

BATCH_SIZE, CHECK_TOKENS = 4, 64


class EncoderCase(NamedTuple):
    preset: str
    profile: str
    max_tokens: int
    sequences: int
    rounds: int


CASES = {
    "small": {
        "tiny_notes": EncoderCase("tiny", "note_discharge", 256, 8, 3),
        "tiny_population": EncoderCase("tiny", "ehr_population", 256, 8, 3),
    },
    "large": {
        "tiny_notes": EncoderCase("tiny", "note_discharge", 2048, 8, 11),
        "tiny_population": EncoderCase("tiny", "ehr_population", 2048, 16, 11),
        "clinicalbert_chunks": EncoderCase("clinicalbert", "note_chunks", 128, 8, 5),
        "modernbert_population": EncoderCase(
            "bioclinical-modernbert-base", "ehr_population", 512, 8, 5
        ),
    },
}
PEER = next(variant for variant in VARIANTS if variant.name == "sdpa_bucketed")


def pytest_generate_tests(metafunc):
    metafunc.parametrize("name", CASES[metafunc.config.getoption("--sizes")])


@functools.lru_cache(maxsize=1)
def checked(case: EncoderCase, device: torch.device) -> tuple[Runner, list[MaskedExample]]:
    """The model and the sequences of a case, once its layouts have agreed."""
    config = encoder_config(BenchmarkSettings(preset=case.preset, max_tokens=case.max_tokens))
    torch.manual_seed(0)
    runner = Runner(MaskedLanguageModel(config).to(device), device)
    workload = profile_workload(case.profile, case.max_tokens, config.vocab_size, seed=0)
    examples = [workload.example(i, seed=0) for i in workload.sample(case.sequences, seed=0)]
    check_agreement(runner, shortened(examples[:BATCH_SIZE], CHECK_TOKENS), batch_size=2)
    return runner, examples


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_encoder(race, device, sizes, name, variant, mode):
    case = CASES[sizes][name]
    runner, examples = checked(case, device)
    lengths = [len(example.ids) for example in examples]

    def work(variant: Variant):
        batches = [[examples[i] for i in batch] for batch in variant.batches(lengths, BATCH_SIZE)]

        def step() -> None:
            for batch in batches:
                runner.run(mode, variant, batch)

        return step

    computed = sum(
        variant.computed_tokens(lengths, batch) for batch in variant.batches(lengths, BATCH_SIZE)
    )
    race(
        work(variant),
        None if variant is PEER else work(PEER),
        group=f"{name} {mode}",
        tokens=sum(lengths),
        dtype=torch.float32,
        rounds=case.rounds,
        kind="encoder",
        way=variant.name,
        case=name,
        passes=mode,
        preset=case.preset,
        workload=case.profile,
        sequences=case.sequences,
        longest=max(lengths),
        padding_share=1 - sum(lengths) / computed,
    )
