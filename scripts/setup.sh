# shellcheck shell=bash
# What quickstart.sh and test.sh have in common; sourced by both, from the top of the checkout.
# It installs only what is missing and needs no network when nothing is.

VENV="$PWD/.venv"
# FUSE itself and what building pyfuse3 from its source takes.
FUSE_PACKAGES=(fuse3 libfuse3-dev pkg-config gcc libc6-dev)
# Only if python3 is Debian's: another one (pyenv, for example) brings these along.
PYTHON_PACKAGES=(python3 python3-venv python3-dev)

say() { printf '%s\n' "$*"; }

fail() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# step TEXT COMMAND...: runs a long command with its output in a log, shows that time passes, and the log if it fails.
step() {
    local text=$1 log started status=0 tick=0
    shift
    log=$(mktemp -t dfs-setup.XXXXXX)
    started=$SECONDS
    "$@" >"$log" 2>&1 </dev/null &
    local pid=$!
    if [[ -t 1 ]]; then
        while kill -0 "$pid" 2>/dev/null; do
            printf '\r%s ... %d s ' "$text" $((SECONDS - started))
            sleep 0.5
        done
    else
        printf '%s ...' "$text"
        while kill -0 "$pid" 2>/dev/null; do
            sleep 0.5
            tick=$((tick + 1))
            # A sign of life every ten seconds where no line can be rewritten.
            if ((tick % 20 == 0)); then printf '.'; fi
        done
    fi
    wait "$pid" || status=$?
    if ((status == 0)); then
        if [[ -t 1 ]]; then printf '\r%s ... ' "$text"; else printf ' '; fi
        printf 'done in %d s\n' $((SECONDS - started))
        rm -f "$log"
        return 0
    fi
    printf '\n%s failed (exit code %d). Its last lines, the rest is in %s:\n' "$text" "$status" "$log" >&2
    tail -n 15 "$log" >&2
    return "$status"
}

# become_root ARGUMENTS...: starts the calling script again through sudo unless it runs as root already.
become_root() {
    if ((EUID == 0)); then return 0; fi
    command -v sudo >/dev/null || fail "this needs root: run it as root, or install sudo"
    say "root is needed to install packages and to mount; asking sudo"
    exec sudo -- "$PWD/${0##*/}" "$@"
}

# python_works PYTHON: whether it is new enough, can make virtual environments, and has headers to build against.
python_works() {
    "$1" - >/dev/null 2>&1 <<'PYTHON'
import ensurepip, os, sys, sysconfig, venv
header = os.path.join(sysconfig.get_path("include"), "Python.h")
sys.exit(not (sys.version_info >= (3, 11) and os.path.exists(header)))
PYTHON
}

# is_installed PACKAGE: whether Debian's package manager has it, completely.
is_installed() {
    [[ $(dpkg-query --show --showformat='${db:Status-Status}' "$1" 2>/dev/null || true) == installed ]]
}

# install_packages PACKAGE...: installs those that are missing.
install_packages() {
    local missing=() package
    for package in "$@"; do
        is_installed "$package" || missing+=("$package")
    done
    if ((${#missing[@]} == 0)); then return 0; fi
    ((EUID == 0)) || fail "missing Debian packages: ${missing[*]} (run this as root to have them installed)"
    export DEBIAN_FRONTEND=noninteractive
    # Stale lists are no reason to stop: the installation itself says what it cannot find.
    step "Updating the package lists" apt-get -q update || true
    # A machine that has just started often installs updates by itself.
    step "Installing Debian packages: ${missing[*]}" \
        apt-get -q -y -o DPkg::Lock::Timeout=300 --no-install-recommends install "${missing[@]}"
}

# system_setup PACKAGE...: Debian packages (the ones given on top of FUSE's), a usable PYTHON, and /dev/fuse.
system_setup() {
    command -v dpkg-query >/dev/null || fail "this set-up is for Debian 12; elsewhere see 'By hand' in README.md"
    # The program itself, not a shim that picks one by the directory it is called in.
    PYTHON=$(python3 -c 'import sys; print(sys._base_executable)' 2>/dev/null || true)
    if [[ -z $PYTHON ]] || ! python_works "$PYTHON"; then
        PYTHON=/usr/bin/python3
        install_packages "${FUSE_PACKAGES[@]}" "${PYTHON_PACKAGES[@]}" "$@"
        python_works "$PYTHON" || fail "$PYTHON is older than 3.11: this needs Debian 12 or newer"
    else
        install_packages "${FUSE_PACKAGES[@]}" "$@"
    fi
    # One name for it, whether called through a link or from an activated environment: python_setup remembers it.
    PYTHON=$(readlink -f "$PYTHON")
    if [[ ! -c /dev/fuse ]]; then
        modprobe fuse 2>/dev/null || true
        [[ -c /dev/fuse ]] || fail "there is no /dev/fuse: load the kernel module fuse (in a container: pass the device)"
    fi
}

# pip_install EXTRAS: the project, editable, with exactly the versions of constraints.txt, those for building included.
pip_install() {
    # Newer pip versions take the second for building, older ones the first.
    PIP_CONSTRAINT=$PWD/constraints.txt PIP_BUILD_CONSTRAINT=$PWD/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
        "$VENV/bin/python" -m pip install --quiet --no-input --editable ".$1"
}

# python_setup EXTRAS: the virtual environment, "" or "[dev]"; skipped if it is as constraints.txt and pyproject.toml say.
python_setup() {
    local extras=$1 stamp="$VENV/.installed" want have=""
    want=$(printf '%s\n' "$VENV" "$PYTHON" | cat - constraints.txt pyproject.toml | sha256sum)
    want=${want%% *}
    if [[ -f $stamp ]]; then have=$(<"$stamp"); fi
    # "[dev]" holds everything that "" does.
    if [[ $have == "$want $extras" || $have == "$want [dev]" ]]; then return 0; fi
    if [[ ${have%% *} != "$want" ]]; then
        step "Making a virtual environment in .venv" "$PYTHON" -m venv --clear "$VENV"
    fi
    rm -f "$stamp"
    step "Installing Python packages into .venv" pip_install "$extras"
    printf '%s %s' "$want" "$extras" >"$stamp"
}
