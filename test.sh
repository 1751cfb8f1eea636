#!/usr/bin/env bash
# The set-up of quickstart.sh with what development needs, then every check and test. About a quarter of an hour on two cores.
# Arguments are passed on to pytest, which then runs alone: ./test.sh tests/unit -k frame
set -euo pipefail

cd "$(dirname "$(readlink -f "$0")")"
# shellcheck source=scripts/setup.sh
source scripts/setup.sh

# What the tests call; systemd for systemd-analyze.
TEST_PACKAGES=(
    acl attr curl e2fsprogs ed fio fish git inotify-tools litmus iproute2 make man-db mandoc patch procps prometheus rsync sqlite3 systemd
    tar unzip vim-tiny zip zsh
)

become_root "$@"
system_setup "${TEST_PACKAGES[@]}"
python_setup "[dev]"

names=() results=() failed=0

# check NAME COMMAND...: runs it, and remembers how it went for the summary.
check() {
    local name=$1 started=$SECONDS status=0
    shift
    printf "\n== %s\n" "$name"
    "$@" || status=$?
    names+=("$name")
    if ((status == 0)); then
        results+=("ok, $((SECONDS - started)) s")
    else
        results+=("FAILED (exit code $status), $((SECONDS - started)) s")
        failed=1
    fi
}

# -bb: comparing bytes with str is an error, not False.
pytest() { "$VENV/bin/python" -bb -m pytest "$@"; }

if (($#)); then
    pytest "$@"
    exit
fi

check "ruff check" "$VENV/bin/ruff" check .
check "ruff format" "$VENV/bin/ruff" format --check .
check "mypy --strict" "$VENV/bin/mypy"
check "layering" pytest -q tests/test_layering.py
check "tests without a mount" pytest -q -n 2 --dist loadfile -m "not mount and not soak" --deselect tests/test_layering.py tests
# Three at a time: most of their time they wait for processes, or for time to pass.
check "tests on a real mount" pytest -q -n 3 --dist loadfile -m "mount and not soak" tests

printf "\n== summary\n"
for index in "${!names[@]}"; do
    printf '%-24s %s\n' "${names[index]}" "${results[index]}"
done
exit "$failed"
