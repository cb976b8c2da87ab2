"""Sum of a value over the CTAs of a cluster: the first CTA gets the others' and adds them in order.

On a GPU the others write into its shared memory, with stores that count at its barrier. The
interpreter knows neither such stores nor another CTA's memory; there the values go through global
memory and a barrier of the whole cluster.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels import plgpu


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ClusterSum:
    """What a kernel needs for one sum; the others' values wait side by side in a mailbox.

    Attributes:
        axis: Name of the cluster's axis.
        ctas: CTAs of a cluster, at least 2.
        shape: Of the value, `[rows, columns]`, multiples of 64 and 8; float32 in wgmma's layout.
        count: Values per CTA.
    """

    axis: str
    ctas: int
    shape: tuple[int, int]
    count: int = 1

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA, bytes, barrier included."""
        return 4 * math.prod(self._mailbox) + 128

    @property
    def _mailbox(self) -> tuple[int, ...]:
        return (self.ctas - 1, self.count, *self.shape)

    def scratch(self) -> dict[str, Any]:
        """Scratch of the kernel: `mailbox` if it is in shared memory, and `arrived`."""
        if plgpu.interpreting():
            return {"arrived": plgpu.ClusterBarrier(collective_axes=(self.axis,))}
        layout = plgpu.FLOAT32_TILES
        return {
            "mailbox": plgpu.SMEM(self._mailbox, jnp.float32, transforms=layout),
            "arrived": plgpu.Barrier(num_arrivals=(self.ctas - 1) * self.count),
        }

    def outputs(self, clusters: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Outputs of the kernel that nobody reads: `mailbox` if it is in global memory."""
        if not plgpu.interpreting():
            return {}
        return {"mailbox": jax.ShapeDtypeStruct((clusters, *self._mailbox), jnp.float32)}

    def send(self, values, mailbox, arrived, *, cluster) -> None:
        """Hand the values to the first CTA; for the others of a cluster, once per kernel.

        Args:
            values: `count` arrays of `shape`.
            mailbox: The scratch or output of that name.
            arrived: The scratch of that name.
            cluster: Number of the cluster in the grid.
        """
        place = lax.axis_index(self.axis) - 1
        for i, value in enumerate(values):
            if plgpu.interpreting():
                mailbox[cluster, place, i] = value
            else:
                plgpu.async_store_smem(
                    value, mailbox.at[place, i], arrived,
                    cluster_idx=jnp.int32(0), cluster_dim=self.axis,
                )  # fmt: skip
        if plgpu.interpreting():
            plgpu.barrier_arrive(arrived)
            plgpu.barrier_wait(arrived)

    def receive(self, values, mailbox, arrived, *, cluster) -> list:
        """The sums; for the first CTA of a cluster, once per kernel. Arguments as of `send`."""
        if plgpu.interpreting():
            plgpu.barrier_arrive(arrived)
        plgpu.barrier_wait(arrived)
        sums = list(values)
        for sender in range(self.ctas - 1):
            for i in range(self.count):
                box = mailbox.at[cluster] if plgpu.interpreting() else mailbox
                box = box.at[sender, i]
                value = plgpu.load(box, layout=plgpu.Layout.WGMMA, optimized=False)
                sums[i] = sums[i] + value
        return sums
