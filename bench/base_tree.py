"""A revision of this repository, checked out beside it and built, for as long as it is needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCES = ("csrc/*.cpp", "csrc/*.h", "csrc/cpu/*.cpp", "csrc/cpu/*.h")
LIBRARY = "libclinattn.so"


class Refused(Exception):
    """Raised for what is absent or not as required; the message says what was expected."""


def git(repository: Path, *arguments: str) -> str:
    """Output of a git command, stripped. Raises Refused with git's error message."""
    command = ["git", "-C", str(repository), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(f"git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


def commit_of(repository: Path, revision: str) -> str:
    """The full id of the commit that a revision names."""
    if not revision or revision.startswith("-"):
        raise Refused(f"BASE={revision!r}: expected a revision, as a branch, a tag or HEAD~1")
    git(repository, "rev-parse", "--git-dir")
    try:
        return git(repository, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    except Refused:
        raise Refused(
            f"BASE={revision!r} is no revision of {repository.name}: "
            "expected a branch, a tag or a commit (git fetch brings those of others)"
        ) from None


def description(repository: Path) -> str:
    """The commit checked out, and how many tracked files differ from it."""
    commit = git(repository, "rev-parse", "--short=12", "HEAD")
    changed = git(repository, "status", "--porcelain", "--untracked-files=no").splitlines()
    if not changed:
        return commit
    return f"{commit} with {len(changed)} changed file{'s' * (len(changed) > 1)}"


def require_fresh_build(repository: Path) -> None:
    """Raises Refused where the compiled module is absent, or its sources were changed since."""
    built = repository / "clinattn" / LIBRARY
    if not built.exists():
        raise Refused(f"this tree has no compiled clinattn/{LIBRARY}: expected it (make ext)")
    sources = [path for pattern in SOURCES for path in repository.glob(pattern)]
    newest = max(sources, key=lambda path: path.stat().st_mtime, default=None)
    if newest and newest.stat().st_mtime > built.stat().st_mtime:
        raise Refused(
            f"{newest.relative_to(repository)} was changed after clinattn/{LIBRARY} was built: "
            "expected a build of this tree as it stands (make ext)"
        )


@contextmanager
def checked_out(repository: Path, commit: str) -> Iterator[Path]:
    """Yields a worktree of the commit in a temporary folder, removed however the block ends.

    SIGTERM ends the program as Ctrl-C does. Both are ignored while the worktree is removed.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = tempfile.TemporaryDirectory(prefix="clinattn-base-")
    tree = Path(folder.name) / "tree"
    try:
        git(repository, "worktree", "add", "--detach", str(tree), commit)
        yield tree
    finally:
        handlers = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)}
        folder.cleanup()
        git(repository, "worktree", "prune")
        signal.signal(signal.SIGINT, handlers[signal.SIGINT])
        signal.signal(signal.SIGTERM, before)


def build(tree: Path, commit: str) -> None:
    """Builds a tree's module in place. Raises Refused with the end of the build's output."""
    if not (tree / "setup.py").is_file():
        raise Refused(f"{commit[:12]} has no setup.py: expected a revision that can be built")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    variables = {**os.environ, "CLINATTN_FORCE_BUILD": "1", "CLINATTN_CUDA": "0"}
    process = subprocess.Popen(
        command,
        cwd=tree,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that its compilers end with it
    )
    try:
        words, _ = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    # any name: that of older revisions is another
    if process.returncode or not list(tree.glob("clinattn/*.so")):
        last = "\n".join(words.splitlines()[-15:])
        raise Refused(f"{commit[:12]} does not build here:\n{last}")
