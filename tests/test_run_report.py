# SPDX-License-Identifier: Apache-2.0
"""`jai report`: what it draws of a run's logs, when it gives alarm, and what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jai import cli
from jai.errors import UserError
from jai.trainers.run_report import find_alarms, read_logs, report_run
from jai.trainers.run_report_options import RunReportOptions


def calm_logs(steps: int = 12) -> list[dict[str, Any]]:
    """Of a run in which nothing goes wrong, two layers with two experts each."""
    return [
        {
            "step": step,
            "loss": 3 - 0.1 * step,
            "grad_norm": 1 + 0.1 * (step % 3),
            "learning_rate": 1e-4,
            "loss/language/en": 2 - 0.05 * step,
            "loss/language/th": 5 - 0.3 * step,
            "tokens_seen": 100 * step,
            "tokens_seen/thai": 27 * step,
            "skip_alpha/layer_01": 0.01 * step,
            "router/entropy/layer_00": 0.6,
            **{f"router/load/layer_0{layer}/expert_{expert}": 0.5 for layer in (0, 1) for expert in (0, 1)},
        }
        for step in range(1, steps + 1)
    ]


def with_languages(share: float) -> list[dict[str, Any]]:
    """Of two layers with four experts; Thai gives the first two of layer 1 so much together, the others the rest."""
    return [
        {
            **{key: value for key, value in log.items() if not key.startswith("router/load")},
            **{f"router/load/layer_0{layer}/expert_{expert}": 0.25 for layer in (0, 1) for expert in range(4)},
            **{
                f"router/load/language/{language}/layer_0{layer}/expert_{expert}": (
                    (share if expert < 2 else 1 - share) / 2 if (language, layer) == ("th", 1) else 0.25
                )
                for language in ("en", "th")
                for layer in (0, 1)
                for expert in range(4)
            },
            **{f"router/entropy/language/{language}/mean": 0.5 for language in ("en", "th")},
            **{f"router/load_max/language/{language}/mean": 0.25 for language in ("en", "th")},
        }
        for log in calm_logs()
    ]


def changed(number: int, **values: float) -> list[dict[str, Any]]:
    logs = calm_logs()
    logs[number].update({key.replace("__", "/"): value for key, value in values.items()})
    return logs


def write_state(folder: Path, logs: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [*logs, {"train_runtime": 1.0}]}))


def test_a_calm_run_gives_no_alarm_and_has_all_its_charts(tmp_path):
    write_state(tmp_path / "run<1>", calm_logs())
    out = report_run(RunReportOptions(run=tmp_path / "run<1>"), Console(quiet=True))
    page = out.read_text()
    assert out == tmp_path / "run<1>" / "report.html"
    assert "<h1>run&lt;1&gt;</h1>" in page
    assert "No alarms." in page
    for text in ("en: 1.4", "th: 1.4", "Gradient norm", "Learning rate", "thai: 324", "Skip alphas", "Entropy of each"):
        assert text in page
    assert page.count("<polyline") == 1 + 2 + 1 + 1 + 2 + 1 + 1
    assert "expert 1: 50 %" in page
    assert "z-loss" not in page  # it logged none


def test_pairs_have_charts_of_their_own(tmp_path):
    logs = [
        {
            "step": step,
            "loss": 0.7 - 0.01 * step,
            **{
                f"rewards/{figure}{group}": step / 10
                for figure in ("margins", "accuracies")
                for group in ("", "/category/chat", "/category/if", "/language/th", "/language/en")
            },
        }
        for step in range(1, 6)
    ]
    write_state(tmp_path / "run", logs)
    page = report_run(RunReportOptions(run=tmp_path / "run"), Console(quiet=True)).read_text()
    assert page.count("<polyline") == 1 + 2 * (1 + 2 + 2)
    for text in (
        "Margin of the chosen",
        "Margin by category",
        "Share of pairs whose chosen",
        "The same share by language",
    ):
        assert text in page
    for group in ("chat", "if", "th", "en"):
        assert page.count(f"{group}: 0.5") == 2


@pytest.mark.parametrize(
    ("logs", "kind", "text"),
    [
        (changed(6, loss=math.nan), "instability", "the loss is nan at step 7"),
        (changed(6, grad_norm=12), "instability", "the gradient norm is 12 at step 7, more than 10 times"),
        (changed(8, loss=6.0), "instability", "the loss has risen to 3.500 by step 9, from 2.300"),
        (
            changed(-1, router__load__layer_01__expert_0=0.96, router__load__layer_01__expert_1=0.04),
            "router",
            "expert 1 of layer 1 gets 4.00% of the tokens at step 12; if all got as much it would be 50%",
        ),
        (
            [{**log, "loss/language/en": 2 + 0.05 * log["step"]} for log in calm_logs()],
            "language",
            "the loss on en is 2.550 at step 12, and was 2.100 at the start",
        ),
    ],
)
def test_what_goes_wrong_gives_one_alarm(logs, kind, text):
    alarms = find_alarms(logs, "en")
    assert {alarm.kind for alarm in alarms} == {kind}
    assert text in alarms[0].text


def test_a_router_that_collapses_for_one_language_alone_gives_alarm(tmp_path):
    assert find_alarms(with_languages(0.9), "en") == []
    (alarm,) = find_alarms(with_languages(0.992), "en")
    assert alarm.kind == "router"
    assert alarm.text == (
        "layer 1 has collapsed for th: of 4 experts, 2, 3 together get 0.80% of its tokens at the end"
    )
    assert find_alarms(with_languages(0.992)[:2], "en") == []  # a mean of three logs
    write_state(tmp_path, with_languages(0.992))
    page = report_run(RunReportOptions(run=tmp_path), Console(quiet=True)).read_text()
    for text in ("Entropy of routers by language", "Largest share of an expert by language", "collapsed for th"):
        assert text in page
    maps = page.partition("Routers at step")[2]
    for text in ("all tokens", ">en<", ">th<", "layer 1, expert 3: 0 %", "layer 1, expert 0: 50 %"):
        assert text in maps


def test_little_gives_none():
    assert find_alarms(changed(8, loss=2.9, grad_norm=9), "en") == []
    assert find_alarms(changed(3, router__load__layer_01__expert_1=0.001), "en") == []  # only the end counts
    rising = [{**log, "loss/language/th": 2.0 + log["step"]} for log in calm_logs()]
    assert find_alarms(rising, "en") == []
    assert [alarm.kind for alarm in find_alarms(rising, "th")] == ["language"]


def test_a_run_that_goes_on_is_read_from_its_last_whole_checkpoint(tmp_path):
    write_state(tmp_path / "checkpoint-9", calm_logs(9))
    write_state(tmp_path / "checkpoint-10", calm_logs(10))
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-11" / "trainer_state.json").write_text('{"log_history": [')
    assert read_logs(tmp_path)[-1]["step"] == 10
    write_state(tmp_path, calm_logs(12))
    assert read_logs(tmp_path)[-1]["step"] == 12


def test_logs_without_a_loss_and_values_that_are_no_numbers_are_left_out(tmp_path):
    losses = [
        {"step": 1, "loss": math.nan, "note": "text", "flag": True, "huge": 10**400, "none": None},
        {"step": 2, "eval_loss": 1.0},
        {"step": 3, "loss": 2, "grad_norm": math.inf},
    ]
    write_state(tmp_path, losses)
    first, last = read_logs(tmp_path)
    assert first.keys() == {"step", "loss"}
    assert math.isnan(first["loss"])
    assert last == losses[2]


@pytest.mark.parametrize(
    ("history", "problem"),
    [
        ({"step": 1}, "its log_history is not a list of logs"),
        ([{"step": 1, "loss": 1.0}, 5], "its log_history is not a list of logs"),
        ([{"step": 1, "loss": "1.0"}], "no number for its loss or its step"),
        ([{"step": True, "loss": 1.0}], "no number for its loss or its step"),
        ([{"step": 1.5, "loss": 1.0}], "no number for its loss or its step"),
        ([{"loss": 1.0}], "no number for its loss or its step"),
    ],
)
def test_damaged_logs_are_refused(tmp_path, history, problem):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    with pytest.raises(UserError, match=rf"trainer_state.json is damaged: .*{problem}.* Give another run"):
        read_logs(tmp_path)


def test_the_command_says_the_alarms_and_writes_where_it_is_told(tmp_path, monkeypatch, capsys):
    write_state(tmp_path, [{**log, "loss/language/th": 2.0 + log["step"]} for log in calm_logs()])
    monkeypatch.setattr(
        "sys.argv", ["jai", "report", str(tmp_path), "--out", str(tmp_path / "a.html"), "--language", "th"]
    )
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code
    assert "language: the loss on th is 13.000 at step 12" in " ".join(capsys.readouterr().out.split())
    assert "<b>language</b>: the loss on th" in (tmp_path / "a.html").read_text()
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("logs", "language", "said"),
    [
        (calm_logs(), "fr", "Whether fr recovers is not known: the logs have losses on en, th."),
        (calm_logs(5), "en", "that takes 6 logs with a loss on it, and there are 5."),
        (calm_logs(6), "en", None),
        ([{"step": step, "loss": 1.0} for step in range(9)], "en", None),  # a stage that knows of no languages
    ],
)
def test_that_the_old_language_is_not_watched_is_said(tmp_path, capsys, logs, language, said):
    write_state(tmp_path, logs)
    page = report_run(RunReportOptions(run=tmp_path, language=language)).read_text()
    printed = " ".join(capsys.readouterr().out.split())
    assert "No alarms." in printed
    for text in (page, printed):
        assert said in text if said else "comes back" not in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_one_message(tmp_path, monkeypatch, capsys):
    """The system's error names no file."""
    write_state(tmp_path, calm_logs())
    monkeypatch.setattr("sys.argv", ["jai", "report", str(tmp_path), "--out", "/dev/full"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
    assert "Error: The output could not be written: No space left on device." in capsys.readouterr().err


def test_a_folder_without_logs_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no logs of training"):
        report_run(RunReportOptions(run=tmp_path / "nowhere"), Console(quiet=True))
    write_state(tmp_path, calm_logs())
    with pytest.raises(UserError, match=r"The folder .*nowhere of `--out` does not exist"):
        report_run(RunReportOptions(run=tmp_path, out=tmp_path / "nowhere" / "a.html"), Console(quiet=True))
