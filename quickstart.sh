#!/usr/bin/env bash
# One machine, one command: a metaserver and three chunkservers on loopback, mounted as a directory.
# Run it again at any time, after `dfs down` or a reboot too: the same data comes back.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: ./quickstart.sh MOUNTPOINT [--data DIR] [--no-links]

Installs what is missing (Debian packages, a virtual environment in .venv), starts a metaserver and three
chunkservers with two copies of everything, and mounts them on MOUNTPOINT. Needs root, or asks sudo for it.

  --data DIR   where the data is kept (default: /var/lib/dfs-quickstart)
  --no-links   do not make links in /usr/local/bin (dfs, dfsmount, ...) and /sbin (mount.dfs)
TEXT
}

started_in=$PWD
cd "$(dirname "$(readlink -f "$0")")"
# shellcheck source=scripts/setup.sh
source scripts/setup.sh

# absolute PATH: as seen from where the user is.
absolute() {
    case $1 in
        /*) printf '%s' "$1" ;;
        *) printf '%s' "$started_in/$1" ;;
    esac
}

mountpoint="" data=/var/lib/dfs-quickstart links=yes
while (($#)); do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --data) [[ -n ${2:-} ]] || fail "--data needs a directory"; data=$(absolute "$2"); shift 2 ;;
        --data=*) data=$(absolute "${1#--data=}"); shift ;;
        --no-links) links=no; shift ;;
        -*) fail "unknown option $1 (see --help)" ;;
        *) [[ -z $mountpoint ]] || fail "more than one mountpoint: $mountpoint and $1"
           mountpoint=$(absolute "$1"); shift ;;
    esac
done
if [[ -z $mountpoint ]]; then
    usage >&2
    exit 2
fi
again=("$mountpoint" --data "$data")
[[ $links == yes ]] || again+=(--no-links)
become_root "${again[@]}"

# link PATH TARGET: makes a command reachable; leaves alone what is not a link of such a checkout.
link() {
    if [[ -L $1 && $(readlink "$1") == "$2" ]]; then return 0; fi
    if [[ -e $1 || -L $1 ]] && [[ $(readlink "$1") != */.venv/bin/"${2##*/}" ]]; then
        say "Left alone: $1 (not ours); use $2"
        return 0
    fi
    mkdir -p "${1%/*}"
    ln -sfn "$2" "$1"
    say "Linked $1 -> $2"
}

system_setup
python_setup ""
if [[ $links == yes ]]; then
    for program in dfs dfsmount metaserver chunkserver; do
        link "/usr/local/bin/$program" "$VENV/bin/$program"
    done
    # mount(8) looks for helpers of a type there: makes `mount -t dfs` and /etc/fstab work.
    link /sbin/mount.dfs "$VENV/bin/mount.dfs"
    # umount(8) looks for a helper as well: with it, everything is written when umount returns.
    link /sbin/umount.fuse.dfs "$VENV/bin/umount.fuse.dfs"
fi
exec "$VENV/bin/dfs" up "$mountpoint" --data "$data"
