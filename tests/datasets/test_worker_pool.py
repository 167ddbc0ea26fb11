"""Workers that answer in order and stay between iterations; batches copied to the device ahead of their use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image

from prune_lab.datasets import prefetch, stream, worker_pool
from prune_lab.datasets.worker_pool import WorkerPool, num_usable_cores
from tests.helpers.data import FORMAT, REPO, assert_equal_batches, evaluate, make, train, write_tree


class Answer:
    """A request's square, and the process that computed it after `delay` seconds."""

    def __init__(self, delay: float = 0) -> None:
        self.delay = delay

    def __call__(self, request: int) -> tuple[int, int]:
        time.sleep(self.delay)
        return request * request, os.getpid()


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(worker_pool, "num_usable_cores", lambda: 2)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_answers_come_in_the_order_of_the_requests(workers):
    with closing(WorkerPool(Answer(), workers=workers)) as pool:
        for count in (7, 0, 2):
            assert [square for square, _ in pool.map(range(count))] == [i * i for i in range(count)]


def test_workers_stay_until_the_pool_is_closed():
    pool = WorkerPool(Answer(), workers=2)
    first = {process for _, process in pool.map(range(6))}
    assert len(first) == 2 and os.getpid() not in first
    assert {process for _, process in pool.map(range(6))} == first
    pool.close()
    assert not any(map(is_running, first))
    assert {process for _, process in pool.map(range(6))}.isdisjoint(first)
    pool.close()


def test_an_iteration_that_is_given_up_leaves_nothing_for_the_next():
    with closing(WorkerPool(Answer(), workers=2)) as pool:
        for square, _ in pool.map(range(10, 30)):
            assert square == 100
            break
        assert [square for square, _ in pool.map(range(5))] == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iteration_inside_another_has_workers_of_its_own(workers):
    with closing(WorkerPool(Answer(), workers=workers)) as pool:
        outer = pool.map(range(5))
        seen = [next(outer)]
        assert [square for square, _ in pool.map([7, 8])] == [49, 64]
        seen += outer
        assert [square for square, _ in seen] == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_job_is_left_to_the_training(number):
    with closing(WorkerPool(Answer(0.02), workers=2)) as pool:
        squares = []
        for square, process in pool.map(range(12)):
            squares.append(square)
            os.kill(process, number)
        assert squares == [i * i for i in range(12)]
    assert not is_running(process)


@pytest.mark.slow  # torch looks for lost workers every five seconds
def test_a_worker_that_was_meant_itself_ends_after_a_while(monkeypatch):
    monkeypatch.setattr(worker_pool, "_GRACE_S", 1)
    with closing(WorkerPool(Answer(), workers=1)) as pool:
        ((_, process),) = pool.map([0])
        os.kill(process, signal.SIGTERM)
        with pytest.raises(RuntimeError, match="exited unexpectedly|killed by signal"):
            time.sleep(1.5)
            list(pool.map(range(100)))


@pytest.mark.parametrize("last", ["pass", "raise SystemExit(0)"])
def test_a_program_that_closes_no_pool_ends_at_once(last):
    code = (
        "import time\nfrom prune_lab.datasets.worker_pool import WorkerPool\npool = WorkerPool(float, workers=2)\n"
        f"list(pool.map(range(3)))\nheld = pool.map(range(99))\nnext(held)\nprint(time.time())\n{last}"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.time() - float(done.stdout) < 15  # workers that must be killed take 20


def test_no_more_workers_than_cores_and_ranks_share_them(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6), raising=False)
    assert num_usable_cores() == 6
    for ranks, cores in (("2", 3), ("4", 1), ("8", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert num_usable_cores() == cores
    with closing(WorkerPool(Answer(0.05), workers=8)) as pool:
        assert len({process for _, process in pool.map(range(4))}) == 1


def test_requests_move_no_random_numbers_of_the_training():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with closing(WorkerPool(Answer(), workers=1)) as pool:
        list(pool.map(range(3)))
    assert torch.equal(torch.rand(3), expected)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    counts = {"train": {"a": 9, "b": 8}, "val": {"a": 5, "b": 4}}
    root = write_tree(tmp_path_factory.mktemp("folder") / "images", counts)
    random = np.random.default_rng(0)
    for path in root.rglob("*.png"):
        Image.fromarray(random.integers(0, 256, (*random.integers(20, 60, 2), 3), dtype=np.uint8)).save(path)
    return {"root": str(root), "image_size": 24}


def test_a_run_of_epochs_with_the_same_workers_gives_the_batches_of_none(images):
    plain = make("imagefolder", FORMAT, **images, workers=0)
    with closing(make("imagefolder", FORMAT, **images, workers=2)) as dataset:
        for epoch in range(3):
            first, second = (train(data, batch_size=4, epoch=epoch, start=epoch) for data in (dataset, plain))
            assert_equal_batches(first, second)
            assert_equal_batches(evaluate(dataset, batch_size=4), evaluate(plain, batch_size=4))
        subset = [torch.tensor([3, 1]), torch.tensor([0])]
        for seed in (None, 5):
            first, second = (list(data.train_subset(subset, augment_seed=seed)) for data in (dataset, plain))
            assert_equal_batches(first, second)


@pytest.mark.parametrize("workers", [0, 2])
def test_pieces_of_a_batch_are_joined_in_order(images, workers, monkeypatch):
    with closing(make("imagefolder", FORMAT, **images, workers=0)) as whole:
        expected = train(whole, batch_size=8), evaluate(whole, batch_size=7)
    monkeypatch.setattr(stream, "PIECE", 3)
    with closing(make("imagefolder", FORMAT, **images, workers=workers)) as dataset:
        assert_equal_batches(train(dataset, batch_size=8), expected[0])
        assert_equal_batches(evaluate(dataset, batch_size=7), expected[1])


def test_on_a_cpu_nothing_is_fetched_ahead():
    fetched = []

    def batches():
        for i in range(3):
            fetched.append(i)
            yield torch.full((2,), i), torch.tensor([i])

    for i, (pixels, labels) in enumerate(prefetch.on_device(batches(), torch.device("cpu"))):
        assert fetched == list(range(i + 1))
        assert pixels.tolist() == [i, i] and labels.tolist() == [i]


@pytest.mark.gpu
def test_on_a_gpu_one_batch_is_copied_ahead_and_arrives_whole():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    fetched, device = [], torch.device("cuda", 0)

    def batches():
        for i in range(20):
            fetched.append(i)
            yield torch.full((64, 1000, 1000), i, dtype=torch.uint8).pin_memory(), torch.tensor([i]).pin_memory()

    sums = []
    for i, (pixels, labels) in enumerate(prefetch.on_device(batches(), device)):
        assert len(fetched) == min(i + 2, 20) and pixels.device == labels.device == device
        sums.append((pixels.sum(dtype=torch.int64), labels))
    assert [(int(total), int(label)) for total, label in sums] == [(64_000_000 * i, i) for i in range(20)]
