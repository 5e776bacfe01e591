"""What a release needs to agree on."""

import re

import yaml
from repository import ROOT

import efficient_transformers


def test_one_version():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    latest = re.search(r"^## (\S+)", changelog, re.M).group(1)
    declared = re.search(r'^version = "(.*)"', pyproject, re.M).group(1)
    assert {efficient_transformers.__version__, citation["version"], latest} == {declared}


def test_workflows_start_scripts_that_exist():
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
        for script in re.findall(r"^\.ci/\S+", "\n".join(commands), re.M):
            assert (ROOT / script).stat().st_mode & 0o111, f"{path.name} runs {script}"


def test_contributing_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:src|tests|training|configs|benchmarks|docs|\.ci|model_cards)/[\w./*-]*)`", text):
        assert list(ROOT.glob(name.rstrip("/"))), name
