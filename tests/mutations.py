"""Mutation testing: apply small mistakes to the code one at a time, and see whether a test notices each.

    python tests/mutations.py mistakes.json --jobs 2
    python tests/mutations.py mistakes.py --wider tests/test_model.py tests/test_golden_inference.py

The list is a JSON file, or a Python file that defines MUTATIONS: [file, old, new] each, where `old` occurs in
`file` exactly once. A fourth entry, a list of test files, replaces the tests that are chosen by name.

A mutation is tried against the module's own test file, then against the test files that import the module, then
against those of --wider, until a test fails. The work is done in temporary copies of the repository. Exit status 1:
some mutations survived.
"""
import argparse
import compileall
import json
import os
import py_compile
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

REPOSITORY = Path(__file__).resolve().parent.parent
NOT_COPIED = (".git", "__pycache__", ".pytest_cache", "datasets", "runs", "demo", "shared", ".venv")
# The same speed for any number of jobs; and no stale bytecode, as an edit may change neither size nor time of a file.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def read_mutations(path: Path) -> list[list]:
    """The list of a JSON or Python file; an entry that cannot be applied ends the program."""
    mutations = json.loads(path.read_text()) if path.suffix == ".json" else runpy.run_path(str(path))["MUTATIONS"]
    for file, old, new, *_ in mutations:
        if (count := (REPOSITORY / file).read_text().count(old)) != 1 or old == new:
            sys.exit(f"{file}: {old!r} occurs {count} times, or is not changed")
    return mutations


def choose_tests(file: str, wider: list[str]) -> list[str]:
    """Test files for a module, the most specific ones first."""
    own = f"tests/test_{Path(file).stem}.py"
    module = re.escape(file.removesuffix(".py").replace("/", "."))
    imports = re.compile(rf"^\s*(import|from) {module}\b", re.MULTILINE)
    importing = [str(path.relative_to(REPOSITORY)) for path in sorted(REPOSITORY.glob("tests/test_*.py"))
                 if imports.search(path.read_text())]
    return [path for path in dict.fromkeys([own, *importing, *wider]) if (REPOSITORY / path).exists()]


def run_tests(copy: Path, test: str, timeout: float) -> str | None:
    """The first test that fails, or what else went wrong; None if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", test]
    process = subprocess.Popen(command, cwd=copy, env=ENVIRONMENT, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        printed, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"{test}: timeout"
    if process.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", printed, re.MULTILINE)
    return failed[1] if failed else f"{test}: exit status {process.returncode}"


def make_copy(folder: Path) -> Path:
    """A copy of the repository whose bytecode is checked against its source by content."""
    shutil.copytree(REPOSITORY, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
    compileall.compile_dir(folder, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    return folder


def main() -> None:
    """Try all mutations of a list and print which of them survive."""
    parser = argparse.ArgumentParser(description="Apply mutations one at a time and see which tests notice them.")
    parser.add_argument("list", type=Path, help="JSON or Python file of [file, old, new] entries")
    parser.add_argument("--jobs", type=int, default=2, help="mutations that are tried at once")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one test file; longer counts as noticed")
    parser.add_argument("--wider", nargs="*", default=[], help="test files that are tried last")
    args = parser.parse_args()
    mutations = read_mutations(args.list)
    wanted = [tests[0] if tests else choose_tests(file, args.wider) for file, _, _, *tests in mutations]
    copies: SimpleQueue[Path] = SimpleQueue()

    def check(test: str) -> tuple[str, str | None, float]:
        copy, began = copies.get(), time.perf_counter()
        failed = run_tests(copy, test, 10 * args.timeout)
        copies.put(copy)
        return test, failed, time.perf_counter() - began

    def attempt(mutation: list, tests: list[str]) -> tuple[str, str | None]:
        (file, old, new, *_), copy = mutation, copies.get()
        original = (copy / file).read_text()
        (copy / file).write_text(original.replace(old, new))
        noticed = next((failed for test in tests if (failed := run_tests(copy, test, args.timeout))), None)
        (copy / file).write_text(original)
        copies.put(copy)
        print(f"{'killed ' if noticed else 'SURVIVED'} {file}: {old!r} -> {new!r}   {noticed or ''}", flush=True)
        return file, noticed

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        for number in range(args.jobs):
            copies.put(make_copy(Path(folder) / str(number)))
        useless = set()
        for test, failed, seconds in pool.map(check, sorted({test for tests in wanted for test in tests})):
            print(f"{seconds:6.1f} s {test}{f' is left out: {failed}' if failed else ''}", flush=True)
            useless |= {test} if failed else set()
        outcomes = list(pool.map(attempt, mutations, [[test for test in tests if test not in useless] for tests in wanted]))
    tried, killed = Counter(file for file, _ in outcomes), Counter(file for file, noticed in outcomes if noticed)
    for file, count in sorted(tried.items()) + [("all", len(outcomes))]:
        caught = killed[file] if file != "all" else killed.total()
        print(f"{file:24} {caught:4} of {count:4} noticed, {caught / count:.1%}")
    sys.exit(killed.total() < len(outcomes))


if __name__ == "__main__":
    main()
