"""What JAX finds in the environments of Slurm and Open MPI, which `--distributed` relies on.

No launcher runs here, and names of hosts are not resolved.
"""

import os

import pytest
from jax._src.clusters import ClusterEnv

SLURM = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
OPENMPI = {
    "OMPI_COMM_WORLD_SIZE": "16",
    "OMPI_COMM_WORLD_RANK": "9",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
# Ports are from the last 4096: the number of the job, of Open MPI's without its lowest 12 bits.
SLURM_PORT = 61440 + 4711 % 4096
OPENMPI_PORT = 61440 + (1531576320 >> 12) % 4096


@pytest.fixture(autouse=True)
def by_nobody(monkeypatch):
    """The tests themselves may have been started by a launcher, or in a pod."""
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR", "KUBERNETES_")):
            monkeypatch.delenv(name)


def found() -> tuple[object, ...]:
    """Address of process 0, number of processes, number of this one, and its devices."""
    return ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 300)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("gpu[007-008]", "gpu007"),
        ("gpu[007,009-010],cpu1", "gpu007"),
    ],
)
def test_slurm(monkeypatch, nodes, first):
    for name, value in (SLURM | {"SLURM_STEP_NODELIST": nodes}).items():
        monkeypatch.setenv(name, value)
    assert found() == (f"{first}:{SLURM_PORT}", 16, 9, [1])


@pytest.mark.parametrize(
    ("uri", "first"),
    [
        ("1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "10.96.0.1"),
        ("1531576320.0;tcp://10.96.0.1:34911", "10.96.0.1"),
    ],
)
def test_open_mpi_4(monkeypatch, uri, first):
    for name, value in (OPENMPI | {"OMPI_MCA_orte_hnp_uri": uri}).items():
        monkeypatch.setenv(name, value)
    assert found() == (f"{first}:{OPENMPI_PORT}", 16, 9, [1])


def test_a_port_of_ones_own(monkeypatch):
    variables = SLURM | {"SLURM_STEP_NODELIST": "gpu[1-2]", "JAX_COORDINATOR_PORT": "14711"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert found() == ("gpu1:14711", 16, 9, [1])


def test_nobody():
    assert found() == (None, None, None, None)
