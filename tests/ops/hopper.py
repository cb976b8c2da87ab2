"""Running Mosaic kernels in tests, in the CPU interpreter or on a GPU."""

import contextlib
import dataclasses
import io

import jax

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.device import H100, current_device, use_device
from tests.ops.cases import quick_compilation

_RACE = "RACE DETECTED"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hopper:
    """A place to run kernels for sm_90.

    Attributes:
        interpreted: In the CPU interpreter; outputs start as NaN there, and races fail the test.
    """

    interpreted: bool

    def run(self, function, *args, num_sms: int = 2):
        """`function(*args)`, finished, on a device with `num_sms` SMs.

        Few SMs keep the interpreter quick and make several requests share one. On a GPU the
        kernels are planned for so many, and for all of them if `num_sms` is 0.
        """
        if not self.interpreted:
            spec = current_device()
            with use_device(dataclasses.replace(spec, num_sms=num_sms or spec.num_sms)):
                return jax.block_until_ready(function(*args))
        printed = io.StringIO()  # the detector of JAX 0.11 prints what it finds and goes on
        spec = dataclasses.replace(H100, num_sms=num_sms or 2)
        try:
            with contextlib.redirect_stdout(printed), plgpu.interpret(spec), quick_compilation():
                result = jax.block_until_ready(function(*args))
        except jax.errors.JaxRuntimeError as error:  # that of JAX 0.12 raises
            if _RACE in str(error):
                raise RaceError(str(error)) from error
            raise
        if _RACE in printed.getvalue():
            raise RaceError(printed.getvalue())
        return result


class RaceError(AssertionError):
    """The interpreter saw two accesses of one location that nothing orders."""
