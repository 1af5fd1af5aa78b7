"""Code on the pages of documentation: commands have valid arguments, and examples run.

A block without a language holds commands. A block that is none of these needs a language.
"""

import argparse
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed.run

import deform_attn_cuda
from pages import PAGES, code_blocks, commands, prose
from processes import ENVIRONMENT, REPOSITORY

sys.path.append(str(REPOSITORY / "benchmarks"))  # at the end: some of its files have names of ours

PYTHON = {  # pages with examples in Python, and the tests that run them
    "README.md": "test_pages.py",
    "docs/evaluation.md": "test_pages.py",
    "docs/extending.md": "test_extending.py",
    "docs/kernel.md": "test_pages.py",
    "weights/README.md": "test_pages.py",
}
# What examples take for granted: frames, an official file, results with their ground truth, and a
# copy of the repository. The large preset is a small one.
PRELUDE = f"""
import os, torch, model
model.PRESETS["r50"] = model.PRESETS["toy"]
torch.save(model.build_model("r50", 25).state_dict(), "grattvis_r50_ovis.pth")
frames = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
for name in ("results.json", "gt.json"):
    os.symlink(f"{REPOSITORY}/tests/golden/{{name}}", name)
os.makedirs("path/to")
os.symlink({str(REPOSITORY)!r}, "path/to/repository")
del os, torch, model
"""
EXECUTED = [  # commands that take seconds
    "python train.py --recipe grattvis/ovis/r50 --dry-run",
    "python evaluate.py --results results.json --annotations gt.json --output scores",
    "python benchmarks/study.py table benchmarks/study.json",
]


# Parsers: functions of a list of arguments that raise an error if one is invalid


@cache
def parser_of(program: str):
    """The function parse_arguments of a file."""
    return runpy.run_path(str(REPOSITORY / program)).get("parse_arguments")


def parse_program(program: str, arguments: list[str]) -> None:
    parse = parser_of(program)
    assert parse or not arguments, f"{program} has no arguments"
    if parse:
        parse(arguments)


def parse_script(program: str, arguments: list[str]) -> None:
    """A shell script; its syntax is checked."""
    assert os.access(REPOSITORY / program, os.X_OK)
    subprocess.run(["bash", "-n", REPOSITORY / program], check=True)


def parse_torchrun(arguments: list[str]) -> None:
    args = torch.distributed.run.get_args_parser().parse_args(arguments)
    parse_program(args.training_script, args.training_script_args)


def existing(path: str) -> Path:
    """The type of an argument that is a path in the repository."""
    if not (REPOSITORY / path).exists():
        raise argparse.ArgumentTypeError(f"{path} does not exist")
    return REPOSITORY / path


def package(name: str) -> str:
    """The type of an argument of pip: a package that developers install, or a folder."""
    lines = (REPOSITORY / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    return name if name in [re.split("[=>]", line)[0] for line in lines] else existing(name)


def make_parser(*flags: tuple[str, dict]):
    """A parser of the flags of other programs that the pages use."""
    parser = argparse.ArgumentParser()
    for name, options in flags:
        parser.add_argument(name, **options)
    return parser.parse_intermixed_args


MARKERS = re.findall(r"^    (\w+):", (REPOSITORY / "pytest.ini").read_text(), re.MULTILINE)
parse_pytest = make_parser(
    ("-m", {"choices": MARKERS}), ("-k", {}), ("paths", {"nargs": "*", "type": existing})
)
PARSERS = {
    "pip": make_parser(
        ("command", {"choices": ["install"]}),
        ("-r", {"type": existing}),
        ("--no-build-isolation", {"action": "store_true"}),
        ("packages", {"nargs": "*", "type": package}),
    ),
    "pytest": parse_pytest,
    "tests/run.py": parse_pytest,
    "ruff": make_parser(
        ("command", {"choices": ["check", "format"]}),
        ("--check", {"action": "store_true"}),
        ("paths", {"nargs": "+", "type": existing}),
    ),
    "tensorboard": make_parser(("--logdir", {"required": True})),
    "torchrun": parse_torchrun,
}


def parse(words: list[str]) -> None:
    """Parse a command; an error if its program is unknown or an argument invalid."""
    while re.match(r"\w+=", words[0]):  # environment variables
        words = words[1:]
    name, *arguments = words
    if name == "python":
        is_module = arguments[0] == "-m"
        name, *arguments = arguments[is_module:]
        if is_module and name not in PARSERS:
            name = f"{name.replace('.', '/')}.py"
    if name in PARSERS:
        PARSERS[name](arguments)
    elif name.endswith(".py"):
        parse_program(name, arguments)
    else:
        parse_script(name, arguments)


@pytest.mark.parametrize("page, command", commands())
def test_commands_have_valid_arguments(page, command):
    try:
        parse(shlex.split(command))
    except SystemExit as end:
        assert not end.code  # 0 after --help


@pytest.mark.parametrize("command", ["python demo.py --scores 1", "python -m pip install nothing"])
def test_invalid_arguments_are_errors(command):
    with pytest.raises(SystemExit) as end:
        parse(shlex.split(command))
    assert end.value.code


def test_flags_in_the_prose_exist():
    files = [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("*/*.py")]
    programs = [path for path in files if path.parent.name != "tests"]
    code = " ".join(path.read_text(encoding="utf-8") for path in programs)
    flags = {flag.replace("--no-", "--") for flag in re.findall(r'"(--[a-z-]+)"', code)}
    others = {"--help", "--max-restarts", "--shm-size"}  # of argparse, torchrun and docker
    for page in PAGES.keys() - {"docs/extending.md"}:  # which adds flags
        named = {
            flag.replace("--no-", "--")
            for code in re.findall(r"`([^`]*)`", prose(page))
            for flag in re.findall(r"(?<![\w-])--[a-z-]+", code)
        }
        assert named <= flags | others, page


def test_every_block_is_checked():
    languages = {language for _, language, _ in code_blocks()}
    assert languages == {"", "python", "diff", "text", "bibtex"}
    assert {page for page, language, _ in code_blocks() if language == "python"} == PYTHON.keys()
    assert {page for page, language, _ in code_blocks() if language == "diff"} == {
        "docs/extending.md"
    }


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, test in PYTHON.items() if test == "test_pages.py"])
def test_examples_run(page, tmp_path):
    """The blocks of a page one after another; those with "cuda" only where the kernel runs."""
    on_gpu = torch.cuda.is_available() and deform_attn_cuda.load()
    script = PRELUDE
    for found, language, block in code_blocks():
        if (found, language) == (page, "python"):
            compile(block, page, "exec")
            script += block if on_gpu or '"cuda"' not in block else ""
    run([sys.executable, "-c", script], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", EXECUTED)
def test_commands_run(command, tmp_path):
    """As they stand on the page, in a folder with the files of the repository."""
    assert command in [found for _, found in commands()]
    for path in REPOSITORY.iterdir():
        if path.suffix == ".py" or path.is_dir():
            (tmp_path / path.name).symlink_to(path)
    for name in ("results.json", "gt.json"):
        shutil.copy(REPOSITORY / "tests/golden" / name, tmp_path)
    run([sys.executable, *shlex.split(command)[1:]], tmp_path)


def run(command: list[str], folder: Path) -> None:
    done = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
