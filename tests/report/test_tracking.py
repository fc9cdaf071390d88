"""What --track logs: every number, curve and table, by fakes of all three packages and by those that are installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import robustvlm as rv
from robustvlm.commands import COMMANDS, command_of, open_run, report_of
from robustvlm.commands.index import batch_of
from robustvlm.errors import UserError
from robustvlm.report import tracking
from robustvlm.report.copies import markdown
from robustvlm.report.tracking import Logged, logged, require, track
from robustvlm.runs.run import FinishedRun

BEFORE = Path(__file__).parents[1] / "pins" / "before"
SECRET = "hunter2hunter2"


@pytest.fixture(scope="module")
def run() -> FinishedRun[Any]:
    return open_run(BEFORE / "finetune")


@pytest.fixture(scope="module")
def told(run: FinishedRun[Any]) -> Logged:
    return logged(run, report_of(run))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return what puts modules of a name in the place of installed ones."""

    def put(name: str, **content: object) -> None:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)

    return put


def test_curves_are_the_history_and_numbers_the_summary(run: FinishedRun[Any], told: Logged) -> None:
    history = run.summary.history
    assert history.steps
    assert history.validations
    for name in history.steps[0].terms:
        assert told.curves[f"training/{name}"] == [(one.step, one.terms[name]) for one in history.steps]
    for name in ("learning_rate", "gradient_norm"):
        assert told.curves[f"training/{name}"] == [(one.step, getattr(one, name)) for one in history.steps]
    name, measure = next(iter(history.validations[-1].measures.items()))
    assert told.curves[f"validation/{name}"][-1] == (history.validations[-1].step, measure.value)
    assert told.curves[f"validation/{name}.low"][-1] == (history.validations[-1].step, measure.low)
    assert not any("total" in name for name in told.curves)
    assert told.numbers["steps"] == run.summary.steps
    assert told.numbers["history/seconds"] == history.seconds
    assert told.settings["seed"] == str(run.manifest["config"]["seed"])
    attack = open_run(BEFORE / "attack")
    at = attack.summary.per_eps[-1]
    key = f"per_eps/{at.eps_text.replace('/', '_')}/robust_accuracy"
    numbers = logged(attack, report_of(attack)).numbers
    assert (numbers[key], numbers[f"{key}.high"]) == (at.robust_accuracy.value, at.robust_accuracy.high)


def test_many_numbers_are_cut_from_the_inside_and_none_takes_another_s_place() -> None:
    many = {
        "deep": {"er": {str(n): n for n in range(900)}},
        "a": 1,
        "a/b": 2,
        "a?b": 3,
        "odd": float("nan"),
        "on": True,
    }
    found = tracking.numbers_of(many)
    assert len(found) == 500
    assert [found[name] for name in ("a", "a_b", "a_b 2")] == [1, 2, 3]
    assert "odd" not in found
    assert "on" not in found


def test_severities_of_a_kind_are_told_apart() -> None:
    found = [{"name": "fog", "severity": level, "accuracy": level / 10} for level in (3, 5)]
    assert tracking.numbers_of({"found": found}) == {"found/fog_3/accuracy": 0.3, "found/fog_5/accuracy": 0.5}


def test_tensorboard_gets_all_of_it(
    told: Logged, tmp_path: Path, run: FinishedRun[Any], fake: Callable[..., None]
) -> None:
    scalars: list[tuple[str, float, int]] = []
    texts: dict[str, str] = {}
    writer = SimpleNamespace(
        add_scalar=lambda *found: scalars.append(found),
        add_text=texts.__setitem__,
        close=lambda: texts.update(closed=""),
    )
    fake("tensorboard")
    fake("torch.utils.tensorboard", SummaryWriter=lambda _: writer)
    track(FinishedRun(tmp_path, run.manifest, run.summary), report_of(run), "tensorboard")
    wanted = [(name, value, step) for name, points in told.curves.items() for step, value in points]
    assert sorted(scalars) == sorted(wanted + [(f"summary/{name}", value, 0) for name, value in told.numbers.items()])
    assert texts.keys() - {"settings", "outcome", "closed"} == {f"tables/{title}" for title in told.tables}
    assert "closed" in texts


def test_mlflow_gets_all_of_it_once(told: Logged, run: FinishedRun[Any], fake: Callable[..., None]) -> None:
    metrics: list[tuple[Any, ...]] = []
    params: dict[str, str] = {}
    texts: dict[str, str] = {}
    runs: list[Any] = []

    class Client:
        def get_experiment_by_name(self, name: str) -> None:
            assert name == "robustvlm"

        def create_experiment(self, name: str) -> str:
            assert name == "robustvlm"
            return "7"

        def search_runs(self, experiments: list[str], wanted: str, max_results: int) -> list[Any]:
            assert experiments == ["7"]
            assert told.ident in wanted
            return runs[:max_results]

        def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
            assert (experiment, run_name) == ("7", told.name)
            assert told.ident in tags.values()
            runs.append(SimpleNamespace(info=SimpleNamespace(run_id=f"run {len(runs)}")))
            return runs[-1]

        def log_batch(self, ident: str, metrics: Any = (), params: Any = ()) -> None:
            assert ident == "run 0"
            assert len(metrics) <= 1000
            assert len(params) <= 100
            kept.extend(metrics)
            given.update(params)

        def log_text(self, ident: str, text: str, place: str) -> None:
            assert ident == "run 0"
            texts[place] = text

        def set_terminated(self, ident: str) -> None:
            texts["ended"] = ident

    kept, given = metrics, params
    fake("mlflow", MlflowClient=Client)
    fake("mlflow.entities", Metric=lambda *found: found, Param=lambda *found: found)
    track(run, report_of(run), "mlflow")
    points = {(f"summary/{name}", value, 0) for name, value in told.numbers.items()}
    points |= {(name, value, step) for name, curve in told.curves.items() for step, value in curve}
    assert {(name, value, step) for name, value, _, step in metrics} == points
    assert len(metrics) == len(points)
    assert params == told.settings
    assert [texts[place] for place in texts if place.startswith("tables/")] == [
        markdown(table) + "\n" for table in told.tables.values()
    ]
    assert texts["ended"] == "run 0"
    track(run, report_of(run), "mlflow")
    assert len(runs) == 1


def test_wandb_gets_all_of_it_and_gathers_nothing(
    told: Logged, run: FinishedRun[Any], fake: Callable[..., None]
) -> None:
    rows: list[tuple[dict[str, Any], int | None]] = []
    kept: dict[str, Any] = {}
    ended: list[bool] = []
    made = SimpleNamespace(
        log=lambda values, step=None: rows.append((values, step)), summary=kept, offline=True, dir="w/r/files",
        finish=lambda: ended.append(True),
    )  # fmt: skip
    settings: dict[str, Any] = {}
    begun: dict[str, Any] = {}
    fake(
        "wandb",
        Settings=lambda **given: settings.update(given),
        init=lambda **given: begun.update(given) or made,
        Table=lambda columns, data: (columns, data),
    )
    assert "wandb sync" in track(run, report_of(run), "wandb")
    *steps, (tables, _) = rows
    points = {(name, value, step) for values, step in steps for name, value in values.items()}
    assert points == {(name, value, step) for name, curve in told.curves.items() for step, value in curve}
    assert [step for _, step in steps] == sorted({step for _, step in steps})
    assert {name: kept[name] for name in told.numbers} == told.numbers
    assert tables.keys() == {f"tables/{title}" for title in told.tables}
    for columns, data in tables.values():
        assert len(set(columns)) == len(columns)
        assert {len(row) for row in data} <= {len(columns)}
    assert all(settings[name] for name in ("disable_git", "disable_code", "x_disable_meta", "x_disable_machine_info"))
    assert (begun["id"], begun["config"]) == (told.ident[:32], told.settings)
    assert ended == [True]


def test_no_secret_is_logged(run: FinishedRun[Any]) -> None:
    config = run.manifest["config"] | {"data": f"wds:https://me:{SECRET}@host/a.tar?token={SECRET}"}
    told = logged(FinishedRun(run.folder, run.manifest | {"config": config}, run.summary), None)
    assert told.settings["data"].startswith("wds:https://***@host/a.tar")
    assert SECRET not in repr(told)


def test_what_is_missing_or_fails_is_one_line(
    run: FinishedRun[Any], monkeypatch: pytest.MonkeyPatch, fake: Callable[..., None], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"unknown --track 'tensorbord': did you mean 'tensorboard'\?"):
        require("tensorbord")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match=r"needs the package mlflow-skinny: pip install 'robustvlm\[mlflow\]'"):
        rv.evaluate("tiny", limit=4, track="mlflow", out=tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "wandb.py").write_text("import of_another_age")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match="wandb cannot be used for --track wandb: No module named 'of_another_age'"):
        require("wandb")

    def offline(**_: object) -> None:
        raise OSError(f"cannot reach https://me:{SECRET}@host")

    fake("wandb", Settings=dict, init=offline)
    with pytest.raises(UserError, match=r"is whole, but wandb did not take it \(OSError: cannot reach") as failed:
        track(run, None, "wandb")
    assert SECRET not in str(failed.value)


def test_every_command_that_makes_runs_tracks_them_and_is_named_alike_with_and_without() -> None:
    for kind in COMMANDS.keys() - {"build"}:
        fields = command_of(kind).settings.model_fields
        assert "track" in fields, kind
        options = {name: about for name, _, about in command_of(kind).settings.options()}
        assert options["track"].place == "run", kind


def test_a_run_is_logged_when_it_ends_and_when_it_is_asked_for_again(tmp_path: Path, fake: Callable[..., None]) -> None:
    times: list[str] = []
    writer = SimpleNamespace(add_scalar=lambda *_: None, add_text=lambda *_: None, close=lambda: None)
    fake("tensorboard")
    fake("torch.utils.tensorboard", SummaryWriter=lambda folder: times.append(folder) or writer)
    first = rv.evaluate("tiny", limit=4, track="tensorboard", out=tmp_path)
    again = rv.evaluate("tiny", limit=4, track="tensorboard", out=tmp_path)
    assert times == [str(first.folder / "tensorboard")] * 2
    assert [told.run.summary.images for told in batch_of([first.folder]).runs] == [4]
    assert first.folder == again.folder == rv.evaluate("tiny", limit=4, out=tmp_path).folder


# The packages themselves, where they are installed


def test_tensorboard_reads_it_back(run: FinishedRun[Any], told: Logged, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track(FinishedRun(tmp_path, run.manifest, run.summary), report_of(run), "tensorboard")
    track(FinishedRun(tmp_path, run.manifest, run.summary), report_of(run), "tensorboard")
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(found.Tags()["scalars"]) == {*told.curves, *(f"summary/{name}" for name in told.numbers)}
    for name, points in told.curves.items():
        assert [(one.step, pytest.approx(one.value)) for one in found.Scalars(name)] == points


def test_mlflow_reads_it_back(
    run: FinishedRun[Any], told: Logged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    from mlflow import MlflowClient

    track(run, report_of(run), "mlflow")
    track(run, report_of(run), "mlflow")
    client = MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("robustvlm").experiment_id])
    wanted = {f"summary/{name}" for name in told.numbers} | told.curves.keys()
    assert found.data.metrics.keys() == wanted
    assert found.data.params == told.settings
    name, points = next(iter(told.curves.items()))
    assert {(one.step, one.value) for one in client.get_metric_history(found.info.run_id, name)} == set(points)
    tables = client.list_artifacts(found.info.run_id, "tables")
    assert len(tables) == len(told.tables)


def test_wandb_keeps_it_offline(
    run: FinishedRun[Any], told: Logged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["robustvlm", "attack", f"--data=https://me:{SECRET}@host/a.tar"])
    where = track(run, report_of(run), "wandb")
    assert "wandb sync" in where
    sys.modules["wandb"].teardown()  # what is still to be written is written
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for name in [*told.curves, *told.numbers]:
        assert name.encode() in kept, name
    assert len(list(tmp_path.rglob("*.table.json"))) == len(told.tables)
    assert SECRET.encode() not in kept
