"""The second run under FSDP2 and DeepSpeed, by the files that users copy: two processes end where one ends.

accelerate leaves both to accelerators. Here it is told that two processes on the CPU, over gloo, are such.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_folders import TinyFolders

ROOT = Path(__file__).resolve().parents[2]
STEPS, KILLED_IN = 5, 4
FIT = ["--steps", STEPS, "--rise-steps", 1, "--learning-rate", 0.01, "--batch-size", 4, "--rank", 2, "--save-steps", 1]


def work() -> None:
    """Be one of the processes: the command, with a look at the model in every step."""
    from accelerate import state
    from accelerate.utils import DistributedType
    from transformers import TrainerCallback

    from lorazor.cli.app import main
    from lorazor.train.fit import AnswerTrainer

    torch.distributed.init_process_group("gloo")
    state.PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    state.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            kinds = {"DTensor" if type(one).__name__ == "DTensor" else "" for one in model.parameters()}
            kinds |= {"ZeRO" for one in model.parameters() if hasattr(one, "ds_id")}
            print("seen:", state.global_step, args.world_size, *sorted(kinds - {""}), flush=True)
            if state.global_step == int(os.environ.get("KILLED_IN", "0")):
                os._exit(3)

    start = AnswerTrainer.__init__

    def start_looking(self, *args, **kwargs):
        start(self, *args, **kwargs)
        self.add_callback(Look())

    AnswerTrainer.__init__ = start_looking
    main()


def run(*words: object, config: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in one process, or in two as a file in examples/ says."""
    launcher: list[object] = ["-m", "lorazor"]
    if config is not None:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "examples" / config]
        launcher += ["--main_process_port", 0, "-m", "tests.train.test_sharded"]
    paths = os.pathsep.join([f"{ROOT}/src", str(ROOT), os.environ.get("PYTHONPATH", "")])
    base = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths, "COLUMNS": "300"}
    command = [sys.executable, *map(str, (*launcher, *words))]
    environment = {**base, "DS_ACCELERATOR": "cpu", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def alone(tiny: TinyFolders, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[object], Path]:
    """The command of the second run without its --out, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    given = ["--model", tiny.base, "--data", tiny.validation, *FIT]
    choice = run("select", *given, "--keep", 6, "--select-steps", 3, "--out", folder / "choice")
    assert choice.returncode == 0, choice.stderr
    command = ["train", *given, "--selection", folder / "choice" / "selection.json"]
    result = run(*command, "--out", folder / "run")
    assert result.returncode == 0, result.stderr
    return command, folder / "run"


needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "kind"), [("fsdp2.yaml", "DTensor"), pytest.param("zero3.yaml", "ZeRO", marks=needs_deepspeed)]
)
def test_chosen_sites_are_trained_by_two_processes_as_by_one_and_after_a_break(alone, tmp_path, config, kind):
    command, expected = alone
    killed = run(*command, "--out", tmp_path / "run", config=config, KILLED_IN=str(KILLED_IN))
    assert killed.returncode != 0 and f"seen: {KILLED_IN} 2 {kind}" in killed.stdout, killed.stderr
    result = run(*command, "--out", tmp_path / "run", "--resume", config=config)
    assert result.returncode == 0, result.stderr
    assert f"seen: {STEPS} 2 {kind}" in result.stdout and "seen: 1 " not in result.stdout
    weights, wanted = (load_file(one / "adapter_model.safetensors") for one in (tmp_path / "run", expected))
    assert weights.keys() == wanted.keys() and len(wanted) == 12
    for name, tensor in wanted.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=0)
    documents = [json.loads((one / "run.json").read_text())["result"] for one in (tmp_path / "run", expected)]
    assert documents[0]["n_parameters"] == documents[1]["n_parameters"]
    assert documents[0]["loss"] == pytest.approx(documents[1]["loss"], abs=1e-4)


@pytest.mark.slow
def test_sites_are_not_chosen_there(tiny, tmp_path):
    given = ["--model", tiny.base, "--data", tiny.validation, *FIT]
    result = run("select", *given, "--keep", 6, "--select-steps", 3, "--out", tmp_path / "run", config="fsdp2.yaml")
    assert result.returncode != 0
    assert (
        "Under FSDP, gates are not supported. Choose the sites with 'lorazor select', in one process" in result.stderr
    )


if __name__ == "__main__":
    work()
