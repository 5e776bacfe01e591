"""The benchmark of all variants goes on where it stopped; comparing two of them finds what got slower."""

import json

import compare
import pytest
import torch
from repository import ROOT

from efficient_transformers import VARIANTS

everything = __import__("all")


def row(layer, milliseconds, length=4096, mode="training"):
    return {
        "layer": layer, "mode": mode, "length": length, "dtype": "float32", "device": "cpu",
        "milliseconds": milliseconds, "median": sorted(milliseconds)[len(milliseconds) // 2], "of_full": 1.0,
        "megabytes": 10.0,
    }  # fmt: skip


def file(folder, name, rows, device="a CPU"):
    path = folder / name
    path.write_text(json.dumps({"machines": {"cpu": {"device": device}}, "rows": rows}))
    return str(path)


def test_every_variant_contends():
    contenders = everything.CONTENDERS
    assert {contender.slug for contender in contenders.values()} == {*VARIANTS, None}
    for slug, variant in VARIANTS.items():
        assert contenders[slug].family == variant.family
        assert 0 < contenders[slug].law(512) < contenders[slug].law(1024)
        assert contenders[slug].make(512).layer.config.max_position_embeddings == 512
    theirs = {name for name in everything.CONTENDERS if name.startswith("transformers ")}
    assert theirs == {f"transformers {x}" for x in ("longformer", "big_bird", "reformer", "fnet", "nystromformer")}


def test_slower_is_what_lies_beyond_the_spread(tmp_path, capsys):
    old = [row("full", [10, 11, 12]), row("local", [1.0, 1.1, 1.2]), row("linear", [2, 2.1, 9]), row("rfa", [5.0] * 3)]
    new = [row("full", [10, 11, 12]), row("local", [1.3, 1.4, 1.5]), row("linear", [3, 3, 9]), row("rfa", [5.1] * 3)]
    before, after = file(tmp_path, "old.json", old), file(tmp_path, "new.json", [*new, row("fnet", [1.0])])
    assert compare.main([before, after]) == 1
    lines = capsys.readouterr().out.splitlines()
    # linear varies as much as it has changed, and rfa has changed by less than 5 %
    assert lines == [
        "1.27 times as slow: cpu, float32, training, 4096, local: 1.1 -> 1.4 ms",
        "1 of 4 slower; only old: 0, only new: 1",
    ]
    assert compare.main([after, before]) == 0
    assert compare.main([before, before]) == 0
    assert compare.main([before, after, "--tolerance", "0.3"]) == 0


def test_other_machines_are_compared_by_full_attention_alone(tmp_path, capsys):
    old = [row("full", [10.0] * 3), row("local", [1.0] * 3), row("linear", [2.0] * 3)]
    new = [row("full", [20.0] * 3), row("local", [2.0] * 3), row("linear", [6.0] * 3)]
    before, after = file(tmp_path, "old.json", old), file(tmp_path, "new.json", new, "another CPU")
    assert compare.main([before, after]) == 2
    assert "pass --relative" in capsys.readouterr().err
    assert compare.main([before, after, "--relative"]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("1.50 times as slow: cpu, float32, training, 4096, linear: 0.2 -> 0.3 of full attention")
    assert last.startswith("1 of 2 slower")
    assert compare.main([before, file(tmp_path, "none.json", [])]) == 2


def test_files_of_the_other_benchmarks_can_be_compared(capsys):
    docs = ROOT / "docs"
    assert compare.main([str(docs / "feature_maps.json")] * 2) == 0
    assert compare.main([str(docs / "generation.json")] * 2) == 0


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_an_exponent_is_fitted_between_2k_and_16k(power):
    rows = [row("local", [1e-3 * n**power] * 3, n) for n in (2048, 4096, 8192, 16384)]
    rows += [row("local", [1e6], n) for n in (512, 1024, 32768)]
    time, layer, mixer = everything.exponents(rows, "local")
    assert time == pytest.approx(power)
    assert mixer == pytest.approx(1, abs=0.05)  # blocks of the engine at the ends
    assert 1 <= layer <= mixer
    assert everything.exponents([row("full", [n], n) for n in (2048, 16384)], "full")[2] == pytest.approx(2)
    assert everything.exponents(rows[:1], "local") == (None, None, None)
    on_gpu = [row("local", [1e-3 * n**power] * 3, n) | {"device": "cuda"} for n in (16384, 32768, 65536)]
    on_gpu.append(on_gpu[0] | {"length": 8192, "median": 1e6})  # shorter ones cost what launching costs
    assert everything.exponents(on_gpu, "local")[0] == pytest.approx(power)


def test_projections_and_parameters_are_those_of_the_layers():
    count = {name: everything.projections(name) for name in ("local", "longformer", "reformer", "linformer", "gmlp")}
    assert count == {"local": 4, "longformer": 4, "reformer": 3, "linformer": 2, "gmlp": 6}
    assert everything.projections("transformers reformer") == 3
    assert everything.projections("transformers nystromformer") == 4
    gmlp = everything.CONTENDERS["gmlp"]
    assert 3 < gmlp.least_bytes(8192, 4, "generation") / (4 * 8192**2) < 3.1  # W, its gradient, its draw


def test_what_would_not_fit_is_noted_and_left_out(monkeypatch):
    monkeypatch.setattr(everything, "free_bytes", lambda device: 2**30)
    where = {"device": "cpu", "dtype": "float32", "length": 16384, "mode": "training"}
    built, note = everything.tried("full, eager", lambda: pytest.fail("built"), where, torch.device("cpu"))
    assert built is None
    assert note == {"layer": "full, eager", **where, "skipped": "needs 16 GB and more, 1 are free"}
    assert everything.tried("local", lambda: "a run", where, torch.device("cpu")) == ("a run", None)


def test_a_layer_of_transformers_that_fails_is_noted_and_one_of_ours_is_not():
    def fail():
        raise RuntimeError("Unsupported dtype\nand where")

    where, cpu = {"device": "cpu", "dtype": "bfloat16", "length": 64, "mode": "forward"}, torch.device("cpu")
    name = "transformers fnet"
    assert everything.tried(name, fail, where, cpu) == (None, {"layer": name, **where, "skipped": "Unsupported dtype"})
    with pytest.raises(RuntimeError, match="Unsupported dtype"):
        everything.tried("local", fail, where, cpu)


def test_flex_attention_contends_on_cuda_alone():
    able = [everything.able(everything.CONTENDERS, 4096, "training", device) for device in ("cpu", "cuda")]
    assert {*able[1]} - {*able[0]} == {"local, flex"}


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    out = tmp_path / "times"
    few = ["--out", str(out), "--devices", "cpu", "--only", "local", "fnet", "--lengths", "16", "--repeats", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(everything, "draw_all", lambda *given: [])
        everything.main([*few, "--modes", "training"])
    first = json.loads(out.with_suffix(".json").read_text())
    assert [row["layer"] for row in first["rows"]] == ["full", "local", "fnet"]

    with monkeypatch.context() as patch:
        patch.setattr(everything, "draw_all", lambda *given: [])
        everything.main([*few, "--modes", "training", "generation"])
    second = json.loads(out.with_suffix(".json").read_text())
    assert second["rows"][:3] == first["rows"]
    added = [(row["mode"], row["layer"], len(row["milliseconds"])) for row in second["rows"][3:]]
    assert added == [("generation", "full", 3), ("generation", "local", 3)]  # FNet has no decoder
    assert all(row["megabytes"] > 0 for row in second["rows"][3:])

    monkeypatch.setattr(everything, "measure_layers", lambda *given: pytest.fail("measured again"))
    second["machines"]["cpu"]["device"] = "another"  # on which nothing is to be measured
    out.with_suffix(".json").write_text(json.dumps(second))
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(finished_run(0.75)))
    page = out.with_suffix(".md")
    page.write_text(page.read_text().replace("<!-- end:notes -->", "Said by hand.\n\n<!-- end:notes -->"))
    everything.main([*few, "--modes", "training", "--runs", str(tmp_path / "runs")])
    assert json.loads(out.with_suffix(".json").read_text()) == second
    text = page.read_text()
    assert "<!-- begin:notes -->\n\nSaid by hand.\n\n<!-- end:notes -->" in text
    assert "## training on cpu" in text
    assert "| fnet | " in text
    for name in ("training", "generation", "bubbles"):
        assert (tmp_path / f"times_cpu_float32_{name}.png").stat().st_size > 10_000
        assert f"(times_cpu_float32_{name}.png)" in text

    with pytest.raises(SystemExit, match=r"holds times of .*another.*choose another --out"):
        everything.main(few)


def finished_run(accuracy, task="era", length=64):
    model = {"model_type": "et_local", "max_length": length}
    return {"test": {"accuracy": accuracy}, "model": model, "settings": {"config": f"{task}/local"}}


def test_quality_is_that_of_one_task_at_the_longest_length(tmp_path):
    runs = [finished_run(0.5), finished_run(0.75), finished_run(1.0, length=16), finished_run(0.0, "text")]
    (tmp_path / "results.json").write_text(json.dumps({"runs": runs}))
    assert everything.read_quality(tmp_path / "results.json", "era", "accuracy") == ({"local": 0.625}, 64)
    assert everything.read_quality(tmp_path / "results.json", "text", "accuracy") == ({"local": 0.0}, 64)
    assert everything.read_quality(tmp_path / "results.json", "text", "f1") == ({}, 0)
