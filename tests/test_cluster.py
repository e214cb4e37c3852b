"""What environments of clusters say of a process."""

import pytest

from bhsd_jax.platform.cluster import Place, apart, find, first_host, missing

SLURM = {
    "SLURM_JOB_ID": "70000",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "rack[1-2]n[07,9]",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2),2",
    "SLURM_NODEID": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
JAX = {
    "JAX_COORDINATOR_ADDRESS": "head:1234",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-015],host2", "node001"),
        ("n[5]", "n5"),
        ("rack[1-2]n[07,9],x", "rack1n07"),
        ("gpu-a[3,7-9].cluster", "gpu-a3.cluster"),
    ],
)
def test_the_first_host_of_every_way_slurm_writes_a_list(nodes, host):
    """As `scontrol show hostnames` of Slurm 22.05 prints it."""
    assert first_host(nodes) == host


def test_a_task_of_slurm_knows_its_step_its_machine_and_the_first_host():
    found = find(environment=SLURM)
    assert (found.index, found.count, found.local) == (3, 4, (1, 2))
    assert found.coordinator == f"rack1n07:{61440 + 70002 % 4096}"
    assert found.complete
    assert find(environment=SLURM | {"JAX_COORDINATOR_PORT": "9"}).coordinator == "rack1n07:9"


def test_a_shell_of_salloc_and_a_batch_script_are_alone():
    shell = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    assert find(environment=shell).count == 1
    script = {k: v for k, v in SLURM.items() if not k.startswith("SLURM_STEP")}
    assert find(environment=script) == Place()


def test_of_launchers_inside_each_other_the_one_that_started_several_tells():
    """`mpirun` in a shell or a script of Slurm, whose variables its processes inherit."""
    shell = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    found = find(environment=shell | OPEN_MPI)
    assert found == find(environment=OPEN_MPI)
    assert (found.index, found.count) == (2, 4)
    assert find(environment=SLURM | OPEN_MPI) == find(environment=OPEN_MPI)
    one = OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}
    assert find(environment=SLURM | one) == find(environment=SLURM)
    assert find(environment=shell | one).count == 1


def test_open_mpi_tells_all_on_one_machine_and_with_version_4_on_several():
    found = find(environment=OPEN_MPI)
    assert (found.index, found.count, found.local) == (2, 4, (0, 2))
    assert found.coordinator == f"10.96.0.1:{61440 + (1531576320 >> 12) % 4096}"
    six = "1314521088.0;tcp6://[fe80::1,2620:10d::2]:43370"
    assert find(environment=OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": six}).coordinator.startswith(
        "fe80::1:"
    )
    one = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-a@1"}
    del one["OMPI_MCA_orte_hnp_uri"]
    assert find(environment=one).coordinator.startswith("127.0.0.1:")
    five = {k: v for k, v in OPEN_MPI.items() if not k.startswith("OMPI_MCA")}
    assert not find(environment=five).complete
    assert missing(find(environment=five)) == (
        "--config.mesh.coordinator or JAX_COORDINATOR_ADDRESS"
    )


ELSEWHERE = {
    "MPICH or Intel MPI": {
        "PMI_SIZE": "4",
        "PMI_RANK": "2",
        "MPI_LOCALNRANKS": "2",
        "MPI_LOCALRANKID": "0",
    },
    "PALS": {"PMI_SIZE": "4", "PMI_RANK": "2", "PMI_LOCAL_SIZE": "2", "PMI_LOCAL_RANK": "0"},
    "MVAPICH": {
        "MV2_COMM_WORLD_SIZE": "4",
        "MV2_COMM_WORLD_RANK": "2",
        "MV2_COMM_WORLD_LOCAL_SIZE": "2",
        "MV2_COMM_WORLD_LOCAL_RANK": "0",
    },
    "jsrun": {
        "JSM_NAMESPACE_SIZE": "4",
        "JSM_NAMESPACE_RANK": "2",
        "JSM_NAMESPACE_LOCAL_SIZE": "2",
        "JSM_NAMESPACE_LOCAL_RANK": "0",
    },
    "torchrun (RANK, WORLD_SIZE)": {
        "WORLD_SIZE": "4",
        "RANK": "2",
        "LOCAL_WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "TORCHELASTIC_RUN_ID": "none",
    },
}


@pytest.mark.parametrize("launcher", ELSEWHERE)
def test_every_launcher_tells_number_and_machine_of_a_process(launcher):
    """None may leave N trainings that each take themselves for the only one."""
    told = ELSEWHERE[launcher]
    found = find(environment=told)
    assert (found.source, found.index, found.count) == (launcher, 2, 4)
    assert found.local == (0, 2)
    assert not found.complete, "nobody tells where process 0 is"
    assert missing(found) == "--config.mesh.coordinator or JAX_COORDINATOR_ADDRESS"
    local = [name for name in told if "LOCAL" in name and not name.endswith(("RANK", "ID"))]
    alone = find(environment=told | {local[0]: "4"})
    assert alone.coordinator.startswith("127.0.0.1:")
    assert alone.complete
    # Within a job of Slurm's they begin on its first machine; a shell or script of Slurm's is one.
    job = {"SLURM_JOB_NODELIST": "n[7-8]"}
    shell = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    within = find(environment=shell | told | job | {"JAX_COORDINATOR_PORT": "9"})
    assert (within.source, within.index, within.count) == (launcher, 2, 4)
    assert within.coordinator == ("" if "RANK" in told else "n7:9")


@pytest.mark.parametrize("told", [SLURM, OPEN_MPI, *ELSEWHERE.values()])
def test_a_process_that_is_told_to_be_alone_is(told):
    """In a shell of one of several, and as a verb of a series that was started there."""
    assert find(environment=told).several
    for found in (find(environment=told | {"JAX_NUM_PROCESSES": "1"}), find("", 1, None, told)):
        assert (found.count, found.several) == (1, False)
    assert find(environment=apart(told)) == Place()
    assert apart(JAX | told).items() >= JAX.items()


def test_processes_that_speak_pmi_are_those_of_slurm():
    """`srun --mpi=pmi2`, to which Slurm itself says more; else a bootstrap of hydra's."""
    pmi = {"PMI_SIZE": "4", "PMI_RANK": "3"}
    assert find(environment=SLURM | pmi) == find(environment=SLURM)
    proxies = SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    found = find(environment=proxies | ELSEWHERE["MPICH or Intel MPI"])
    assert (found.index, found.count, found.source) == (2, 4, "MPICH or Intel MPI")


def test_torchrun_says_where_to_meet_and_listens_at_its_own_port():
    told = ELSEWHERE["torchrun (RANK, WORLD_SIZE)"]
    head = {"MASTER_ADDR": "head", "MASTER_PORT": "29500"}
    found = find(environment=told | head)
    host, port = found.coordinator.split(":")
    assert host == "head"
    assert 61440 <= int(port) < 65536
    assert find(environment=told | head | {"RANK": "3"}).coordinator == found.coordinator
    assert find(environment=told | head | {"MASTER_PORT": "29501"}).coordinator != found.coordinator
    # One torchrun on each machine of a job step is usual; variables left over from elsewhere too.
    inside = find(environment=SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"} | told)
    assert (inside.index, inside.count) == (2, 4)
    left = {"RANK": "0", "WORLD_SIZE": "8"}
    assert find(environment=SLURM | left) == find(environment=SLURM)
    one = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert find(environment=one | left) == find(environment=one), "of the shell that submitted it"
    pod = find(environment=left | head)  # as schedulers of PyTorch jobs start them
    assert (pod.index, pod.count, pod.local) == (0, 8, (0, 1))
    assert find(environment={"RANK": "first"}) == Place()
    assert find(environment={"RANK": "-1", "LOCAL_RANK": "-1", "WORLD_SIZE": "1"}).count == 1


def test_flux_tells_all_on_one_machine():
    told = {"FLUX_JOB_SIZE": "4", "FLUX_TASK_RANK": "2", "FLUX_TASK_LOCAL_ID": "2"}
    pmi = {"PMI_SIZE": "4", "PMI_RANK": "2"}
    found = find(environment=told | pmi | {"FLUX_JOB_NNODES": "1"})
    assert (found.index, found.count, found.local, found.source) == (2, 4, (2, 4), "Flux")
    assert found.complete
    spread = find(environment=told | {"FLUX_JOB_NNODES": "2"})
    assert not spread.complete
    assert spread.gpus(0) == []
    with pytest.raises(ValueError, match="8 GPUs over who knows how many processes"):
        spread.gpus(8)


def test_flags_come_before_variables_and_these_before_the_cluster():
    assert find(environment=JAX).index == 1
    assert find("other:9", 3, 2, JAX) == Place("other:9", 3, 2, source="mesh and JAX_* variables")
    address = {"JAX_COORDINATOR_ADDRESS": "head:1234"}
    found = find(environment=SLURM | address)
    assert (found.coordinator, found.count, found.index) == ("head:1234", 4, 3)
    alone = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    found = find(environment=alone | JAX)  # processes that a single task has started
    assert (found.count, found.index, found.local) == (2, 1, (0, 1))


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (SLURM | JAX, "say 2 processes, Slurm job 70000 says 4"),
        (OPEN_MPI | {"JAX_PROCESS_ID": "3"}, "say 3 as this process, Open MPI says 2"),
        (JAX | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES: needs a whole number"),
        (JAX | {"JAX_PROCESS_ID": "2"}, "process 2 of 2; they count from 0"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, r"^torchrun .*: process 2 of 2; they count from 0"),
        ({"PMI_SIZE": "2", "PMI_RANK": "x"}, "PMI_RANK: needs a whole number"),
    ],
)
def test_what_does_not_agree_is_refused(environment, words):
    with pytest.raises(ValueError, match=words):
        find(environment=environment)


def test_what_is_missing_is_named():
    found = find(environment={"JAX_COORDINATOR_ADDRESS": "head:1234"})
    assert not found.complete
    assert missing(found) == (
        "--config.mesh.num_processes or JAX_NUM_PROCESSES, "
        "--config.mesh.process_id or JAX_PROCESS_ID"
    )


def test_gpus_of_a_machine_are_shared_out():
    whole = find(environment=SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_LOCALID": "0"})
    assert whole.gpus(8) == list(range(8))
    second = find(environment=SLURM)
    assert second.gpus(8) == [4, 5, 6, 7]
    assert second.gpus(2) == [1]
    for asked in ({"SLURM_GPUS_PER_TASK": "2"}, {"SLURM_TRES_PER_TASK": "gres/gpu:2"}):
        assert find(environment=SLURM | asked).gpus(2) == [0, 1]
    with pytest.raises(ValueError, match="3 GPUs over 2 processes of one machine"):
        second.gpus(3)
