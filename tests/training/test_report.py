"""Tables and pictures of finished runs, from metrics that are made up here."""

import json
import os
import shutil
import statistics
from pathlib import Path

import pytest

from efficient_transformers.training.runs import report
from efficient_transformers.training.runs.report import marks, put, read_runs, rows_of, table
from efficient_transformers.training.settings import InputError


def write_run(folder, config="era/local", seed=0, memory=None, accuracy=0.5, command="", settings=None, **test):
    variant = config.rpartition("/")[2]
    training = {"steps": 1200, "tokens_per_second": 1000 + seed, "hardware": "2 CPU threads"}
    metrics = {
        "test": {"loss": 1.0, "accuracy": accuracy, "n": 100, **test},
        "training": training | ({"peak_memory_mb": memory} if memory else {}),
        "model": {"model_type": f"et_{variant}", "parameters": 801_234},
        "settings": {
            "data": "era", "config": config, "seed": seed, "best_metric": "accuracy", "out": str(folder),
            "max_length": 64, "model": {"model_type": f"et_{variant}"}, **(settings or {}),
        },
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics | ({"command": command} if command else {})))


@pytest.fixture
def runs(tmp_path):
    for seed, accuracy in enumerate((0.5, 0.6, 0.7)):
        values = {"accuracy": accuracy, "memory": 100.0 + seed, "command": f"train {seed}"}
        write_run(tmp_path / f"runs/local-{seed}", seed=seed, **values)
    write_run(tmp_path / "runs/full", config="era/full", accuracy=0.9)
    write_run(tmp_path / "runs/clm", config="clm/full", accuracy=0.25, settings={"best_metric": "loss"}, perplexity=2.7)
    write_run(tmp_path / "runs/full/checkpoints/step-1", config="era/none")  # no run of its own
    return tmp_path / "runs"


def cells(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_runs_are_grouped_by_task_and_seed(runs):
    groups = rows_of(read_runs([runs]))
    assert {name: [row.name for row in rows] for name, rows in groups.items()} == {
        "clm": ["full"],
        "era": ["full", "local"],
    }
    heads, _, full, local = cells(table(groups["era"]))
    assert heads == ["variant", "accuracy", "loss", "seeds", "parameters", "steps", "tokens/s", "peak memory, MB"]
    deviation = statistics.stdev([0.5, 0.6, 0.7])
    assert local == [
        "local",
        f"0.600 ± {deviation:.3f}",
        "1.000 ± 0.000",
        "0, 1, 2",
        "801,234",
        "1,200",
        "1,001",
        "102",
    ]
    assert full == ["full", "0.900", "1.000", "0", "801,234", "1,200", "1,000", ""]
    heads, *_ = cells(table(groups["clm"]))
    assert heads[:3] == ["variant", "loss", "accuracy"]  # the score that training looked at, and no perplexity
    assert "peak memory, MB" not in heads
    text = table(groups["era"])
    assert "n = 100; mean ± sample standard deviation over the seeds. 2 CPU threads." in text
    assert "```bash\ntrain 0\ntrain 1\ntrain 2\n```" in text


def test_the_best_stands_first(tmp_path):
    for name, loss in {"a": 2.0, "b": 1.0, "c": 3.0}.items():
        write_run(tmp_path / name, config=f"clm/{name}", loss=loss, settings={"best_metric": "loss"})
        write_run(tmp_path / f"{name}2", config=f"era/{name}", accuracy=loss)
    groups = rows_of(read_runs([tmp_path]))
    assert [row.name for row in groups["clm"]] == ["b", "a", "c"]
    assert [row.name for row in groups["era"]] == ["c", "a", "b"]


@pytest.mark.parametrize(("runs", "shown"), [(4, 4), (5, 0)])
def test_few_commands_are_shown(tmp_path, runs, shown):
    for seed in range(runs):
        write_run(tmp_path / str(seed), seed=seed, command=f"train {seed}")
    assert table(rows_of(read_runs([tmp_path]))["era"]).count("\ntrain ") == shown


def test_a_classifier_is_known_by_its_accuracy(tmp_path):
    """Whatever chose its weights; a language model by its loss."""
    write_run(tmp_path / "era", settings={"best_metric": "loss"}, macro_f1=0.4)
    write_run(tmp_path / "clm", config="clm/full", settings={"best_metric": "loss"}, perplexity=2.7)
    groups = rows_of(read_runs([tmp_path]))
    assert {name: cells(table(rows))[0][1] for name, rows in groups.items()} == {"era": "accuracy", "clm": "loss"}


def test_runs_with_other_settings_are_other_rows(tmp_path):
    for length in (64, 512):
        for seed in (0, 1):
            settings = {"max_length": length, "model": {"model_type": "et_local", "window_size": length // 4}}
            write_run(tmp_path / f"{length}-{seed}", seed=seed, accuracy=length / 1000, settings=settings)
    rows = rows_of(read_runs([tmp_path]))["era"]
    assert [row.name for row in rows] == [
        "local, max_length=512, model.window_size=128",
        "local, max_length=64, model.window_size=16",
    ]
    assert [len(row.runs) for row in rows] == [2, 2]


def test_a_run_that_does_not_tell_its_config_goes_by_its_data(tmp_path):
    write_run(tmp_path / "a", config="x/local", settings={"config": None, "data": "texts/reviews.csv"})
    (group,) = rows_of(read_runs([tmp_path])).items()
    assert (group[0], group[1][0].name) == ("reviews", "local")


def test_a_folder_given_twice_counts_once(runs):
    assert len(read_runs([runs, runs / "full"])) == len(read_runs([runs])) == 5


def test_hand_written_text_stays(runs, tmp_path):
    out = tmp_path / "results.md"
    begin, end = marks("era")
    out.write_text(f"# Results\n\nBy hand.\n\n{begin}\nold | table\n{end}\n\nBelow \\1 by hand.\n")
    report.main([str(runs), "--out", str(out)])
    text = out.read_text()
    assert text.startswith(f"# Results\n\nBy hand.\n\n{begin}\n| variant | accuracy")
    assert "old | table" not in text
    assert f"{end}\n\nBelow \\1 by hand.\n\n## clm\n\n{marks('clm')[0]}\n| variant | loss" in text
    report.main([str(runs), "--out", str(out)])
    assert out.read_text() == text
    before = text
    write_run(runs / "more", config="era/new", accuracy=0.99)
    report.main([str(runs), "--out", str(out), "--only", "clm"])
    assert out.read_text() == before
    report.main([str(runs), "--out", str(out), "--only", "era"])
    assert "| new | 0.990" in out.read_text()


def test_a_new_file_is_begun(runs, tmp_path):
    report.main([str(runs), "--out", str(tmp_path / "new/results.md"), "--only", "era"])
    assert (tmp_path / "new/results.md").read_text().startswith("## era\n\n<!-- begin:era -->\n| variant |")


def test_a_group_is_drawn(runs, tmp_path):
    picture = tmp_path / "pictures/era.png"
    report.main([str(runs), "--out", str(tmp_path / "results.md"), "--picture", f"era={picture}"])
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert 2_000 < len(content) < 200_000


@pytest.mark.parametrize("text", ["{0}", "{1} {0}", "{0} {1} {0} {1}", "{1}"])
def test_marks_that_do_not_fit_are_refused(text):
    with pytest.raises(InputError, match=r"must contain <!-- begin:era --> once, and <!-- end:era --> once after it"):
        put(text.format(*marks("era")), "era", "table\n")


def test_what_cannot_be_reported_is_told(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, message in {
        ("missing",): "error: There is no folder missing",
        (str(runs), "--only", "lra"): "error: There are no runs of 'lra'; there are some of clm, era",
        (str(runs), "--beside", "lenght"): "error: No runs of clm, era differ in 'lenght', the setting of --beside",
        (str(runs), "--out", "page.json"): r"error: --out \(page.json\) must be a page such as page.md",
        (str(runs), "--picture", "era"): r"error: --picture \('era'\) must have the form GROUP=FILE.png",
    }.items():
        with pytest.raises(SystemExit, match=message):
            report.main(["--out", "results.md", *arguments])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"error: No finished run \(no metrics.json\) is below empty"):
        report.main(["empty"])
    for content, message in {
        "{": "cannot be read as the metrics",
        '{"test": {}}': "lacks model, settings, training",
    }.items():
        (tmp_path / "empty/metrics.json").write_text(content)
        with pytest.raises(SystemExit, match=message):
            report.main(["empty"])
    assert not list(Path().glob("*.md")) + list(Path().glob("*.json"))


def test_runs_that_differ_in_a_setting_stand_side_by_side(tmp_path):
    for name, accuracy, steps in (("full", 0.5, None), ("full", 0.7, 200), ("local", 0.6, None)):
        values = {"accuracy": accuracy, "memory": 100.0, "settings": {"self_pretrain_steps": steps}}
        write_run(tmp_path / f"{name}-{steps}", config=f"lists/{name}", **values)
    write_run(tmp_path / "full-2", config="lists/full", seed=1, accuracy=0.9, settings={"self_pretrain_steps": 200})
    report.main([str(tmp_path), "--out", str(tmp_path / "results.md"), "--beside", "self_pretrain_steps"])
    heads, _, full, local = cells((tmp_path / "results.md").read_text())
    assert heads == [
        "variant",
        "accuracy",
        "accuracy, self_pretrain_steps=200",
        "seeds",
        "parameters",
        "tokens/s",
        "peak memory, MB",
    ]
    deviation = statistics.stdev([0.7, 0.9])
    assert full == ["full", "0.500", f"0.800 ± {deviation:.3f}", "0 / 0, 1", "801,234", "1,000", "100"]
    assert local == ["local", "0.600", "", "0 / -", "801,234", "1,000", "100"]


@pytest.mark.parametrize(
    ("taken", "heads"),
    [
        ({"full": 4096, "local": 4096}, ["accuracy, 4,096 tokens", "accuracy, 512 tokens"]),
        ({"full": 4096, "local": 2048}, ["accuracy, full length", "accuracy, 512 tokens"]),
        ({"full": 512, "local": 512}, ["accuracy, full length", "accuracy, 512 tokens"]),
    ],
)
def test_lengths_stand_side_by_side(tmp_path, taken, heads):
    for name, accuracy in (("full", 0.5), ("local", 0.8)):
        for length in (None, 512):
            for seed in (0, 1, 2):
                folder = tmp_path / f"{name}-{length}-{seed}"
                found = accuracy + seed / (10 if length is None else 100)
                # a difference beside that of the length, whose name comes behind it
                settings = {"max_length": length, "weight_decay": 0.0 if name == "full" else 0.1}
                write_run(folder, config=f"era/{name}", seed=seed, accuracy=found, settings=settings)
                metrics = json.loads((folder / "metrics.json").read_text())
                metrics["model"]["max_length"] = length or taken[name]
                (folder / "metrics.json").write_text(json.dumps(metrics))
    out = tmp_path / "results.md"
    report.main([str(tmp_path), "--out", str(out), "--beside", "max_length"])
    first, _, local, full = cells(out.read_text())
    assert first[1:3] == heads
    assert local[:4] == ["local", "0.900 ± 0.100", "0.810 ± 0.010", "0, 1, 2"]
    assert full[:4] == ["full", "0.600 ± 0.100", "0.510 ± 0.010", "0, 1, 2"]
    assert "n = 100; mean ± sample standard deviation over the seeds. Speed and memory are" in out.read_text()
    write_run(tmp_path / "decayed", config="era/local", settings={"max_length": 512, "weight_decay": 0.5})
    report.main([str(tmp_path), "--out", str(out)])
    names = [row[0] for row in cells(out.read_text())[2:]]
    assert names == ["local, weight_decay=0.1", "full", "local, weight_decay=0.5"]


def test_tables_are_made_again_without_the_folders(runs, tmp_path, monkeypatch):
    for steps in (None, 200):
        for name in "ba":  # one score: their order must not be that of the folders
            settings = {"self_pretrain_steps": steps}
            write_run(runs / f"lists-{steps}/{name}{name < 'b'}", config=f"lists/{name}", settings=settings)
    monkeypatch.chdir(tmp_path)
    out, file = Path("docs/results.md"), Path("docs/results.json")
    report.main(["--beside", "self_pretrain_steps"])
    page, kept = out.read_text(), file.read_bytes()
    assert "| a | 0.500 | 0.500 |" in page
    assert "| local | 0.600 ± 0.100 |" in page  # no runs of this group differ in the setting
    shutil.rmtree("runs")
    Path("runs").mkdir()  # as good as none
    out.unlink()
    report.main([])
    assert (out.read_text(), file.read_bytes()) == (page, kept)
    Path("runs").rmdir()
    report.main(["--only", "lists", "--beside", "none"])
    assert "| a, self_pretrain_steps=200 | 0.500 |" in out.read_text()
    again = out.read_text()
    report.main([])
    assert out.read_text() == again
    with pytest.raises(SystemExit, match="error: There is no folder runs"):
        report.main(["runs"])
    write_run(tmp_path / "new/local", seed=3, accuracy=0.8)
    report.main(["new"])
    assert f"| local | {0.65:.3f} ± {statistics.stdev([0.5, 0.6, 0.7, 0.8]):.3f} |" in out.read_text()
    assert len(file.read_text().splitlines()) == len(kept.splitlines()) + 1


def test_the_newest_run_of_settings_and_seed_counts(tmp_path):
    out = tmp_path / "results.md"
    for name, accuracy, time in (("a", 0.5, 300), ("b", 0.6, 100), ("c", 0.7, 200)):
        write_run(tmp_path / name, accuracy=accuracy)
        os.utime(tmp_path / name / "metrics.json", (time, time))
    report.main([str(tmp_path), "--out", str(out)])
    assert cells(out.read_text())[2][:4] == ["local", "0.500", "1.000", "0"]
    report.main([str(tmp_path / "b"), "--out", str(out)])  # is given, so it takes the place of what is kept
    assert cells(out.read_text())[2][:4] == ["local", "0.600", "1.000", "0"]
    assert [run["test"]["accuracy"] for run in json.loads((tmp_path / "results.json").read_text())["runs"]] == [0.6]


def test_a_setting_newer_than_a_run_had_its_default(tmp_path):
    for seed, settings in enumerate(({}, {"self_pretrain_mask_share": 0.15}, {"self_pretrain_mask_share": 0.5})):
        command = "accelerate launch training/classify.py --config configs/era/local.yaml"
        write_run(tmp_path / str(seed), seed=seed, command=command, settings=settings)
    rows = rows_of(read_runs([tmp_path]))["era"]
    assert {row.name: row.seeds for row in rows} == {
        "local, self_pretrain_mask_share=0.15": "0, 1",
        "local, self_pretrain_mask_share=0.5": "2",
    }


def test_only_what_is_written_is_kept(runs, tmp_path):
    out, file = tmp_path / "results.md", tmp_path / "results.json"
    report.main([str(runs), "--out", str(out), "--only", "clm"])
    (clm,) = json.loads(file.read_text())["runs"]
    assert clm["settings"]["config"] == "clm/full"
    report.main([str(runs), "--out", str(out), "--only", "era"])
    kept = json.loads(file.read_text())["runs"]
    assert [(run["settings"]["config"], run["settings"]["seed"]) for run in kept] == [
        ("clm/full", 0), ("era/full", 0), ("era/local", 0), ("era/local", 1), ("era/local", 2),
    ]  # fmt: skip
    assert kept[0] == clm


def test_nothing_bulky_and_no_path_of_the_machine_is_kept(tmp_path):
    command = "/opt/env/bin/python /home/me/zoo/training/classify.py --config /home/me/zoo/configs/era/local.yaml"
    settings = {
        "config": "/home/me/zoo/configs/era/local", "data": "/home/me/texts/reviews.csv", "tokenizer": "data/tokenizer",
        "model": {"checkpoint": "/home/me/zoo/model_cards/local-mlm"}, "test_data": "~/texts/test.csv",
        "more_data": ["/home/me/more.csv"], "card_notes": "Much.",
    }  # fmt: skip
    write_run(tmp_path / "a", command=f"{command} data=/home/me/texts/reviews.csv lr=1/2", settings=settings)
    metrics = json.loads((tmp_path / "a/metrics.json").read_text())
    metrics["model"]["costs"] = {"64": [1, 2]}
    metrics["versions"] = {"torch": "2.13"}
    (tmp_path / "a/metrics.json").write_text(json.dumps(metrics | {"history": [{"step": 1, "loss": 1.0}]}))
    report.main([str(tmp_path), "--out", str(tmp_path / "results.md")])
    text = (tmp_path / "results.json").read_text() + (tmp_path / "results.md").read_text()
    assert not any(path in text for path in ("/home", "me/", "~", "/opt", str(tmp_path)))
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert run["command"] == "python training/classify.py --config configs/era/local.yaml data=reviews.csv lr=1/2"
    assert run["settings"] == {
        "config": "era/local", "data": "reviews.csv", "tokenizer": "data/tokenizer", "seed": 0, "max_length": 64,
        "model": {"checkpoint": "model_cards/local-mlm"}, "test_data": "test.csv", "more_data": ["more.csv"],
        "best_metric": "accuracy",
    }  # fmt: skip
    assert run.keys() == {"test", "training", "model", "command", "settings", "versions"}
    assert run["model"] == {"model_type": "et_local", "parameters": 801_234}
    assert (run["test"], run["training"]) == (metrics["test"], metrics["training"])


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "a package"}', '{"runs": [{"test": {}}]}', '{"runs": [1]}'])
def test_a_file_that_keeps_no_runs_is_not_written_over(runs, tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(SystemExit, match=r"error: .*results.json cannot be read as stored runs"):
        report.main([str(runs), "--out", str(tmp_path / "results.md")])
    assert (tmp_path / "results.json").read_text() == content
    assert not (tmp_path / "results.md").exists()
