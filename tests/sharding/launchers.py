"""What two processes are given by those who start them, here both on one host."""

from collections.abc import Callable

Launcher = Callable[[str, int], tuple[tuple[str, ...], dict[str, str]]]
"""From the address of process 0 and a number: options of the command, and the environment."""


def by_hand(address: str, number: int) -> tuple[tuple[str, ...], dict[str, str]]:
    """Three options."""
    given = ("--coordinator", address, "--num-processes", "2", "--process-id", str(number))
    return given, {}


def slurm(address: str, number: int) -> tuple[tuple[str, ...], dict[str, str]]:
    """Variables that JAX reads of those that `srun` sets; and the port, which is not the job's."""
    host, _, port = address.rpartition(":")
    return (), {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_NODELIST": host,
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
        "JAX_COORDINATOR_PORT": port,
    }


def openmpi(address: str, number: int) -> tuple[tuple[str, ...], dict[str, str]]:
    """The same of Open MPI 4's `mpirun`."""
    host, _, port = address.rpartition(":")
    return (), {
        "OMPI_MCA_orte_hnp_uri": f"1531576320.0;tcp://{host},10.148.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(number),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(number),
        "JAX_COORDINATOR_PORT": port,
    }
