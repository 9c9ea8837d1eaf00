"""How ranks meet: on one machine, unreachable by others; across machines, signed with the job's secret, as are later subgroups."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from ranks import free_port, on_ranks

from megafork.joined import joined
from megafork.parallel import meeting
from megafork.recipe import RecipeError
from megafork.secret import NAME, is_loopback, secret

SECRET = "a-secret-of-this-test"
LIMIT = timedelta(seconds=30)
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", NAME)


@pytest.fixture(autouse=True)
def no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _OF_RANKS:
        monkeypatch.delenv(name, raising=False)


def own_address() -> str:
    """One that other machines would reach; the loopback's where there is no other."""
    found = {entry.address for of_card in psutil.net_if_addrs().values() for entry in of_card if entry.family == socket.AF_INET}
    return next((address for address in sorted(found) if not is_loopback(address)), "127.0.0.1")


def _meet(address: str, port: int, secrets: list[str]) -> Any:
    rank = dist.get_rank()
    dist.barrier()
    dist.destroy_process_group()
    os.environ.pop("LOCAL_WORLD_SIZE", None)
    os.environ.update({"MASTER_ADDR": address, "MASTER_PORT": str(port), NAME: secrets[rank]})
    try:
        meeting.join("gloo", LIMIT)
    except RecipeError as error:
        return str(error)
    pairs = [dist.new_group([0, rank]) for rank in range(1, dist.get_world_size())]
    totals = []
    for other, pair in enumerate(pairs, start=1):
        if rank in (0, other):
            totals.append(torch.tensor([rank + 1.0]))
            dist.all_reduce(totals[-1], group=pair)
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, {"rank": rank})
    keys = list(dist.TCPStore(address, port, is_master=False, timeout=LIMIT).list_keys()) if rank == 0 else []
    listening = {c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    dist.barrier()
    return [float(total) for total in totals], [one["rank"] for one in told], listening, any("greeting" in key for key in keys)


@pytest.mark.parametrize("known", ["", SECRET])
def test_on_the_loopback_nobody_else_is_listened_to(known: str) -> None:
    (first, *told), *_ = found = on_ranks(2, _meet, "127.0.0.1", free_port(), [known] * 2)
    assert first == [3.0] and told[0] == [0, 1] and told[2]
    assert [ips for _, _, ips, _ in found] == [{"127.0.0.1"}] * 2


def test_groups_are_made_by_a_signed_store(monkeypatch: pytest.MonkeyPatch) -> None:
    address = own_address()
    found = on_ranks(3, _meet, address, free_port(), [SECRET] * 3)
    assert [(total, told) for total, told, _, _ in found] == [([3.0, 4.0], [0, 1, 2]), ([3.0], [0, 1, 2]), ([4.0], [0, 1, 2])]
    assert address in found[0][2] and not found[0][2] & {"0.0.0.0", "::"}


@pytest.mark.parametrize("secrets", [[SECRET, ""], ["", SECRET], [SECRET, SECRET + "x"]])
def test_ranks_of_different_secrets_do_not_meet(secrets: list[str]) -> None:
    """Rank 0 waits for the other, which is told at once."""
    said = on_ranks(2, _greet, free_port(), secrets)[1]
    assert NAME in said and "export" in said and "\n" not in said


def _greet(port: int, secrets: list[str]) -> str:
    """As `meeting.join` begins; rank 0 goes on living until the other has been told."""
    rank = dist.get_rank()
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), NAME: secrets[rank]})
    said = ""
    try:
        store = meeting._across(rank, 2, LIMIT)
        assert store
    except RecipeError as error:
        said = str(error)
    dist.barrier()
    return said


def test_what_a_stranger_writes_is_refused() -> None:
    store = dist.HashStore()
    mine = meeting.SignedStore(store, SECRET)
    mine.set("address", b"\x00\xff here")
    assert mine.get("address") == b"\x00\xff here"
    for forged in (b"there", b"", bytes(32) + b"there", bytes(store.get("address"))[:-1]):
        store.set("address", forged)  # type: ignore[arg-type]
        with pytest.raises(RecipeError, match="'address' was written to the ranks' store without this rank's"):
            mine.get("address")
    mine.set("address", b"here")
    store.set("port", bytes(store.get("address")))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="'port'"):  # a true value under another name
        mine.get("port")
    meeting.SignedStore(store, SECRET + "x").set("address", b"there")
    with pytest.raises(RecipeError):
        mine.get("address")


RANK = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0"}, "RANK is '0', so another program started this rank, but WORLD_SIZE is not set: unset RANK to have megafork"),
        ({**RANK, "MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({**RANK, "MASTER_PORT": ""}, "MASTER_PORT is not set"),
        ({**RANK, "RANK": "first"}, "RANK is 'first', not a number"),
        ({**RANK, "RANK": "-1"}, "RANK is '-1', not a number"),
        ({**RANK, "WORLD_SIZE": "1e3"}, "WORLD_SIZE is '1e3', not a number"),
        ({**RANK, "MASTER_PORT": "http"}, "MASTER_PORT is 'http', not a number"),
        ({**RANK, "MASTER_PORT": "70000"}, "MASTER_PORT is '70000': ports are"),
        ({**RANK, "LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', not a number"),
        ({**RANK, "RANK": "2"}, "RANK is '2' and WORLD_SIZE '2': ranks are counted from 0"),
        ({**RANK, "MASTER_ADDR": "192.0.2.77"}, f"MASTER_ADDR is '192.0.2.77', which other machines can reach, and {NAME} is not set"),
        ({**RANK, "MASTER_ADDR": "192.0.2.77", NAME: "short"}, f"{NAME} has 5 characters"),
        ({**RANK, "MASTER_ADDR": "192.0.2.77", NAME: "with spaces in its midst"}, "no spaces"),
    ],
)
def test_what_the_environment_says_of_a_rank_is_checked(environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError) as error:
        joined()
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "environment",
    [
        RANK,
        {**RANK, "MASTER_ADDR": "localhost"},
        {**RANK, "MASTER_ADDR": "192.0.2.77", NAME: SECRET},
        {**RANK, "MASTER_ADDR": "192.0.2.77", "LOCAL_WORLD_SIZE": "2"},  # torchrun, with all ranks here
    ],
)
def test_ranks_that_others_started_are_joined(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert joined()


def test_which_hosts_only_this_machine_reaches() -> None:
    for host in ("localhost", "127.0.0.1", "127.8.0.9", "::1", "::ffff:127.0.0.1"):
        assert is_loopback(host)
    for host in ("", "0.0.0.0", "::", "192.0.2.1", socket.gethostname(), "localhost.example.org", "::ffff:192.0.2.1"):
        assert not is_loopback(host)


def test_a_store_listens_at_its_address_alone() -> None:
    for host, wanted in (("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), (own_address(), own_address())):
        store = meeting.listen(host, 0, 1, LIMIT)
        listening = {c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.laddr.port == store.port and c.status == "LISTEN"}
        assert listening == {wanted} or (host == "localhost" and listening == {"::1"})
        store.set("key", "value")
        assert dist.TCPStore(host, store.port, is_master=False, timeout=LIMIT).get("key") == b"value"


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for name, value in {**RANK, "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RecipeError, match=rf"^MASTER_ADDR is '127.0.0.1' and MASTER_PORT {port}: rank 0 can't listen there \(Address"):
            meeting.join("gloo", LIMIT)


def test_no_secret_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert secret() is None
    monkeypatch.setenv(NAME, "")
    assert secret() is None
