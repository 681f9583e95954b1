"""Do weights come from, and go to, the Hugging Face hub through its real client?

The client, in a process of its own (it reads its settings when imported), talks to a hub on loopback. Any other address
is refused in that process before anything is sent.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, running_hub
from published_layouts import layouts, published, random_arrays, write

from pylo_integrations import Theta
from pylo_integrations.weights.convert import OPTIMIZERS
from pylo_integrations.weights.hub import PUBLISHED, find_published

pytestmark = pytest.mark.timeout(180)
ROOT = Path(__file__).parents[2]

WORKER = """
import json, socket, sys, warnings
connect = socket.socket.connect
def only_loopback(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
        print(json.dumps({"left the machine": repr(address)}), file=sys.stderr, flush=True)
        raise OSError(f"{address} is not on this machine")
    return connect(self, address)
socket.socket.connect = only_loopback
import dataclasses
from pylo_integrations import Theta
from pylo_integrations.weights import hub, load_theta
for line in sys.stdin:
    names = dict(globals())
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            exec(json.loads(line), names)
        value = names.get("result")
        if isinstance(value, Theta):
            value = {"sha256": value.sha256, "name": value.name, "provenance": value.provenance}
        answer = {"result": value, "warnings": [str(w.message) for w in caught]}
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        answer = {"error": type(error).__name__, "message": str(error), "kinds": kinds}
    print("ANSWER " + json.dumps(answer), flush=True)
"""


class Answer(dict):
    """``result`` and ``warnings``, or ``error``, ``message`` and ``kinds``."""

    def __missing__(self, key):
        raise AssertionError(f"no {key} in {dict(self)}")


class Client:
    """A process that imported the package with given settings of the hub's client."""

    def __init__(self, endpoint: str, home: Path, **settings: str) -> None:
        kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.environment = {
            **{key: value for key, value in kept.items() if not key.startswith(("HF_", "HUGGING"))},
            **{"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": path},
            **{"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_ETAG_TIMEOUT": "5", "HF_HUB_DOWNLOAD_TIMEOUT": "5"},
            **{"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"},
            **settings,
        }
        home.mkdir(exist_ok=True)
        self.said = (home / f"stderr{len(list(home.glob('stderr*')))}").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
        )

    def run(self, code: str) -> Answer:
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return Answer(json.loads(line.removeprefix("ANSWER ")))
        raise AssertionError(f"the client process died: {Path(self.said.name).read_text()}")

    def load(self, weights: str) -> Answer:
        return self.run(f"result = load_theta({weights!r}, '')")

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert "left the machine" not in Path(self.said.name).read_text()


@pytest.fixture(scope="module")
def hub():
    with running_hub() as hub:
        hub.large |= {"model.safetensors", "theta.safetensors"}
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("huggingface")


@pytest.fixture(scope="module")
def online(hub, home):
    client = Client(hub.url, home, HF_TOKEN=TOKEN)
    yield client
    client.close()


@pytest.fixture(scope="module")
def offline(hub, home):
    client = Client(hub.url, home, HF_HUB_OFFLINE="1")
    yield client
    client.close()


@pytest.fixture(scope="module")
def theta():
    return Theta.from_arrays("small_fc", random_arrays("small_fc"), provenance="a test")


@pytest.fixture(scope="module")
def ours(theta, tmp_path_factory):
    return {"theta.safetensors": theta.save(tmp_path_factory.mktemp("ours") / "theta.safetensors").read_bytes()}


def downloads(hub, name):
    return [line for line in hub.requests(name) if line.startswith("GET ")]


# -- one file, all that may happen to it -----------------------------------------------------------------------------


def test_a_first_download_a_cache_hit_and_an_offline_hit(hub, online, offline, theta, ours):
    commit = hub.add("ann/first", ours, "v1")
    assert online.load("hub:ann/first")["result"]["sha256"] == theta.sha256
    assert len(downloads(hub, "ann/first")) == 1
    for address in ("hub:ann/first", "hub:ann/first@v1", f"hub:ann/first@{commit}"):
        assert online.load(address)["result"]["sha256"] == theta.sha256
    assert len(downloads(hub, "ann/first")) == 1, "a cached file was downloaded again"
    seen = len(hub.log)
    for address in ("hub:ann/first", "hub:ann/first@v1", f"hub:ann/first@{commit}"):
        assert offline.load(address)["result"]["sha256"] == theta.sha256
    assert len(hub.log) == seen, "offline, something was asked"


def test_who_wants_only_local_files_gets_only_those(hub, online, theta, ours):
    hub.add("ann/local", ours)
    code = "result = load_theta('hub:ann/local', '', local_files_only=True)"
    assert online.run(code)["error"] == "FileNotFoundError" and hub.requests("ann/local") == []
    online.load("hub:ann/local")
    seen = len(hub.log)
    assert online.run(code)["result"]["sha256"] == theta.sha256 and len(hub.log) == seen


def test_a_new_commit_is_seen_and_a_pinned_one_stays(hub, online, theta, ours, tmp_path):
    old = hub.add("ann/moving", ours)
    assert online.load("hub:ann/moving")["result"]["sha256"] == theta.sha256
    newer = Theta.from_arrays("small_fc", random_arrays("small_fc", seed=1))
    hub.add("ann/moving", {"theta.safetensors": newer.save(tmp_path / "x.safetensors").read_bytes()})
    assert online.load("hub:ann/moving")["result"]["sha256"] == newer.sha256
    assert online.load(f"hub:ann/moving@{old}")["result"]["sha256"] == theta.sha256


def test_an_offline_miss_says_what_to_do(hub, offline, ours):
    hub.add("ann/absent", ours)
    seen = len(hub.log)
    for address, command in [
        ("ann/absent", "hf download ann/absent theta.safetensors`"),
        ("ann/absent@v2", "hf download ann/absent theta.safetensors --revision v2`"),
        ("amoudgl/velo-4000", "hf download amoudgl/velo-4000 theta.state`"),
    ]:
        failed = offline.load(f"hub:{address}")
        assert failed["error"] == "FileNotFoundError"
        assert f"weights='hub:{address}'" in failed["message"] and command in failed["message"]
        assert f"`pylo weights convert hub:{address} theta.safetensors`" in failed["message"]
        assert "builtin:small_fc_bootstrap" in failed["message"]
    assert len(hub.log) == seen


@pytest.mark.slow
def test_an_unreachable_hub_is_like_being_offline(hub, home, online, theta, ours):
    hub.add("ann/reached", ours)
    online.load("hub:ann/reached")
    client = Client("http://127.0.0.1:9", home)  # the discard port: nobody listens
    try:
        assert client.load("hub:ann/reached")["result"]["sha256"] == theta.sha256
        failed = client.load("hub:ann/unreached")
        assert failed["error"] == "FileNotFoundError" and "hf download ann/unreached" in failed["message"]
    finally:
        client.close()


def test_a_hub_that_is_down_or_is_none(hub, online, theta, ours):
    hub.add("ann/odd", ours)
    online.load("hub:ann/odd")
    for fault in ("down", "strange"):
        hub.faults["ann/odd"] = fault
        assert online.load("hub:ann/odd")["result"]["sha256"] == theta.sha256
    hub.faults["ann/never"] = "strange"
    failed = online.load("hub:ann/never")
    assert failed["error"] == "FileNotFoundError" and "HF_ENDPOINT is no hub" in failed["message"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ann/nobody", "no such repository or revision"),
        ("ann/there@no-such-tag", "no such repository or revision"),
        ("ann/there@" + "0" * 40, "no such repository or revision"),
        ("ann/there", "hub:ann/there has no theta.safetensors or theta.state or config.json"),
        ("amoudgl/celo", "hub:amoudgl/celo has no theta.state"),
    ],
)
def test_what_the_hub_does_not_have_is_named(hub, online, address, message):
    hub.add("ann/there", {"README.md": b"nothing else"})
    if "celo" in address:
        hub.repos.pop("amoudgl/celo", None)
        hub.add("amoudgl/celo", {"README.md": b"nothing else"})
    failed = online.load(f"hub:{address}")
    assert failed["error"] == "FileNotFoundError" and message in failed["message"], failed
    hub.repos.pop("amoudgl/celo", None)


@pytest.mark.slow
def test_a_private_repository_needs_a_token(hub, home, online, theta, ours):
    hub.add("ann/secret", ours)
    hub.repos["ann/secret"].private = True
    assert online.load("hub:ann/secret")["result"]["sha256"] == theta.sha256
    stranger = Client(hub.url, home / "stranger")
    try:
        failed = stranger.load("hub:ann/secret")
        assert failed["error"] == "FileNotFoundError" and "not for you" in failed["message"]
    finally:
        stranger.close()


def test_a_renamed_repository_is_followed(hub, online, theta, ours):
    hub.add("ann/new-name", ours)
    hub.renamed["ann/old-name"] = "ann/new-name"
    assert online.load("hub:ann/old-name")["result"]["sha256"] == theta.sha256


def test_a_download_that_ends_early_is_an_error_and_leaves_nothing(hub, online, theta, ours):
    hub.add("ann/short", ours)
    hub.faults["ann/short"] = "short"
    failed = online.load("hub:ann/short")
    assert failed["error"] == "OSError" and "fetching theta.safetensors failed" in failed["message"]
    del hub.faults["ann/short"]
    assert online.load("hub:ann/short")["result"]["sha256"] == theta.sha256


def test_a_connection_that_breaks_does_no_harm(hub, online, theta, ours):
    """Newer clients try again by themselves."""
    hub.add("ann/hangup", ours)
    hub.faults["ann/hangup"] = "hangup"
    answer = online.load("hub:ann/hangup")
    if "error" in answer:
        assert answer["error"] == "OSError" and "try again" in answer["message"]
        answer = online.load("hub:ann/hangup")
    assert answer["result"]["sha256"] == theta.sha256 and len(downloads(hub, "ann/hangup")) == 2


def test_a_file_that_is_damaged_on_the_hub_is_refused(hub, online, ours):
    data = ours["theta.safetensors"]
    flipped = bytearray(data)
    flipped[-3] ^= 1
    for name, damaged, message in [
        ("cut", data[:-100], "not a readable safetensors file"),
        ("flipped", bytes(flipped), "is damaged: its sha256 is"),
    ]:
        hub.add(f"ann/{name}", {"theta.safetensors": damaged})
        failed = online.load(f"hub:ann/{name}")
        assert failed["error"] == "ValueError" and message in failed["message"]


def test_a_file_with_another_digest_than_the_catalogue_s_is_refused(hub, online):
    [files] = layouts()["flax_small_fc"]
    commit = hub.add("amoudgl/pinned", files)
    digest = hashlib.sha256(files["theta.state"]).hexdigest()
    code = """
part = hub.Repository("amoudgl/pinned", "theta.state", {revision!r}, {sha256!r})
before, hub.PUBLISHED = hub.PUBLISHED, (hub.Published("pinned", "small_fc", (part,), ""),)
try:
    result = load_theta("hub:amoudgl/pinned{at}", "")
finally:
    hub.PUBLISHED = before
"""
    found = online.run(code.format(revision=commit, sha256=digest, at=""))["result"]
    assert found["name"] == "small_fc" and f"amoudgl/pinned@{commit}" in found["provenance"]
    failed = online.run(code.format(revision=commit, sha256="0" * 64, at=""))
    assert failed["error"] == "ValueError" and f"has sha256 {digest}, expected 000" in failed["message"]
    # Who asks for another revision asks for another file.
    assert "result" in online.run(code.format(revision=commit, sha256="0" * 64, at="@main"))


# -- published layouts ----------------------------------------------------------------------------------------------


def serve(hub, entry, folders):
    return [hub.add(part.name, files) for part, files in zip(entry.repositories, folders, strict=True)]


LAYOUT_OF = {
    "mulo": "MetaMLP",
    "elo": "MetaMLP",
    "elo_celo2": "CELO2MLP",
    "velo": "VeLO",
    "velo_4000": "flax_velo",
    "velo_s": "flax_velo",
    "celo": "flax_celo",
    "celo_adam": "flax_celo_adam",
    "adafac_mlp_lopt": "flax_small_fc",
    "celo2": "flax_celo2",
    "celo2_base": "flax_celo2",
}


@pytest.mark.parametrize("entry", [entry for entry in PUBLISHED if entry.optimizer], ids=lambda entry: entry.name)
def test_every_published_repository_loads_in_its_layout(entry, hub, online, offline):
    commits = serve(hub, entry, layouts()[LAYOUT_OF[entry.name]])
    answers = [client.load(f"hub:{part.name}") for client in (online, offline) for part in entry.repositories]
    for part, commit in zip(entry.repositories, commits, strict=True):
        assert len(downloads(hub, f"{part.name}/{commit}")) == (part.filename in hub.large)
        hub.repos.pop(part.name)
    assert len({answer["result"]["sha256"] for answer in answers}) == 1
    found = answers[0]["result"]
    assert found["name"] == entry.optimizer and answers[0]["warnings"] == []
    for part, commit in zip(entry.repositories, commits, strict=True):
        assert f"huggingface.co/{part.name}@{commit}" in found["provenance"]


def test_the_authors_own_celo_file_loads_from_the_hub(hub, online):
    files = {"theta.state": published("celo.theta.state").read_bytes()}
    hub.add("someone/mirror-of-celo", files)
    assert online.load("hub:someone/mirror-of-celo")["result"]["name"] == "celo"


def test_other_repositories_are_recognised_by_their_files(hub, online, offline, theta, ours):
    [metamlp], [flax] = layouts()["MetaMLP"], layouts()["flax_small_fc"]
    hub.add("bob/metamlp", metamlp)
    hub.add("bob/flax", {**flax, "config.json": b"{}"})
    hub.add("bob/ours", {**ours, **metamlp, **flax})
    answers = {}
    for client in (online, offline):
        for name in ("metamlp", "flax", "ours"):
            answers[name] = client.load(f"hub:bob/{name}")
        assert [answers[name]["result"]["name"] for name in answers] == ["mulo", "small_fc", "small_fc"]
    assert answers["ours"]["result"]["sha256"] == theta.sha256
    assert any("taken for MuLO's" in warning for warning in answers["metamlp"]["warnings"])


def test_a_language_model_is_refused_before_it_is_downloaded(hub, online):
    config = {"architectures": ["GPT2LMHeadModel"], "n_layer": 12, "hidden_size": 768}
    hub.add("bob/gpt", {"config.json": json.dumps(config).encode(), "model.safetensors": b"\0" * 100_000})
    failed = online.load("hub:bob/gpt")
    assert failed["error"] == "ConversionError" and "ValueError" in failed["kinds"]
    assert "is not the config of one of the published modules" in failed["message"]
    assert not [line for line in hub.requests("bob/gpt") if "model.safetensors" in line]


def test_half_of_velo_alone_and_an_optimizer_without_rule_say_so(hub, online):
    [rnn, _] = layouts()["VeLO"]
    hub.add("bob/rnn", rnn)
    assert "VeLO_RNN does not make one theta" in online.load("hub:bob/rnn")["message"]
    failed = online.load("hub:amoudgl/rnn-mlp-lopt")
    assert failed["error"] == "ValueError" and "no rule" in failed["message"]


# -- users' own ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("large", [True, False], ids=["lfs", "regular"])
def test_push_and_load_again(large, hub, online, theta, ours, tmp_path):
    (hub.large.add if large else hub.large.discard)("theta.safetensors")
    name = f"carl/{'large' if large else 'small'}"
    write(tmp_path, ours)
    path = str(tmp_path / "theta.safetensors")
    code = f"result = Theta.load({path!r}).push_to_hub({name!r}, private=True)"
    try:
        commit = online.run(code)["result"]
        assert re.fullmatch(r"[0-9a-f]{40}", commit) and hub.repos[name].private
        again = online.run(code)["result"]  # now that the repository exists
        for oid in (commit, again):
            assert list(hub.repos[name].commits[oid]) == ["theta.safetensors"]
        for address in (f"hub:{name}", f"hub:{name}@{commit}"):
            assert online.load(address)["result"]["sha256"] == theta.sha256
        for arguments in ("", f", {commit!r}", f", sha256={theta.sha256!r}", ", 'main'"):
            found = online.run(f"result = Theta.from_hub({name!r}{arguments})")
            assert found["result"] == {"sha256": theta.sha256, "name": "small_fc", "provenance": "a test"}
        failed = online.run(f"Theta.from_hub({name!r}, sha256='0' * 64)")
        assert failed["error"] == "ValueError" and f"{theta.sha256}, expected 0000" in failed["message"]
    finally:
        hub.large.add("theta.safetensors")


@pytest.mark.slow
def test_push_without_a_token_offline_or_to_no_repository_changes_nothing(hub, home, offline, online, ours, tmp_path):
    write(tmp_path, ours)
    code = f"Theta.load({str(tmp_path / 'theta.safetensors')!r}).push_to_hub({{!r}})"
    stranger = Client(hub.url, home / "stranger")
    try:
        failed = stranger.run(code.format("carl/no-token"))
        assert "OSError" in failed["kinds"] and "hf auth login" in failed["message"]
    finally:
        stranger.close()
    failed = offline.run(code.format("carl/offline"))
    assert "OSError" in failed["kinds"] and "hub:carl/offline: pushing theta.safetensors failed" in failed["message"]
    assert online.run(code.format("a/b/c"))["error"] == "ValueError"
    assert not [name for name in hub.repos if name in ("carl/no-token", "carl/offline", "a/b/c")]


def test_from_hub_offline_says_what_to_do(offline):
    failed = offline.run("Theta.from_hub('carl/none', 'v1')")
    assert failed["error"] == "FileNotFoundError"
    assert "hf download carl/none theta.safetensors --revision v1" in failed["message"]


@pytest.mark.slow
def test_the_command_line_fetches_and_converts_in_one_go(hub, online, tmp_path):
    [metamlp] = layouts()["MetaMLP"]
    hub.add("DiamondXL/elo", metamlp)
    done = subprocess.run(
        [sys.executable, "-m", "pylo_integrations.cli", "weights", "convert", "hub:DiamondXL/elo", "elo.safetensors"],
        cwd=tmp_path,
        env=online.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    theta = Theta.load(tmp_path / "elo.safetensors")
    assert theta == Theta.from_arrays("elo", random_arrays("mulo")) and "DiamondXL/elo@" in theta.provenance
    hub.repos.pop("DiamondXL/elo")


# -- the catalogue ---------------------------------------------------------------------------------------------------


def test_the_catalogue_of_published_weights_is_consistent():
    names = [entry.name for entry in PUBLISHED]
    repositories = [part.name for entry in PUBLISHED for part in entry.repositories]
    assert len(set(names)) == len(names) and len(set(repositories)) == len(repositories) == 13
    page = (ROOT / "docs" / "weights.md").read_text()
    assert [name for name in repositories if name not in page] == []
    for entry in PUBLISHED:
        assert entry.optimizer in (None, *OPTIMIZERS)
        for part in entry.repositories:
            assert find_published(part.name) is entry and part.filename in ("theta.state", "model.safetensors")
            assert (part.sha256 is None) or part.revision, "a digest belongs to a revision"
    assert find_published("someone/else") is None
