"""The benchmarks are not installed; plain `pytest` needs to be told where they are."""

import sys

from tests.paths import REPOSITORY

if str(REPOSITORY) not in sys.path:
    sys.path.append(str(REPOSITORY))
