"""Encoder steps on clinical length profiles: ours packed against torch SDPA padded and bucketed.

    pytest bench/bench_encoder.py --benchmark-json bench/results/NAME.json

The ways are checked to agree before they are timed. `clinattn bench` is the run on real data.
"""

from __future__ import annotations

import pytest
import torch

from clinattn.benchmark import MODES, VARIANTS, Settings
from clinattn.benchmark.agreement import check_agreement
from clinattn.benchmark.run import encoder_config
from clinattn.benchmark.variants import Runner, Variant
from clinattn.benchmark.workload import profile_workload, shortened
from clinattn.encoder import MaskedLanguageModel

BATCH_SIZE, CHECK_TOKENS = 4, 64
CASES = {  # preset, profile, max_tokens, sequences, rounds
    "tiny_notes": ("tiny", "note_discharge", 2048, 8, 11),
    "tiny_population": ("tiny", "ehr_population", 2048, 16, 11),
    "clinicalbert_chunks": ("clinicalbert", "note_chunks", 128, 8, 5),
    "modernbert_population": ("bioclinical-modernbert-base", "ehr_population", 512, 8, 5),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_encoder(race, device, name, mode):
    preset, profile, max_tokens, sequences, rounds = CASES[name]
    config = encoder_config(Settings(preset=preset, max_tokens=max_tokens))
    torch.manual_seed(0)
    runner = Runner(MaskedLanguageModel(config).to(device), device)
    workload = profile_workload(profile, max_tokens, config.vocab_size, seed=0)
    examples = [workload.example(i, seed=0) for i in workload.sample(sequences, seed=0)]
    check_agreement(runner, shortened(examples[:BATCH_SIZE], CHECK_TOKENS), batch_size=2)
    lengths = [len(example.ids) for example in examples]

    def work(variant: Variant):
        batches = [[examples[i] for i in batch] for batch in variant.batches(lengths, BATCH_SIZE)]

        def step() -> None:
            for batch in batches:
                runner.run(mode, variant, batch)

        return step

    ways = {variant.name: work(variant) for variant in VARIANTS}
    race(
        ways.pop("clinattn_packed"),
        ways,
        tokens=sum(lengths),
        flops=None,
        dtype=torch.float32,
        case=name,
        mode=mode,
        preset=preset,
        rounds=rounds,
        sequences=sequences,
        longest=max(lengths),
    )
