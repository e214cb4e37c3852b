"""What environments of clusters say of a process."""

import pytest

from bhsd_jax.platform.cluster import Place, find, first_host, missing

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
