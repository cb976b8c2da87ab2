"""One of two processes that wait for each other between steps; run by `test_processes.py`.

Arguments: its number, and the address of the first. Says `joined` when it has found the other.
"""

import sys
import time

from jaxinfer.distributed.group import Group
from jaxinfer.distributed.last_words import speak_on_abort
from jaxinfer.distributed.start import initialize

if __name__ == "__main__":
    number, address = int(sys.argv[1]), sys.argv[2]
    speak_on_abort()
    initialize(
        coordinator=address, num_processes=2, process_id=number,
        initialization_timeout_s=60, heartbeat_timeout_s=3,
    )  # fmt: skip
    group = Group(3)
    print("joined", flush=True)
    if group.is_first:
        time.sleep(600)  # a download, say
    group.share("a plan")
