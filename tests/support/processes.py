"""Two processes that find each other as torchrun's do, forked from one that has imported the trainer."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any


def _work(rank: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
    work(*arguments)


def run_two(work: Callable[..., None], *arguments: Any, until_first: bool = False) -> list[int | None]:
    """`work(*arguments)` in each; gives their exit codes. `until_first`: when the first ends, kill the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["onebase_training.training_run"])
    processes: list[BaseProcess] = [
        context.Process(target=_work, args=(rank, port, work, arguments)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        processes[0].join(300)
        if not until_first:
            processes[1].join(120)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]
