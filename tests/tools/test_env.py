"""`tools/env` on a small project of its own, with the real uv and packages that are made here."""

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UV = shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv")
pytestmark = pytest.mark.skipif(
    not Path(UV).is_file(), reason="no uv on the PATH or in .uv; tools/env brings it"
)

PROJECT = """
[project]
name = "small"
version = "0"
requires-python = ">=3.11"
dependencies = ["core>=1"]

[project.optional-dependencies]
red = ["red>=1"]
blue = ["blue>=1"]
cuda = ["red>=1"]
tpu = ["blue>=1"]

[dependency-groups]
dev = ["packaging"]

[tool.uv]
conflicts = [[{{ extra = "cuda" }}, {{ extra = "tpu" }}]]
no-index = true
find-links = ["{wheels}"]
"""


def wheel(folder, name, version="1"):
    """A package of one module, as a wheel."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": f"version = '{version}'\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    record = []
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        record.append(f"{path},sha256={digest.decode()},{len(text)}\n")
    files[f"{info}/RECORD"] = "".join(record) + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def packaging_wheel(folder):
    """The installed `packaging`, which every environment of ours has."""
    import packaging

    source = Path(packaging.__file__).parent
    info = next(source.parent.glob("packaging-*.dist-info"))
    version = info.name.removeprefix("packaging-").removesuffix(".dist-info")
    with zipfile.ZipFile(folder / f"packaging-{version}-py3-none-any.whl", "w") as archive:
        names = []
        for path in [*source.rglob("*.py"), info / "METADATA", info / "WHEEL"]:
            names.append(str(path.relative_to(source.parent)))
            archive.write(path, names[-1])
        record = "".join(f"{name},,\n" for name in [*names, f"{info.name}/RECORD"])
        archive.writestr(f"{info.name}/RECORD", record)


@pytest.fixture
def project(tmp_path):
    home = tmp_path / "a project"
    wheels = tmp_path / "wheels"
    for name in ("core", "red", "blue"):
        wheel(wheels, name)
    packaging_wheel(wheels)
    (home / "tools").mkdir(parents=True)
    shutil.copy(ROOT / "tools" / "env", home / "tools" / "env")
    (home / "pyproject.toml").write_text(PROJECT.format(wheels=wheels))
    (home / "uv-bin").mkdir()
    (home / "uv-bin" / "uv").write_text(
        f'#!/bin/sh\necho "$@" >>"{home}/calls"\nexec "{UV}" "$@"\n'
    )
    (home / "uv-bin" / "uv").chmod(0o755)
    project = Project(home, wheels)
    project.uv("lock")
    return project


class Project:
    def __init__(self, home, wheels):
        self.home, self.wheels = home, wheels
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("UV_", "BHSD"))
        }
        python = Path(sys.executable).parent
        self.environment |= {
            "PATH": f"{home / 'uv-bin'}:{python}:/usr/bin:/bin",
            "UV_CACHE_DIR": str(home.parent / "cache"),
        }

    def uv(self, *words):
        subprocess.run([UV, *words], cwd=self.home, env=self.environment, check=True)

    def bash(self, script, extras="", **more):
        """Runs lines of bash somewhere else; `$HOME_` is the project."""
        environment = self.environment | {"BHSD_EXTRAS": extras, "HOME_": str(self.home)} | more
        return subprocess.run(
            ["bash", "-c", script],
            cwd=self.home.parent,
            env=environment,
            check=False,
            capture_output=True,
            text=True,
            timeout=600,
        )

    def make(self, extras="", **more):
        done = self.bash('"$HOME_/tools/env"', extras, **more)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def installed(self):
        site = next((self.home / ".venv" / "lib").glob("python*/site-packages"))
        names = (path.name.split("-")[0] for path in site.glob("*.dist-info"))
        return {name for name in names if name != "packaging"}

    def calls(self):
        path = self.home / "calls"
        return len(path.read_text().splitlines()) if path.is_file() else 0


def test_nothing_is_uninstalled_with_or_without_extras(project):
    project.make("red")
    wheel(project.wheels, "byhand")
    project.uv("pip", "install", "--python", ".venv/bin/python", "byhand")
    for extras in ("", "red", "blue", "", "blue red"):
        project.make(extras)
        project.make(extras)
        assert {"core", "red", "byhand"} <= project.installed(), extras
    assert "blue" in project.installed()


def test_once_made_nothing_is_called(project):
    project.make("red")
    before = project.calls()
    assert before
    for extras in ("red", "", "red"):
        done = project.make(extras)
        assert done.stdout == done.stderr == ""
    assert project.calls() == before


def test_a_changed_lock_upgrades_extras_that_were_added_before(project):
    project.make("red")
    for name in ("core", "red", "blue"):
        wheel(project.wheels, name, "2")
    project.uv("lock", "--upgrade")
    assert "has changed" in project.make("").stdout
    script = "import core, red; print(core.version, red.version)"
    script = f'source "$HOME_/tools/env" && python -c "{script}"'
    assert project.bash(script).stdout.split()[-2:] == ["2", "2"]


def test_it_works_without_a_network(project):
    project.make("red")
    # A new lock, of which nothing can be had: the index is unreachable and the cache is empty.
    wheel(project.wheels, "core", "2")
    project.uv("lock", "--upgrade")
    away = {"UV_CACHE_DIR": str(project.home / "empty")}
    shutil.rmtree(project.wheels)
    done = project.make("", **away)
    assert "it has all that is needed: going on" in done.stderr
    assert {"core", "red"} <= project.installed()
    done = project.bash('"$HOME_/tools/env"', "blue", **away)
    assert done.returncode == 1
    assert "cannot make .venv, which lacks blue (" in done.stderr.splitlines()[-1]
    done = project.bash('source "$HOME_/tools/env"; echo "returned $?"', "blue", **away)
    assert "returned 1" in done.stdout, "sourced, it returns: the shell of the caller stays"


def test_offline_is_enough_for_what_uv_has(project):
    project.make("red")
    shutil.rmtree(project.home / ".venv")
    project.make("red", UV_OFFLINE="1")
    assert {"core", "red"} <= project.installed()


def test_the_caller_is_left_as_it_was(project):
    project.make()
    script = """
    trap 'echo at exit' EXIT; trap 'echo error' ERR
    CDPATH=/usr
    shopt -s nullglob extglob
    own='^(BASH|PATH=|MALLOC|_=|PIPE|FUNC|LINENO|RANDOM|SECONDS|EPOCH|SRANDOM|before|after)'
    state() { pwd; echo "$-"; shopt; set -o; trap; set | grep -vE "$own"; }
    OPTIONS; before=''; after=''
    before=$(state); source "a project/tools/env" || exit 9; after=$(state)
    [ "$before" = "$after" ] && echo same || diff <(echo "$before") <(echo "$after")
    source "a project/tools/env"; echo "$PATH" | grep -o 'project/.venv/bin' | wc -l
    command -v python; echo "$MALLOC_ARENA_MAX"
    """
    for options in ("set -u", "set -eu", "set +eu", "set -euo pipefail", "set -f"):
        done = project.bash(script.replace("OPTIONS", options))
        assert done.stdout.split("\n")[:-1] == [
            "same",
            "1",
            f"{project.home}/.venv/bin/python",
            "1",
            "at exit",
        ], f"{options}: {done.stdout}{done.stderr}"


def test_two_jobs_may_make_it_at_once(project):
    script = """
    for i in 1 2 3; do "$HOME_/tools/env" & done
    code=0
    for job in $(jobs -p); do wait $job || code=1; done
    exit $code
    """
    done = project.bash(script, "red")
    assert done.returncode == 0, done.stderr
    assert {"core", "red"} <= project.installed()
    calls = (project.home / "calls").read_text().splitlines()
    assert sum("sync" in line for line in calls) <= 2, (
        "offline, then online; the others found it made"
    )


def test_the_python_of_the_environment_is_kept(project):
    project.make()
    kept = (project.home / ".venv" / "pyvenv.cfg").read_text()
    other = project.home / "other"
    other.mkdir()
    for name in ("python3", "python3.11"):  # another one comes first on the PATH of this node
        (other / name).write_text("#!/bin/sh\necho 'not a Python' >&2; exit 1\n")
        (other / name).chmod(0o755)
    project.make("blue", PATH=f"{other}:{project.environment['PATH']}")
    assert (project.home / ".venv" / "pyvenv.cfg").read_text() == kept
    assert "blue" in project.installed()
    python = project.home / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nowhere/python3.99")
    done = project.bash('"$HOME_/tools/env"')
    assert done.returncode == 1
    assert "made with /nowhere/python3.99, which this machine lacks" in done.stderr
    assert {"core", "blue"} <= project.installed()


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="has no older Python to prefer")
def test_a_python_for_which_all_has_wheels_comes_before_a_newer_one(project):
    other = project.home / "other"
    other.mkdir()
    newer = "import sys\nsys.version_info = (3, 14)\nexec(sys.argv[2])\nsys.exit('taken')\n"
    (other / "python3").write_text(f"#!{sys.executable}\n{newer}")
    (other / "python3").chmod(0o755)
    path = f"{other}:{project.environment['PATH']}"
    (other / f"python3.{sys.version_info.minor}").symlink_to(sys.executable)
    project.make(PATH=path)


def test_what_must_be_compiled_and_cannot_be_is_said(project):
    text = "Metadata-Version: 2.2\nName: stone\nVersion: 1\n"
    build = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    files = {"PKG-INFO": text, "pyproject.toml": build, "backend.py": "raise SystemExit('no g++')"}
    source = project.home / "stone-1"
    source.mkdir()
    for name, words in files.items():
        (source / name).write_text(words)
    with tarfile.open(project.wheels / "stone-1.tar.gz", "w:gz") as archive:
        archive.add(source, "stone-1")
    path = project.home / "pyproject.toml"
    path.write_text(path.read_text().replace('"core>=1"', '"core>=1", "stone>=1"'))
    project.uv("lock")
    done = project.bash('"$HOME_/tools/env"')
    assert done.returncode == 1
    assert "no g++" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "install a C++ compiler, or Python 3.11 to 3.13" in last
    assert "network" not in last
    assert "No module named 'packaging'" not in done.stderr


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_the_locked_versions_come_from_the_index_that_uv_is_told_of(project):
    served = project.home.parent / "served"
    for index in ("there", "mirror"):
        for path in project.wheels.iterdir():
            folder = served / index / path.name.split("-")[0]
            folder.mkdir(parents=True)
            shutil.copy(path, folder)
    path = project.home / "pyproject.toml"
    path.write_text(path.read_text().partition("no-index")[0])
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=served))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    project.uv("lock", "--default-index", f"{address}/there")
    shutil.rmtree(served / "there")  # as behind a firewall
    wheel(served / "mirror" / "core", "core", "2")
    project.make("red", UV_DEFAULT_INDEX=f"{address}/mirror")
    assert {"core", "red"} <= project.installed()
    script = 'source "$HOME_/tools/env" && python -c "import core; print(core.version)"'
    assert project.bash(script).stdout.split() == ["1"]
    path.write_text(path.read_text().replace('"core>=1"', '"core>=2"'))
    done = project.bash('"$HOME_/tools/env"', UV_DEFAULT_INDEX=f"{address}/mirror")
    assert "do not fit each other" in done.stderr.splitlines()[-1]
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("extras", "want"),
    [
        ("reed", "Extra `reed` is not defined"),
        ("cuda tpu", "the extras cuda and tpu exclude each other"),
    ],
)
def test_extras_that_do_not_fit_are_one_clear_line(project, extras, want):
    project.make()
    done = project.bash('"$HOME_/tools/env"', extras)
    assert done.returncode == 1
    assert want in done.stderr
    assert "core" in project.installed()


def test_a_lock_that_does_not_fit_is_said(project):
    project.make()
    path = project.home / "pyproject.toml"
    path.write_text(path.read_text().replace('"core>=1"', '"core>=1", "red>=1"'))
    done = project.bash('"$HOME_/tools/env"')
    assert done.returncode == 1
    assert "do not fit each other" in done.stderr.splitlines()[-1]
