"""Every command of the README is one: its words, flags and configs are accepted."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bhsd_jax.command_line import parse
from bhsd_jax.experiments import paper_tables, queue, sweep

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TABLES = {"launch/table1", "launch/table2", "launch/table3"}


def commands():
    """Lines of its code blocks and its tables, without what comes after a `#` or `&&`."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"\| `(bhsd .*?)` \|", README)
    return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = commands()


def flags_of(verb, words):
    """Checks a verb's words as the program does; a run that was trained has no config to read."""
    if not any(word.startswith("--config=") for word in words):
        words = [*words, "--config=cps"]
    command = parse([verb, *words], "")
    queue.resolve([flag for flag in command.flags if not flag.startswith("--workdir=")])


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # upstream
@pytest.mark.parametrize("words", [w for w in COMMANDS if w[0] == "bhsd"], ids=" ".join)
def test_a_verb_takes_its_words(words):
    if "--help" in words:
        assert parse(words[1:], "").text
    else:
        flags_of(words[1], words[2:])


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # upstream
@pytest.mark.parametrize(
    "words",
    [w for w in COMMANDS if w[0] in ("sbatch", "mpirun") or w[0] == "launch/local.sh"],
    ids=" ".join,
)
def test_a_job_takes_its_words(words):
    verb = next((word for word in words if word in ("train", "preprocess")), "train")
    flags_of(verb, [word for word in words if word.startswith(("--config", "--workdir"))])
    script = next((word for word in words if word.startswith("launch/")), "launch/slurm.sh")
    assert (ROOT / script).is_file()


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # upstream
@pytest.mark.parametrize("words", [w for w in COMMANDS if w[0] in TABLES], ids=" ".join)
def test_a_table_lists_its_runs(words, tmp_path, capsys):
    more = ["--dry-run", f"--out={tmp_path / 'out'}"]
    assert paper_tables.cli([Path(words[0]).name, *words[1:], *more]) == 0
    assert "\nbhsd train --config=" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # upstream
def test_a_sweep_lists_its_runs(tmp_path, capsys):
    (words,) = [words for words in COMMANDS if words[0] == "launch/sweep"]
    assert sweep.cli([*words[1:], "--dry-run", f"--out={tmp_path / 'out'}"]) == 0
    assert capsys.readouterr().out.count("0.2") > 0


@pytest.mark.parametrize("words", [w for w in COMMANDS if w[0] == "python"], ids=" ".join)
def test_a_tool_is_there(words):
    done = subprocess.run(
        [sys.executable, ROOT / words[1], "--help"], check=True, capture_output=True, text=True
    )
    for flag in (word for word in words if word.startswith("--")):
        assert flag in done.stdout


def test_every_file_it_names_is_there():
    named = re.findall(r"`((?:tools|launch|configs|tests)/[\w./]+)`?", README)
    assert len(named) > 5
    assert not [name for name in named if not (ROOT / name).exists()]
