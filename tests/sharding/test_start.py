"""What a process finds out before it is connected, and right after it."""

import json

import pytest

from jaxinfer.distributed import start
from jaxinfer.distributed.group import Group
from jaxinfer.distributed.store import Store


@pytest.fixture
def unknown(monkeypatch):
    def getaddrinfo(*_):
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr(start.socket, "getaddrinfo", getaddrinfo)


def test_a_name_that_nobody_knows(unknown, monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(start.UnreachableError, match="'host0' cannot be resolved: Name or service"):
        start._check_name("host0:1234")


def test_the_name_of_a_pod_may_come_later(unknown, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    start._check_name("host0:1234")


def test_processes_that_were_told_other_numbers(monkeypatch):
    group = object.__new__(Group)
    group.index, group.count, group._store = 1, 3, object.__new__(Store)
    monkeypatch.setattr(group._store, "wait", lambda key: json.dumps(2).encode())
    group._folder, group._shared = "", 0
    message = "process 0 was told 2, process 1 was told 3"
    with pytest.raises(ValueError, match=message):
        group.begin()
