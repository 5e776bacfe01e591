"""Progress in logs: whole lines with the time left."""

import io
import re
import sys

from efficient_transformers.training.engine import progress


def test_a_log_has_whole_lines_with_the_time_left(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(progress, "SECONDS", 0)
    with progress.progress_bar("training", 4, done=1) as bar:
        for _ in range(3):
            bar.update()
            bar.set_postfix(loss="0.5")
    lines = log.getvalue().splitlines()
    assert len(lines) >= 3
    assert "\r" not in log.getvalue()
    assert all(line.startswith("training: ") for line in lines)
    assert re.search(r"3/4 \[\d\d:\d\d<\d\d:\d\d", log.getvalue())  # time passed and time left


def test_a_short_run_and_other_processes_write_nothing(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    for shown in (True, False):
        with progress.progress_bar("evaluating", 3, shown=shown) as bar:
            bar.update(3)
    assert not log.getvalue()
