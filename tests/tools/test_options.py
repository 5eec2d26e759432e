"""Options of the commands: all fields of their settings, choices in the help, and --data."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass, fields
from types import SimpleNamespace

import pytest

for package in ("typer", "rich", "pyarrow", "matplotlib", "jinja2"):
    pytest.importorskip(package)

from clinattn.encoder import PRESETS  # noqa: E402
from clinattn.encoder.presets import DESCRIPTIONS  # noqa: E402
from clinattn.tools import console  # noqa: E402
from clinattn.tools.benchmark import settings as benchmark  # noqa: E402
from clinattn.tools.benchmark.variants import VARIANTS  # noqa: E402
from clinattn.tools.evaluation.settings import EvaluateSettings  # noqa: E402
from clinattn.tools.explanation.settings import ExplainSettings  # noqa: E402
from clinattn.tools.exporting.settings import ExportSettings  # noqa: E402
from clinattn.tools.model_report.settings import ReportSettings  # noqa: E402
from clinattn.tools.options import takes  # noqa: E402
from clinattn.tools.prediction.settings import PredictionSettings  # noqa: E402
from clinattn.tools.prepare import PrepareSettings  # noqa: E402
from clinattn.training import settings as training  # noqa: E402
from clinattn.training.fields import check, option, options  # noqa: E402
from clinattn.workloads import PROFILES  # noqa: E402

WIDE = {"COLUMNS": "400", "TERMINAL_WIDTH": "400"}
SETTINGS = {
    "bench": benchmark.BenchmarkSettings,
    "train": training.TrainingSettings,
    "profile": benchmark.ProfileSettings,
    "report-model": ReportSettings,
    "explain": ExplainSettings,
    "evaluate": EvaluateSettings,
    "export": ExportSettings,
    "predict": PredictionSettings,
    "prepare": PrepareSettings,
}
LISTED = {
    "bench": {"preset": PRESETS, "dtype": benchmark.DTYPES, "modes": benchmark.MODES},
    "train": {"preset": PRESETS, "dtype": training.DTYPES, "task": training.TASKS},
    "profile": {
        "preset": PRESETS,
        "mode": benchmark.MODES,
        "variant": [variant.name for variant in VARIANTS],
    },
    "report-model": {"dtype": benchmark.DTYPES},
    "explain": {},
    "predict": {"dtype": training.DTYPES},
}
# of commands, which no field's option says
ARGUMENTS = ("source", "checkpoint", "methods", "predictions", "by")
SMALL = ["--max-tokens", "48", "--batch-size", "2"]
BENCH = ["bench", *SMALL, "--modes", "infer", "--sequences", "4", "--rounds", "1"]
TRAIN = ["train", "--max-tokens", "48", "--batch-tokens", "96", "--steps", "1", "--threads", "1"]


def help_lines(cli, command: str) -> dict[str, str]:
    """The help of each option, on one line, by the option's name."""
    done = cli(command, "--help", **WIDE)
    assert done.exit_code == 0, done.output
    text = re.sub(r"[│ \n]+", " ", done.stdout)
    found = re.split(r" (--[a-z-]+)(?= )(?= <)", text)
    return dict(zip(found[1::2], found[2::2], strict=True))


def refused(done, *parts: str) -> None:
    """Checks that a command ends with status 2 and one line of stderr that has all the parts."""
    (line,) = done.stderr.splitlines()
    assert done.exit_code == 2 and done.stdout == "" and line.startswith("error: ")
    assert all(part in line for part in parts), line


@pytest.mark.parametrize("command", SETTINGS)
def test_each_field_is_an_option_with_its_help_and_default(cli, command):
    lines = help_lines(cli, command)
    for field in fields(SETTINGS[command]):
        if field.name in ARGUMENTS:
            continue
        known = field.metadata["option"]
        shown = lines[known.name or f"--{field.name.replace('_', '-')}"]
        assert known.help in shown
        if known.shown is not None:
            assert f"[default: ({known.shown})]" in shown
        elif isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
            assert f"[default: {field.default}]" in shown
        if known.least is not None:
            assert f"At least {known.least}." in shown


@pytest.mark.parametrize("command", LISTED)
def test_the_help_lists_the_choices(cli, command):
    lines = help_lines(cli, command)
    for name, choices in {"device": ("cpu", "cuda"), **LISTED[command]}.items():
        if name != "preset":
            (listed,) = re.findall(r"Choices: (.*?)\.", lines[f"--{name}"])
            assert set(listed.split(", ")) == set(choices)


@pytest.mark.parametrize("command", ["bench", "train", "profile"])
@pytest.mark.parametrize("columns", ["80", "200"])
def test_the_help_has_presets_and_profiles_with_a_phrase_each(cli, command, columns):
    width = {"COLUMNS": columns, "TERMINAL_WIDTH": columns}
    printed = cli(command, "--help", **WIDE | width).stdout
    profiles = {name: profile.description for name, profile in PROFILES.items()}
    for title, phrases in (("NAME of --data", profiles), ("Choices of --preset", DESCRIPTIONS)):
        start = printed.index(f"─ {title} ─")
        listed = printed[start : printed.index("╰", start)]
        flat = " ".join(listed.replace("│", " ").split())
        for name, phrase in phrases.items():
            assert f" {name} {phrase}" in flat
        assert max(map(len, listed.splitlines())) <= int(columns)
        assert f"Below: {title}." in " ".join(printed.replace("│", " ").split())


def test_every_preset_has_a_phrase():
    assert set(DESCRIPTIONS) == set(PRESETS) and all(DESCRIPTIONS.values())


@pytest.mark.parametrize(
    ("command", "name"), [(c, name) for c in LISTED for name in (*LISTED[c], "device")]
)
def test_a_wrong_choice_is_refused_with_the_list(cli, command, name, tmp_path):
    model = ["bert"] if command in ("report-model", "explain", "predict") else []
    place = ["--data", "profile:fixed"] if command != "report-model" else []
    choices = LISTED[command].get(name, ("cpu", "cuda"))
    refused(cli(command, *model, *place, f"--{name}", "wrong"), f"{name}=", "expected", *choices)
    assert not list(tmp_path.iterdir())


def test_a_wrong_choice_is_no_matter_of_case_and_a_list_has_some(cli):
    refused(cli("bench", "--modes", "train,TRAIN"), "modes=('train', 'TRAIN'): expected some of")
    refused(cli("bench", "--modes", ""), "modes=('',): expected some of ('train', 'infer')")


def test_the_version_is_a_line(cli):
    import torch

    import clinattn

    done = cli("--version")
    assert done.exit_code == 0 and done.stderr == ""
    assert done.stdout == f"clinattn {clinattn.__version__}, torch {torch.__version__}\n"


TWO_WAYS = [
    (("--data", "profile:fixed"), ("--profile", "fixed")),
    (("--data", "meds:my_meds"), ("--meds-dir", "my_meds")),
    (("--data", "text:a.csv"), ("--text", "a.csv")),
    (("--meds-dir", "my_meds"), ("--text", "a.csv")),
    (("--meds-dir", "my_meds"), ("--profile", "fixed")),
    (("--text", "a.csv"), ("--profile", "fixed")),
]


@pytest.mark.parametrize("command", ["bench", "train", "profile"])
@pytest.mark.parametrize("ways", TWO_WAYS, ids=lambda ways: "".join(way[0] for way in ways))
def test_data_said_twice_is_refused_with_both_names(cli, command, ways):
    (first, _), (second, _) = ways
    done = cli(command, *(word for way in ways for word in way))
    refused(done, f"{first} and {second}: got both, expected exactly one of them")


@pytest.fixture
def data_of(cli, monkeypatch):
    """The data that a command would read; it ends before any work."""
    found = []

    def stop(settings, *others):
        found.append(settings.data)
        raise ValueError("enough")

    for name in ("benchmark.run.Benchmark", "profiling.warmed_step"):
        monkeypatch.setattr(f"clinattn.tools.{name}", stop)
    monkeypatch.setattr("clinattn.training.loop.Trainer", stop)

    def run(*words, **environment):
        assert cli(*words, **environment).exit_code == 2
        return found.pop()

    return run


@pytest.mark.parametrize("command", ["bench", "train", "profile"])
def test_older_words_stand_for_data(data_of, command):
    assert data_of(command, "--data", "text:a.csv") == "text:a.csv"
    assert data_of(command, "--meds-dir", "ward") == "meds:ward"
    assert data_of(command, "--text", "a.csv") == "text:a.csv"
    assert data_of(command, "--profile", "fixed") == "profile:fixed"


def test_the_environment_gives_way_and_then_the_demo_serves(data_of, meds, monkeypatch):
    for command in ("bench", "train"):
        for name in ("MEDS_DIR", "CLINATTN_MEDS_DIR"):
            assert data_of(command, **{name: "ward"}) == "meds:ward"
        assert data_of(command, "--profile", "fixed", MEDS_DIR="ward") == "profile:fixed"
        assert data_of(command, "--data", "meds:icu", MEDS_DIR="ward") == "meds:icu"
    assert data_of("bench", MEDS_DIR="") == "profile:note_discharge"
    assert data_of("profile", MEDS_DIR="ward") == "profile:note_discharge"
    monkeypatch.setattr(console, "DEMO", meds)
    assert data_of("bench") == data_of("train") == f"meds:{meds}"
    assert data_of("profile") == "profile:note_discharge"


KINDS = {
    "meds:my_meds": "MEDS folder my_meds, 5 patients",
    "text:notes.csv": "notes.csv, 40 rows",
    "profile:note_chunks": "length profile note_chunks",
}


@pytest.mark.parametrize("data", KINDS)
def test_every_kind_of_data_is_trained_and_timed(cli, meds, tmp_path, threads, small_presets, data):
    threads(1)
    rows = [f"{i % 4} days of {'fever pain '[6 * (i % 2) :]} and rest,{i}" for i in range(40)]
    (tmp_path / "notes.csv").write_text("\n".join(["text,subject_id", *rows]))
    share = "0.01" if data.startswith("profile") else "0.7"
    done = cli(*TRAIN, "--data", data, "--held-out", share)
    assert done.exit_code == 0, done.output
    assert KINDS[data] in " ".join(done.stderr.split())
    done = cli(*BENCH, "--data", data, "--output", "out")
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["workload"]["source"].startswith(KINDS[data])
    assert result["settings"]["data"] == (data if "profile" in data else data.partition(":")[0])
    assert str(tmp_path) not in json.dumps(result)  # a result may be published


def test_sequences_too_short_to_mask_are_refused(cli, tmp_path):
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n{"text": "b c"}\n{"text": " "}\n')
    done = cli("bench", "--text", "short.jsonl")
    *_, line = done.stderr.splitlines()
    assert done.exit_code == 2 and "text_file='short.jsonl': none of the 3 sequences" in line


def test_quick_gives_way_to_what_is_said(cli, monkeypatch):
    found = []

    def stop(settings, *others):
        found.append((settings.budget_s, settings.max_tokens))
        raise ValueError("enough")

    monkeypatch.setattr("clinattn.tools.benchmark.run.Benchmark", stop)
    cli("bench")
    cli("bench", "--quick")
    cli("bench", QUICK="1")
    cli("bench", "--quick", "--max-tokens", "4096")
    cli("bench", "--budget", "7", MEDS_DIR="")
    assert found == [(270, 4096), (45, 2048), (45, 2048), (45, 4096), (7, 4096)]


@dataclass(frozen=True)
class Kitchen:
    pans: int = option(2, "Pans.", least=1)
    herbs: tuple[str, ...] = option(("sage",), "Herbs.", choices=("sage", "thyme"))
    oven: str | None = option(None, "Oven.", choices=lambda: ("gas", "wood"), name="--stove")
    hot: bool = option(False, "Hot.")
    secret: int = 3


def test_the_command_gets_what_was_given_and_nothing_else():
    got = []

    @takes(Kitchen)
    def cook(given, salt: int = 1) -> None:
        """Cooks."""
        got.append((given, salt))

    names = list(inspect.signature(cook).parameters)
    assert names == ["context", "pans", "herbs", "oven", "hot", "salt"]
    assert cook.__doc__ == "Cooks."
    said = {"herbs": "COMMANDLINE", "pans": "DEFAULT", "oven": "DEFAULT_MAP", "hot": "ENVIRONMENT"}
    context = SimpleNamespace(
        get_parameter_source=lambda name: SimpleNamespace(name=said.get(name, "DEFAULT"))
    )
    cook(context, pans=2, herbs="sage,thyme", oven=None, hot=True, salt=5)
    assert got == [({"herbs": ("sage", "thyme"), "hot": True}, 5)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pans": 0}, "pans=0: expected at least 1"),
        ({"pans": float("nan")}, "pans=nan: expected at least 1"),
        ({"herbs": ()}, r"herbs=\(\): expected some of \('sage', 'thyme'\)"),
        ({"herbs": ("mint",)}, r"herbs=\('mint',\): expected some of"),
        ({"oven": "coal"}, r"oven='coal': expected one of \('gas', 'wood'\)"),
    ],
)
def test_fields_are_checked_by_what_they_say(changes, message):
    check(Kitchen())
    assert list(options(Kitchen)) == ["pans", "herbs", "oven", "hot"]
    with pytest.raises(ValueError, match=message):
        check(Kitchen(**changes))
