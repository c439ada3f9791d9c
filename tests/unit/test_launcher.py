"""What a launcher says in the environment: read, or rejected in one line."""

import pytest

from qwen3next_train.errors import ConfigError
from qwen3next_train.launcher import LaunchedProcess, check_host, speaks_for_node

WHOLE = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


def test_no_launcher_is_one_process():
    assert LaunchedProcess.from_environment({"MASTER_ADDR": "node0"}) == LaunchedProcess(0, 1, 0, 1, "", 0)
    assert not LaunchedProcess.from_environment({}).is_launched


def test_a_launcher():
    process = LaunchedProcess.from_environment(WHOLE)
    assert process == LaunchedProcess(5, 8, 1, 4, "node0", 29500)
    assert process.is_launched
    again = LaunchedProcess.from_environment(WHOLE | {"TORCHELASTIC_RESTART_COUNT": "2"})
    assert (process.num_restarts, again.num_restarts) == (0, 2)
    without = {name: value for name, value in WHOLE.items() if name != "LOCAL_WORLD_SIZE"}
    assert LaunchedProcess.from_environment(without).local_world_size == 1


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "LOCAL_WORLD_SIZE"])
def test_a_part_that_is_missing_or_empty(name):
    for value, state in ((None, "missing although "), ("", "empty; "), (" ", "empty; ")):
        given = {other: text for other, text in WHOLE.items() if other != name}
        given |= {} if value is None else {name: value}
        with pytest.raises(ConfigError, match=f"^{name}: {state}"):
            LaunchedProcess.from_environment(given)


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "MASTER_ADDR"])
@pytest.mark.parametrize("value", ["x", "-1", "1.0", "1e3", "0x1", "1_0", "+1", " 1", "１", "9" * 13, "\udcff"])
def test_what_is_no_number(name, value):
    with pytest.raises(ConfigError, match=f"^{name}: not a whole number >= 0 "):
        LaunchedProcess.from_environment(WHOLE | {name: value})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"RANK": "8"}, "RANK: 8 contradicts WORLD_SIZE 8"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: not between 1 and 1000000 (got 0)"),
        ({"WORLD_SIZE": "1000001"}, "WORLD_SIZE: not between 1 and 1000000 (got 1000001)"),
        ({"WORLD_SIZE": "3", "RANK": "2"}, "LOCAL_WORLD_SIZE: 4 contradicts WORLD_SIZE 3"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK: 4 contradicts LOCAL_WORLD_SIZE 4"),
        ({"RANK": "0"}, "LOCAL_RANK: 1 contradicts RANK 0"),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE: 0 processes on this node"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT: not between 1 and 65535 (got 0)"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT: not between 1 and 65535 (got 65536)"),
        ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT: not a whole number"),
    ],
)
def test_contradictions(changes, text):
    with pytest.raises(ConfigError) as raised:
        LaunchedProcess.from_environment(WHOLE | changes)
    assert str(raised.value).startswith(text)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a..b", "x" * 300, "\udcff", "host name"])
def test_a_host_that_does_not_resolve(host):
    with pytest.raises(ConfigError, match=r"^MASTER_ADDR: '.* does not resolve "):
        check_host(host, "MASTER_ADDR")


def test_hosts_that_resolve():
    for host in ("", "localhost", "127.0.0.1"):
        check_host(host, "MASTER_ADDR")


@pytest.mark.parametrize(
    ("changes", "speaks"),
    [({}, False), ({"LOCAL_RANK": "0"}, True), ({"RANK": "x", "LOCAL_RANK": "y"}, True), ({"MASTER_ADDR": ""}, True)],
)
def test_who_says_what_all_ranks_see(changes, speaks):
    assert speaks_for_node(WHOLE | changes) is speaks
    assert speaks_for_node({})
