"""How programs are compiled in tests of the engine."""

import pytest

from tests.compiling import compiled_once
from tests.ops.cases import quick_compilation


@pytest.fixture(scope="package", autouse=True)
def quickly(tmp_path_factory):
    """Most of the time is compilation, of the same programs for every engine.

    With all of XLA's optimisations, engines answer in `tests/test_llm.py` and `tests/cli`.
    """
    with compiled_once(tmp_path_factory.mktemp("compiled")), quick_compilation():
        yield
