"""benchmarks/paper_tables.py: real trainings in turns, killed and resumed; what is reported of them, and when not."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import paper_tables
from gfrnn.config import UserError
from gfrnn.runs import RunFolder
from launch import ROOT, environment, metrics, summary, validations, warm_python
from paper.compare import Spread, gains, levels, lines, verdict, way
from paper.figures import COLOURS
from paper.plan import Budget, Choice, overrides, published_choice
from paper.published import BASELINES, MODELS, TEST_BPC
from paper.rows import Point, Row, merged, read_rows, thinned, write_rows
from paper.turns import Training

SCRIPT = ROOT / "benchmarks/paper_tables.py"
MODELS_HERE = ["lstm-3x191", "gf-lstm-3x140"]
# of models that an update takes milliseconds for
SMALL = ["--hidden-size", "12", "--rows", "8", "--steps", "20"]
SMALL += ["--valid-bytes", "3000", "--eval-warmup", "20", "--sample-length", "20"]


def small(data: Path, *more: str) -> list[str]:
    return ["--", *SMALL, "--corpus", "enwik8-1m", "--data-dir", str(data), *more]


def run_flags(folder: Path, *more: str) -> list[str]:
    flags = ["run", str(folder), "--updates", "3", "--seeds", "0", "--threads", "1", "--optimizer", "adam"]
    return [*flags, "--learning-rate", "0.01", "--alone", "--json", f"{folder}.json", *more]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two models, stopped after an update each, killed with -9, and finished by the same command."""
    base = tmp_path_factory.mktemp("paper")
    folder, flags = base / "runs", small(base / "data")
    # a turn that is over at once is an update
    turns = run_flags(folder, "--turn", "1e-5", "--models", *MODELS_HERE)
    process = psutil.Popen(
        [sys.executable, SCRIPT, *turns, *flags, "--no-mlflow"],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    second = folder / f"{MODELS_HERE[1]}-seed-0"
    deadline = time.monotonic() + 120
    while not (second / "checkpoints/latest").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = process.children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive  # the training ends with the script, whose kill it could not see
    assert [summary(folder / f"{name}-seed-0")["status"] for name in MODELS_HERE] == ["stopped", "stopped"]
    command = [sys.executable, SCRIPT, *run_flags(folder, "--turn", "0", "--models", *MODELS_HERE), *flags]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "LSTM, adam 0.01" in done.stdout
    return folder


def rows_of(trained: Path) -> list[Row]:
    return read_rows(trained.with_suffix(".json"))


def test_turns_and_a_kill_change_no_bit(trained: Path, tmp_path: Path) -> None:
    flags = run_flags(tmp_path / "whole", "--models", MODELS_HERE[1])
    done = warm_python(SCRIPT, *flags, *small(trained.parent / "data", "--no-mlflow"))
    assert done.returncode == 0, done.stderr
    parts, whole = trained / f"{MODELS_HERE[1]}-seed-0", tmp_path / f"whole/{MODELS_HERE[1]}-seed-0"
    assert sorted(validations(whole)) == [1, 2, 3]
    assert validations(parts) == validations(whole)
    assert summary(parts)["test_bpc"] == summary(whole)["test_bpc"]
    ours, (theirs,) = rows_of(trained)[1], rows_of(tmp_path / "whole")
    assert [(p.characters, p.bpc) for p in ours.curve] == [(p.characters, p.bpc) for p in theirs.curve]


def test_seconds_go_on_over_turns_and_are_of_updates_alone(trained: Path) -> None:
    for name in MODELS_HERE:
        seconds = [line["train_seconds"] for line in metrics(trained / f"{name}-seed-0") if "train_bpc" in line]
        assert len(seconds) == 3
        assert 0 < seconds[0] < seconds[1] < seconds[2]
        found = summary(trained / f"{name}-seed-0")
        assert found["train_seconds"] == seconds[2] < found["wall_clock_s"]
        log = (trained / f"{name}-seed-0.log").read_text()
        assert log.count("\n$ ") + log.startswith("$ ") >= 2  # starts


def test_a_row_says_what_it_is_of(trained: Path) -> None:
    stack, ours = rows_of(trained)
    assert [stack.model, ours.model] == MODELS_HERE
    assert (stack.updates, stack.characters) == (3, 3 * 8 * 20)
    assert ours.budget == {"kind": "updates", "amount": 3.0}
    assert ours.settings == {
        **{"optimizer": "adam", "learning_rate": 0.01, "schedule": "constant", "hidden_size": 12},
        **{"rows": 8, "steps": 20, "valid_bytes": 3000, "eval_warmup": 20},
    }
    assert (ours.alone, ours.chosen, ours.machine["threads"]) == (True, "by hand", 1)
    assert ours.corpus["name"] == "enwik8-1m"
    assert ours.test_bpc == summary(trained / f"{ours.model}-seed-0")["test_bpc"]
    assert len(trained.with_suffix(".json").read_text().splitlines()) == 4  # a row a line


def test_what_is_finished_is_not_trained_again(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = trained.with_suffix(".json").read_text()
    log = (trained / f"{MODELS_HERE[0]}-seed-0.log").read_text()
    flags = [*run_flags(trained, "--models", *MODELS_HERE), *small(trained.parent / "data")]
    monkeypatch.setattr(sys, "argv", ["paper_tables.py", *flags])
    paper_tables._main()
    assert trained.with_suffix(".json").read_text() == before
    assert (trained / f"{MODELS_HERE[0]}-seed-0.log").read_text() == log
    other = [*flags[: flags.index("--")], "--learning-rate", "0.02", *flags[flags.index("--") :]]
    monkeypatch.setattr(sys, "argv", ["paper_tables.py", *other])
    with pytest.raises(UserError, match=r"seed-0 was trained with adam 0\.01, not adam 0\.02: give another folder"):
        paper_tables._main()
    assert trained.with_suffix(".json").read_text() == before


def report(output: Path, *sources: str) -> dict[str, bytes]:
    """Its files by name."""
    flags = paper_tables._parser().parse_args(["report", *sources, "--output", str(output)])
    paper_tables.report(flags)
    return {path.name: path.read_bytes() for path in output.iterdir()}


def test_mlflow_json_and_the_folder_give_the_same_report(trained: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{trained}/mlflow.db"
    from_json = report(tmp_path / "json", f"{trained}.json")
    assert sorted(from_json) == sorted(
        ["results.md", "rows.csv", "curves.csv", "gains.csv", "bpc-characters.png", "bpc-seconds.png"]
    )
    assert report(tmp_path / "mlflow", "--tracking-uris", uri) == from_json
    assert report(tmp_path / "both", str(trained), f"{trained}.json", "--tracking-uris", uri) == from_json
    text = from_json["results.md"].decode()
    assert "| LSTM, published | 1.887 | 1.868 | 1.842 | 1.789 | 1.854 |" in text
    assert "LSTM (adam 0.01), GF less stacked" in text
    assert "| 1, 1 | -0.026 | one seed: no claim |" in text
    stack, _ = rows_of(trained)
    assert f"| {stack.test_bpc:.3f} (1) |" in text
    with (tmp_path / "json/rows.csv").open() as file:
        assert [float(row["test_bpc"]) for row in csv.DictReader(file)] == [row.test_bpc for row in rows_of(trained)]
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("paper-tables")
    tags = [run.data.tags for run in client.search_runs([experiment.experiment_id])]
    told = sorted((each["model"], each["seed"], each["budget"], each["alone"]) for each in tags)
    assert told == [(name, "0", "3 updates", "True") for name in sorted(MODELS_HERE)]


# --------------------------------------------------------------------------------------------------- of made-up rows


def row(model: str, seed: int, test_bpc: float, *, alone: bool = True, speed: float = 1.0, **more: Any) -> Row:
    """Falls from 4 BPC to its end in ten validations."""
    curve = [Point(1000 * n, 10.0 * n / speed, test_bpc + (4 - test_bpc) * (1 - n / 10)) for n in range(1, 11)]
    values: dict[str, Any] = {
        **{"model": model, "seed": seed, "budget": {"kind": "characters", "amount": 10000.0}, "chosen": "tuned"},
        **{"corpus": {"name": "text", "md5": "0"}, "alone": alone, "versions": {"torch": "2"}, "commit": None},
        "settings": {"optimizer": "adam", "learning_rate": 0.003, "schedule": "constant"},
        "machine": {"device": "abacus", "cores": 2, "threads": 2},
        **{"date": "2026-01-01", "parameters": 1, "updates": 10, "characters": 10000, "best_step": 10},
        **{"train_seconds": 100.0 / speed, "valid_bpc": test_bpc, "test_bpc": test_bpc, "curve": tuple(curve)},
    }
    return Row(**{**values, **more})


def rows_over_seeds() -> list[Row]:
    stack = [row("lstm-3x191", seed, bpc) for seed, bpc in enumerate((2.50, 2.52, 2.54))]
    gated = [row("gf-lstm-3x140", seed, bpc, speed=0.5) for seed, bpc in enumerate((2.46, 2.47, 2.49))]
    fixed = [row("full-lstm-3x140", seed, bpc, alone=False) for seed, bpc in enumerate((2.49, 2.51, 2.53))]
    return merged([*fixed, *gated, *stack])


def test_better_is_said_only_where_all_seeds_say_it() -> None:
    gated, fixed = gains(lines(rows_over_seeds())[0])
    assert (gated.column, gated.mean) == ("GF", pytest.approx(-0.0466667, abs=1e-6))
    assert (gated.low, gated.high) == (pytest.approx(-0.08), pytest.approx(-0.01))
    assert gated.published == pytest.approx(-0.026)
    assert gated.verdict == "better with every seed (by chance 10%)"
    assert fixed.verdict == "within the seeds' spread"
    low, high = Spread(2.0, 1.9, 2.1, 2), Spread(3.0, 2.9, 3.1, 2)
    assert verdict(high, low) == "worse with every seed, but too few of them: by chance 33%"
    assert verdict(low, high._replace(seeds=1)) == "one seed: no claim"


def test_the_way_to_a_bpc_lies_between_validations() -> None:
    curve = [Point(100, 1.0, 4.0), Point(200, 2.0, 3.0), Point(300, 4.0, 2.0)]
    assert way(curve, 2.5, "seconds") == pytest.approx(3.0)
    assert way(curve, 3.0, "characters") == pytest.approx(200)
    assert way(curve, 1.9, "seconds") is None
    assert way(curve, 4.5, "seconds") is None
    marks = levels(rows_over_seeds())
    assert marks == sorted(marks, reverse=True)
    assert marks[-1] == 2.55  # the worst seed came to 2.54


def test_seconds_come_from_those_alone(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.json", rows_over_seeds())
    text = report(tmp_path / "report", f"{tmp_path}/rows.json")["results.md"].decode()
    characters, seconds = text.split("### Seconds, on abacus, 2 of 2 cores")
    assert "full-lstm-3x140" in characters
    assert "full-lstm-3x140" not in seconds
    assert "6 trainings had the machine to themselves" in seconds
    assert "x 0.5" in seconds  # as good a curve at half the speed
    nobody = [dataclasses.replace(each, alone=False) for each in rows_over_seeds()]
    write_rows(tmp_path / "nobody.json", nobody)
    files = report(tmp_path / "none", f"{tmp_path}/nobody.json")
    assert "no figures of seconds" in files["results.md"].decode()
    assert "bpc-seconds.png" not in files


def test_a_picture_of_all_models_shows_them_all(tmp_path: Path) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    rows = [row(model, seed, 2.5 + 0.02 * n + 0.01 * seed) for n, model in enumerate(MODELS) for seed in (0, 1)]
    write_rows(tmp_path / "rows.json", rows)
    report(tmp_path / "report", f"{tmp_path}/rows.json")
    for name in ("bpc-characters.png", "bpc-seconds.png"):
        pixels = imread(tmp_path / "report" / name)[..., :3]
        assert pixels.shape[0] > 800
        for column, colour in COLOURS.items():
            assert (abs(pixels - to_rgb(colour)).max(axis=-1) < 0.01).sum() > 300, column


def test_a_picture_of_three_units_has_no_empty_panel(tmp_path: Path) -> None:
    from matplotlib.image import imread

    rows = [row(BASELINES[unit], 0, 2.5) for unit in ("lstm", "gru", "tanh")]
    write_rows(tmp_path / "rows.json", rows)
    report(tmp_path / "report", f"{tmp_path}/rows.json")
    pixels = imread(tmp_path / "report/bpc-characters.png")[..., :3]
    height, width = pixels.shape[:2]
    assert (pixels[height // 2 + 40 :, width // 2 + 40 :] > 0.99).all()
    assert not (pixels[height // 2 + 40 :, : width // 2 - 40] > 0.99).all()


def test_other_budgets_and_settings_are_not_compared(tmp_path: Path) -> None:
    other = row("gf-lstm-3x140", 0, 1.0, budget={"kind": "characters", "amount": 99.0})
    write_rows(tmp_path / "rows.json", [row("lstm-3x191", 0, 2.5), other])
    text = report(tmp_path / "report", f"{tmp_path}/rows.json")["results.md"].decode()
    assert "## 10,000 characters of text" in text
    assert "## 99 characters of text" in text
    assert "less stacked" not in text
    rate = {"optimizer": "adam", "learning_rate": 0.01, "schedule": "constant"}
    assert len(lines([row("lstm-3x191", 0, 2.5), row("gf-lstm-3x140", 0, 2.5, settings=rate)])) == 2


def test_rows_are_merged_and_a_run_alone_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    write_rows(path, [row("gf-lstm-3x140", 0, 2.5), row("lstm-3x191", 1, 2.6)])
    write_rows(path, [row("lstm-3x191", 0, 2.7), row("gf-lstm-3x140", 0, 2.4, alone=False), row("lstm-3x191", 1, 2.65)])
    found = [(each.model, each.seed, each.test_bpc) for each in read_rows(path)]
    assert found == [("lstm-3x191", 0, 2.7), ("lstm-3x191", 1, 2.65), ("gf-lstm-3x140", 0, 2.5)]


def test_a_long_curve_is_thinned_to_its_ends() -> None:
    points = [Point(n, float(n), 3.0) for n in range(1000)]
    found = thinned(points)
    assert len(found) == 40
    assert (found[0], found[-1]) == (points[0], points[-1])


# ------------------------------------------------------------------------------------------------- plans and tuning


def test_the_presets_are_the_papers_places() -> None:
    assert {MODELS[model] for model in MODELS} >= set(TEST_BPC)
    assert all(MODELS[model].column == "stacked" for unit, model in BASELINES.items() if unit != "mrnn")
    assert published_choice("tanh-3x390") == Choice("rmsprop", 5e-5, source="published")


def test_a_budget_in_updates() -> None:
    settings = paper_tables.preset("lstm-3x191")
    assert overrides(settings) == {}
    assert Budget("characters", 6_000_000).updates(settings, 360) == 600
    assert Budget("characters", 15_000).updates(settings, 360) == 2
    assert Budget("epochs", 2).updates(settings, 360) == 720
    assert Budget("epochs", 0.1).share(1 / 5).updates(settings, 360) == 8
    assert Budget("seconds", 60).updates(settings, 360) is None


def training(folder: Path, updates: int | None, rate: float = 0.01) -> Training:
    return Training("lstm-3x191", 100, RunFolder(folder), Choice("adam", rate), Budget("seconds", 60), updates, ())


def checkpoint(folder: Path, step: int, seconds: float) -> None:
    where = folder / f"checkpoints/step-{step:08d}"
    where.mkdir(parents=True)
    (where / "trainer.json").write_text(json.dumps({"position": {"step": step, "train_seconds": seconds}}))
    (folder / "checkpoints/latest").write_text(where.name)


def flag(command: list[str], name: str) -> float:
    return float(command[command.index(name) + 1])


def test_a_budget_of_seconds_ends_with_one_more_update(tmp_path: Path) -> None:
    each = training(tmp_path, None)
    assert flag(each.command(2.0), "--time-limit") == 1  # minute: the whole budget
    assert flag(each.command(0.25), "--time-limit") == 0.25
    checkpoint(tmp_path, 40, 48.0)
    assert each.done == pytest.approx(0.8)
    assert flag(each.command(2.0), "--time-limit") == pytest.approx(0.2)
    checkpoint(tmp_path, 50, 60.5)
    command = each.command(2.0)
    assert (flag(command, "--max-updates"), flag(command, "--time-limit")) == (51, 0)


def test_a_real_trial_is_kept_and_used(tmp_path: Path, trained: Path) -> None:
    flags = ["tune", str(tmp_path / "runs"), "--updates", "10", "--threads", "1", "--units", "lstm"]
    more = small(trained.parent / "data", "--no-mlflow")
    done = warm_python(SCRIPT, *flags, "--optimizers", "adam", "--learning-rates", "0.01", *more)
    assert done.returncode == 0, done.stderr
    assert "LSTM: adam 0.01 for all its models (validation of lstm-3x191); it is at the edge" in done.stdout
    assert "try --units lstm --optimizers adam --learning-rates 0.0033 too" in done.stdout
    run = tmp_path / "runs/tune-lstm-3x191-adam-0.01-constant-seed-100"
    assert summary(run)["step"] == 2  # a fifth
    found = json.loads((tmp_path / "runs/tuned.json").read_text())["lstm"]
    assert found["valid_bpc"] == summary(run)["valid_bpc"]
    assert str(summary(run)["test_bpc"]) not in (tmp_path / "runs/tuned.json").read_text()
    plan = plan_of(tmp_path / "runs", trained.parent / "data", 10)
    assert plan.choice("lstm") == Choice("adam", 0.01, "constant", "tuned")
    for rate, bpc in ((0.003, 1.0), (0.03, None)):  # the lowest validation is taken, whatever explodes
        trial = training(tmp_path / f"{rate}", 2, rate)
        trial.folder.path.mkdir()
        if bpc is not None:
            values = {"finished": True, "step": 2, "without_best": 0, "valid_bpc": bpc, "test_bpc": 9.0}
            trial.folder.write_summary({**values, "best_step": 2, "sample": ""})
        paper_tables._keep_trial(plan, trial)
    assert plan.choice("lstm").learning_rate == 0.003
    assert [each["valid_bpc"] for each in plan.tuned()["lstm"]["tried"]] == [1.0, found["valid_bpc"], None]


def plan_of(folder: Path, data: Path, updates: float) -> Any:
    return paper_tables.Plan(folder, Budget("updates", updates), [], small(data, "--no-mlflow")[1:])


# ------------------------------------------------------------------------------------------------------- mistakes


BY_HAND = ["--optimizer", "adam", "--learning-rate", "1"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["run", "F", "--models", "lstm-9x9"], "lstm-9x9 is no model of the paper's table; give some of tanh-1x1000"),
        (["tune", "F", "--units", "rnn"], "--units rnn is no unit; give some of tanh gru lstm mrnn"),
        (["run", "F", "--updates", "0"], "--updates is 0; it must be greater than 0"),
        (["run", "F", "--updates", "5", "--epochs", "1"], "not allowed with argument --updates"),
        (["run", "F", "--threads", "0"], "--threads is 0; it must be at least 1"),
        (["run", "F", "--models", "gru-3x228"], "no learning rate is tuned for GRU in .*: run tune --units gru first"),
        (["run", "F", "--learning-rate", "0.1"], "--learning-rate by hand goes with --optimizer"),
        (["run", "F", "--optimizer", "adam"], "by hand go with --learning-rate"),
        (["run", "F", "--published", "--optimizer", "adam"], "leave out the others"),
        (["run", "F", "--", "--learning-rate", "1"], "--learning-rate is this script's own"),
        (["run", "F", "--", "--max_updates=1"], "--max-updates is this script's own"),
        (["run", "F", "--corpus-file", "SHORT"], "training text of 1800 bytes is too short for 100 rows x 100 steps"),
        (["run", "F", "--corpus-file", "MISSING"], "MISSING"),
        (["run", "F", "--json", "SHORT"], "SHORT is not JSON"),
        (["run", "F", "--seconds", "9", *BY_HAND, "--schedule", "cosine"], "cosine must know the end"),
        (["tune", "F", "--learning-rates", "1"], "--learning-rates are of one optimizer"),
        (["report"], "nothing to report: give a folder"),
        (["report", "SHORT"], "SHORT is not JSON"),
        (["report", "OTHER"], "OTHER is not of the form gfrnn.paper_tables.1"),
        (["report", "TORN"], "TORN: row 1 is not a whole row"),
        (["report", "EMPTY"], "nothing to report: no training there has finished"),
        (["report", "."], "is no folder of paper_tables.py"),
        (["report", "--tracking-uris", "sqlite:////no/such.db"], "there is no MLflow database at"),
    ],
)
def test_a_mistake_is_a_line(flags: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("SHORT").write_text("some text " * 200)
    Path("OTHER").write_text('{"results": []}')
    Path("TORN").write_text('{"form": "gfrnn.paper_tables.1", "rows": [{"model": "lstm-3x191", "curve": []}]}')
    Path("EMPTY").write_text('{"form": "gfrnn.paper_tables.1", "rows": []}')
    own = ["--data-dir", str(tmp_path / "data")]
    if flags[0] != "report":
        text = [] if "--corpus-file" in flags else ["--corpus", "enwik8-1m"]
        flags = [*flags, *([] if "--" in flags else ["--"]), *own, *text]
    monkeypatch.setattr(sys, "argv", ["paper_tables.py", *flags])
    with pytest.raises(UserError, match=said) as raised:
        paper_tables._main()
    assert "\n" not in str(raised.value)


def test_a_folder_of_something_else(tmp_path: Path, trained: Path) -> None:
    data = trained.parent / "data"
    plan_of(tmp_path / "runs", data, 20)
    plan_of(tmp_path / "runs", data, 10)  # nothing is trained yet
    (tmp_path / "runs/trainings.json").write_text("{}")
    with pytest.raises(UserError, match=r"runs is of a budget of 10 updates, not 20 updates: give another folder"):
        plan_of(tmp_path / "runs", data, 20)
    other = tmp_path / "other.txt"
    other.write_bytes(bytes(range(256)) * 40)
    more = [*SMALL, "--data-dir", str(data)]
    with pytest.raises(UserError, match=r"is of another text than other\.txt"):
        paper_tables.Plan(tmp_path / "runs", Budget("updates", 10), ["--corpus-file", str(other)], more)
    with pytest.raises(UserError, match="is of models with hidden_size 12, rows 8"):
        paper_tables.Plan(tmp_path / "runs", Budget("updates", 10), [], ["--corpus", "enwik8-1m", *more[-2:]])


def test_a_users_error_ends_with_status_2(tmp_path: Path) -> None:
    done = warm_python(SCRIPT, "report", tmp_path / "none.json")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert done.stderr.startswith("error: ")
