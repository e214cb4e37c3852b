"""Processes find each other in every way they are told, and stop together."""

import fnmatch
import http.server
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

from bhsd_jax.experiments.local import free_port
from bhsd_jax.platform import cluster, machine
from bhsd_jax.platform.errors import UserError
from bhsd_jax.train import processes
from bhsd_jax.train.processes import Preemption

ROOT = Path(__file__).parents[2]
JOIN = """
import os
import jax
from bhsd_jax.platform import cluster
from bhsd_jax.train import processes
processes.start(cluster.find(), saves=True)
if jax.distributed.is_initialized():
    processes.share_cores(4)  # does nothing: each has its own share of the batch
line = f"joined {jax.process_index()} {jax.process_count()} {len(jax.devices())}\\n"
os.write(1, line.encode())  # in one piece: two processes may share the pipe
"""
GLOO = "[Gloo]"  # what JAX's way of sending between CPUs says at the first collective
UNTIL_ASKED = """
import time
from bhsd_jax.train.agreement import gather_words
every = [f"I am {number}" for number in range(jax.process_count())]
assert gather_words(every[jax.process_index()]) == every
with processes.Preemption() as asked:
    print("listens", flush=True)
    for call in range(1, 10_000):
        if asked():
            break
        time.sleep(0.02 if jax.process_index() else 0.03)
print("stopped at", call, flush=True)
"""


@pytest.mark.parametrize(
    ("visible", "there", "local", "want"),
    [
        ("2", 4, (2, 4), [0]),  # `--gpu-bind=single:1`, or a wrapper
        ("0,1,2,3", 4, (2, 4), [2]),
        (None, 4, (1, 2), [2, 3]),
        ("-1", 0, (1, 2), []),  # hidden
        ("3", 4, (3, 0), [0]),  # bound, though nobody tells how many there are
        ("0", 1, (1, 2), None),  # one for two
        ("0,1,2", 4, (0, 2), None),
    ],
)
def test_a_process_takes_the_gpus_that_were_bound_to_it_or_its_share(
    visible, there, local, want, monkeypatch
):
    files = [f"/dev/nvidia{number}" for number in range(there)]
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: files)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    place = cluster.Place("a:1", 8, local[0], local, source="Slurm job 7")
    if want is None:
        with pytest.raises(ValueError, match=r"GPUs over 2 processes.*JAX_LOCAL_DEVICE_IDS"):
            processes._own_gpus(place)
    else:
        assert processes._own_gpus(place) == want


def environment(**more):
    names = ("JAX_COORDINATOR", "SLURM", "OMPI", "XLA_FLAGS", "JAX_NUM", "JAX_PROCESS")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    return clean | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | more


def begin(script, **more):
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(*started):
    """What each printed, and that all went well."""
    done = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0] * len(started), done
    return [[line for line in out.splitlines() if not line.startswith(GLOO)] for out, _ in done]


def test_told_by_variables_and_one_that_is_asked_to_stop_stops_all_at_one_step():
    port = f"127.0.0.1:{free_port()}"
    pair = [
        begin(
            JOIN + UNTIL_ASKED,
            JAX_COORDINATOR_ADDRESS=port,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(index),
        )
        for index in range(2)
    ]
    assert [process.stdout.readline() for process in pair] == ["joined 0 2 2\n", "joined 1 2 2\n"]
    for process in pair:
        assert next(line for line in process.stdout if not line.startswith(GLOO)) == "listens\n"
    pair[1].send_signal(signal.SIGUSR1)
    (first,), (second,) = said(*pair)
    assert first == second
    assert 1 < int(first.split()[-1]) < 9999


class Metadata(http.server.BaseHTTPRequestHandler):
    """What a Cloud TPU VM is told of the two of its slice."""

    worker = 0

    def do_GET(self):
        known = {
            "agent-worker-number": str(self.worker),
            "worker-network-endpoints": "a:b:127.0.0.1,a:b:127.0.0.1",
            "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'",
        }
        found = known.get(self.path.rpartition("/")[2])
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write((found or "").encode())

    def log_message(self, *words):
        pass


@pytest.fixture
def metadata():
    """Addresses of the metadata servers of two VMs."""
    servers = [
        http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), type(f"Worker{index}", (Metadata,), {"worker": index})
        )
        for index in range(2)
    ]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield [f"127.0.0.1:{server.server_port}" for server in servers]
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_slice_of_cloud_tpu_vms_is_found_by_its_metadata(metadata):
    port = str(free_port())
    # JAX itself sets this one where it sees no chips.
    join = "import os, jax; del os.environ['TPU_SKIP_MDS_QUERY']" + JOIN
    pair = [
        begin(join, JAX_FORCE_TPU_INIT="1", GCE_METADATA_IP=address, JAX_COORDINATOR_PORT=port)
        for address in metadata
    ]
    assert said(*pair) == [["joined 0 2 2"], ["joined 1 2 2"]]


def test_the_pods_of_a_tpu_slice_on_gke_are_found_by_their_variables(metadata):
    port = str(free_port())
    pair = [
        begin(
            JOIN,
            JAX_FORCE_TPU_INIT="1",
            TPU_SKIP_MDS_QUERY="1",  # of the two, GKE's way
            GCE_METADATA_IP=metadata[index],  # which tells of slices, elsewhere than here
            TPU_WORKER_HOSTNAMES="127.0.0.1,127.0.0.1",
            TPU_WORKER_ID=str(index),
            JAX_COORDINATOR_PORT=port,
        )
        for index in range(2)
    ]
    assert said(*pair) == [["joined 0 2 2"], ["joined 1 2 2"]]


@pytest.mark.skipif(not shutil.which("mpirun"), reason="needs Open MPI's mpirun on the PATH")
def test_open_mpi_starts_processes():
    done = subprocess.run(
        ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-c", JOIN],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert sorted(done.stdout.splitlines()) == ["joined 0 2 2", "joined 1 2 2"], done.stderr


def test_alone_nothing_is_joined():
    assert said(begin(JOIN)) == [["joined 0 1 1"]]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"coordinator": "127.0.0.1:9"},
            "not all is known .* say --config.mesh.num_processes or JAX_NUM_PROCESSES, "
            "--config.mesh.process_id or JAX_PROCESS_ID",
        ),
        (
            {"num_processes": 2, "process_id": 0},
            "say --config.mesh.coordinator or JAX_COORDINATOR_ADDRESS",
        ),
        (
            {"coordinator": "head", "num_processes": 2, "process_id": 0},
            r"coordinator is host:port; got 'head'",
        ),
        ({"detect": "no such way"}, "mesh.detect 'no such way': not all is known"),
    ],
)
def test_what_is_not_enough_is_one_clear_error(more, words, monkeypatch):
    more = dict(more)
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes.jax.distributed, "is_initialized", lambda: False)
    # JAX refuses to join once devices are in use, as they are here.
    from jax._src import distributed

    monkeypatch.setattr(
        processes.jax.distributed,
        "initialize",
        lambda *place, **rest: distributed.State().initialize(
            *place,
            local_device_ids=rest["local_device_ids"],
            cluster_detection_method=rest["cluster_detection_method"],
        ),
    )
    detect = more.pop("detect", "")
    with pytest.raises(ValueError, match=words):
        processes.start(cluster.find(**more), detect)


@pytest.mark.parametrize(
    ("environment", "error", "words"),
    [
        (
            {"JAX_COORDINATOR_ADDRESS": "head:9", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            jax.errors.JaxRuntimeError("UNKNOWN: Failed to start RPC server\nmore"),
            r"^process 1 of 2 could not listen \(UNKNOWN: Failed to start RPC server\); see that "
            "all were started, .*_ADDRESS.*JAX_COORDINATOR_PORT.*JAX_NUM_PROCESSES=1 says",
        ),
        (
            {"PMI_SIZE": "4", "PMI_RANK": "1"},
            ValueError("coordinator_address should be defined."),
            "^MPICH.*: not all .*_ADDRESS, host:port on .* process 0; .*_PROCESSES=1 says",
        ),
        (
            {"JOB_COMPLETION_INDEX": "1"},
            RuntimeError("Kubernetes API Error: 403 - Forbidden\nIt appears"),
            "^JAX could not ask Kubernetes .*403 - Forbidden.*JAX_NUM_PROCESSES=1 where each pod",
        ),
    ],
)
def test_processes_that_do_not_meet_are_told_why(environment, error, words, monkeypatch):
    def fails(*place, **rest):
        raise error

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes.jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(processes.jax.distributed, "initialize", fails)
    with pytest.raises(UserError, match=words):
        processes.start(cluster.find())


def test_a_process_that_nobody_answers_says_what_to_look_at(monkeypatch, caplog):
    """XLA ends it after minutes, from within: then these are the only words of ours."""

    def waits(*place, **rest):
        end = time.monotonic() + 60
        while "see that all" not in caplog.text and time.monotonic() < end:
            time.sleep(0.01)

    monkeypatch.setattr(machine, "log_every_s", lambda: 0.01)
    monkeypatch.setattr(processes.jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(processes.jax.distributed, "initialize", waits)
    with caplog.at_level("INFO"):
        processes.start(cluster.find("head:9", 2, 1))
    assert "process 1 of 2 waits for the others at head:9; see that" in caplog.text


def test_a_pod_that_is_none_of_an_indexed_job_is_alone(monkeypatch):
    """JAX would ask Kubernetes, and end where this may not be asked."""
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert not cluster.may_be_one_of_several()
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    assert cluster.may_be_one_of_several()


def test_a_verb_that_is_told_half_says_what_is_missing(tmp_path):
    words = ["evaluate", "--config=configs/cps.py:smoke", f"--workdir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "bhsd_jax.main", *words],
        cwd=ROOT,
        env=environment(JAX_COORDINATOR_ADDRESS="127.0.0.1:9"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("evaluate: mesh and JAX_* variables: not all is known")
    assert "JAX_NUM_PROCESSES" in last


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory", r"RESOURCE_EXHAUSTED: Out .*train\.accumulate=2"),
        ("UNAVAILABLE: closed\nby peer", "UNAVAILABLE: closed; most likely another process has"),
    ],
)
def test_a_device_without_memory_is_not_taken_for_a_process_that_is_gone(said, told, monkeypatch):
    with pytest.raises(jax.errors.JaxRuntimeError, match=said), processes.together():
        raise jax.errors.JaxRuntimeError(said)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=f"^process 0 of 2: {told}"), processes.together():
        raise jax.errors.JaxRuntimeError(said)


ASKS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]


@pytest.mark.parametrize("number", ASKS)
def test_a_single_process_notices_every_way_of_being_asked(number):
    before = signal.getsignal(number)
    with Preemption() as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked()
        assert asked(), "it stays so"
    assert signal.getsignal(number) == before


def test_who_asks_is_heard_where_nobody_reads_the_log_any_more(monkeypatch):
    """Ctrl-C reaches all of `bhsd train ... | tee log`, and `tee` is gone at once."""
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as unread, Preemption() as asked:
        monkeypatch.setattr(sys, "stderr", unread)
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()


def test_a_closed_terminal_ends_nothing_that_nohup_started():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Preemption() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_who_insists_is_obeyed_at_once():
    with Preemption() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("environment", "plugins", "words"),
    [
        ({"JAX_PLATFORMS": "cpu"}, ["jax_cuda12_plugin"], ""),
        ({}, [], ""),
        ({}, ["jax_cuda12_plugin"], "plugin for cuda is installed and finds no device"),
        ({}, ["libtpu"], "plugin for tpu is installed"),
        ({"JAX_PLATFORMS": "cuda,cpu"}, ["jax_cuda13_plugin"], "plugin for cuda"),
    ],
)
def test_an_accelerator_that_lies_idle_is_a_loud_warning(
    environment, plugins, words, monkeypatch, caplog
):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name in plugins or None)
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: [])
    processes.say_devices()
    loud = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    if not words:
        assert loud == []
        return
    assert len(loud) == 1
    assert "THIS RUNS ON THE CPU ALONE" in loud[0]
    assert words in loud[0]


@pytest.mark.parametrize("wanted", ["cuda", "rocm"])
def test_a_platform_that_is_asked_for_and_not_there_is_one_line(wanted):
    """As on a login node; JAX says it by a bare AssertionError, or by a traceback."""
    if any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))):
        pytest.skip("there may be such devices here")
    script = "from bhsd_jax.train import processes; processes.share_cores(2)"
    done = begin(script, JAX_PLATFORMS=wanted)
    _, said = done.communicate(timeout=600)
    assert said.splitlines()[-1].startswith(
        f"bhsd_jax.platform.errors.UserError: JAX_PLATFORMS is {wanted!r}, and JAX finds no such"
    )


@pytest.mark.parametrize("file", ["/dev/nvidia0", "/usr/lib/wsl/lib/libcuda.so.1"])
def test_a_gpu_without_its_plugin_is_said(file, monkeypatch, caplog):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: fnmatch.filter([file], pattern))
    processes.say_devices()
    assert "BHSD_EXTRAS=cuda tools/env" in caplog.text
