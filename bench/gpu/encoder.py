"""Stage of run.py that times the encoder on discharge notes: torch's SDPA, ours padded and packed.

The work is that of `clinattn bench --device cuda --dtype bfloat16 --max-tokens 8192`, from token
ids to hidden states or to updated weights, in bf16 weights: 32 notes (71,585 tokens, the longest
4,781) in batches of 8. A token costs 0.22 GFLOP in the linear layers of the base model, so that a
round of inference is 16 TFLOP packed and 26 padded; attention adds 5 in ours, and 31 where SDPA
computes a window of 129 keys as a full row. At 250 TFLOP/s, with what is bound by memory, a round
of inference in all five ways takes 0.7 s and one of training 2.5 s. With up to 9 rounds of each,
first passes, the comparison of results and the profile, that makes 50 to 75 s on an H100.
"""

from __future__ import annotations

import functools
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from gpu.dense_shapes import pairs_in_window
from gpu.kernel_seconds import kernel_seconds
from gpu.rows import Run

if TYPE_CHECKING:
    from clinattn.tools.benchmark.variants import Runner, Variant
    from clinattn.tools.benchmark.workload import MaskedExample

EXPECTED = 70.0  # seconds of the whole stage
PRESET, PROFILE = "bioclinical-modernbert-base", "note_discharge"
MAX_TOKENS, NOTES, BATCH = 8192, 32, 8
SECONDS = {"infer": 7.0, "train": 22.0}  # of the rounds
LEAST, MOST = 3, 9  # rounds
# Packed over SDPA padded, in real tokens a second.
TARGETS = {"infer": 2.5, "train": 2.0}
PROFILED = ("clinattn_packed", "sdpa_padded")
ATTENTION = re.compile(  # names of kernels: ours, and those behind the backends of SDPA
    r"^(_?forward_kernel|dq_kernel|dkdv_kernel)|clinattn"
    r"|fmha|flash|sdpa|attention|dot_do_o|convert_dq",
    re.IGNORECASE,
)


def encoder(run: Run) -> None:
    """Rows of each way to run the encoder, in inference and in training."""
    if not run.enough_time(30, "encoder"):
        return
    try:
        bench = Bench(run)
    except ImportError as error:  # pyarrow
        run.row(skipped=f"encoder: {error}")
        return
    with bench.sdpa_as_found():
        bench.compare_results()
        medians = {mode: bench.measure(mode) for mode in ("infer", "train")}
        for mode, seconds in medians.items():
            bench.attention_shares(mode, seconds)
    bench.runner.free()


class Bench:
    """The model, the notes, and the ways to run one on the other."""

    def __init__(self, run: Run) -> None:
        from clinattn.backends.select import implementation
        from clinattn.encoder import MaskedLanguageModel
        from clinattn.tools.benchmark.run import encoder_config
        from clinattn.tools.benchmark.variants import VARIANTS, Runner, Variant
        from clinattn.tools.benchmark.workload import profile_workload

        preset, profile, longest, notes, self.batch = PRESET, PROFILE, MAX_TOKENS, NOTES, BATCH
        if run.dryrun:
            preset, profile, longest, notes, self.batch = "tiny", "ehr_population", 64, 4, 2
        self.run = run
        self.dtype = torch.bfloat16 if not run.dryrun else torch.float32
        bucketed = Variant("clinattn_bucketed", "clinattn", bucketed=True)
        padded, by_length, *ours = VARIANTS
        # The most decisive first: if time runs out, the rest is missing.
        self.variants = [ours[-1], padded, by_length, *ours[:-1], bucketed]
        settings = SimpleNamespace(preset=preset, full_attention=False, max_tokens=longest)
        words = {"vocab_size": 256} if run.dryrun else {}
        config = encoder_config(settings, **words)  # type: ignore[arg-type]
        workload = profile_workload(profile, longest, config.vocab_size, seed=0)
        self.examples = [workload.example(i, 0) for i in workload.sample(notes, seed=0)]
        self.lengths = [len(example.ids) for example in self.examples]
        self.backend = implementation("", torch.empty(0, dtype=self.dtype, device=run.device)).name
        with run.device:  # random numbers of 150 million weights take seconds on a CPU
            model = MaskedLanguageModel(config).to(self.dtype)
        self.runner: Runner = Runner(model, run.device)
        run.row(
            case=f"{preset}, {profile} up to {longest} tokens",
            expected_s=EXPECTED,
            parameters=sum(p.numel() for p in model.parameters()),
            sequences=len(self.lengths),
            batch_size=self.batch,
            tokens=sum(self.lengths),
            longest=max(self.lengths),
            tflop={mode: self.flops(mode) / 1e12 for mode in TARGETS},
        )

    def flops(self, mode: str) -> float:
        """FLOP of the real tokens: products with weights, and 4D a visible pair of each layer."""
        encoder = self.runner.model.encoder
        weights = sum(p.numel() for p in encoder.layers.parameters() if p.dim() == 2)
        width, words = encoder.config.hidden_size, encoder.config.vocab_size
        linear = 2.0 * weights * sum(self.lengths)
        windows = encoder.config.windows
        pairs = sum(pairs_in_window(n, window) for window in windows for n in self.lengths)
        attention = 4.0 * width * pairs
        if mode == "infer":
            return linear + attention
        labelled = sum(int((example.labels >= 0).sum()) for example in self.examples)
        return 3 * (linear + 2.0 * labelled * width * (width + words)) + 3.5 * attention

    @contextmanager
    def sdpa_as_found(self) -> Iterator[None]:
        """Restores cuDNN's attention after the block: measure turns it off where it fails."""
        enabled = torch.backends.cuda.cudnn_sdp_enabled()
        try:
            yield
        finally:
            torch.backends.cuda.enable_cudnn_sdp(enabled)

    def row(self, mode: str, variant: Variant, **fields: Any) -> None:
        backend = self.backend if variant.attention == "clinattn" else None
        self.run.row(mode=mode, provider=variant.name, backend=backend, **fields)

    def compare_results(self) -> None:
        """Checks all ways against fp64 on a few short notes, as `clinattn bench` does first."""
        from clinattn.tools.benchmark.agreement import Disagreement, check_agreement
        from clinattn.tools.benchmark.run import CHECK_SEQUENCES, CHECK_TOKENS
        from clinattn.tools.benchmark.workload import shortened

        began = time.perf_counter()
        try:
            found = check_agreement(
                self.runner, shortened(self.examples[:CHECK_SEQUENCES], CHECK_TOKENS), batch_size=2
            )
        except Disagreement as error:
            self.run.row(case="agreement", backend=self.backend, ok=False, error=str(error))
        except RuntimeError as error:  # the times are of use without it
            self.run.row(case="agreement", backend=self.backend, ok=False, error=brief(error))
        else:
            seconds = time.perf_counter() - began
            self.run.row(
                case="agreement", backend=self.backend, ok=True, errors=found, seconds=seconds
            )
        self.runner.free()

    def batches(self, variant: Variant) -> list[list[MaskedExample]]:
        chosen = variant.batches(self.lengths, self.batch)
        return [[self.examples[i] for i in batch] for batch in chosen]

    # Timing

    def measure(self, mode: str) -> dict[str, float]:
        """Rows of first passes, of each round and of the medians; returns median seconds."""
        self.first_step(mode)
        memory = {}
        for variant in self.variants:
            if not self.run.enough_time(10, f"encoder: {mode}, {variant.name}"):
                continue
            peak = self.first_pass(mode, variant)
            if peak is None and not variant.packed and self.without_cudnn(variant):
                peak = self.first_pass(mode, variant)
            if peak is not None:
                memory[variant.name] = peak
        times = self.rounds(mode, [v for v in self.variants if v.name in memory])
        medians = {}
        for variant in self.variants:
            if values := times.get(variant.name):
                medians[variant.name] = statistics.median(values)
                self.median_row(mode, variant, values, memory[variant.name])
        self.ratio_row(mode, medians)
        return medians

    def first_step(self, mode: str) -> None:
        """Takes one small step: the optimizer's state is made before any way is measured."""
        from clinattn.tools.benchmark.workload import shortened

        self.runner.run(mode, self.variants[0], shortened(self.examples[:2], 64))

    def first_pass(self, mode: str, variant: Variant) -> int | None:
        """Peak bytes of all batches run once, which compiles and plans; None where that fails."""
        from clinattn.tools.benchmark.measure import peak_memory

        work = functools.partial(self.runner.seconds, mode, variant, self.batches(variant))
        began = time.perf_counter()
        try:
            peak = peak_memory(work, self.run.device)
        except torch.OutOfMemoryError as error:
            self.row(mode, variant, failed="out of memory", error=brief(error))
        except RuntimeError as error:
            ok = {"ok": False} if variant.attention == "clinattn" else {}
            self.row(mode, variant, failed="first pass", error=brief(error), **ok)
        else:
            seconds = time.perf_counter() - began
            self.row(mode, variant, case="first pass", seconds=seconds, peak_bytes=peak)
            return peak or 0
        self.runner.free()
        return None

    def without_cudnn(self, variant: Variant) -> bool:
        """Turns cuDNN off for another try of SDPA, and tells whether there is one to make."""
        if variant.attention != "sdpa" or not torch.backends.cuda.cudnn_sdp_enabled():
            return False
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.run.row(provider=variant.name, note="torch's SDPA goes on without cuDNN")
        return True

    def rounds(self, mode: str, variants: list[Variant]) -> dict[str, list[float]]:
        """Seconds of each way, in rounds that begin with another way each."""
        times: dict[str, list[float]] = {variant.name: [] for variant in variants}
        began, longest = time.perf_counter(), 0.0
        for index in range(MOST if not self.run.dryrun else 2):
            so_far = time.perf_counter() - began
            if index >= LEAST and so_far + longest > SECONDS[mode] and not self.run.dryrun:
                break
            if not self.run.enough_time(longest + 3, f"encoder: {mode}, rounds from {index} on"):
                break
            shift = index % max(1, len(variants))
            for variant in variants[shift:] + variants[:shift]:
                try:
                    seconds = self.runner.seconds(mode, variant, self.batches(variant))
                except torch.OutOfMemoryError as error:
                    self.row(mode, variant, failed="out of memory", error=brief(error))
                    variants = [x for x in variants if x is not variant]
                else:
                    times[variant.name].append(seconds)
            longest = max(longest, time.perf_counter() - began - so_far)
            last = {name: round(values[-1], 5) for name, values in times.items() if values}
            self.run.row(mode=mode, round=index, seconds=last)
        return times

    def median_row(self, mode: str, variant: Variant, values: list[float], peak: int) -> None:
        real = sum(self.lengths)
        chosen = variant.batches(self.lengths, self.batch)
        computed = sum(variant.computed_tokens(self.lengths, batch) for batch in chosen)
        low, median, high = quartiles(values)
        self.row(
            mode,
            variant,
            case="tokens/s",
            dtype=str(self.dtype).removeprefix("torch."),
            rounds=len(values),
            tokens_per_s=real / median,
            tokens_per_s_low=real / high,
            tokens_per_s_high=real / low,
            s=median,
            tflops=self.flops(mode) / median / 1e12,
            computed_tokens=computed,
            padding_share=1 - real / computed,
            peak_bytes=peak,
        )

    def ratio_row(self, mode: str, medians: dict[str, float]) -> None:
        packed = medians.get("clinattn_packed")
        for name, seconds in medians.items():
            if name == "clinattn_packed" or packed is None:
                continue
            ratio, case = seconds / packed, f"ratio encoder {mode} packed over {name}"
            if name != "sdpa_padded":
                self.run.row(backend=self.backend, case=case, measured=ratio)
                continue
            target = TARGETS[mode]
            self.run.row(
                backend=self.backend, case=case, target=target, measured=ratio, met=ratio >= target
            )

    # Shares of the time

    def attention_shares(self, mode: str, medians: dict[str, float]) -> None:
        """The share of the kernels' time that is attention's, and the largest of the kernels."""
        for variant in self.variants:
            if variant.name not in PROFILED or variant.name not in medians:
                continue
            if not self.run.enough_time(5, f"encoder: attention share, {mode}, {variant.name}"):
                continue
            work = functools.partial(self.runner.seconds, mode, variant, self.batches(variant))
            by_kernel = kernel_seconds(work, self.run.device)
            total = sum(by_kernel.values())
            attention = sum(x for name, x in by_kernel.items() if ATTENTION.search(name))
            self.row(
                mode,
                variant,
                case="attention share",
                attention_share=attention / total if total else None,
                attention_s=attention,
                kernels_s=total,
                # below 1, the device stood idle and the host was the limit
                busy_share=total / medians[variant.name],
                largest={name[:60]: x / total for name, x in by_kernel.most_common(8)},
            )


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if values[1:] else values * 3


def brief(error: BaseException) -> str:
    return str(error).strip()[:300]
