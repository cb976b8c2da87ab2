"""Two CTAs of a cluster give each other a value.

On a GPU each writes into the other's shared memory, with stores that count at its barrier. The
interpreter knows neither such stores nor another CTA's memory; there the values go through global
memory and a barrier of both.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels import plgpu


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ClusterSwap:
    """What a kernel needs to swap `times` times, once per tile.

    Two mailboxes suffice. Before a CTA writes into one again, two swaps later, it has received the
    value of the swap between, which the other sent after it had read that mailbox.

    Attributes:
        axis: Name of the cluster's axis, of size 2.
        shape: Of the value, `[rows, columns]`, multiples of 64 and 8; float32 in wgmma's layout.
        times: Swaps of each CTA.
    """

    axis: str
    shape: tuple[int, int]
    times: int

    @property
    def _boxes(self) -> int:
        return min(self.times, 2)

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA, bytes, barriers included."""
        return self._boxes * (4 * math.prod(self.shape) + 128)

    def scratch(self) -> dict[str, Any]:
        """Scratch of the kernel: `mailbox` if it is in shared memory, and `arrived`."""
        if plgpu.interpreting():
            return {"arrived": plgpu.ClusterBarrier(collective_axes=(self.axis,))}
        layout = plgpu.FLOAT32_TILES
        return {
            "mailbox": plgpu.SMEM((self._boxes, *self.shape), jnp.float32, transforms=layout),
            "arrived": plgpu.Barrier(num_barriers=self._boxes),
        }

    def outputs(self, clusters: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Outputs of the kernel that nobody reads: `mailbox` if it is in global memory."""
        if not plgpu.interpreting():
            return {}
        return {
            "mailbox": jax.ShapeDtypeStruct((clusters, self.times, 2, *self.shape), jnp.float32)
        }

    def swap(self, value, mailbox, arrived, *, cluster, time) -> jax.Array:
        """The other CTA's value.

        Args:
            value: Of `shape`.
            mailbox: The scratch or output of that name.
            arrived: The scratch of that name.
            cluster: Number of the cluster in the grid.
            time: How many swaps came before.
        """
        here = lax.axis_index(self.axis)
        if plgpu.interpreting():
            boxes = mailbox.at[cluster, time]
            boxes[here] = value
            plgpu.barrier_arrive(arrived)
            plgpu.barrier_wait(arrived)
            return plgpu.load(boxes.at[1 - here], layout=plgpu.Layout.WGMMA, optimized=False)
        number = lax.rem(time, jnp.int32(self._boxes))
        box, barrier = mailbox.at[number], arrived.at[number]
        plgpu.async_store_smem(value, box, barrier, cluster_idx=1 - here, cluster_dim=self.axis)
        plgpu.barrier_wait(barrier)
        return plgpu.load(box, layout=plgpu.Layout.WGMMA, optimized=False)
