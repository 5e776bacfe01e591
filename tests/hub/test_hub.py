"""Publishing and downloading, by the real client and a Hub of our own: see hub_server.py and hub_client.py."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from hub_server import TOKEN, serve
from repository import ROOT

CLIENT = ROOT / "tests/helpers/hub_client.py"
STAGES = re.findall(r'@stage\("(\w+)"\)\ndef (\w+)', CLIENT.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """The Hub after all stages, what they came to, and all that the clients have said."""
    folder = tmp_path_factory.mktemp("hub")
    outcomes, said = {}, ""
    with serve(tmp_path_factory.mktemp("store")) as hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {
            "HF_ENDPOINT": hub.address,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        for group in ("with", "without"):  # with caches of their own: the second downloads for itself
            environment["HF_HOME"] = str(folder / f"home-{group}")
            command = [sys.executable, str(CLIENT), group, str(folder / group)]
            done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            outcomes |= json.loads((folder / group).read_text())
            said += done.stdout + done.stderr
    return hub, outcomes, said, folder


@pytest.mark.parametrize("name", [name for _, name in STAGES])
def test_stage(session, name):
    _, outcomes, _, _ = session
    assert "failed" not in outcomes[name], outcomes[name]["failed"]


def test_the_logits_have_travelled(session):
    _, outcomes, _, _ = session
    there, back = (outcomes[name]["value"] for name in ("pushed_by_the_model", "opened_without_the_package"))
    torch.testing.assert_close(torch.tensor(back["logits"]), torch.tensor(there["logits"]))


def test_a_dry_run_lists_what_would_go(session):
    _, outcomes, _, _ = session
    listed = re.findall(r"^ *([\d,]+)  (LFS|   )  (\S+)$", outcomes["dry_run"]["value"], re.M)
    kinds = {name: kind for _, kind, name in listed}
    assert kinds["model.safetensors"] == "LFS"
    assert kinds["README.md"] == "   "
    assert not any(name.startswith("checkpoints") for name in kinds)


def test_what_has_arrived_is_not_sent_again(session):
    hub, _, _, _ = session
    puts = [request for request in hub.requests if request.startswith("PUT")]
    assert len(puts) > 3
    # the one that was broken off is there twice, and no other
    again = {put for put in puts if puts.count(put) > 1}
    assert [puts.count(put) for put in again] == [2]


def test_a_range_is_asked_for_as_one(session):
    hub, _, _, _ = session
    assert any(re.fullmatch(r"GET /objects/\w+ bytes=10000005-\d+", request) for request in hub.requests)


def test_the_collection_holds_the_model_once(session):
    hub, _, _, _ = session
    (collection,) = hub.collections.values()
    assert [item["id"] for item in collection["items"]] == ["tester/era-linear"]
    assert collection["private"]


def test_the_token_is_nowhere(session):
    _, outcomes, said, folder = session
    assert TOKEN not in said
    assert TOKEN not in json.dumps(outcomes)
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size < 10**6]
    assert files
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
