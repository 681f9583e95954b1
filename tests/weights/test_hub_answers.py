"""Does an answer of a hub, hostile or missing, do no more than raise: nothing outside the cache, no wait, no log?

In this process, with the client's settings patched; :mod:`test_weights_hub` has processes of its own.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time

import huggingface_hub
import pytest
from hub_server import running_hub
from huggingface_hub import constants, file_download

from pylo_integrations import Theta, cli
from pylo_integrations.weights import bootstrap, load_theta
from pylo_integrations.weights import hub as client

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def hub():
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return bootstrap().save(tmp_path_factory.mktemp("theta") / "theta.safetensors").read_bytes()


@pytest.fixture
def point_to(monkeypatch, tmp_path):
    """Has the client use an endpoint, and a cache deep inside ``tmp_path``."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "a" / "b" / "c" / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)

    def point(url: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        for module in (constants, file_download):  # older clients have it in both
            template = url + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        if hasattr(huggingface_hub, "close_session"):
            huggingface_hub.close_session()

    return point


def written(tmp_path):
    return {path for path in tmp_path.rglob("*") if "cache" not in path.parts and path.name not in ("a", "b", "c")}


# -- hostile answers -------------------------------------------------------------------------------------------------

OUTSIDE = [
    "../../../../../escaped",
    "/tmp/pylo_escaped",
    "..",
    ".",
    "a/b",
    "a\\b",
    "C:escaped",
    ".hidden",
    "a" * 300,
    " ",
]


def _cases():
    for name in OUTSIDE:
        for quoted in (f'"{name}"', f'W/"{name}"'):
            yield {"ETag": quoted}
        yield {"X_Linked_ETag": f'"{name}"'}
        yield {"X_Repo_Commit": name}
    for size in ("1000000000000", "9" * 400, "-5"):
        yield {"X_Linked_Size": size}


@pytest.mark.parametrize("file", ["theta.safetensors", "README.md"], ids=["found", "not found"])
def test_an_answer_that_would_leave_the_cache_is_refused_before_anything_is_written(
    file, hub, data, point_to, tmp_path
):
    point_to(hub.url)
    for index, answer in enumerate(_cases()):
        if file == "README.md" and "X_Repo_Commit" not in answer:
            continue  # only the commit matters of what is missing
        name = f"eve/{file[0].lower()}{index}"
        hub.add(name, {file: data})
        hub.answers[name] = [answer]
        with pytest.raises(ValueError, match=r"answers with the (etag|commit)|announces"):
            load_theta(f"hub:{name}", "small_fc_lopt")
        assert not [line for line in hub.requests(name) if line.startswith("GET")], "nothing was fetched"
        assert not list(tmp_path.rglob("*"))
    assert not os.path.exists("/tmp/pylo_escaped")


def test_who_answers_well_first_and_then_badly_is_refused_too(hub, data, point_to, tmp_path):
    point_to(hub.url)
    hub.add("eve/flips", {"theta.safetensors": data})
    hub.answers["eve/flips"] = [{}, {"ETag": '"../../../../../escaped"'}]
    with pytest.raises(ValueError, match="Do not trust this endpoint"):
        load_theta("hub:eve/flips", "small_fc_lopt")
    assert not written(tmp_path)


def test_a_session_that_the_client_makes_anew_is_no_way_around(hub, data, point_to, tmp_path, monkeypatch):
    """It does where a connection fails, and where anyone tells it to."""
    point_to(hub.url)
    hub.add("eve/renews", {"theta.safetensors": data})
    hub.answers["eve/renews"] = [{}, {"ETag": '"../../../../../escaped"'}]
    renew = getattr(huggingface_hub, "close_session", None) or huggingface_hub.utils.reset_sessions
    download, renewed = huggingface_hub.hf_hub_download, []

    def download_anew(*args, **kwargs):
        renew()
        renewed.append(huggingface_hub.utils.get_session())
        return download(*args, **kwargs)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download_anew)
    with pytest.raises(ValueError, match="answers with the etag .*Do not trust this endpoint"):
        load_theta("hub:eve/renews", "small_fc_lopt")
    assert renewed and not written(tmp_path)
    assert not [line for line in hub.requests("eve/renews") if line.startswith("GET")]


def test_a_connection_that_fails_is_no_way_around(hub, data, point_to, tmp_path, monkeypatch):
    """The client tries again by itself, with a new session."""
    point_to(hub.url)
    hub.add("eve/drops", {"theta.safetensors": data})
    hub.answers["eve/drops"] = [{}, {"ETag": '"../../../../../escaped"'}]
    client_session = type(huggingface_hub.utils.get_session())
    request, failures = client_session.request, []

    def failing(self, method, url, **kwargs):
        if method == "HEAD" and len(hub.requests("eve/drops")) == 1 and len(failures) < 2:
            failures.append(self)
            return request(self, method, "http://127.0.0.1:9", **kwargs)
        return request(self, method, url, **kwargs)

    monkeypatch.setattr(client_session, "request", failing)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises((OSError, ValueError), match=r"Do not trust this endpoint|cannot be reached"):
        load_theta("hub:eve/drops", "small_fc_lopt")
    assert failures and not written(tmp_path)


@pytest.mark.parametrize("place", ["file:///etc/passwd", "ftp://127.0.0.1/x", "//", "http://[", "/loop"])
def test_a_redirect_to_nowhere_is_an_error(place, hub, data, point_to, tmp_path):
    point_to(hub.url)
    name = "eve/sends"
    hub.add(name, {"theta.safetensors": data})
    hub.large.add("theta.safetensors")
    hub.answers[name] = [{"Location": place}]
    try:
        with pytest.raises((OSError, ValueError), match="hub:eve/sends"):
            load_theta(f"hub:{name}", "small_fc_lopt")
    finally:
        hub.large.discard("theta.safetensors")
    assert not written(tmp_path)


def test_usual_answers_pass(hub, data, point_to):
    point_to(hub.url)
    hub.add("ann/usual", {"theta.safetensors": data})
    for etag in ('"33a64df551425fcc55e4d42a148795d9f25f89d4"', 'W/"0815"', '"d41d8cd98f00b204e9800998ecf8427e-2"'):
        hub.answers["ann/usual"] = [{"ETag": etag}]
        assert load_theta("hub:ann/usual", "small_fc_lopt") == bootstrap()
    hub.answers["ann/usual"] = [{"ETag": '"0816"', "X_Linked_Size": ""}]  # which some do not tell
    assert load_theta("hub:ann/usual", "small_fc_lopt") == bootstrap()


def test_nobody_elses_requests_are_looked_at(hub, data, point_to):
    point_to(hub.url)
    hub.add("ann/asks", {"theta.safetensors": data})
    hub.add("bob/asks", {"model.bin": b"large"})
    hub.answers["bob/asks"] = [{"X_Linked_Size": "1000000000000"}]
    ask = file_download.get_hf_file_metadata
    with client._looking_at_answers("ann/asks"):
        url = huggingface_hub.hf_hub_url("bob/asks", "model.bin")
        assert file_download.get_hf_file_metadata(url).size == 10**12
        threads = [threading.Thread(target=load_theta, args=("hub:ann/asks", "small_fc_lopt")) for _ in range(3)]
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join()
    assert file_download.get_hf_file_metadata is ask
    assert load_theta("hub:ann/asks", "small_fc_lopt") == bootstrap()
    assert file_download.get_hf_file_metadata is ask


# -- no answers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def silent():
    """A port that takes connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        stop = threading.Event()
        held = []

        def hold():
            server.settimeout(0.05)
            while not stop.is_set():
                try:
                    held.append(server.accept()[0])
                except TimeoutError:
                    continue

        thread = threading.Thread(target=hold)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        stop.set()
        thread.join()
        for connection in held:
            connection.close()


@pytest.mark.parametrize("kind", ["refused", "unknown host", "switched off", "down", "silent"])
def test_without_a_hub_the_error_comes_soon_and_alone(kind, hub, data, point_to, silent, monkeypatch, caplog, capsys):
    url = {"refused": "http://127.0.0.1:9", "unknown host": "http://no-such-host.invalid", "silent": silent}
    point_to(url.get(kind, hub.url))
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    if kind == "switched off":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.faults["amoudgl/velo-4000"] = "down"
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with caplog.at_level(logging.INFO), pytest.raises(FileNotFoundError, match="cannot be reached") as raised:
        load_theta("hub:amoudgl/velo-4000", "velo")
    assert "What happened: " in str(raised.value) and "builtin:celo" in str(raised.value)
    assert not slept and not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert capsys.readouterr() == ("", "")
    assert len(hub.requests("amoudgl/velo-4000")) <= 1
    hub.log.clear()


def test_what_is_cached_needs_no_hub(hub, data, point_to, monkeypatch):
    point_to(hub.url)
    hub.add("ann/cached", {"theta.safetensors": data})
    assert load_theta("hub:ann/cached", "small_fc_lopt") == bootstrap()
    point_to("http://127.0.0.1:9")
    assert load_theta("hub:ann/cached", "small_fc_lopt") == bootstrap()
    point_to(hub.url)
    hub.repos["ann/cached"].private = True  # a repository that is gone, or not for us any more
    assert load_theta("hub:ann/cached", "small_fc_lopt") == bootstrap()


def test_a_cache_that_is_closed_to_us_is_not_called_empty(hub, data, point_to, monkeypatch, capsys):
    point_to(hub.url)
    hub.add("ann/closed", {"theta.safetensors": data})
    load_theta("hub:ann/closed", "small_fc_lopt")
    point_to("http://127.0.0.1:9")

    def closed(folder, onerror):
        onerror(PermissionError(13, "Permission denied", str(folder)))
        return iter(())

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", _absent)
    monkeypatch.setattr(os, "walk", closed)
    with pytest.raises(PermissionError, match="models--ann--closed.* cannot be read: no permission"):
        load_theta("hub:ann/closed", "small_fc_lopt")
    with pytest.raises(SystemExit):
        cli.main(["weights", "info", "hub:ann/closed"])
    assert "no permission" in capsys.readouterr().err


def _absent(*args, **kwargs):
    raise huggingface_hub.errors.LocalEntryNotFoundError("not here")


def test_theta_of_a_hub_goes_the_same_way(hub, data, point_to, tmp_path):
    point_to(hub.url)
    hub.add("eve/own", {"theta.safetensors": data})
    hub.answers["eve/own"] = [{"ETag": '"../../../../../escaped"'}]
    with pytest.raises(ValueError, match="Do not trust this endpoint"):
        Theta.from_hub("eve/own")
    assert not written(tmp_path)
