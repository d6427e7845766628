# Sourced by the other scripts: makes .venv in the repository's root and installs the package into it. They stay in the
# caller's folder, which relative paths on their command lines mean.
#
#   root                            the repository's root
#   prepare_environment [EXTRA]     EXTRA is an optional set of dependencies, "test" for example; what scripts need if none
#   accelerators                    prints how many there are
#   free_port                       prints a port that nobody listens on

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    echo "error: $1" >&2
    exit 2
}

prepare_environment() {
    local extra=${1:-train,bench,mpi} python stamp installed
    python=${PYTHON:-python3}
    command -v "$python" >/dev/null || fail "python3 is missing; on Debian or Ubuntu: apt-get install python3 python3-venv"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$("$python" --version) is too old; Python 3.10 or newer is needed (PYTHON=/path/to/python chooses one)"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "Python's venv module is missing; on Debian or Ubuntu: apt-get install python3-venv"

    # Installed already for this pyproject.toml, this folder and these extras: nothing to do.
    stamp="$(cksum <"$root/pyproject.toml") $root"
    for installed in "installed-$extra" installed-test; do
        installed="$root/.venv/$installed"
        if [ -f "$installed" ] && [ "$(cat "$installed")" = "$stamp" ]; then
            export PATH="$root/.venv/bin:$PATH"
            return
        fi
    done
    echo "Installing into .venv (torch alone is several gigabytes; this takes minutes, once) ..."
    [ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv" ||
        fail "no virtual environment could be made in $root/.venv"
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root[$extra]" ||
        fail "the installation failed; the lines above say why"
    echo "$stamp" >"$root/.venv/installed-$extra"
    export PATH="$root/.venv/bin:$PATH"
}

accelerators() {
    python -c 'import torch; print(torch.accelerator.device_count() if torch.accelerator.is_available() else 0)'
}

free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
export -f free_port
