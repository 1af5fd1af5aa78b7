"""Mutation testing: apply small mistakes to the code one at a time, and see whether a test notices.

    python tests/mutations.py mistakes.py --jobs 2 --wider tests/test_golden_inference.py

The list is a JSON file, or a Python file that defines MUTATIONS: [file, old, new] each, where `old`
occurs in `file` exactly once. A fourth entry, a list of test files, replaces those chosen by name.

A mutation is tried against the module's own test file, then against those that import the module
and those of --wider, the fastest first, until a test fails. All work is done in temporary copies of
the repository. Exit status 1 says that some mutations survived.
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
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is imported
sys.dont_write_bytecode = True       # an edit may change neither the size nor the time of a file
import pytest  # noqa: E402
import torchvision  # noqa: E402, F401, which takes long: processes that are forked have it

REPOSITORY = Path(__file__).resolve().parent.parent
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "datasets", "runs", "demo", "shared")
OPTIONS = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider"]


def read_mutations(path: Path) -> list[list]:
    """The list of a JSON or Python file; ends the program if an entry cannot be applied."""
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
    tests = {f"tests/{path.name}": path.read_text() for path in REPOSITORY.glob("tests/test_*.py")}
    imports = re.compile(rf"^(import|from) {module}\b", re.MULTILINE)
    importing = [name for name, text in tests.items() if imports.search(text)]
    chosen = dict.fromkeys([f"tests/test_{Path(file).stem}.py", *importing, *wider])
    return [name for name in chosen if name in tests]


def make_copy(folder: str) -> None:
    """Make a copy of the repository, which this process works in from now on."""
    os.chdir(shutil.copytree(REPOSITORY, Path(folder, str(os.getpid())), ignore=NOT_COPIED))
    sys.path.remove(str(REPOSITORY / "tests"))


def run_tests(tests: list[str], timeout: float) -> str | None:
    """The first test that fails, or what else went wrong; None if all pass, or there are none."""
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


def attempt(tests: list[str], timeout: float, file: str, old: str, new: str) -> tuple:
    """The first test that fails with a mutation, if any, and the seconds that it took."""
    source, began = Path(file).read_text(), time.monotonic()
    Path(file).write_text(source.replace(old, new))
    results = (run_tests(part, timeout) for part in (tests[:1], tests[1:]) if part)
    noticed = next(filter(None, results), None)
    Path(file).write_text(source)
    return noticed, time.monotonic() - began


def main() -> None:
    """Try all mutations of a list and print which of them survive."""
    parser = argparse.ArgumentParser(description="Which small mistakes do the tests notice?")
    parser.add_argument("list", type=Path, help="JSON or Python file of [file, old, new] entries")
    parser.add_argument("--jobs", type=int, default=2, help="mutations that are tried at once")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one run of tests")
    parser.add_argument("--wider", nargs="*", default=[], help="test files that are tried last")
    args = parser.parse_args()
    mutations = read_mutations(args.list)
    wanted = [own[0] if own else choose_tests(file, args.wider) for file, _, _, *own in mutations]
    seconds, tried, killed = {}, Counter(), Counter()
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(
            args.jobs, multiprocessing.get_context("fork"), make_copy, (folder,)) as pool:
        whole = {test: pool.submit(attempt, [test], args.timeout, "pytest.ini", "", "")
                 for test in set().union(*wanted)}
        for test, done in whole.items():
            failed, taken = done.result()
            if failed:
                print(f"{test} is left out, as it fails without a mutation: {failed}", flush=True)
            else:
                seconds[test] = taken
        found = {}
        for mutation, tests in zip(mutations, wanted):
            tests = [test for test in tests if test in seconds]
            tests = tests[:1] + sorted(tests[1:], key=seconds.get)
            found[pool.submit(attempt, tests, args.timeout, *mutation[:3])] = mutation
        for done in as_completed(found):
            (file, old, new, *_), (noticed, _) = found[done], done.result()
            print(f"{noticed or 'SURVIVED':70} {file}: {old!r} -> {new!r}", flush=True)
            tried.update([file, "all"])
            killed.update([file, "all"] if noticed else [])
    for name, count in tried.items():
        print(f"{name:24} {killed[name]:4} of {count:4} noticed, {killed[name] / count:.1%}")
    sys.exit(killed["all"] < len(mutations))


if __name__ == "__main__":
    main()
