"""Folders that outlive a killed process are removed by the next one, and no others."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from fedmm.engines import private_folder

CLAIM = """
import sys, time
from fedmm.engines import private_folder
print(private_folder.claim("mine-", sys.argv[1]), flush=True)
time.sleep(60)
"""


def claimed_elsewhere(parent):
    process = subprocess.Popen([sys.executable, "-c", CLAIM, str(parent)], stdout=subprocess.PIPE, text=True)
    return process, Path(process.stdout.readline().strip())


def test_folder_of_a_killed_process_is_removed_and_that_of_a_living_one_stays(tmp_path):
    killed, its_folder = claimed_elsewhere(tmp_path)
    (its_folder / "session").mkdir()
    living, other_folder = claimed_elsewhere(tmp_path)
    try:
        assert its_folder.is_dir()
        assert other_folder.is_dir()
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        mine = private_folder.claim("mine-", str(tmp_path))
        assert not its_folder.exists()
        assert other_folder.is_dir()
        again = private_folder.claim("mine-", str(tmp_path))  # in the same process
        assert Path(mine).is_dir()
        for folder in (mine, again):
            private_folder.remove(folder)
        assert not Path(mine).exists()
        assert not Path(again).exists()
    finally:
        living.kill()
        living.wait()


def test_what_bears_another_name_or_no_owner_stays(tmp_path):
    (tmp_path / "mine-without-owner").mkdir()
    (tmp_path / "other-1").mkdir()
    (tmp_path / "other-1" / "owner.lock").touch()
    private_folder.remove(private_folder.claim("mine-", str(tmp_path)))
    assert sorted(os.listdir(tmp_path)) == ["mine-without-owner", "other-1"]


def test_a_folder_that_is_just_being_made_stays(tmp_path):
    """Its owner has not locked it yet."""
    young = tmp_path / "mine-young"
    young.mkdir()
    (young / "owner.lock.new").touch()
    private_folder.remove(private_folder.claim("mine-", str(tmp_path)))
    assert young.is_dir()
