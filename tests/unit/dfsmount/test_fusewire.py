"""The kernel's protocol: bytes as a kernel sends and expects them."""

import stat
import struct

import pytest

from dfsmount import fusewire
from dfsmount.fusewire import Flag

# As Linux 6.18 sent it: 7.45, its flags, and flags of later protocols that follow.
INIT = bytes.fromhex("07000000 2d000000 00000200 fbffff73 ff000000") + bytes(44)


def test_the_handshake_asks_for_what_libfuse_asked_for() -> None:
    # What libfuse 3.14 answered to INIT for pyfuse3 3.5, but that it said INIT_EXT (1 << 30) without having any, and
    # that we take setuid and setgid away ourselves (1 << 28).
    expected = bytes.fromhex("07000000 1f000000 00000200 29b05010 0000 0000 00001000 01000000 0001 0000") + bytes(32)
    assert fusewire.encode_init(INIT) == expected
    older = bytearray(INIT)
    older[15] &= 0xEF
    assert fusewire.encode_init(bytes(older))[12:16] == bytes.fromhex("29b05000")


@pytest.mark.parametrize(("major", "minor", "flags"), [(8, 1, -1), (7, 30, -1), (7, 31, ~Flag.DO_READDIRPLUS)])
def test_a_kernel_without_what_is_needed_is_refused(major: int, minor: int, flags: int) -> None:
    with pytest.raises(ValueError, match="too old"):
        fusewire.encode_init(struct.pack("<IIII", major, minor, 4096, flags & 0xFFFFFFFF))


def test_an_entry_is_what_fuse_entry_out_says() -> None:
    entry = fusewire.encode_entry(
        5, 7, 1.5, 0.25, 1 << 40, 9, (-1, 1_500_000_000, 3), stat.S_IFREG | 0o644, 2, (10, 11), 0x10203, 65536
    )
    assert entry[:40] == struct.pack("<QQQQII", 5, 7, 1, 0, 500_000_000, 250_000_000)
    assert entry[40:64] == struct.pack("<QQQ", 5, 1 << 40, 9)
    # Before 1970: seconds are rounded down, nanoseconds count up from there.
    assert entry[64:100] == struct.pack("<qqqIII", -1, 1, 0, 999_999_999, 500_000_000, 3)
    assert entry[100:] == struct.pack("<IIIIIII", 0o100644, 2, 10, 11, 0x10203, 65536, 0)
    answer = fusewire.attributes_of(entry)
    assert len(answer) == fusewire.ATTRIBUTES_OUT_BYTES
    assert answer[:16] == struct.pack("<QII", 0, 250_000_000, 0)
    assert answer[16:] == entry[40:]


def test_what_is_believed_for_very_long_fits() -> None:
    entry = fusewire.encode_entry(1, 0, float("inf"), 1e30, 0, 0, (0, 0, 0), 0, 0, (0, 0), 0, 0)
    assert struct.unpack_from("<QQII", entry, 16) == (1 << 40, 1 << 40, 0, 0)


def test_changes_of_attributes() -> None:
    body = struct.pack(
        "<IIQQQqqqIIIIIIII", 0x7F, 0, 3, 99, 0, -2, 5, 0, 500, 600, 0, 0o100755, 0, 1000, 1001, 0
    )  # fmt: skip
    changes = fusewire.decode_changes(body, 0)
    assert (changes.handle, changes.st_mode, changes.st_uid, changes.st_gid) == (3, 0o100755, 1000, 1001)
    assert (changes.st_size, changes.st_atime_ns, changes.st_mtime_ns) == (99, -1_999_999_500, 5_000_000_600)
    assert all(changes[-7:-1])
    assert not changes.kills_special_bits
    now = fusewire.decode_changes(struct.pack("<I", 0x9B0) + body[4:], 77)
    assert (now.st_atime_ns, now.st_mtime_ns, now.handle) == (77, 77, None)
    assert (now.update_mode, now.update_size, now.update_atime, now.update_mtime) == (False, False, True, True)
    assert now.kills_special_bits


def test_names_and_forgets() -> None:
    assert fusewire.first_name(b"a\xff\0rest\0") == b"a\xff"
    assert fusewire.two_names(b"old\0new\0") == (b"old", b"new")
    body = struct.pack("<II", 2, 0) + struct.pack("<QQQQ", 5, 1, 6, 2)
    assert fusewire.decode_forgets(body) == [(5, 1), (6, 2)]


def test_listed_entries_are_padded() -> None:
    listed = fusewire.encode_listed(bytes(128), 4, 8, b"name5", 17)
    assert listed == bytes(128) + struct.pack("<QQII", 4, 17, 5, 8) + b"name5\0\0\0"
    assert len(fusewire.encode_listed(bytes(128), 4, 8, b"8 bytes.", 1)) == 128 + 24 + 8


def test_a_message_about_an_inode() -> None:
    assert fusewire.invalidate_inode(9, -1, 0) == struct.pack("<IiQQqq", 40, 2, 0, 9, -1, 0)
