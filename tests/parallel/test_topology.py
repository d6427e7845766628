"""Who is who among the ranks, and what is read of a DeepSpeed configuration, before torch is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tlgc_mp import UsageError
from tlgc_mp.engine.config import read_config, tensor_parallel_size, zero_stage
from tlgc_mp.parallel.topology import Launch, Topology, across_hosts, default_tensor_parallel


def test_consecutive_ranks_share_a_replica() -> None:
    places = [Topology(6, rank, 3) for rank in range(6)]
    assert [place.tp_rank for place in places] == [0, 1, 2, 0, 1, 2]
    assert [place.dp_rank for place in places] == [0, 0, 0, 1, 1, 1]
    assert {place.data_parallel for place in places} == {2}


@pytest.mark.parametrize("ranks", [0, -1, 4, 5, 12])
def test_world_that_is_not_p_times_d_is_refused(ranks: int) -> None:
    with pytest.raises(
        UsageError, match=f"must be a divisor of the 6 ranks started .*got {ranks}; use one of 1, 2, 3, 6"
    ):
        Topology(6, 0, ranks)


@pytest.mark.parametrize(
    ("world", "groups", "ranks"), [(1, 4, 1), (2, 4, 2), (4, 4, 4), (8, 4, 4), (6, 4, 2), (3, 4, 1), (4, 1, 1)]
)
def test_default_split_is_the_largest_that_shares_groups_and_ranks_evenly(world: int, groups: int, ranks: int) -> None:
    assert default_tensor_parallel(world, world, "gc-2l", groups) == ranks


def test_learned_groups_are_not_split_by_default() -> None:
    assert default_tensor_parallel(4, 4, "flgc", 4) == 1


@pytest.mark.parametrize(("world", "local", "ranks"), [(4, 2, 2), (2, 1, 1), (8, 4, 4), (7, 4, 1), (6, 4, 2)])
def test_default_split_fits_in_a_host(world: int, local: int, ranks: int) -> None:
    assert default_tensor_parallel(world, local, "gc-2l", 4) == ranks


@pytest.mark.parametrize(
    ("hosts", "ranks", "said"),
    [
        ("aaaa", 2, ""),
        ("aabb", 2, ", on 2 hosts, each replica on one of them"),
        ("abab", 1, ", on 2 hosts, replicas only"),
        (
            "abab",
            2,
            "2 replica(s) lie on several, and every layer's exchange crosses the network: start ",
        ),
        (
            "aabb",
            4,
            "1 replica(s) lie on several, and every layer's exchange crosses the network: --tp 2",
        ),
    ],
)
def test_where_replicas_lie_is_said(hosts: str, ranks: int, said: str) -> None:
    told = across_hosts(Topology(4, 0, ranks), list(hosts))
    assert said in told and bool(said) == bool(told)


# What srun tells a task of a step, without PMI.
STEP = {
    **{"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "5"},
    **{"SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "3", "SLURM_NODEID": "2"},
    **{"SLURM_STEP_NODELIST": "gpu[07-08,12]", "SLURM_STEP_TASKS_PER_NODE": "2(x2),3"},
}


@pytest.mark.parametrize(
    ("environ", "launch"),
    [
        ({}, Launch(1, 0, 0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Launch(4, 3, 1, 2)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, Launch(4, 3, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Launch(2, 1, 1, 2)),
        (
            {
                "OMPI_COMM_WORLD_RANK": "5",
                "OMPI_COMM_WORLD_SIZE": "8",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
            },
            Launch(8, 5, 1, 4),
        ),
        ({"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}, Launch(3, 2, 0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "2", "PMI_RANK": "1", "PMI_SIZE": "3"}, Launch(2, 0, 0, 2)),
        ({"WORLD_SIZE": "4"}, Launch(1, 0, 0, 1)),
        (STEP, Launch(7, 5, 1, 3, ("gpu07", 20008))),
        (
            {**STEP, "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "rack[2-3]gpu[4-5]"},
            Launch(7, 5, 1, 2, ("rack2gpu4", 20008)),
        ),
        (
            {**STEP, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "7"},
            Launch(7, 5, 1, 7, ("127.0.0.1", 20008)),
        ),
        ({**STEP, "RANK": "0", "WORLD_SIZE": "2"}, Launch(2, 0, 0, 2)),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, Launch(1, 0, 0, 1)),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Launch(1, 0, 0, 1)),
    ],
    ids=[
        *("plain", "torchrun", "deepspeed", "no local rank", "open mpi", "pmi", "torchrun under mpi", "half a launch"),
        *(
            "srun",
            "srun on a rack",
            "srun on one node",
            "torchrun under srun",
            "shell of a batch job",
            "srun of one task",
        ),
    ],
)
def test_launcher_is_recognized(environ: dict[str, str], launch: Launch) -> None:
    assert Launch.detect(environ) == launch


def test_srun_that_does_not_name_its_nodes_is_refused() -> None:
    with pytest.raises(
        UsageError, match="SLURM_STEP_NODELIST must name the nodes where SLURM_STEP_NUM_NODES is 3, got none"
    ):
        Launch.detect({key: value for key, value in STEP.items() if key != "SLURM_STEP_NODELIST"})


def test_launch_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert Launch.detect() == Launch(2, 1, 0, 1)


def test_configuration_is_copied() -> None:
    given = {"tensor_parallel": {"autotp_size": 2}}
    settings = read_config(given)
    settings["tensor_parallel"]["autotp_size"] = 3
    assert given == {"tensor_parallel": {"autotp_size": 2}}


def test_configuration_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"train_batch_size": 8, # of all replicas\n "zero_optimization": {"stage": 1}}')
    expected = {"train_batch_size": 8, "zero_optimization": {"stage": 1}}
    assert read_config(path) == read_config(str(path)) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "deepspeed_config must be a JSON file, got"),
        (b"\xff\xfe\x00", "deepspeed_config must be a JSON file, got"),
        (b"[1]", "deepspeed_config must hold a JSON object, got none in"),
        (b'{"a": 1, "a": 2}', "deepspeed_config must have each key once, got 'a' twice; keep one"),
        (b'{"b": {"a": 1, "a": 2}}', "deepspeed_config must have each key once, got 'a' twice; keep one"),
    ],
)
def test_broken_configuration_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as refusal:
        read_config(path)
    assert "\n" not in str(refusal.value)


def test_missing_configuration_is_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(UsageError, match=f"deepspeed_config must be a JSON file, got '{path}'"):
            read_config(path)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({}, None),
        ({"tensor_parallel": {}}, None),
        ({"tensor_parallel": {"autotp_size": 0}}, None),
        ({"tensor_parallel": {"autotp_size": 1}}, 1),
        ({"tensor_parallel": {"autotp_size": 4}}, 4),
    ],
)
def test_tensor_parallel_size(settings: dict[str, Any], size: int | None) -> None:
    assert tensor_parallel_size(settings) == size


@pytest.mark.parametrize("section", [2, "two", [2], True])
def test_tensor_parallel_section_that_is_no_object_is_refused(section: Any) -> None:
    with pytest.raises(
        UsageError, match=r'tensor_parallel in the DeepSpeed configuration must be \{"autotp_size": P\}, got'
    ) as refusal:
        tensor_parallel_size({"tensor_parallel": section})
    assert str(refusal.value).endswith(f", got {json.dumps(section)}")


@pytest.mark.parametrize("size", [-1, 2.0, "2", True, None, [2]])
def test_tensor_parallel_size_that_is_no_count_is_refused(size: Any) -> None:
    with pytest.raises(
        UsageError, match=r"tensor_parallel\.autotp_size in the DeepSpeed configuration must be 1 or more, got"
    ) as refusal:
        tensor_parallel_size({"tensor_parallel": {"autotp_size": size}})
    assert str(refusal.value).endswith(f", got {json.dumps(size)}")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_stage(stage: int) -> None:
    assert zero_stage({"zero_optimization": {"stage": stage}}) == stage


def test_zero_stage_is_0_where_nothing_says() -> None:
    assert zero_stage({}) == zero_stage({"zero_optimization": {}}) == 0


@pytest.mark.parametrize("stage", [-1, 4, 1.0, "1", True, None])
def test_zero_stage_that_is_none_is_refused(stage: Any) -> None:
    with pytest.raises(
        UsageError, match=r"zero_optimization\.stage in the DeepSpeed configuration must be 0, 1, 2 or 3, got"
    ) as refusal:
        zero_stage({"zero_optimization": {"stage": stage}})
    assert str(refusal.value).endswith(f", got {json.dumps(stage)}")
