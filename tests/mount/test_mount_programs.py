"""Ordinary programs, called as a person would: what they print, their exit codes and the trees they leave are those of
a local directory.

Most tests give one shell script to both places and compare everything. A script prints nothing that differs by nature:
times of the day, inode numbers, the order of a listing.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from mount_cluster import RealCluster, differences, run, running, wait_until

pytestmark = pytest.mark.timeout(600)

# For one script in one place, on a machine that has much else to do.
SECONDS = 280
# Settings of the person who runs the tests must not decide what programs do.
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "PIP_", "PYTHON"))},
    "LC_ALL": "C",
    # Where nothing can be made.
    "HOME": "/proc",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    **{f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    "GIT_AUTHOR_DATE": "2024-01-01T00:00:00Z",
    "GIT_COMMITTER_DATE": "2024-01-01T00:00:00Z",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PYTHON": sys.executable,
}


class Sides:
    """The same directory twice: on the mount and on the local disk."""

    def __init__(self, cluster: RealCluster, mounted: Path, local: Path, given: Path) -> None:
        self.cluster = cluster
        self.mounted = mounted
        self.local = local
        self._given = given

    def _shell(self, place: Path, script: str) -> list[str]:
        """What the script prints, errors included, and its exit code; paths as if the place were /here."""
        # A process that is left behind must not keep the test waiting for the end of a pipe.
        output = place.with_name(f"{place.name}.out")
        with output.open("wb") as file:
            words = ["bash", "-u", "-c", f"umask 002\n{script}"]
            environment = {**ENVIRONMENT, "GIVEN": str(self._given)}
            code = subprocess.run(
                words, cwd=place, env=environment, stdout=file, stderr=file, timeout=SECONDS
            ).returncode
        text = output.read_text(errors="replace").replace(str(place), "/here")
        return [*text.splitlines(), f"exit code {code}"]

    def same(self, script: str, times: bool = False) -> list[str]:
        """What both print, after comparing it and the trees; times of modification only if the script sets them."""
        local, mounted = (self._shell(place, script) for place in (self.local, self.mounted))
        assert "\n".join(mounted) == "\n".join(local)
        assert _without_times(differences(self.local, self.mounted), times) == []
        return mounted


def _without_times(lines: list[str], times: bool) -> list[str]:
    """Differences without those of times alone, which `differences` tells as one tuple against another."""
    if times:
        return lines
    return [line for line in lines if " is not " not in line or not _only_time(line)]


def _only_time(line: str) -> bool:
    one, other = (text[text.rindex("(") :].strip("()").split(", ") for text in line.split(" is not "))
    return one[:4] + one[5:] == other[:4] + other[5:]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Input for all: files of a real tree with everything beside them that an archive must carry, and random bytes."""
    place = tmp_path_factory.mktemp("given")
    unwanted = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("email", "json", "asyncio", "xml", "unittest"):
        shutil.copytree(Path(sysconfig.get_path("stdlib")) / name, place / "tree" / name, ignore=unwanted)
    (place / "random").write_bytes(os.urandom(6_000_000))
    make_wheel(place / "hello_dfs-1-py3-none-any.whl")
    script = """
    cd tree; umask 002; echo a > plain; ln plain linked; ln -s nowhere dangling; mkfifo fifo; mknod null c 1 3
    mkdir acl
    setfattr -n user.k -v hello plain; setfattr -n trusted.t -v root plain; chown 33:44 fifo; chmod 4751 plain
    setfacl -m u:1234:rw,g:5:r plain; setfacl -d -m u:1234:rwx acl; echo b > acl/inherits
    "$PYTHON" -c 'import socket; socket.socket(socket.AF_UNIX).bind("socket")'
    truncate -s 20M sparse; printf x | dd of=sparse bs=1 seek=5M conv=notrunc status=none
    # Old: rsync looks at whole seconds only when it asks whether the time of a FIFO it has just made is right already.
    find . -print0 | xargs -0 touch -h -d '2001-02-03 04:05:06.123456789'
    touch -h -d '1931-02-03 04:05:06.123456789' dangling
    """
    run("bash", "-euc", script, cwd=place, env=ENVIRONMENT)
    return place


@pytest.fixture
def sides(cluster: RealCluster, place: Path, tmp_path: Path, given: Path) -> Iterator[Sides]:
    local = tmp_path / "local"
    local.mkdir()
    mounted = place / "here"
    mounted.mkdir()
    yield Sides(cluster, mounted, local, given)
    shutil.rmtree(place)


@pytest.fixture
def second(cluster: RealCluster, tmp_path: Path) -> Iterator[Path]:
    """Another mount of the same cluster."""
    point = tmp_path / "second"
    cluster.mount_again(point)
    yield point
    run("umount", point)


# -- copying trees -------------------------------------------------------------------------------------------------

SHOW = """
show() { (cd $1; getfacl -p plain acl acl/inherits; getfattr -m - -d plain; stat -c '%n %h %F %t %T %a %u %g %.9Y' *
    test $(stat -c %b sparse) -lt 2000 && echo sparse; cmp sparse $GIVEN/tree/sparse); }
"""


def test_rsync_carries_everything_and_has_nothing_to_do_the_second_time(sides: Sides) -> None:
    lines = sides.same(
        f"""{SHOW}
        again() {{ "$@"; echo "$1 $?"; echo "left to do: $("$@" -i)"; }}
        again rsync -aHAXS --numeric-ids $GIVEN/tree/ all; show all
        rm all/plain all/email/*.py; echo more > all/surplus; again rsync -aHAXS --delete $GIVEN/tree/ all; show all
        again rsync -a --link-dest=$PWD/all all/ snapshot; stat -c %h all/sparse snapshot/json/tool.py
        cp $GIVEN/random inplace; printf CHANGED | dd of=inplace bs=1 seek=3M conv=notrunc status=none
        again rsync -a --inplace --no-whole-file -I $GIVEN/random inplace | grep -v '^left'
        head -c 5000000 $GIVEN/random > longer; again rsync -a --append-verify $GIVEN/random longer
        for name in inplace longer; do cmp $GIVEN/random $name; done
        """
    )
    assert lines.count("left to do: ") == 4
    assert lines.count("sparse") == 2


def test_interrupted_rsync_and_cp_go_on(sides: Sides) -> None:
    lines = sides.same(
        """
        timeout -s INT 0.7 rsync -a --partial --bwlimit=2m $GIVEN/random part >/dev/null 2>&1; echo $?
        until test -e part; do sleep 0.05; done  # rsync's second process tidies up after the first has ended
        test $(stat -c %s part) -lt 6000000 && echo kept; ls -A
        rsync -a --partial $GIVEN/random part; echo $?; rsync -ai --partial $GIVEN/random part; cmp $GIVEN/random part
        mkfifo pipe; cp pipe copied & sleep 0.1; exec 5> pipe; cat $GIVEN/random >&5; sleep 0.2
        cmp $GIVEN/random copied >/dev/null 2>&1 || head -c $(stat -c %s copied) $GIVEN/random | cmp - copied
        kill -INT $!; kill -TERM $!; wait $!; echo $?; exec 5>&-; cp $GIVEN/random copied; echo $?; rm pipe
        """
    )
    assert "kept" in lines


def test_tar_and_cp_carry_everything(sides: Sides) -> None:
    lines = sides.same(
        f"""{SHOW}
        all="--xattrs --xattrs-include=* --acls --sparse --format=posix"
        tar $all -C $GIVEN/tree -cf first.tar . ; mkdir x; tar $all -xpf first.tar -C x; echo $?; show x
        tar -C x -df first.tar; echo $?
        tar $all -C x -cf second.tar .; mkdir y; tar $all -xpf second.tar -C y; echo $?; show y; rm *.tar
        cp -a x copied; echo $?; show copied; cp -al x hard; stat -c %h hard/json/tool.py; rm -r hard
        cp --sparse=always x/sparse holes; cp --sparse=never x/sparse full; cp --reflink=auto x/sparse same
        cmp holes full
        test $(stat -c %b holes) -lt 2000 && test $(stat -c %b full) -ge 40960 && echo blocks are right
        cp --reflink=always x/sparse clone 2>/dev/null; echo $?; mkdir -p deep/er; mv copied deep/er/
        mv y deep/er/copied/in
        mv deep/er shallow; mv shallow/copied/in y; mv -T y shallow/acl; show shallow/copied; rm -r x; echo $?
        rm full clone
        """,
    )
    assert "blocks are right" in lines
    assert lines.count("sparse") == 4


def test_zip_split_dd_and_du(sides: Sides) -> None:
    sides.same(
        """
        cp -r $GIVEN/tree/json $GIVEN/tree/xml .; zip -qr z.zip json xml; unzip -qt z.zip; mkdir u; unzip -q z.zip -d u
        diff -r json u/json; zip -qd z.zip 'json/*'; echo more > add; zip -q z.zip add; unzip -p z.zip add; rm z.zip
        R=$GIVEN/random; dd if=$R of=d1 bs=64k oflag=direct status=none; cmp $R d1
        dd if=$R of=d1 bs=8192 count=10 seek=20 conv=notrunc oflag=direct status=none; sha256sum d1
        dd if=$R of=d2 bs=4k count=1 seek=100000 status=none; stat -c %s d2
        dd if=$R of=d1 conv=notrunc oflag=append bs=1k count=3 status=none
        dd if=d1 iflag=direct bs=128k status=none | sha256sum
        dd if=d1 of=d3 conv=fsync,sparse bs=1M status=none; cmp d1 d3
        dd if=$R of=d4 oflag=dsync bs=1M count=2 status=none
        dd if=$R of=d5 oflag=sync,nofollow bs=1M count=2 status=none; cmp d4 d5
        dd of=d4 conv=excl </dev/null 2>&1 | head -1
        split -b 1M -d $R s.; ls s.*; cat s.* | cmp - $R; truncate -s 1G hole; du -k hole; du --apparent-size -k hole
        test $(du -sk d1 | cut -f1) -ge 5000 && echo enough; du --inodes -s u; rm hole d2
        """
    )


def test_find_and_ls(sides: Sides) -> None:
    sides.same(
        """
        cp -r $GIVEN/tree/email .; touch -d 2020-01-01 old; touch -d 2021-01-01 new; ln new also
        find . -newer old ! -type d | sort; find . -inum $(stat -c %i new) | sort; find . -links 2 | sort
        find . -empty | sort
        find . -size +40k | sort; find . -perm 664 | sort | wc -l; find . -newermt 2100-01-01
        find . -samefile also | sort
        find . -type f -print0 | xargs -0 sha256sum | sort | sha256sum; find email -delete; ls -d email
        mkdir l; for i in $(seq 300); do echo $i > l/$i; done; ls -laR l | awk '/^-/{print $1,$2,$3,$5,$9}'
        ls l | wc -l
        df --output=target . | tail -n +2 | wc -l; df -i . | wc -l
        """
    )


# -- programs that build things ------------------------------------------------------------------------------------


def test_git(sides: Sides) -> None:
    sides.same(
        """
        git -c init.defaultBranch=main init -q work; cd work; cp -r $GIVEN/tree/[a-z]*/ .; git add .
        git commit -qm first; echo $?
        for i in 1 2 3; do echo $i >> json/tool.py; git commit -qam $i; done; git clone -q . ../clone; cd ../clone
        git checkout -qb side HEAD~2; echo s > side; git add side; git commit -qm side; git rebase -q main; echo $?
        git log --format=%s%H | head -4; echo dirty >> json/tool.py; git stash -q; git status --porcelain
        git stash pop -q
        git status --porcelain; git checkout -q .; git worktree add -q ../tree HEAD~1; ls ../tree
        git worktree remove ../tree
        git gc -q; echo $?; git fsck --full; echo $?; git repack -adq; git prune; git grep -c import | sha256sum
        git archive HEAD | sha256sum; git mv json moved; git commit -qm moved; git clean -dxfq; git status --porcelain
        git init -q --bare ../bare; git push -q ../bare side; git -C ../bare fsck; cd ..
        find . -name .git | xargs rm -rf; rm -rf bare
        """
    )


def test_a_bare_repository_is_pushed_to_from_two_mounts(cluster: RealCluster, place: Path, second: Path) -> None:
    other = second / place.relative_to(cluster.mnt)

    def git(folder: Path, *words: str) -> str:
        return run("git", *words, cwd=folder, env=ENVIRONMENT).stdout

    git(place, "init", "-q", "--bare", "bare")
    git(place, "clone", "-q", "bare", "one")
    git(place / "one", "commit", "-q", "--allow-empty", "-m", "begin")
    git(place / "one", "push", "-q", "origin", "HEAD:main")
    git(other, "clone", "-q", "-b", "main", "bare", "two")
    for number in range(2):
        for folder in (place / "one", other / "two"):
            git(folder, "pull", "-q", "--rebase", "origin", "main")
            (folder / f"{folder.name}{number}").write_text(str(number))
            git(folder, "add", ".")
            git(folder, "commit", "-q", "-m", f"{folder.name} {number}")
            git(folder, "push", "-q", "origin", "HEAD:main")
    for folder in (place, other):
        git(folder / "bare", "fsck", "--full", "--strict")
        assert git(folder / "bare", "rev-list", "--count", "main") == "5\n"
        assert len(git(folder / "bare", "ls-tree", "--name-only", "main").splitlines()) == 4


MAKEFILE = """\
objects := $(patsubst %.c,%.o,$(wildcard *.c))
all: program
program: $(objects)
\t$(CC) -o $@ $^
%.o: %.c all.h
\t@echo compile $<
\t@$(CC) -g -c -o $@ $<
lib.a: $(objects)
\tar rcs $@ $^
"""


def test_make_j4_and_nothing_to_do_again(sides: Sides) -> None:
    lines = sides.same(
        f"""
        cat > Makefile <<'END'\n{MAKEFILE}END
        echo 'int f(int);' > all.h
        source() {{ printf '#include "all.h"\\n%s\\n' "$2" > $1.c; }}
        source main 'int main(void) {{ return f(8) == 8 ? 0 : 1; }}'
        source f 'int f(int x) {{ return x; }}'
        for i in $(seq 12); do source g$i "int g$i(int x) {{ return f(x) + $i; }}"; done
        make -s -j4 | sort; echo $?; ./program; echo $?; make -q -j4; echo "again $?"
        touch g7.c; make -s -j4; make -q; echo "again $?"; touch all.h; make -s -j4 | wc -l; make -s lib.a
        ar t lib.a | sort
        install -D -m 755 program inst/bin/program; strip inst/bin/program; inst/bin/program; echo $?
        rm -f *.o *.a program
        """
    )
    assert lines.count("again 0") == 2


def make_wheel(path: Path) -> None:
    """The smallest package that pip installs."""
    contents = {
        "hello_dfs/__init__.py": "def main(): print('hello from', __file__)\n",
        "hello_dfs-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: hello-dfs\nVersion: 1\n",
        "hello_dfs-1.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "hello_dfs-1.dist-info/entry_points.txt": "[console_scripts]\nhello-dfs = hello_dfs:main\n",
    }
    contents["hello_dfs-1.dist-info/RECORD"] = "".join(f"{name},,\n" for name in contents)
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in contents.items():
            wheel.writestr(name, text)


@pytest.mark.parametrize(
    ("venv", "pip"),
    [
        pytest.param("venv --without-pip", "$PYTHON -m pip --python v/bin/python", id="small"),
        pytest.param("venv", "v/bin/pip", id="with its own pip", marks=pytest.mark.soak),
    ],
)
def test_pip_installs_into_a_virtual_environment(sides: Sides, venv: str, pip: str) -> None:
    lines = sides.same(
        f"""
        $PYTHON -m {venv} v; echo $?; {pip} install -q --no-index $GIVEN/hello_dfs-1-py3-none-any.whl; echo $?
        v/bin/hello-dfs; echo $?; {pip} check; v/bin/python -m compileall -q v/lib/python*/site-packages/hello_dfs
        {pip} uninstall -qy hello-dfs 2>/dev/null; v/bin/python -c 'import hello_dfs' 2>&1 | tail -1; rm -rf v; echo $?
        """
    )
    assert any(line.startswith("hello from /here/v/lib") for line in lines)


# -- programs that replace and change files ------------------------------------------------------------------------


def test_editors(sides: Sides) -> None:
    sides.same(
        r"""
        seq 1000 > n; chmod 640 n; setfattr -n user.k -v kept n
        sed -i.bak 's/5/five/g' n; sed -i /3/d n; printf '1,10d\n$a\nlast\n.\nw\nq\n' | ed -s n; tail -1 n
        perl -pi -e 's/7/seven/' n
        edit() { vim.tiny -u NONE -N -es "$@" -c wq n; echo $?; ls -A; sha256sum n*; stat -c '%a %h' n; }
        edit -c 'set backup writebackup fsync swapfile' -c '%s/8/eight/ge'; ln n linked
        edit -c 'set backup backupcopy=no' -c '%s/9/nine/ge'; edit -c 'set nobackup backupcopy=yes' -c '%s/6/six/ge'
        sed -n 's/one/1/p' n; sort -o n n; sha256sum n; patch -s n <<END
--- n
+++ n
@@ -1,1 +1,1 @@
$(head -1 n | sed 's/^/-/')
+patched
END
        head -1 n; getfattr -d n
        """
    )


def test_fio_verifies_what_it_wrote(sides: Sides) -> None:
    lines = sides.same(
        """
        job() {
            fio --name=j --filename=f --size=2m --bs=4k --randseed=7 --verify=crc32c --verify_fatal=1 "$@" >out 2>err
            echo "fio $?"; cat err; rm -f f out err *.state
        }
        for engine in psync mmap libaio pvsync; do job --ioengine=$engine --rw=randrw; done
        job --ioengine=libaio --direct=1 --iodepth=8 --rw=randwrite; job --ioengine=psync --fsync=32 --rw=randwrite
        job --ioengine=psync --rw=randrw --bsrange=1k-64k --verify=md5
        """
    )
    assert lines.count("fio 0") == 7


def test_a_filesystem_in_a_file(sides: Sides) -> None:
    lines = sides.same(
        """
        trap 'umount m 2>/dev/null' EXIT
        truncate -s 32M image; mkfs.ext4 -q image; echo $?; mkdir m; mount -o loop image m; echo "mounted $?"
        cp -r $GIVEN/tree/json $GIVEN/random m; sync m/random; rm m/json/tool.py; umount m
        e2fsck -fn image >/dev/null 2>&1; echo $?
        mount -o loop,ro image m; cmp m/random $GIVEN/random; ls m m/json; umount m; rm image
        """
    )
    assert "mounted 0" in lines


# -- several processes ---------------------------------------------------------------------------------------------


def test_processes_meet(sides: Sides) -> None:
    """Locks, pipes, sockets, followers of a log, and programs that are run while somebody wants to write them."""
    sides.same(
        """
        mkfifo ready; (flock -x 9; echo > ready; sleep 0.3; echo released) 9>lock & read < ready
        flock -n -x lock true; echo $?; flock -w 60 lock echo "had it"; wait; flock -s lock flock -n -s lock echo shared
        (seq 50000 > ready &); sha256sum < ready
        "$PYTHON" - <<'END'
import os, socket
server = socket.socket(socket.AF_UNIX); server.bind("socket"); server.listen()
client = socket.socket(socket.AF_UNIX); client.connect("socket"); client.sendall(b"hello")
print(server.accept()[0].recv(100), os.path.exists("socket"))
END
        (echo data; cat) < socket; rm socket
        exec 7>>held; echo one >&7; mv held held.1; echo two >&7; echo three > held; cat held.1 held; exec 7>&-
        exec 7>>held; cp held held.2; : > held; echo four >&7; cat held; rm held; echo five >&7; ls; exec 7>&-
        printf '#!/bin/sh\\necho script $1\\n' > script; ./script a; chmod +x script; ./script a
        cp $(command -v sleep) program; ./program 0.4 & sleep 0.1; (echo x >> program); mv program renamed; wait
        ./renamed 0; echo $?
        """
    )


def test_inotifywait_sees_what_this_host_does(sides: Sides) -> None:
    sides.same(
        """
        mkdir watched; touch seen ready
        inotifywait -m -e create,modify,delete,move,close_write --format '%e %f' watched > seen 2> ready &
        until grep -q established ready; do sleep 0.05; done
        echo x > watched/a; echo y >> watched/a; mv watched/a watched/b; rm watched/b; mkdir watched/d; rmdir watched/d
        until grep -q 'DELETE.* d' seen; do sleep 0.05; done; kill $!; wait $! 2>/dev/null; cat seen
        """
    )


def test_tail_f_follows_what_is_appended_here_and_elsewhere(cluster: RealCluster, place: Path, second: Path) -> None:
    log = place / "log"
    log.touch()
    with subprocess.Popen(["tail", "-n", "+1", "-f", log], stdout=subprocess.PIPE) as tail:
        try:
            assert tail.stdout is not None
            for number, path in enumerate((log, second / log.relative_to(cluster.mnt)) * 2):
                line = f"{number} {path}\n"
                with path.open("a") as file:
                    file.write(line)
                # The test's time-out ends this if the line never comes.
                assert tail.stdout.readline().decode() == line
        finally:
            tail.kill()


def test_rm_r_of_a_tree_in_which_another_process_writes(place: Path) -> None:
    """Each may lose the race and says so then, in the same words as on ext4; in the end nothing is left.

    rm loses in two ways: the directory is not empty any more, or it was not there when rm looked and is when rm then
    unlinks it as if it were a file (EISDIR). mkdir -p loses if the directory is gone when it looks what is there.
    """
    root = place / "tree"
    lost_races = ("Directory not empty", "Is a directory")
    script = (
        "i=0; while [ $i -lt 200 ]; do mkdir -p tree/$((i % 7)) && echo $i > tree/$((i % 7))/f$i; i=$((i + 1)); done"
    )
    with subprocess.Popen(["bash", "-c", script], cwd=place, stderr=subprocess.PIPE, text=True) as writer:
        wait_until(root.exists, "the writer has begun")
        while writer.poll() is None:
            removed = run("rm", "-rf", root, check=False)
            assert all(line.endswith(lost_races) for line in removed.stderr.splitlines()), removed.stderr
        assert writer.stderr is not None
        complaints = writer.stderr.read().splitlines()
        assert [line for line in complaints if not line.endswith(("No such file or directory", "File exists"))] == []
    run("rm", "-rf", root)
    assert list(place.iterdir()) == []


# -- databases -----------------------------------------------------------------------------------------------------

MODES = ("delete", "truncate", "persist", "wal")


@pytest.mark.parametrize("mode", MODES)
def test_sqlite_with_two_writers(sides: Sides, mode: str) -> None:
    lines = sides.same(
        f"""
        sqlite3 db 'pragma journal_mode={mode}; create table t(x text)'
        for who in 1 2; do (for i in $(seq 15); do echo "insert into t values('$who $i');"; done |
            sqlite3 -bail -cmd '.timeout 60000' db; echo writer $?) & done; wait
        sqlite3 db 'pragma integrity_check; select count(distinct x) from t'
        sqlite3 db 'vacuum; create index i on t(x); pragma integrity_check'
        rm db*
        """
    )
    assert "30" in lines
    assert lines.count("ok") == 2


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    """A cluster of which processes are killed."""
    with running(tmp_path_factory.mktemp("killed")) as made:
        yield made


# Inserts for ever; a number is printed when its row is durable.
INSERT = """
import itertools, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("pragma journal_mode=" + sys.argv[2])
connection.execute("pragma synchronous=full")
connection.execute("create table t (number integer, filling text)")
for number in itertools.count():
    connection.execute("insert into t values (?, ?)", (number, "x" * 2000))
    print(number, flush=True)
"""


@pytest.mark.parametrize("mode", ["delete", "wal"])
@pytest.mark.parametrize("victim", ["sqlite", "metaserver", "mount"])
def test_sqlite_is_whole_after_kill_9(own: RealCluster, mode: str, victim: str) -> None:
    """Every row whose insertion was confirmed is there, and only a mount that dies ends the program that uses it."""
    database = own.mnt / f"{victim}-{mode}"
    words = [sys.executable, "-c", INSERT, str(database), mode]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        confirmed = [int(program.stdout.readline()) for _ in range(10)]
        if victim != "sqlite":
            own.kill(victim)
            if victim == "mount":
                own.unmount_lazily()
            own.up()
        if victim == "metaserver":
            # It goes on: 64 KiB of numbers would have to be in the pipe already for these to be old.
            confirmed += [int(program.stdout.readline()) for _ in range(10)]
        program.kill()
        confirmed += [int(line) for line in program.stdout.read().splitlines()]
        complaint = program.stderr.read()
        # Without its mount it fails at what it is about to do: with the database, or opening its next journal.
        failures = ("disk I/O error", "unable to open database file") if victim == "mount" else ()
        assert not complaint or any(text in complaint for text in failures), complaint
    text = run("sqlite3", database, "pragma integrity_check; select number from t order by number").stdout.split()
    assert text[0] == "ok"
    assert confirmed == list(range(len(confirmed)))
    # The last one may have been written without being confirmed.
    assert list(map(int, text[1:])) in (confirmed, [*confirmed, len(confirmed)])


# -- what is too big for every day ---------------------------------------------------------------------------------


@pytest.mark.soak
def test_ffmpeg(sides: Sides) -> None:
    """Segments that are written one after another, an index rewritten again and again, an mp4 that moves its own end to
    the front. Needs Debian's ffmpeg, which is not installed for ./test.sh."""
    lines = sides.same(
        """
        f() { ffmpeg -nostdin -hide_banner -loglevel error -y -threads 1 "$@"; echo "ffmpeg $?"; }
        f -f lavfi -i testsrc=duration=6:size=320x240:rate=25 -f lavfi -i sine=duration=6 \
            -bitexact -c:v mpeg4 -c:a aac in.mkv
        f -i in.mkv -bitexact -c copy -f segment -segment_time 1 seg%03d.mkv; ls
        f -i in.mkv -bitexact -c:v mpeg4 -c:a copy -movflags +faststart out.mp4; f -i out.mp4 -f null -
        f -i in.mkv -bitexact -c copy -f hls -hls_time 1 -hls_segment_filename hls%03d.ts index.m3u8
        for name in seg*.mkv; do echo "file $name"; done > list; f -f concat -i list -bitexact -c copy joined.mkv
        f -i in.mkv -bitexact -vf fps=2 image%04d.png; ls | wc -l
        """
    )
    assert lines.count("ffmpeg 0") == 7
