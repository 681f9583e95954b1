"""Is a damaged or hostile file of weights ever more than a refused file? A thousand corruptions of every layout.

Whatever is done to the bytes, reading ends in weights or in a ``ValueError`` that begins with the file's name, at once,
without executing anything, and within 1 GiB of address space beyond what the process has.
"""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import pytest
from published_layouts import layouts, random_arrays, write
from thetas import slow_unless

from pylo_integrations import Theta
from pylo_integrations.weights.convert import ConversionError, convert, read_foreign
from pylo_integrations.weights.theta import ARCHITECTURES

resource = pytest.importorskip("resource")

CORRUPTIONS = 1000
QUICK = ("flax_celo", "VeLO")
"""One layout of each format; the others differ in names and shapes."""
HOSTILE_NUMBERS = (b"-1", b"1e999", b"99999999999", b"18446744073709551615", b"340282366920938463463374607431768211456")
FORBIDDEN = {"exec", "os.system", "os.exec", "subprocess.Popen", "pickle.find_class", "socket.connect", "open.write"}


def corrupt(data: bytes, rng: random.Random) -> bytes:
    """One corruption, more often near the front, where headers are."""
    data = bytearray(data)

    def place() -> int:
        return rng.randrange(min(len(data), rng.choice([16, 300, 3000, len(data)])) or 1)

    kind = rng.choice(["bits", "cut", "insert", "delete", "ones", "zeros", "number", "nest", "repeat", "garbage"])
    at, size = place(), rng.choice([1, 1, 2, 4, 8, 64])
    if kind == "bits":
        for _ in range(rng.randint(1, 8)):
            data[place()] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "insert":
        data[at:at] = rng.randbytes(size)
    elif kind == "delete":
        del data[at : at + size]
    elif kind in ("ones", "zeros"):
        data[at : at + size] = (b"\xff" if kind == "ones" else b"\0") * size
    elif kind == "number":  # in JSON, where lengths and shapes are written out
        digits = list(re.finditer(rb"\d+", bytes(data[:5000])))
        if digits:
            found = rng.choice(digits)
            data[found.start() : found.end()] = rng.choice(HOSTILE_NUMBERS)
    elif kind == "nest":
        data[at:at] = rng.choice([b"\x91", b"\x81\xa1a", b"[", b'{"a":']) * rng.choice([10, 1000, 50_000])
    elif kind == "repeat":
        data[at:at] = data[at : at + rng.choice([10, 100, 1000])] * rng.choice([1, 2, 50])
    else:
        data[:] = rng.randbytes(rng.randrange(200))
    return bytes(data)


class Watch:
    """Sees what Python's audit events tell; hooks cannot be taken back, so there is one, on or off."""

    on = False
    seen: list[str] = []

    @classmethod
    def hook(cls, event, args):
        if cls.on and event in FORBIDDEN:
            cls.seen.append(event)


@pytest.fixture(scope="module")
def hook():
    sys.addaudithook(Watch.hook)


@pytest.fixture
def watched(hook):
    """Little memory, and an eye on what is executed; only while ``with`` lasts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if statm.exists():
        pages = int(statm.read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), hard))
    Watch.seen.clear()
    try:
        yield Watch
    finally:
        Watch.on = False
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def attempt(watch, read, names):
    """Whether ``read`` succeeded; anything but a named error fails the test."""
    watch.on = True
    try:
        read()
    except ValueError as error:
        watch.on = False
        assert str(error).startswith(names), error
        assert len(str(error)) < 3000
        return False
    finally:
        watch.on = False
    return True


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:.*MuLO's and ELO's files look the same")
@pytest.mark.parametrize("layout", [slow_unless(name in QUICK, name) for name in sorted(layouts())])
def test_a_corrupt_file_is_refused_by_name_and_does_no_harm(layout, tmp_path, watched):
    folders = layouts()[layout]
    paths = [write(tmp_path / str(number), files) for number, files in enumerate(folders)]
    names = tuple(str(path) for path in paths)
    known = read_foreign(*paths).architecture in ARCHITECTURES
    read = convert if known else read_foreign
    read(*paths)  # imports what it needs
    rng = random.Random(layout)
    outcomes = []
    for _ in range(CORRUPTIONS):
        number = rng.randrange(len(folders))
        name = rng.choice(sorted(folders[number]))
        target = paths[number] / name
        target.write_bytes(corrupt(folders[number][name], rng))
        outcomes.append(attempt(watched, lambda: read(*paths), names))
        target.write_bytes(folders[number][name])
    read(*paths)
    assert watched.seen == []
    assert any(outcomes) and outcomes.count(False) > CORRUPTIONS / 2  # a weight or two changed is no damage to see


@pytest.mark.timeout(120)
def test_a_corrupt_theta_of_ours_is_refused_by_name_and_does_no_harm(tmp_path, watched):
    training = {"tasks": ["digits"], "steps": 3}
    theta = Theta.from_arrays("small_fc", random_arrays("small_fc"), {"step_mult": 0.5}, training=training)
    path = theta.save(tmp_path / "theta.safetensors")
    whole, rng, outcomes = path.read_bytes(), random.Random(0), []
    for _ in range(CORRUPTIONS):
        path.write_bytes(corrupt(whole, rng))
        outcomes.append(attempt(watched, lambda: Theta.load(path), str(path)))
        # What is not covered by its digest, such as its name, may change; weights may not.
        assert not outcomes[-1] or Theta.load(path) == theta
    assert watched.seen == [] and outcomes.count(False) > CORRUPTIONS / 2


def test_the_watch_sees_what_it_must_see(watched):
    assert not attempt(watched, lambda: (_ for _ in ()).throw(ConversionError("file: bad")), "file")
    watched.on = True
    exec("1")
    watched.on = False
    assert watched.seen == ["exec"]
    with pytest.raises(MemoryError):
        bytearray(3 << 30)
