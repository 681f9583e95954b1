"""Do files appear whole or not at all, whoever else writes there, and whoever was killed doing so?"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
from thetas import theta_for

from pylo_integrations import Theta
from pylo_integrations.files import write_whole

KILLED = """
import os, sys, time
from pathlib import Path
from pylo_integrations.files import write_whole

def write(path):
    path.write_text("half")
    path.with_name("another library's temporary").write_text("half")
    print("writing", flush=True)
    time.sleep(60)

write_whole(Path(sys.argv[1]), write)
"""


def hidden(folder):
    return [entry for entry in folder.iterdir() if entry.name.startswith(".")]


def test_of_many_writers_that_may_not_replace_one_succeeds(tmp_path):
    theta = theta_for("celo2")
    for round_ in range(10):
        path, start, outcomes = tmp_path / f"{round_}.safetensors", threading.Barrier(8), []

        def save(path=path, start=start, outcomes=outcomes):
            start.wait()
            try:
                outcomes.append(theta.save(path))
            except FileExistsError as error:
                outcomes.append(str(error))

        threads = [threading.Thread(target=save) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        refused = [outcome for outcome in outcomes if isinstance(outcome, str)]
        assert len(outcomes) == 8 and len(refused) == 7
        assert all("exists; pass overwrite=True" in message for message in refused)
        assert Theta.load(path) == theta
    assert not hidden(tmp_path)


def test_a_file_system_without_links_has_one_winner_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "file"
    write_whole(path, lambda temporary: temporary.write_text("first"), overwrite=False)

    def late(temporary):
        temporary.write_text("second")

    with pytest.raises(FileExistsError, match="file exists"):
        write_whole(path, late, overwrite=False)
    assert path.read_text() == "first" and not hidden(tmp_path)


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError("no more")

    for overwrite in (True, False):
        with pytest.raises((RuntimeError, FileExistsError)):
            write_whole(path, fail, overwrite=overwrite)
    assert path.read_text() == "old" and not hidden(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks that end with a process")
@pytest.mark.timeout(120)
def test_the_next_save_removes_what_a_killed_one_left_and_nothing_else(tmp_path):
    path, neighbour = tmp_path / "run.safetensors", tmp_path / ".run.safetensors.notours"
    neighbour.write_text("mine")
    (tmp_path / ".run.safetensors.0a1b2c3d").write_text("left by version 0.1.0")
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    write_whole(path, lambda temporary: temporary.write_text("alive"))
    left = [entry for entry in hidden(tmp_path) if entry != neighbour]
    assert len(left) == 1 and left[0].is_dir(), "that of a writer who is at it stays"
    process.kill()
    process.wait(30)
    process.stdout.close()
    assert hidden(tmp_path) and path.read_text() == "alive"
    write_whole(path, lambda temporary: temporary.write_text("next"))
    assert hidden(tmp_path) == [neighbour] and path.read_text() == "next"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_writers_do_not_disturb_each_other(tmp_path):
    path, errors = tmp_path / "file", []
    end = time.monotonic() + 2

    def write(number):
        while time.monotonic() < end:
            try:
                write_whole(path, lambda temporary: temporary.write_text(str(number) * 1000))
                assert len(set(path.read_text())) == 1
            except BaseException as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and not hidden(tmp_path)
