"""Every launch that the released models make, compiled for GPUs that are not at hand."""

import ast
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import triton
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from . import __main__ as command
from . import table as module
from .occupancy import resident
from .program import TARGETS, Program
from .sources import calls, launched, launched_directly
from .table import TESTS, Figures, Key, operation_of, read, write

ROOT = Path(__file__).parents[2]


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Without the interpreter, which the other tests use where there is no GPU: it would leave nothing to compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "tests.programs", *arguments)


def assert_all_compiled(result: subprocess.CompletedProcess[str], at_least: int) -> None:
    *rows, summary = result.stdout.splitlines()[1:]
    faults = [row for row in rows if row.rstrip().endswith(tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))]
    assert result.returncode == 0, f"{result.stderr}\n" + "\n".join(faults) + summary
    assert len(rows) >= at_least
    for kernel in KERNELS:
        assert any(row.startswith(kernel + " ") for row in rows), kernel
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert sum(f" {target} " in row for row in rows) > at_least / 8


KERNELS = launched()


def test_no_kernel_runs_unregistered() -> None:
    """Every launch goes through launch(), which the table is made from."""
    assert {"group_norm_silu_forward", "attention_forward", "diffusion_step", "philox_draw"} < KERNELS
    assert not launched_directly()


def test_the_table_is_of_the_programs_in_use() -> None:
    """All of them are in it, and what is compiled anew, other programs every day, has the figures that it says."""
    result = run("--check")
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout.splitlines()[-1].split()[0]) >= command.SHARE


def test_every_kernel_and_target_is_in_the_table_and_none_spills() -> None:
    table = read()
    assert {figures.kernel.split()[0] for figures in table.values()} == KERNELS
    assert {key.target for key in table} == set(TARGETS)
    assert len(table) > 1000
    for key, figures in table.items():
        assert figures.spills <= command.may_spill(figures.kernel), figures
        warps = int(figures.kernel.split()[1].removesuffix("w"))
        assert figures.resident == resident(key.target, figures.registers, figures.shared, warps) > 0, figures


def test_every_kernel_names_the_tests_that_hold_it() -> None:
    assert {operation_of(kernel) for kernel in KERNELS} == set(TESTS)
    for operation, paths in TESTS.items():
        assert paths
        for path in paths:
            names = {ast.unparse(call.func) for call in calls(ROOT / path)}
            assert any(name.startswith(operation) for name in names), (operation, path)


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "programs"),
    [
        ("sm_80", 128, 0, 8, 2),  # 16 warps of 4096 registers each
        ("sm_90", 129, 0, 4, 3),  # 136 registers: three warps on each quarter
        ("sm_90", 255, 0, 8, 1),
        ("sm_80", 32, 81 * 1024, 4, 2),
        ("sm_80", 32, 82 * 1024, 4, 1),  # with what is reserved for a program, two need 166 KiB
        ("sm_100", 32, 227 * 1024, 4, 1),
        ("sm_100", 32, 0, 4, 16),
        ("sm_100", 16, 0, 1, 32),
        ("sm_100", 255, 0, 16, 0),  # does not run
        ("gfx942", 64, 0, 4, 8),
        ("gfx942", 129, 0, 4, 3),
        ("gfx942", 512, 0, 4, 1),
        ("gfx942", 16, 20 * 1024, 4, 3),
        ("gfx942", 16, 0, 1, 16),
    ],
)
def test_how_many_programs_run_at_once(target: str, registers: int, shared: int, warps: int, programs: int) -> None:
    assert resident(target, registers, shared, warps) == programs


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_every_dtype_and_layout_compiles() -> None:
    assert_all_compiled(run("--thorough"), 5000)


@pytest.mark.parametrize(
    ("words", "said"),
    [(["sm_12"], "no target sm_12: sm_80, sm_90, sm_100, gfx942"), (["sm_90", "--check"], "give --check or --update")],
)
def test_bad_arguments(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["programs", *words])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


# What --check finds, with compilers that are not there


SOURCE = SimpleNamespace(name="a")
PROGRAMS = {Key(f"{i:x}", "sm_80", triton.__version__): Program(SOURCE, 4, 1, f"w{i}") for i in range(9)}
FEWER = dict(list(PROGRAMS.items())[:8])
BUILT = Figures("a 4w", "w", 32, 0, 1024, 16, 4, 4, 2, 2, "")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A table of the nine programs, one of which is compiled to what the test says."""
    path = tmp_path / "programs.csv"
    monkeypatch.setattr(module, "TABLE", path)
    write(dict.fromkeys(PROGRAMS, BUILT))
    monkeypatch.setattr(command, "faults", lambda *_: [])
    monkeypatch.setattr(command, "launched", lambda: {"a"})
    monkeypatch.setattr(command, "compile_all", lambda programs: dict.fromkeys(programs, BUILT).items())
    return path


def test_a_table_that_is_right(table: Path) -> None:
    assert read()
    assert command.check(PROGRAMS)


def test_a_figure_that_changed(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worse = BUILT._replace(registers=64)
    monkeypatch.setattr(command, "compile_all", lambda programs: dict.fromkeys(programs, worse).items())
    assert not command.check(PROGRAMS)
    assert "REGISTERS 64, NOT 32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("of_the_table", "said"),
    [(slice(8), "programs.csv lacks a 4w w8 sm_80\nprograms.csv lacks 1 programs and has 0"), (slice(9), "")],
)
def test_a_program_that_nobody_has_registered(
    of_the_table: slice, said: str, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(dict(list(read().items())[of_the_table]))
    assert command.check(PROGRAMS) == (not said)
    assert said in capsys.readouterr().out
    assert command.update(PROGRAMS)
    assert command.check(PROGRAMS)


def test_a_program_that_is_no_longer_in_use(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not command.check(FEWER)
    out = capsys.readouterr().out
    assert "programs.csv has a 4w w sm_80, which is not in use" in out
    assert "has 1 that are not in use" in out
    assert command.update(FEWER)
    assert len(read()) == 8


def test_what_is_wrong_is_not_written(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table.unlink()
    monkeypatch.setattr(command, "faults", lambda *_: ["spills 8 bytes"])
    assert not command.update(PROGRAMS)
    assert not table.exists()


@pytest.mark.parametrize("launch", ["launch(module.new, (1,), device, x=x)", "new[(1,)](x)"])
def test_a_kernel_of_which_the_table_has_no_program(
    launch: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "kernel.py").write_text(f"launch(a, (1,), device, x=x)\n{launch}\n")
    for search in (launched, launched_directly):
        monkeypatch.setattr(command, search.__name__, partial(search, tmp_path / "kernels"))
    assert not command.check(PROGRAMS)
    assert "new is launched, but programs.csv has no program of it" in capsys.readouterr().out
    monkeypatch.setattr(command, "programs_in_use", lambda *_: PROGRAMS)
    monkeypatch.setattr(sys, "argv", ["programs", "--check"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1


PLANTED = """
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.compiler import ASTSource

from tests.programs import __main__ as command
from tests.programs import table
from tests.programs.program import Program


@triton.jit
def philox_planted(x, BLOCK: tl.constexpr):
    "Holds BLOCK values in the registers of a warp until their sum is known."
    i = tl.arange(0, BLOCK)
    values = tl.load(x + i)
    tl.store(x + i, values - tl.sum(values, 0))


path, block, fewer = Path(sys.argv[1]), *map(int, sys.argv[2:])
source = ASTSource(philox_planted, {"x": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": block})
program = Program(source, 1, 1, "planted")
key = table.Key(program.fingerprint, "sm_90", triton.__version__)
built = program.compile_for("sm_90")
table.TABLE, command.launched = path, lambda: {"philox_planted"}
table.write({key: built._replace(registers=built.registers - fewer)})
sys.exit(not command.check({key: program}))
"""


@pytest.mark.parametrize(
    ("block", "fewer", "said"),
    [
        (1024, 2, r"REGISTERS (\d+), NOT (\d+)$"),
        pytest.param(1024, 0, "", marks=pytest.mark.slow),
        pytest.param(16384, 0, r"SPILLS (\d+) BYTES$", marks=pytest.mark.slow),
    ],
    ids=["more registers than the table says", "right", "a spill"],
)
def test_what_a_planted_program_does_to_a_check(block: int, fewer: int, said: str, tmp_path: Path) -> None:
    """It is compiled: of 512 values per thread a GPU with 255 registers must spill."""
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    result = run_python(str(script), str(tmp_path / "programs.csv"), str(block), str(fewer))
    row = result.stdout.splitlines()[1].rstrip()
    assert row.startswith("philox_planted 1w"), result.stderr
    assert result.returncode == bool(said)
    assert bool(re.search(said, row))
    assert said or row == row.lower()


def test_another_release_of_triton(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table.write_text(table.read_text().replace(triton.__version__, "1.0"))
    assert command.check(PROGRAMS)
    assert "has no programs of Triton" in capsys.readouterr().out


def test_all_are_chosen_in_their_turn() -> None:
    items = list(range(103))
    chosen = [command.share_of_today(items, 10, day) for day in range(739_000, 739_010)]
    assert sorted(itertools.chain(*chosen)) == items
    assert {len(share) for share in chosen} == {10, 11}
    assert command.share_of_today(items[:3], 10, 5) == items[:3]


KERNEL = """
import triton
import triton.language as tl

{constant} = tl.constexpr({value})

@triton.jit
def inner(x):
    {comment}
    return x * {constant}

@triton.jit
def outer(x, BLOCK: tl.constexpr):
    "A docstring."
    tl.store(x, inner(BLOCK))
"""


def fingerprint(folder: Path, text: str, block: int = 1) -> str:
    path = folder / f"m{len(list(folder.iterdir()))}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("m", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fn = JITFunction(module.outer.fn)
    module.inner = JITFunction(module.inner.fn)  # as without the interpreter
    return Program(ASTSource(fn, {"x": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": block}), 4, 1).fingerprint


def test_a_fingerprint_is_of_what_is_compiled(tmp_path: Path) -> None:
    text = KERNEL.format(constant="TWO", value=2, comment="# why")
    same = [
        text,
        "# a line above\n" + text,
        text.replace("# why", "# because"),
        text.replace("A docstring.", "Another."),
    ]
    assert len({fingerprint(tmp_path, t) for t in same}) == 1
    others = [
        text.replace("x * TWO", "x + TWO"),
        text.replace("constexpr(2)", "constexpr(3)"),
        text.replace("(BLOCK))", "(2 * BLOCK))"),
    ]
    assert len({fingerprint(tmp_path, t) for t in [text, *others]} | {fingerprint(tmp_path, text, block=2)}) == 5
