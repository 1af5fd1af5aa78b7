"""Mutation testing: apply small mistakes to the code one at a time, and see whether a test notices.

    python tests/mutations.py mistakes.py --jobs 2 --wider tests/test_golden_inference.py

The list is a Python file that defines MUTATIONS, or a JSON file: [file, old, new] each, where `old`
occurs in `file` exactly once. A fourth entry, a list of test files, replaces those chosen by name:
the module's own test file first, then those that import the module, then those of --wider. All work
is done in temporary copies of the repository. Exit status 1 says that some mutations survived.
"""

import argparse
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is imported
sys.dont_write_bytecode = True  # an edit may change neither the size nor the time of a file
import pytest  # noqa: E402
import torchvision  # noqa: E402, F401, which takes long: processes that are forked have it

REPOSITORY = Path(__file__).resolve().parent.parent
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "datasets", "runs", "demo", "shared")
OPTIONS = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider"]


def read_mutations(path: Path) -> list[list]:
    """The list of a Python or JSON file; ends the program if an entry cannot be applied."""
    code = path.suffix == ".py"
    mutations = runpy.run_path(path)["MUTATIONS"] if code else json.loads(path.read_text())
    for file, old, new, *_ in mutations:
        source = (REPOSITORY / file).read_text()
        if source.count(old) != 1 or old == new:
            sys.exit(f"{file}: {old!r} occurs {source.count(old)} times, or is not changed")
        compile(source.replace(old, new), file, "exec")
    return mutations


def choose_tests(file: str, wider: list[str]) -> list[str]:
    """Test files for a module, its own one first."""
    module = re.escape(file.removesuffix(".py").replace("/", "."))
    package, _, name = module.rpartition(r"\.")
    imports = re.compile(
        rf"^(import|from) {module}\b|^from {package} import {name}\b", re.MULTILINE
    )
    tests = {f"tests/{path.name}": path for path in sorted(REPOSITORY.glob("tests/test_*.py"))}
    importing = [name for name, path in tests.items() if imports.search(path.read_text())]
    chosen = dict.fromkeys([f"tests/test_{Path(file).stem}.py", *importing, *wider])
    return [name for name in chosen if name in tests]


def make_copy(folder: str) -> None:
    """Copy the repository; this process works in the copy from now on."""
    os.chdir(shutil.copytree(REPOSITORY, Path(folder, str(os.getpid())), ignore=NOT_COPIED))


def run_tests(tests: list[str], timeout: float) -> str | None:
    """The first test that fails, or what else went wrong; None if all pass."""
    deadline, child = time.monotonic() + timeout, os.fork()
    if not child:
        os.setsid()
        printed = os.open("printed", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        status = pytest.main([*OPTIONS, *tests])
        sys.stdout.flush()
        os._exit(status)
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.05)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", Path("printed").read_text(), re.MULTILINE)
    return None if not ended[1] else failed[1] if failed else f"wait status {ended[1]} of {tests}"


def attempt(file: str, old: str, new: str, tests: list[str], timeout: float) -> str | None:
    """The first test that fails with a mutation."""
    source = Path(file).read_text()
    Path(file).write_text(source.replace(old, new))
    found = (run_tests(part, timeout) for part in (tests[:1], tests[1:]) if part)
    noticed = next(filter(None, found), None)
    Path(file).write_text(source)
    return noticed


def main() -> None:
    """Try all mutations of a list and print which of them survive."""
    parser = argparse.ArgumentParser(description="Which small mistakes do the tests notice?")
    parser.add_argument("list", type=Path, help="Python or JSON file of [file, old, new] entries")
    parser.add_argument("--jobs", type=int, default=2, help="mutations that are tried at once")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one run of tests")
    parser.add_argument("--wider", nargs="*", default=[], help="test files that are tried last")
    args = parser.parse_args()
    mutations, tried, killed = read_mutations(args.list), Counter(), Counter()
    wanted = [own[0] if own else choose_tests(file, args.wider) for file, _, _, *own in mutations]
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(
            args.jobs, multiprocessing.get_context("fork"), make_copy, (folder,)
        ) as pool,
    ):
        known = sorted(set().union(*wanted))
        run = partial(run_tests, timeout=args.timeout)
        for test, failed in zip(known, pool.map(run, [[test] for test in known])):
            if failed:
                print(f"{test} is left out, it fails without a mutation: {failed}", flush=True)
                wanted = [[other for other in tests if other != test] for tests in wanted]
        found = {
            pool.submit(attempt, *mutation[:3], tests, args.timeout): mutation
            for mutation, tests in zip(mutations, wanted)
        }
        for done in as_completed(found):
            (file, old, new, *_), noticed = found[done], done.result()
            print(f"{noticed or 'SURVIVED':70} {file}: {old!r} -> {new!r}", flush=True)
            tried.update([file, "all"])
            killed.update([file, "all"] if noticed else [])
    for name, count in tried.items():
        print(f"{name:24} {killed[name]:4} of {count:4} noticed, {killed[name] / count:.1%}")
    sys.exit(killed["all"] < len(mutations))


if __name__ == "__main__":
    main()
