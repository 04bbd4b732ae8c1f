"""The recipes: their commands parse, and run on two machines that are network namespaces with names of their own."""

import csv
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import typer

from fastdiff.data.shapes import write_shapes

from .support import TINY

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/distributed.md"
RECIPES = ROOT / "docs/recipes"
ON_A_CPU = ["--device", "cpu", "--precision", "fp32", "--compile", "off"]
FLAGS = [*ON_A_CPU, *(part for name, value in TINY.items() for part in (f"--{name.replace('_', '-')}", str(value)))]

Machine = Callable[..., list[str]]


def commands() -> dict[str, list[str]]:
    """Every torchrun command of the page and the recipes, by the file and its number there."""
    texts = {path.name: path.read_text() for path in (PAGE, RECIPES / "slurm.sbatch")}
    texts["kubernetes.yaml"] = container()["command"][-1]
    found = {}
    for name, text in texts.items():
        for number, line in enumerate(re.findall("torchrun +--.* -m fastdiff .*", text.replace("\\\n", " "))):
            found[f"{name}-{number}"] = shlex.split(line)
    return found


def container() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="comes with the extra 'dev'")
    _, job = yaml.safe_load_all((RECIPES / "kubernetes.yaml").read_text())
    return job["spec"]["template"]["spec"]["containers"][0]


def test_every_command_is_one_that_torchrun_and_fastdiff_take() -> None:
    from torch.distributed.run import get_args_parser

    from fastdiff.cli.app import app

    found = commands()
    assert len(found) == 4
    for name, (_, *args) in found.items():
        literal = [arg for arg in args if arg != "$@"]
        literal = ["--nproc-per-node=8" if arg == "--nproc-per-node=$SLURM_GPUS_ON_NODE" else arg for arg in literal]
        parsed, rest = get_args_parser().parse_known_args(literal)
        assert (parsed.module, parsed.training_script, rest) == (True, "fastdiff", []), name
        command, *flags = parsed.training_script_args
        context = typer.main.get_command(app).commands[command].make_context(command, flags)  # type: ignore[attr-defined]
        assert context.params["resume"] or "--standalone" in literal, name


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_shapes(tmp_path / "data", 16, 8, seed=0)
    return tmp_path / "data"


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machine]:
    """Two machines and the cable between them: what to put before a command to run it on the first or the second.

    They share the disk, as machines of a cluster do; nothing of this machine's network is seen or changed.
    """
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("two machines are made of network namespaces, by root, with ip and unshare")
    spaces = [f"fastdiff-{os.getpid()}-{i}" for i in range(2)]
    with ExitStack() as stack:
        try:
            for space in spaces:
                ip("netns", "add", space)
                stack.callback(ip, "netns", "del", space)
            ip("link", "add", "eth0", "netns", spaces[0], "type", "veth", "peer", "name", "eth0", "netns", spaces[1])
            for i, space in enumerate(spaces):
                ip("-n", space, "addr", "add", f"10.213.7.{i + 1}/30", "dev", "eth0")
                ip("-n", space, "link", "set", "eth0", "up")
                ip("-n", space, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")

        def on(i: int, hostname: str = "node{}", domain: str = "") -> list[str]:
            names = [f"10.213.7.{k + 1} {hostname.format(k)}{domain} {hostname.format(k)}\n" for k in range(2)]
            hosts = tmp_path / "hosts"
            hosts.write_text("127.0.0.1 localhost\n" + "".join(names))
            enter = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
            inside = ["unshare", "--mount", "--uts", "sh", "-c", enter, "sh", str(hosts), hostname.format(i)]
            return ["ip", "netns", "exec", spaces[i], *inside]

        yield on


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True, timeout=20)


def environment(**more: str) -> dict[str, str]:
    """This process's, with its own Python first on the path, and without what another torchrun may have left in it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC", "RANK", "WORLD_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', os.defpath)}"
    return kept | {"PATH": path, "OMP_NUM_THREADS": "1"} | more


def finish(processes: list[subprocess.Popen[str]], seconds: float = 150) -> list[str]:
    """What the processes said; they and their children are gone afterwards."""
    try:
        end = time.monotonic() + seconds
        return [process.communicate(timeout=end - time.monotonic())[0] for process in processes]
    finally:
        for pid in [pid for process in processes for pid in descendants(process.pid)]:
            os.kill(pid, signal.SIGKILL)
        for process in processes:
            process.kill()
            process.communicate()


def start(command: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def descendants(pid: int) -> list[int]:
    """The running processes that a process has started, and those that these have started, and so on."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rsplit(") ", 1)[1].split()[:2]
        except OSError:
            continue  # it has just ended
        if state != "Z":
            parents.setdefault(int(parent), []).append(int(path.parent.name))
    found = list(parents.get(pid, []))
    return found + [deeper for child in found for deeper in descendants(child)]


def steps(run_dir: Path) -> list[int]:
    file = run_dir / "progress.csv"
    return [int(row["step"]) for row in csv.DictReader(file.read_text().splitlines())] if file.exists() else []


@pytest.fixture
def two_machines(data: Path, tmp_path: Path) -> list[str]:
    """The page's command for several machines, with one process on each."""
    text = shlex.join(commands()["distributed.md-1"])
    assert "--nnodes=2" in text
    text = text.replace("--nproc-per-node=8", "--nproc-per-node=1")
    text = text.replace("/data/photos", str(data)).replace("/shared/runs/photos", str(tmp_path / "run"))
    return [*shlex.split(text), *FLAGS, "--cache-dir", str(tmp_path / "cache")]


@pytest.mark.slow
def test_two_machines(machines: Machine, two_machines: list[str], tmp_path: Path) -> None:
    command = [*two_machines, "--steps", "4"]
    said = finish([start([*machines(i), *command], environment(GLOO_SOCKET_IFNAME="eth0")) for i in range(2)])
    assert steps(tmp_path / "run") == [1, 2, 3, 4], said
    assert "on: 2 processes" in said[0] + said[1]


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["process", "machine"])
def test_a_machine_that_comes_back_is_taken_in_again(
    machines: Machine, two_machines: list[str], tmp_path: Path, lost: str
) -> None:
    command = [*two_machines, "--steps", "100", "--save-interval", "10"]
    variable = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    assert f"export {variable}=1" in PAGE.read_text()
    env = environment(**{variable: "1"})
    running = [start([*machines(i), *command], env) for i in range(2)]
    try:
        while len(steps(tmp_path / "run")) < 25:
            assert running[0].poll() is None, running[0].communicate()[0]
            time.sleep(0.1)
        second = running[1]
        for pid in descendants(second.pid):
            os.kill(pid, signal.SIGKILL)
        if lost == "machine":
            second.kill()
            running.append(start([*machines(1), *command], env))
    finally:
        said = finish(running)
    assert running[0].returncode == running[-1].returncode == 0, said
    assert re.search("resumed at step [1-9]0\n", said[0] + said[-1]), said
    assert steps(tmp_path / "run") == list(range(1, 101))


@pytest.mark.slow
def test_kubernetes(machines: Machine, data: Path, tmp_path: Path) -> None:
    pod = container()
    variables = {item["name"]: item["value"] for item in pod["env"]}
    *shell, text = pod["command"]
    text = text.replace("--nproc-per-node=8", "--nproc-per-node=1").replace("/data", str(data))
    text = text.replace("/runs/photos", str(tmp_path / "run")).replace("/cache", str(tmp_path / "cache"))
    command = [*shell, f"{text} {shlex.join(FLAGS)} --steps 4"]
    pods = [(machines(i, "fastdiff-{}", ".fastdiff"), environment(JOB_COMPLETION_INDEX=str(i))) for i in range(2)]
    said = finish([start([*inside, *command], env | variables) for inside, env in pods])
    assert steps(tmp_path / "run") == [1, 2, 3, 4], said


@pytest.fixture
def slurm(machines: Machine, tmp_path: Path) -> dict[str, str]:
    """The environment of a batch job on two nodes, with srun and scontrol as far as the recipe needs them."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    nodes = "\n".join(f'{shlex.join(machines(i))} "$@" & pids="$pids $!"' for i in range(2))
    scripts = {
        # As with the real one its own options come first, and its status is the largest of the tasks'.
        "srun": f'while case "$1" in --*) true;; *) false;; esac; do shift; done\npids=\n{nodes}\n'
        'status=0\nfor pid in $pids; do wait "$pid" || status=$?; done\nexit $status\n',
        "scontrol": f'case "$1" in show) printf "node0\\nnode1\\n";; *) echo "$@" >>{tmp_path}/requeued;; esac\n',
    }
    for name, text in scripts.items():
        (bin_ / name).write_text(f"#!/bin/sh\n{text}")
        (bin_ / name).chmod(stat.S_IRWXU)
    env = environment(
        SLURM_JOB_ID="4711",
        SLURM_JOB_NODELIST="node[0-1]",
        SLURM_JOB_NUM_NODES="2",
        SLURM_GPUS_ON_NODE="1",
        SLURM_CPUS_PER_TASK="1",
        SLURM_JOB_END_TIME=str(int(time.time()) + 24 * 3600),
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    return env | {"PATH": f"{bin_}{os.pathsep}{env['PATH']}"}


@pytest.mark.slow
def test_slurm_ends_a_job_before_its_time_and_the_next_one_goes_on(
    slurm: dict[str, str], data: Path, tmp_path: Path
) -> None:
    last = 300
    paths = ["--data-dir", str(data), "--run-dir", str(tmp_path / "run")]
    job = ["bash", str(RECIPES / "slurm.sbatch"), *paths, *FLAGS, "--steps", str(last)]
    first = start(job, slurm | {"SLURM_JOB_END_TIME": str(int(time.time()) + 200)})
    try:
        while len(steps(tmp_path / "run")) < 3:
            assert first.poll() is None, first.communicate()[0]
            time.sleep(0.1)
        (srun,) = [pid for pid in descendants(first.pid) if b"srun" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        for pid in descendants(srun):  # Slurm tells every process of the step, not the shell
            os.kill(pid, signal.SIGTERM)
    finally:
        (said,) = finish([first])
    assert first.returncode != 0
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    reached = steps(tmp_path / "run")[-1]
    assert 3 <= reached < last
    assert list((tmp_path / "run").glob(f"model{reached:06d}*")), said

    second = start(job, slurm)
    (said,) = finish([second])
    assert second.returncode == 0, said
    assert f"resumed at step {reached}" in said
    assert steps(tmp_path / "run") == list(range(1, last + 1))
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"  # done is done


@pytest.mark.slow
def test_ray(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    code = f"""
import runpy
recipe = runpy.run_path({str(RECIPES / "ray_train.py")!r})
flags = {TINY!r} | {{"data_dir": {str(data)!r}, "device": "cpu", "precision": "fp32", "compile": "off", "steps": 4}}
recipe["fit"](flags, {str(tmp_path / "run")!r}, workers=2, use_gpu=False, ray_dir={str(tmp_path / "ray")!r})
"""
    env = environment(XDG_CACHE_HOME=str(tmp_path / "cache"))
    (said,) = finish([start([sys.executable, "-c", code], env)], 110)
    assert steps(tmp_path / "run") == [1, 2, 3, 4], said
