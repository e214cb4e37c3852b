"""A file that one program at a time holds."""

import subprocess
import sys

from bhsd_jax.platform import locks

HOLD = """
import sys
from pathlib import Path
from bhsd_jax.platform import locks
with locks.held(Path(sys.argv[1])) as ours:
    print(ours, flush=True)
    sys.stdin.read()
"""


def test_one_program_holds_a_file_until_it_ends_however_that_comes(tmp_path):
    path = tmp_path / "lock"
    assert not locks.is_held(path), "nobody ever held it"
    command = [sys.executable, "-c", HOLD, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == "True\n"
        assert locks.is_held(path)
        with locks.held(path) as ours:
            assert not ours
        other.kill()
    assert not locks.is_held(path)
    with locks.held(path) as ours:
        assert ours
        assert locks.is_held(path), "by this program"
    assert not locks.is_held(path)
