# Sourced by the scripts beside it. Moves to the project's root, takes the environment of the caller out of the way,
# and offers `prepare_environment [test]`, after which $VENV_PYTHON is the project's own Python.

CDPATH="" cd -P "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT="$PWD"
VENV_PYTHON="$ROOT/.venv/bin/python"

# Another active environment, or a pip told to install elsewhere, must not leak into ours.
unset VIRTUAL_ENV PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX
export HF_HUB_DISABLE_TELEMETRY=1 WANDB_MODE="${WANDB_MODE:-offline}" TOKENIZERS_PARALLELISM=false
# Threads that wait for each other by spinning burn the cores that anything else on the machine also wants: with two
# busy neighbours on two cores, answers came eight times slower. The numbers computed do not depend on it.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"

# The first Python that is recent enough; $PYTHON, if given, is the only candidate.
find_python() {
    local candidate seen="" candidates=(python3 python3.13 python3.12 python3.11 python)
    [[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        command -v "$candidate" >/dev/null || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
        seen="${seen:-$("$candidate" --version 2>&1 | head -n 1)}"
    done
    echo "python: 3.11 or newer is needed (found: ${seen:-none}). Install one, or name it:" \
        "PYTHON=/path/to/python3.11 scripts/$(basename "$0")." >&2
    return 2
}

prepare_environment() {
    local python
    python="$(find_python)" || exit 2
    # Without a home to write to, caches go where the rest of this environment is.
    if [[ ! -d "${HOME:-}" || ! -w "${HOME:-}" ]]; then
        export HOME="$ROOT/.venv/home"
    fi
    "$python" scripts/environment.py "$@" || exit
    mkdir -p "$HOME"
}
