"""accelerate's launcher, really started: the shipped configurations, the SLURM script, and what may go wrong."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.ranks import compare, free_port
from tests.training.jobs import tiny_recipe
from tests.training.processes import wait_until
from tune.run import train

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "recipes" / "launch"
DEVICES = {"ddp-2": 2, "ddp-8": 8, "fsdp2-8": 8, "two-nodes": 16}


@pytest.mark.parametrize("name", sorted(path.stem for path in LAUNCH.iterdir()))
def test_a_shipped_configuration_is_what_accelerate_reads(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    path = LAUNCH / f"{name}.yaml"
    read, written = load_config_from_file(str(path)).to_dict(), yaml.safe_load(path.read_text())
    assert {key: read[key] for key in written} == written, "a key that accelerate does not keep is no key of its own"
    parsed = launch_command_parser().parse_args(["--config_file", str(path), "-m", "tune", "train", "recipe.yaml"])
    arguments, *_ = _validate_launch_command(parsed)
    assert arguments.num_processes == DEVICES[name]
    assert (arguments.use_fsdp, arguments.multi_gpu) == ((True, False) if name == "fsdp2-8" else (False, True))
    assert arguments.mixed_precision == "no"
    assert arguments.num_machines == (2 if name == "two-nodes" else 1)
    if name == "fsdp2-8":
        assert int(arguments.fsdp_version) == 2


STAND_INS = {
    "scontrol": '[ "$1" = show ] && printf "one\\ntwo\\n" || echo "scontrol $*" >> "$TOLD"',
    "scancel": 'echo "scancel $*" >> "$TOLD"; kill -TERM "$(cat "$TOLD.step")"',
    # On the second machine, as SLURM would set it.
    "srun": 'shift; SLURM_NODEID=1 exec "$@"',
    "accelerate": 'echo "accelerate $*" >> "$TOLD"; echo $$ > "$TOLD.step"; trap "sleep 0.3; exit 143" TERM; '
    'if [ -n "$LASTS" ]; then while :; do sleep 0.05; done; fi',
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """What a job sees, with short stand-ins for SLURM's commands and for accelerate."""
    for name, body in STAND_INS.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    return {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "TOLD": str(tmp_path / "told"),
        "SLURM_JOB_ID": "10077",
        "SLURM_JOB_NODELIST": "[one-two]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }


COMMAND = ["bash", str(ROOT / "scripts/slurm.sbatch"), "recipe.yaml", "train.seed=1"]
LINE = (
    "accelerate launch --machine_rank 1 --multi_gpu --num_machines 2 --num_processes 8 --main_process_ip one "
    "--main_process_port 20077 --rdzv_backend static --mixed_precision no --dynamo_backend no "
    "-m tune train recipe.yaml train.seed=1 --resume"
)


def test_the_slurm_script_launches_on_every_machine(slurm: dict[str, str], tmp_path: Path) -> None:
    from accelerate.commands.launch import launch_command_parser

    done = subprocess.run(COMMAND, env={**slurm, "LASTS": ""}, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "told").read_text().splitlines() == [LINE]
    arguments = launch_command_parser().parse_args(LINE.split()[2:])
    assert arguments.training_script_args == ["train", "recipe.yaml", "train.seed=1", "--resume"]
    assert (arguments.num_processes, arguments.machine_rank, arguments.module) == (8, 1, True)


def test_the_slurm_script_stops_and_queues_itself_again(slurm: dict[str, str], tmp_path: Path) -> None:
    job = subprocess.Popen(COMMAND, env={**slurm, "LASTS": "yes"}, stderr=subprocess.PIPE)
    wait_until((tmp_path / "told.step").exists)
    job.send_signal(signal.SIGUSR1)
    _, said = job.communicate(timeout=30)
    assert job.returncode == 0, said
    told = (tmp_path / "told").read_text().splitlines()
    assert told == [LINE, "scancel --signal=TERM 10077", "scontrol requeue 10077"]


def line(*options: str, module: Sequence[str] = ("-m", "tune")) -> list[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*launcher, *options, *module]


def on_cpu(**more: str) -> dict[str, str]:
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), **more}


def two(*options: str) -> list[str]:
    return line("--num_processes", "2", "--num_machines", "1", "--main_process_port", str(free_port()), *options)


def run(command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=on_cpu(**more), capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_shipped_configuration_splits_the_base(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"adapter__targets": ["attention", "experts"]}
    train(tiny_recipe(tmp_path, "mixtral", output=tmp_path / "one", **changes))
    tiny_recipe(tmp_path, "mixtral", output=tmp_path / "two", **changes)
    done = run([*two("--config_file", str(LAUNCH / "fsdp2-8.yaml")), "train", str(tmp_path / "recipe.yaml")])
    assert done.returncode == 0, done.stderr
    assert "devices 2 fsdp2" in done.stdout
    (local,) = [line for line in done.stdout.splitlines() if line.startswith("local ")]
    assert re.fullmatch(r"local 2 x [\d.]+ kB", local), "each layer lies in equal parts"
    compare(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_sigterm_to_the_launcher_ends_in_a_checkpoint_and_the_run_goes_on(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"train__max_steps": 150, "train__save_every": 1000}
    tiny_recipe(tmp_path, output=tmp_path / "two", **changes)
    command = [*two("--use_fsdp", "--fsdp_version", "2"), "train", str(tmp_path / "recipe.yaml")]
    job = subprocess.Popen(command, env=on_cpu(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "two/metrics.jsonl"
    wait_until(lambda: metrics.is_file() and metrics.read_text().count("\n") > 2, 200)
    job.send_signal(signal.SIGTERM)
    said, _ = job.communicate(timeout=120)
    assert said.count("stopped by SIGTERM after step") == 1, said
    (stopped,) = (int(path.name.removeprefix("step-")) for path in (tmp_path / "two/checkpoints").iterdir())
    assert 2 < stopped < 150
    again = run([*command, "--resume"])
    assert again.returncode == 0, again.stderr
    assert f"resume from step {stopped}" in again.stdout


@pytest.mark.slow
def test_a_killed_process_ends_the_launch_within_a_minute(tmp_path: Path) -> None:
    tiny_recipe(tmp_path, train__max_steps=5000, train__save_every=1000)
    command = [*two("--multi_gpu"), "train", str(tmp_path / "recipe.yaml")]
    job = subprocess.Popen(command, env=on_cpu(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "run/metrics.jsonl"
    wait_until(lambda: metrics.is_file() and metrics.read_text().count("\n") > 2, 200)
    children = [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
    ranks = {_rank(pid): pid for pid in children}
    started = time.monotonic()
    os.kill(ranks["1"], signal.SIGKILL)
    said, _ = job.communicate(timeout=60)
    assert time.monotonic() - started < 60
    assert job.returncode != 0
    assert said.count("process 1 of 2 is gone") == 1, said
    assert "--resume" in said


def _rank(process: int) -> str:
    entries = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return next((entry[5:].decode() for entry in entries if entry.startswith(b"RANK=")), "")


@pytest.mark.slow
def test_a_process_that_fails_to_import_ends_the_launch(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/sitecustomize.py").write_text(
        "import os, sys\nif os.environ.get('RANK') == '1': sys.modules['peft'] = None\n"
    )
    tiny_recipe(tmp_path)
    command = [*two("--multi_gpu"), "train", str(tmp_path / "recipe.yaml")]
    started = time.monotonic()
    done = run(command, PYTHONPATH=f"{tmp_path / 'broken'}:{ROOT}")
    assert time.monotonic() - started < 100
    assert done.returncode != 0
    assert "import of peft halted" in done.stderr or "No module named 'peft'" in done.stderr, done.stderr
    assert not (tmp_path / "run/adapter").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "environment", "code", "words"),
    [
        (["--cpu"], {}, 0, "devices 1\n"),
        (["--cpu"], {"WORLD_SIZE": "4"}, 1, "the environment says WORLD_SIZE=4, accelerate counts 1 processes"),
        (["--multi_gpu"], {"WORLD_SIZE": "4"}, 0, "devices 2 ddp\n"),
    ],
    ids=["a single process", "which takes itself for one of four", "two that the launcher tells what they are"],
)
def test_two_processes_on_cpus_asked_for_in_several_ways(
    options: list[str], environment: dict[str, str], code: int, words: str, tmp_path: Path
) -> None:
    tiny_recipe(tmp_path, train__max_steps=1)
    done = run([*two(*options), "train", str(tmp_path / "recipe.yaml")], **environment)
    assert bool(done.returncode) == bool(code), done.stderr
    assert (done.stdout + done.stderr).count(words) == 1, done.stderr
    assert (tmp_path / "run" / "adapter").exists() == (code == 0)


@pytest.fixture
def machines() -> Iterator[list[tuple[str, str]]]:
    """Two network namespaces joined by a cable: their names and addresses."""
    program = shutil.which("ip")
    if program is None:
        pytest.skip("no `ip` (iproute2), so no second machine can be made")
    names = [f"tune{os.getpid()}{end}" for end in "ab"]

    def ip(*words: str) -> None:
        subprocess.run([program, *words], check=True, capture_output=True, text=True, timeout=20)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        for name in names:
            subprocess.run([program, "netns", "delete", name], capture_output=True, check=False)
        pytest.skip(f"no network namespace can be made here ({error.stderr.strip()})")
    yield [(name, f"10.77.0.{number}") for number, name in enumerate(names, start=1)]
    for name in names:
        ip("netns", "delete", name)


@pytest.mark.slow
@pytest.mark.parametrize("split", [True, False], ids=["fsdp2", "ddp"])
def test_two_machines_train_the_adapter_of_one(split: bool, machines: list[tuple[str, str]], tmp_path: Path) -> None:
    train(tiny_recipe(tmp_path, output=tmp_path / "one"))
    tiny_recipe(tmp_path, output=tmp_path / "two")
    kind = ["--use_fsdp", "--fsdp_version", "2"] if split else []
    jobs = []
    for rank, (name, _) in enumerate(machines):
        command = [
            *("ip", "netns", "exec", name),
            *line("--config_file", str(LAUNCH / "two-nodes.yaml"), "--num_processes", "2", *kind),
        ]
        at = command.index("-m", command.index("--config_file"))
        command[at:at] = ["--machine_rank", str(rank), "--main_process_ip", machines[0][1]]
        command += ["train", str(tmp_path / "recipe.yaml")]
        # gloo would take the address of the host's name, which is another machine's as far as these can see.
        environment = on_cpu(GLOO_SOCKET_IFNAME=name)
        jobs.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    said = [job.communicate(timeout=300)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert f"devices 2 {'fsdp2' if split else 'ddp'}" in said[0]
    assert "devices" not in said[1]
    compare(tmp_path / "one", tmp_path / "two")
