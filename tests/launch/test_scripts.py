"""The files of `launch/` and the shell of `tools/`, without the clusters they are for.

`tests/slurm` runs those of Slurm on a real one.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from bhsd_jax.experiments import queue
from bhsd_jax.train import mesh

ROOT = Path(__file__).parents[2]
SHELL = [
    path
    for folder in ("launch", "tools", ".ci", "tests/slurm")
    for path in sorted((ROOT / folder).iterdir())
    if path.is_file() and path.read_bytes().startswith((b"#!/usr/bin/env bash", b"#!/bin/bash"))
]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck on the PATH")
def test_shellcheck_finds_nothing():
    assert len(SHELL) >= 12
    done = subprocess.run(
        ["shellcheck", "--external-sources", *SHELL],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", [p for p in SHELL if "slurm" not in p.parts[-2] + p.name])
def test_shell_for_any_machine_runs_in_the_bash_of_macos(path):
    """Bash 3.2 ends under `set -u` at an empty array, and lacks what came later."""
    later = r"=\(\)|declare -A|local -n|mapfile|readarray|wait -n|&>>"
    assert not re.search(later, path.read_text())


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_git_gives_shell_no_windows_line_ends():
    scripts = [str(p.relative_to(ROOT)) for p in SHELL]
    ask = ["git", "check-attr", "eol", "--", *scripts]
    told = subprocess.run(ask, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert told.splitlines() == [f"{path}: eol: lf" for path in scripts]


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_parses_and_may_be_run(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert (
        os.access(path, os.X_OK)
        or path.suffix in (".sbatch",)
        or path.name
        in (
            "env",
            "slurm.sh",
        )
    )


# ---- tpu_vm.sh, with a `gcloud` that notes its words and does on this machine what ssh would do

GCLOUD = """#!/usr/bin/env python3
import json, os, pathlib, shlex, shutil, subprocess, sys

here = pathlib.Path(os.environ["FAKE"])
with (here / "calls").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
words = sys.argv[1:]
home = here / "remote home"
home.mkdir(exist_ok=True)
if "describe" in words:
    states = (here / "states").read_text().split()
    (here / "states").write_text(" ".join(states[1:]))
    print(states[0])
if "scp" in words:
    shutil.copy(words[words.index("scp") + 1], home)
for word in words:
    if word.startswith("--command="):  # as sshd: one line for the shell of that machine
        line = word.removeprefix("--command=")
        environment = os.environ | {"HOME": str(home)}
        sys.exit(subprocess.run(["sh", "-c", line], cwd=home, env=environment).returncode)
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gcloud").write_text(GCLOUD)
    (tmp_path / "bin" / "gcloud").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setenv("POLL_S", "0.01")
    return tmp_path


def tpu_vm(*words, code=0, **more):
    done = subprocess.run(
        [ROOT / "launch" / "tpu_vm.sh", *words],
        check=False,
        capture_output=True,
        text=True,
        cwd="/",
        timeout=300,
        **more,
    )
    assert done.returncode == code, done.stderr
    return done


def calls(cloud):
    path = cloud / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


STEPS = (
    ["create", "pod 1", "--zone=us-east5-a", "--type=v6e-16", "--spot", "--project=p"],
    ["wait", "pod 1", "--zone=us-east5-a"],
    ["setup", "pod 1", "--zone=us-east5-a"],
    ["run", "pod 1", "--zone=us-east5-a", "--", "train", "--config=a", "--workdir=/a b"],
    ["stop", "pod 1", "--zone=us-east5-a"],
    ["delete", "pod 1", "--zone=us-east5-a"],
)


@pytest.mark.parametrize("words", STEPS, ids=lambda words: words[0])
def test_a_dry_run_prints_what_would_be_called_and_calls_nothing(cloud, words):
    printed = tpu_vm("--dry-run", *words).stdout
    assert calls(cloud) == []
    for command in re.split(r"^(?=gcloud )", printed, flags=re.M)[1:]:
        parsed = shlex.split(command)
        assert parsed[:3] == ["gcloud", "compute", "tpus"]
        assert "pod 1" in [word.removesuffix(":") for word in parsed]
        assert "--zone=us-east5-a" in parsed


def test_create_asks_for_a_queued_resource(cloud):
    tpu_vm(*STEPS[0])
    assert calls(cloud) == [
        [
            *("compute", "tpus", "queued-resources", "create", "pod 1", "--node-id=pod 1"),
            *("--zone=us-east5-a", "--project=p", "--accelerator-type=v6e-16"),
            *("--runtime-version=v2-alpha-tpuv6e", "--spot"),
        ]
    ]
    tpu_vm("create", "pod", "--zone=z", "--type=v5p-8")
    assert "--spot" not in calls(cloud)[-1]
    tpu_vm("delete", "pod 1", "--zone=z")
    assert calls(cloud)[-1][2:] == [
        *("queued-resources", "delete", "pod 1", "--zone=z", "--force", "--quiet")
    ]


def test_wait_ends_when_it_is_there_or_lost(cloud):
    (cloud / "states").write_text("ACCEPTED PROVISIONING ACTIVE FAILED")
    assert "pod is PROVISIONING" in tpu_vm("wait", "pod", "--zone=z").stdout
    assert len(calls(cloud)) == 3
    assert "pod is FAILED; delete it" in tpu_vm("wait", "pod", "--zone=z", code=2).stderr


def test_the_code_gets_there_and_arguments_arrive_as_they_are(cloud):
    tool = cloud / "bin" / "uv"
    tool.write_text("#!/bin/sh\nexit 1\n")
    tool.chmod(0o755)
    home = cloud / "remote home"
    environment = os.environ | {"PATH": f"{cloud / 'bin'}:/usr/bin:/bin"}
    code = home / "bhsd_jax"
    done = subprocess.run(
        [ROOT / "launch" / "tpu_vm.sh", "setup", "pod", "--zone=z"],
        check=False,
        capture_output=True,
        text=True,
        env=environment | {"UV_OFFLINE": "1"},
        timeout=300,
    )
    assert [word for call in calls(cloud) for word in ("scp", "ssh") if word in call] == [
        "scp",
        "ssh",
    ]
    assert (code / "bhsd_jax" / "main.py").is_file(), done.stderr
    assert (code / "launch" / "tpu_vm.sh").is_file()
    assert "lacks all of it" in done.stderr, (
        "the real tools/env was called, and uv could do nothing"
    )
    (code / "tools" / "env").write_text(f'export PATH="{cloud}/python:$PATH"\n')
    (cloud / "python").mkdir()
    (cloud / "python" / "python").write_text(
        '#!/usr/bin/env bash\nprintf "<%s>" "$@" "$BHSD_EXTRAS"; exit 75\n'
    )
    (cloud / "python" / "python").chmod(0o755)
    words = [
        "train",
        "--config=configs/cps.py:data=bhsd",
        "--workdir=/a b/'c\"",
        "$HOME;`id`",
        "",
        "*\n",
    ]
    said = tpu_vm("run", "pod", "--zone=z", "--", *words, code=75).stdout
    want = "".join(f"<{word}>" for word in ["-m", "bhsd_jax.main", *words, "tpu"])
    assert said == want


CURL = """#!/usr/bin/env bash
case "${!#}" in
  */agent-worker-number) echo 2 ;;
  */worker-network-endpoints) echo "a:b:10.0.0.2,a:b:10.0.0.3,a:b:10.0.0.4,a:b:10.0.0.5" ;;
  *) exit 22 ;;
esac
"""


@pytest.mark.parametrize(
    ("verb", "want"), [("preprocess", (2, 4)), ("report", (2, 4)), ("train", (None, None))]
)
def test_a_verb_without_jax_is_told_which_host_it_is_on(cloud, verb, want):
    home = cloud / "remote home"
    (home / "bhsd_jax" / "tools").mkdir(parents=True)
    (home / "bhsd_jax" / "tools" / "env").write_text(f'export PATH="{cloud}/python:$PATH"\n')
    (cloud / "python").mkdir()
    ask = "from bhsd_jax.platform import cluster; p = cluster.find(); print(p.index, p.count)"
    python = f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -c "{ask}"\n'
    for path, text in ((cloud / "python" / "python", python), (cloud / "bin" / "curl", CURL)):
        path.write_text(text)
        path.chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_", "OMPI_"))}
    said = tpu_vm("run", "pod", "--zone=z", "--", verb, "--workdir=a", env=clean).stdout
    assert said.split() == [str(number) for number in want]


def test_a_run_that_goes_on_is_stopped_with_sigterm(cloud):
    home = cloud / "remote home"
    (home / "bhsd_jax" / "tools").mkdir(parents=True)
    (home / "bhsd_jax" / "tools" / "env").write_text(f'export PATH="{cloud}/python:$PATH"\n')
    (cloud / "python").mkdir()
    (cloud / "python" / "python").write_text(
        "#!/usr/bin/env bash\nsleep 600 &\ntrap 'sleep 0.5; echo saved; kill %1; exit 75' TERM\n"
        "echo up; wait\n"
    )
    (cloud / "python" / "python").chmod(0o755)
    with subprocess.Popen(
        [ROOT / "launch" / "tpu_vm.sh", "run", "pod", "--zone=z", "--", "train"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as run:
        assert run.stdout.readline() == "up\n"
        second = tpu_vm("run", "pod", "--zone=z", "--", "train", code=1)
        assert "a run goes on already" in second.stderr
        assert "saved" in tpu_vm("stop", "pod", "--zone=z").stdout
        assert run.wait(timeout=300) == 75


@pytest.mark.parametrize(
    ("words", "want"),
    [
        ([], "needs a step, a NAME and --zone="),
        (["create", "pod", "--zone=z"], "create needs --type="),
        (["create", "pod", "--zone=z", "--type=v9-8"], "no runtime is known for v9-8"),
        (["run", "pod", "--zone=z"], "run needs -- VERB"),
        (["fly", "pod", "--zone=z"], "no step 'fly'; there are create"),
        (["wait", "pod", "--zoned=z"], "no option --zoned"),
    ],
)
def test_wrong_words_are_said(cloud, words, want):
    assert want in tpu_vm(*words, code=2).stderr
    assert calls(cloud) == []


# ---- what the files say to start, and on which machines


def of_jobset(path):
    """Arguments, hosts, and devices of each."""
    jobset = next(yaml.safe_load_all(path.read_text()))
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    limits = container["resources"]["limits"]
    return container["args"], job["parallelism"], int(*limits.values())


def of_tpu_vm():
    """Likewise: a v6e has four chips on each host."""
    top = (ROOT / "launch" / "tpu_vm.sh").read_text().partition("set -euo")[0]
    top = top.replace("\\\n#", "")
    chips = int(re.search(r"--type=v6e-(\d+)", top)[1])
    return re.search(r" run .* -- (.*)", top)[1].split(), chips // 4, 4


@pytest.mark.parametrize("name", ["gke_jobset.yaml", "gke_jobset_gpu.yaml", "tpu_vm.sh"])
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # upstream
def test_what_the_files_start_trains_on_every_device_of_their_machines(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    told = of_tpu_vm() if name == "tpu_vm.sh" else of_jobset(ROOT / "launch" / name)
    (verb, *words), hosts, each = told
    assert verb == "train"
    config = queue.resolve([word for word in words if not word.startswith("--workdir=")])
    devices = [SimpleNamespace(process_index=id // each, id=id) for id in range(hosts * each)]
    batches = config.input.labeled, config.input.unlabeled
    used, groups = mesh._fill(devices, 1, batches, config.train.accumulate)
    assert (used, groups) == (devices, 16)


# ---- Containerfile


def test_the_image_has_what_the_project_declares():
    text = (ROOT / "launch" / "Containerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    named = set(re.findall(r"--extra ([a-z-]+)", text))
    assert named
    assert named <= set(extras)
    assert {"cuda", "tpu"} <= set(extras)
    for source in re.findall(r"^COPY (.+) \S+$", text, flags=re.M):
        assert all((ROOT / name).exists() for name in source.split())
    env = (ROOT / "tools" / "env").read_text()
    for variable in re.findall(r"MALLOC_\w+=\d+", env):
        assert variable in text
    assert text.index("USER 1000") < text.index("ENTRYPOINT")
    assert "--userns=keep-id:uid=1000,gid=1000" in text, "for a person who is not root"
    assert "LD_LIBRARY_PATH=/usr/local/nvidia/lib64" in text, "where GKE mounts the driver"


@pytest.mark.skipif(not shutil.which("hadolint"), reason="no hadolint on the PATH")
def test_hadolint_finds_nothing():
    file = ROOT / "launch" / "Containerfile"
    done = subprocess.run(["hadolint", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
