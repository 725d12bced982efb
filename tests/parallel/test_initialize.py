"""Process groups of real runs over four ranks."""

import json

import pytest

from tests.processes import run_ranks

# Ranks that hold one replica, by replica; Megatron counts TP fastest, then CP, DP, PP.
REPLICAS = {
    "tp2-dp2": [[0, 1], [2, 3]],
    "pp2-dp2": [[0, 2], [1, 3]],
    "cp2-dp2": [[0, 1], [2, 3]],
    "tp2-pp2": [[0, 1, 2, 3]],
    "dp4": [[0], [1], [2], [3]],
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("initialize")
    run_ranks("tests.parallel.initialize_worker", 4, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("layout", REPLICAS)
def test_replicas(ranks, layout):
    for replica, members in enumerate(REPLICAS[layout]):
        for rank in members:
            found = ranks[rank][layout]
            assert found["replica"] == replica and found["replicas"] == len(REPLICAS[layout])
            assert found["members"] == members
            assert found["bits"] == sum(2**member for member in members)  # the group really connects them
        places = [tuple(ranks[rank][layout]["place"]) for rank in members]
        assert len(set(places)) == len(members)  # together they hold the model once
        assert places[0] == (0, 0, 0)  # the rank that loads clips is the first of everything


def test_seeds_are_set(ranks):
    assert len({rank["dp4"]["random"] for rank in ranks}) == 1
