"""Vocabulary and data parallel: parallel_worker.py under torchrun and accelerate launch, and resuming."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parallel_worker import STOPPED, trained

from pyqe.heads import SigmoidHead

WORKER = Path(__file__).with_name("parallel_worker.py")
CHECKS = [
    node.name
    for node in ast.parse(WORKER.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=4"]
ACCELERATE = [
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes=2",
    "--num_machines=1",
    "--main_process_port=0",
]
CHECKPOINT = f"checkpoint-{STOPPED}"

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(300)]


def _launch(launcher: list[str], folder: Path) -> str:
    """Run the worker; what it said, for the tests of the checks that did not get to their end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", *launcher, str(WORKER), str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    return result.stdout[-2000:] + result.stderr[-6000:]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of one process, stopped at its checkpoint."""
    folder = tmp_path_factory.mktemp("one") / "from 1"
    trained(folder, 1, stop=True)
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("four")
    return folder, _launch(TORCHRUN, folder)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, four: tuple[Path, str], stopped: Path) -> tuple[Path, str]:
    """Two processes, which find checkpoints of one and of four."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(stopped, folder / "from 1")
    if (four[0] / "check_checkpoint" / "from 4").is_dir():
        shutil.copytree(four[0] / "check_checkpoint" / "from 4", folder / "from 4")
    return folder, _launch(ACCELERATE, folder)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("processes", ["four", "two"])
def test_processes(check: str, processes: str, request: pytest.FixtureRequest) -> None:
    folder, said = request.getfixturevalue(processes)
    assert (folder / check / "passed").exists(), said


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (4, 2), (2, 1)])
def test_resuming_on_another_number_of_processes(
    before: int, after: int, tmp_path: Path, stopped: Path, two: tuple[Path, str], whole: SigmoidHead
) -> None:
    """The loss over the vocabulary has no chance in it: the training is that of one process without a stop."""
    if after == 1:
        source = stopped if before == 1 else two[0] / "check_checkpoint" / "from 2"
        head = trained(tmp_path, 1, resume=source / CHECKPOINT).head
    else:
        head = SigmoidHead.from_pretrained(two[0] / "check_resuming" / f"from {before}")
    for (name, got), (_, expected) in zip(head.named_parameters(), whole.named_parameters(), strict=True):
        torch.testing.assert_close(got.detach(), expected.detach(), atol=1e-5, rtol=1e-4, msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> SigmoidHead:
    head: SigmoidHead = trained(tmp_path_factory.mktemp("whole"), 1).head
    return head


def test_a_step_of_another_size_is_no_resuming(tmp_path: Path, stopped: Path) -> None:
    with pytest.raises(ValueError, match="per_device_train_batch_size"):
        trained(tmp_path, 2, resume=stopped / CHECKPOINT)  # one process with the batch of two
