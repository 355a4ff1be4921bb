"""Tenants' KV caches do not meet: what salt the engines get, and where its secret comes from."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.errors import ConfigError
from core.handoff import Handoff, Peer, Role
from proxy.body import read_body
from proxy.fields import Kind
from proxy.server import parse_options
from proxy.settings import Settings
from proxy.split import FIELDS, Endpoint, prefill_body
from proxy.tenant import Tenants, load_secret
from tests.fakes.engine import FakeEngine
from tests.proxy.fleet import Fleet, engines, running, until

Pair = tuple[FakeEngine, FakeEngine]
CHAT, COMPLETION = Endpoint.CHAT.value, Endpoint.COMPLETION.value
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4},
    COMPLETION: {"prompt": "hello", "max_tokens": 4},
    "/v1/responses": {"model": "fake", "input": "hello"},
    "/v1/messages": {"model": "fake", "max_tokens": 4, "messages": [{"role": "user", "content": "hello"}]},
    "/v1/embeddings": {"model": "fake", "input": "hello"},
    "/tokenize": {"model": "fake", "prompt": "hello"},
}
TICKET = Handoff("req-1", Peer("d", "tcp://d", "b1"))
KEYS = ("sk-first-0123456789", "sk-second-0123456789")


def salts(fleet: Fleet, pair: Pair, key: str | None, path: str = COMPLETION, **fields: Any) -> tuple[Any, Any]:
    """The salts that P and D get of one request; "absent" where the body has none."""
    before = [len(engine.received) for engine in pair]
    headers = {"Authorization": f"Bearer {key}".rstrip()} if key is not None else {}
    pair[1].behaviour.hold = True
    with fleet.in_background(lambda: fleet.client.post(path, json=BODIES[path] | fields, headers=headers)) as answers:
        until(lambda: all(len(e.received) > n for e, n in zip(pair, before, strict=True)), "both legs have it")
        pair[1].behaviour.hold = False
    assert answers[0].status_code == 200
    first, second = (engine.received[-1].body.get("cache_salt", "absent") for engine in pair)
    return first, second


@contextlib.contextmanager
def started(**options: Any) -> Iterator[tuple[Fleet, Pair]]:
    """A proxy with these settings, and P and D."""
    settings = Settings(health_poll_s=0.02, report_wait_s=0.3, takeover_s=0.1, **options)
    with running(settings) as fleet, engines(Role.PREFILL, Role.DECODE) as (prefill, decode):
        fleet.join(prefill, decode)
        yield fleet, (prefill, decode)


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_two_keys_have_two_salts_and_one_key_has_one_on_both_legs_and_every_time(
    fleet: Fleet, pair: Pair, path: str
) -> None:
    first, again, second = (salts(fleet, pair, key, path) for key in (KEYS[0], *KEYS))
    assert first == again
    assert first[0] == first[1]
    assert second[0] == second[1]
    assert first[0] != second[0]
    assert re.fullmatch(r"[\w-]{22}", first[0]), "vLLM refuses @, /, \\ and NUL"


def test_nothing_that_an_engine_gets_in_a_body_has_the_key_in_it(fleet: Fleet, pair: Pair) -> None:
    salt = salts(fleet, pair, KEYS[0])[0]
    for engine in pair:
        assert KEYS[0].removeprefix("sk-") not in engine.received[-1].raw.decode()
    assert base64.urlsafe_b64decode(salt + "==") not in KEYS[0].encode()


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_a_clients_own_salt_is_passed_on_as_it_is(fleet: Fleet, pair: Pair, path: str) -> None:
    assert salts(fleet, pair, KEYS[0], path, cache_salt="mine é") == ("mine é", "mine é")
    assert salts(fleet, pair, KEYS[0], path, cache_salt="") == ("", ""), "vLLM says what is wrong with it"


def test_who_has_neither_key_nor_salt_gets_none(fleet: Fleet, pair: Pair) -> None:
    assert salts(fleet, pair, None) == ("absent", "absent")
    assert salts(fleet, pair, "") == ("absent", "absent")
    assert salts(fleet, pair, None, cache_salt="mine") == ("mine", "mine")


def test_an_explicit_null_is_no_way_out_of_ones_tenant(fleet: Fleet, pair: Pair) -> None:
    plain = salts(fleet, pair, KEYS[0])
    assert salts(fleet, pair, KEYS[0], cache_salt=None) == plain
    raw = b'{"prompt": "hello", "max_tokens": 4, "cache_salt": "other", "cache\\u005fsalt": null}'
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    assert fleet.client.post(COMPLETION, content=raw, headers=headers).status_code == 200
    assert pair[1].received[-1].body["cache_salt"] == plain[1]


def test_d_asked_again_after_ps_failure_gets_the_same_salt(fleet: Fleet, pair: Pair) -> None:
    prefill, decode = pair
    prefill.behaviour.status, decode.behaviour.hold = 500, True
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    with fleet.in_background(lambda: fleet.client.post(COMPLETION, json=BODIES[COMPLETION], headers=headers)) as answer:
        until(lambda: len(decode.received) == 2, "D was asked again")
        decode.behaviour.hold = False
    assert answer[0].status_code == 200
    sent = [received.body["cache_salt"] for engine in pair for received in engine.received]
    assert (len(sent), len(set(sent))) == (3, 1)


def test_who_takes_over_from_a_failed_d_gets_the_same_salt(fleet: Fleet, pair: Pair) -> None:
    pair[1].behaviour.status = 500
    with FakeEngine(Role.DECODE, "other") as other:
        fleet.join(other)
        fleet.proxy.registry.mark_suspect(next(i for i in fleet.proxy.registry.all() if i.name == "other"))
        headers = {"Authorization": f"Bearer {KEYS[0]}"}
        answer = fleet.client.post(COMPLETION, json=BODIES[COMPLETION], headers=headers)
        assert answer.json()["system_fingerprint"] == "other"
        sent = [received.body["cache_salt"] for engine in (pair[1], other) for received in engine.received]
        assert (len(sent), len(set(sent))) == (2, 1)


def test_d_gets_the_clients_bytes_with_salt_and_ticket_behind_them(fleet: Fleet, pair: Pair) -> None:
    raw = b' {"prompt" : "h\\u00e9\xc3\xa9", "max_tokens":4, "seed":123456789012345678901234567890, "top_p": 1.0e0 }\n'
    fleet.client.post(COMPLETION, content=raw, headers={"Authorization": f"Bearer {KEYS[0]}"})
    received = pair[1].received[-1]
    salt = received.body["cache_salt"]
    assert received.raw.startswith(raw.rstrip()[:-1] + f',"cache_salt":"{salt}","kv_transfer_params":{{'.encode())


@pytest.mark.parametrize("raw", [b"{}", b' {"cache_salt": null,"x" : 1.0e5, "y": "\\ud800" } \r\n', b'{"a":{}}'])
def test_the_salt_is_spliced_in_and_no_other_byte_changes(raw: bytes) -> None:
    body = read_body(raw)
    assert body.with_salt(None) == body
    salted = body.with_salt("s")
    assert salted.raw.startswith(raw.rstrip()[:-1])
    assert json.loads(salted.raw) == salted.fields == json.loads(raw) | {"cache_salt": "s"}
    assert "cache_salt" not in body.fields or body.fields["cache_salt"] is None
    sent = json.loads(salted.with_ticket(TICKET))
    assert (sent["cache_salt"], sent["kv_transfer_params"]) == ("s", TICKET.to_params())


@pytest.mark.parametrize("endpoint", Endpoint)
def test_the_prefill_copy_has_the_salt(endpoint: Endpoint) -> None:
    assert FIELDS[endpoint]["cache_salt"] is Kind.PROMPT
    body = read_body(json.dumps(BODIES[endpoint.value]).encode()).with_salt("s")
    assert prefill_body(endpoint, body.fields, TICKET)["cache_salt"] == "s"


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_other_paths_that_generate_have_the_same_salts(fleet: Fleet, pair: Pair, path: str) -> None:
    expected = salts(fleet, pair, KEYS[0])[1]
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    body = fleet.client.post(path, json=BODIES[path], headers=headers).json()["body"]
    assert body == BODIES[path] | {"cache_salt": expected}
    assert fleet.client.post(path, json=BODIES[path]).json()["body"] == BODIES[path]
    own = BODIES[path] | {"cache_salt": "mine"}
    assert fleet.client.post(path, json=own, headers=headers).json()["body"] == own


@pytest.mark.parametrize("path", ["/v1/embeddings", "/tokenize"])
def test_paths_that_do_not_generate_are_left_alone(fleet: Fleet, pair: Pair, path: str) -> None:
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    assert fleet.client.post(path, json=BODIES[path], headers=headers).json()["body"] == BODIES[path]


def test_a_key_in_x_api_key_is_the_same_tenant(fleet: Fleet, pair: Pair) -> None:
    def salt(headers: dict[str, str]) -> str:
        answer = fleet.client.post("/v1/messages", json=BODIES["/v1/messages"], headers=headers)
        return str(answer.json()["body"]["cache_salt"])

    assert salt({"x-api-key": KEYS[0]}) == salt({"Authorization": f"Bearer {KEYS[0]}"}) != salt({"x-api-key": KEYS[1]})


def test_shared_between_keys_only_a_clients_own_salt_separates() -> None:
    with started(share_between_keys=True) as (fleet, pair):
        assert salts(fleet, pair, KEYS[0]) == ("absent", "absent")
        assert salts(fleet, pair, KEYS[0], cache_salt="mine") == ("mine", "mine")
        headers = {"Authorization": f"Bearer {KEYS[0]}"}
        answer = fleet.client.post("/v1/messages", json=BODIES["/v1/messages"], headers=headers)
        assert answer.json()["body"] == BODIES["/v1/messages"]


def test_a_proxy_that_starts_again_with_its_key_file_gives_the_same_salts(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("tenant.key", "tenant.key", "other.key")]
    seen = []
    for file in [*files, "", ""]:
        with started(tenant_key=file) as (fleet, pair):
            seen.append(salts(fleet, pair, KEYS[0]))
    assert seen[0] == seen[1]
    assert len(set(seen)) == 4, "another file, or none, is another secret"


def test_a_bad_key_file_is_one_clear_line_at_start(tmp_path: Path) -> None:
    path = tmp_path / "tenant.key"
    path.write_bytes(b"short")
    path.chmod(0o600)
    command = [sys.executable, "-m", "proxy", "--port", "0", "--tenant-key", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith(f"proxy: the tenant key {path} must hold 32 random bytes, not 5:")
    assert run.stderr.count("\n") == 1


def test_options_become_settings() -> None:
    settings = parse_options(["--tenant-key", "a/b", "--share-between-keys"])[2]
    assert (settings.tenant_key, settings.share_between_keys) == ("a/b", True)
    settings = parse_options([])[2]
    assert (settings.tenant_key, settings.share_between_keys) == ("", False)


@pytest.mark.parametrize(
    "same", ["Bearer key", "bearer key", "BEARER key", " Bearer  key ", "key", "Basic key"], ids=ascii
)
def test_the_scheme_and_spaces_around_do_not_count(same: str) -> None:
    tenants = Tenants(b"x" * 32)
    assert tenants.salt(same) == tenants.salt("Bearer key") is not None


@pytest.mark.parametrize("other", ["Bearer Key", "Bearer key2", "Bearer ke", "Bearer k ey", "Bearer ké", "Bearer kÃ©"])
def test_every_character_of_the_credential_counts(other: str) -> None:
    tenants = Tenants(b"x" * 32)
    assert tenants.salt(other) not in (None, tenants.salt("Bearer key"))
    assert Tenants(b"y" * 32).salt(other) != tenants.salt(other)
    assert tenants.salt("Bearer ké") != tenants.salt("Bearer kÃ©")


@pytest.mark.parametrize("empty", [None, "", " ", "Bearer", "bearer ", "Bearer   "])
def test_an_empty_credential_is_no_tenant(empty: str | None) -> None:
    assert Tenants(b"x" * 32).salt(empty) is None


def test_the_secret_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "tenant.key"
    secret = load_secret(path)
    assert (len(secret), path.stat().st_mode & 0o777) == (32, 0o600)
    assert load_secret(path) == secret == path.read_bytes()
    assert load_secret(tmp_path / "other.key") != secret
    assert {file.name for file in tmp_path.iterdir()} == {"tenant.key", "other.key"}, "nothing else is left behind"


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        (b"", 0o600, "must hold 32 random bytes, not 0: delete it"),
        (b"x" * 31, 0o600, "must hold 32 random bytes, not 31: delete it"),
        (b"-----BEGIN PRIVATE KEY-----\n" * 3, 0o600, "not more than 32: delete it"),
        (b"x" * 32, 0o644, r"others may use .* \(mode 644\): chmod 600"),
        (b"x" * 32, 0o640, r"others may use .* \(mode 640\): chmod 600"),
        (b"x" * 32, 0o602, r"others may use .* \(mode 602\): chmod 600"),
    ],
)
def test_a_file_that_is_no_secret_is_refused(tmp_path: Path, content: bytes, mode: int, message: str) -> None:
    path = tmp_path / "tenant.key"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=message):
        load_secret(path)
    assert path.read_bytes() == content


def test_a_folder_that_cannot_be_written_to_is_named_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    paths = [tmp_path / "missing/key", tmp_path / "file/key", Path("/proc/key"), tmp_path, tmp_path / "dangling"]
    for path in [*paths, *([] if os.geteuid() == 0 else [closed / "key"])]:
        with pytest.raises(ConfigError, match=f"cannot use the tenant key {path}: .*; name a file in a folder"):
            load_secret(path)


def test_threads_that_make_it_at_once_all_have_the_same(tmp_path: Path) -> None:
    num_threads, rounds = 8, 20
    barrier = threading.Barrier(num_threads)
    found: list[set[bytes]] = [set() for _ in range(rounds)]

    def make() -> None:
        for number in range(rounds):
            barrier.wait(10)
            found[number].add(load_secret(tmp_path / f"{number}.key"))

    threads = [threading.Thread(target=make, daemon=True) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [len(secrets) for secrets in found] == [1] * rounds
    assert len(list(tmp_path.iterdir())) == rounds


def test_processes_that_make_it_at_once_all_have_the_same(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from proxy.tenant import load_secret; print('ready', flush=True); folder = input();"
        "print([load_secret(pathlib.Path(folder) / str(i)).hex() for i in range(50)])"
    )
    command = [sys.executable, "-c", code]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for _ in range(2)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write(f"{tmp_path}\n")
    first, second = (child.communicate(timeout=30)[0] for child in children)
    assert first == second
    assert first.count(",") == 49


SCRIPT = """
import sys
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

app = FastAPI()
KINDS = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": AnthropicMessagesRequest,
}

def route(path, kind):
    def salt(request: kind):
        return request.cache_salt
    app.post(path)(salt)

for path, kind in KINDS.items():
    route(path, kind)
import json
bodies = json.loads(sys.stdin.read())
client = TestClient(app)
headers = {"Content-Type": "application/json"}
print("SALTS" + json.dumps([client.post(path, content=bodies[path], headers=headers).json() for path in KINDS]))
"""


@pytest.mark.engine
def test_vllm_takes_the_salt_on_all_four_paths_also_behind_a_null() -> None:
    pytest.importorskip("vllm.version")
    salt = Tenants(b"x" * 32).salt("Bearer key")
    bodies = {}
    for path, body in BODIES.items():
        raw = json.dumps({"cache_salt": None} | body).encode()
        bodies[path] = read_body(raw).with_salt(salt).raw.decode()
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    run = subprocess.run(command, input=json.dumps(bodies), capture_output=True, text=True, timeout=110, check=False)
    assert run.returncode == 0, run.stderr
    line = next(line for line in run.stdout.splitlines() if line.startswith("SALTS"))
    assert json.loads(line.removeprefix("SALTS")) == [salt] * 4
