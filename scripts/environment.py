"""Make or refresh `.venv`: the project, its pinned dependencies, nothing hand-installed. Standard library only.

`.venv/installed.json` is written after pip succeeded and says what for: where the project lay, a digest of the two
files that decide what is installed, and which extras. While it matches, a later run installs nothing and needs no
network. A virtual environment cannot be moved, so a clone that was moved gets a new one.

    python3 scripts/environment.py [test]

Exit codes: 0 ready; 2 `.venv` cannot be made or filled.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DECIDING_FILES = ("pyproject.toml", "constraints.txt")
# One pip call for everything: with the constraints in force there is no moment at which another torch is chosen.
REQUIREMENTS = {"base": ["-e", ".", "gguf"], "test": ["-e", ".[test]"]}


class Refused(Exception):
    """The machine lacks something that a person has to provide."""


def fingerprint(root: Path) -> str:
    """SHA-256 over the files that decide what is installed."""
    digest = hashlib.sha256()
    for name in DECIDING_FILES:
        digest.update(name.encode() + b"\0" + (root / name).read_bytes() + b"\0")
    return digest.hexdigest()


def read_stamp(root: Path) -> dict[str, str]:
    """What was installed last, or an empty dict when nothing was, or not to the end."""
    try:
        stamp = json.loads((root / ".venv" / "installed.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(root: Path, kind: str) -> None:
    """Record that `kind` ("base" or "test") of the project at `root` is installed."""
    stamp = {"place": str(root), "files": fingerprint(root), "kind": kind}
    (root / ".venv" / "installed.json").write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")


def is_installed(root: Path, kind: str) -> bool:
    """Whether `kind` is installed from the present files at the present place; "test" includes "base"."""
    stamp = read_stamp(root)
    return (
        stamp.get("place") == str(root)
        and stamp.get("files") == fingerprint(root)
        and stamp.get("kind") in (kind, "test")
    )


def venv_python(root: Path) -> Path:
    return root / ".venv" / "bin" / "python"


def works(python: Path) -> bool:
    """Whether `python` starts and is recent enough (its own interpreter may have been removed since)."""
    check = "import sys; sys.exit(sys.version_info < (3, 11))"
    try:
        return subprocess.run([python, "-c", check], capture_output=True).returncode == 0
    except OSError:
        return False


def create(root: Path) -> None:
    """Make an empty `.venv`, replacing one that is broken or came from another place."""
    print("making .venv", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(root / ".venv")], capture_output=True, text=True
    )
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise Refused(
            f"{root / '.venv'}: cannot be made ({said[:300]}). On Debian and Ubuntu the package python{version}-venv "
            "is needed; elsewhere check that the folder is writable."
        )


def install(root: Path, kind: str) -> None:
    """Install `kind` into `.venv` with pip, showing its progress on a terminal and only its errors elsewhere."""
    print("installing the project and its dependencies (torch is large: some minutes the first time)", flush=True)
    (root / ".venv" / "installed.json").unlink(missing_ok=True)
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    command = [str(venv_python(root)), "-m", "pip", "install", *quiet, "--no-input", "--disable-pip-version-check"]
    done = subprocess.run([*command, "-c", "constraints.txt", *REQUIREMENTS[kind]], cwd=root)
    if done.returncode:
        raise Refused(
            f"pip: the installation failed (exit code {done.returncode}); the lines above say why. "
            "With a network and some 6 GB of disk, run the same command again: it goes on from there."
        )
    write_stamp(root, kind)


def prepare(root: Path, kind: str) -> None:
    """Bring `.venv` to the state that `kind` needs; does nothing when it is there already."""
    moved = read_stamp(root).get("place", str(root)) != str(root)
    if moved or not works(venv_python(root)):
        create(root)
    if not is_installed(root, kind):
        install(root, kind)


def main(arguments: list[str]) -> int:
    """Prepare the kind named by `arguments` ("base" when empty) and return the exit code."""
    kind = arguments[0] if arguments else "base"
    if kind not in REQUIREMENTS or len(arguments) > 1:
        print(f"environment.py: takes one of {', '.join(REQUIREMENTS)} (not {' '.join(arguments)})", file=sys.stderr)
        return 2
    try:
        prepare(ROOT, kind)
    except Refused as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{ROOT}: {error}. Check that the files are complete and the folder is writable.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
