#!/usr/bin/env bash
# Makes .venv: a virtual environment with requirements.txt and an editable install of this project.
# The compiled extension is not its business. Does nothing when .venv is already what it would make.
#
#     PYTHON=python3.12 tools/setup_env.sh    chooses the interpreter
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv
export PIP_DISABLE_PIP_VERSION_CHECK=1

fail() { # what is missing, then what to do about it
    printf '\nfused_rnn: %s\n' "$1" >&2
    shift
    printf '    %s\n' "$@" >&2
    exit 1
}

# An environment is tied to its requirements, to its path, and to an interpreter that was asked for.
environment="$({ cat requirements.txt && pwd; } | cksum)"
project="$(cat pyproject.toml setup.py | cksum)"
recorded() { cat "$venv/.made_from_$1" 2>/dev/null || true; }

install_project() {
    [[ "$(recorded project)" == "$project" ]] && return
    FUSED_RNN_SKIP_EXTENSION=1 "$venv/bin/python" -m pip install -qq --no-build-isolation --no-deps -e . ||
        fail "pip could not install this project into $venv" "its message is above"
    echo "$project" >"$venv/.made_from_project"
}

if [[ "$(recorded environment)" == "$environment" ]] &&
    [[ -z "${PYTHON:-}" || "$(recorded python)" == "$PYTHON" ]] &&
    "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    install_project
    exit 0
fi

# --- the interpreter: the first that is new enough and complete, else the first that is new enough

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }
has_headers() {
    "$1" -c 'import os, sys, sysconfig
sys.exit(not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")))' 2>/dev/null
}

python=""
if [[ -n "${PYTHON:-}" ]]; then
    is_new_enough "$PYTHON" || fail "PYTHON=$PYTHON is not a Python >= 3.10" \
        "name one that is, or leave PYTHON unset to have it looked for"
    python="$PYTHON"
else
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        is_new_enough "$candidate" || continue
        if has_venv "$candidate" && has_headers "$candidate"; then
            python="$candidate"
            break
        fi
        python="${python:-$candidate}"
    done
    [[ -n "$python" ]] || fail "no Python >= 3.10 on PATH" \
        "apt install python3 python3-venv python3-dev" \
        "or name one: make PYTHON=/path/to/python3.11 ..."
fi
version="$("$python" -c 'import sys; print("{}.{}".format(*sys.version_info))')"

has_venv "$python" || fail "$python (Python $version) has no venv module" \
    "apt install python$version-venv" "or name another Python: make PYTHON=..."
if [[ -z "${FUSED_RNN_SKIP_EXTENSION:-}" ]]; then # before the long download, not after it
    has_headers "$python" || fail "$python (Python $version) has no Python.h" \
        "apt install python$version-dev" "or name another Python: make PYTHON=..."
    compiler="${CXX:-c++}"
    command -v "${compiler%% *}" >/dev/null || command -v g++ >/dev/null ||
        command -v clang++ >/dev/null || fail "no C++ compiler on PATH" \
        "apt install g++    (macOS: xcode-select --install)"
fi

# --- the environment

echo "fused_rnn: making $venv with $python (Python $version); the first time takes some minutes"
rm -rf "$venv"
"$python" -m venv "$venv" || fail "could not make a virtual environment in $venv" \
    "apt install python$version-venv, and see that the disk is not full"

log="$venv/pip.log"
if ! "$venv/bin/python" -m pip install -qq --log "$log" -r requirements.txt; then
    package="$(sed -nE 's/.*(No matching distribution found for|Failed building wheel for) ([^ ]+).*/\2/p' "$log" | head -1)"
    if grep -qE 'Connection broken|Max retries|Timeout|ProxyError|SSLError|name resolution' "$log"; then
        fail "pip did not reach a package index${package:+ for $package}" \
            "check the network; for a proxy or a mirror set PIP_PROXY, PIP_INDEX_URL or PIP_FIND_LINKS"
    fi
    fail "pip could not install ${package:-what requirements.txt lists} for Python $version" \
        "its message is above, all it did is in $log" \
        "another Python may have it: make PYTHON=..."
fi
echo "$python" >"$venv/.made_from_python"
echo "$environment" >"$venv/.made_from_environment"
install_project
