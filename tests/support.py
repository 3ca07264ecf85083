"""What several test modules share: the `kit` command as a newcomer's machine runs it."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

KIT = [sys.executable, "-m", "kit.cli"]
# a network namespace of its own has no way out; loopback must be up for the kernel's sockets
OFFLINE = ["unshare", "--net", "--", sys.executable, "-c",
           "import fcntl, os, socket, struct, sys\n"
           "s = socket.socket(); fcntl.ioctl(s, 0x8914, struct.pack('16sh14x', b'lo', 0x41))\n"
           "os.execvp(sys.argv[1], sys.argv[1:])"]  # fmt: skip


@functools.cache
def bare_environment() -> dict[str, str]:
    """No java on the PATH, no JAVA_HOME: what a machine without Java has, everything else in its place."""
    bare = Path(tempfile.mkdtemp(prefix="kit-path-"))
    for folder in map(Path, os.environ["PATH"].split(os.pathsep)):
        for program in folder.iterdir() if folder.is_dir() else ():
            link = bare / program.name
            if not program.name.startswith("java") and not os.path.lexists(link):
                link.symlink_to(program)
    kept = {k: v for k, v in os.environ.items() if k not in ("JAVA_HOME", "SPARK_SUBMIT_OPTS")}
    return kept | {"PATH": str(bare)}


def kit(*words: str, cwd: Path, offline: bool = False) -> tuple[int, str, str]:
    """Run the `kit` command in `cwd`, without Java: its exit status, what it printed, and its errors."""
    prefix = OFFLINE if offline and _can_unshare() else []
    done = subprocess.run(
        [*prefix, *KIT, *words], cwd=cwd, env=bare_environment(), capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def _can_unshare() -> bool:
    probe = subprocess.run([*OFFLINE, "true"], env=bare_environment(), capture_output=True, check=False)
    if probe.returncode:
        print("no network namespace to be had here: the chain runs with the network on")
    return probe.returncode == 0
