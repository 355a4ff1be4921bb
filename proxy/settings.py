"""What the proxy can be told, and its bounds. Every wait and every queue of `proxy/` has its number here."""

from __future__ import annotations

import msgspec


class Settings(msgspec.Struct, frozen=True):
    """queue_limit: requests that may wait in the proxy; beyond it 429.
    window: hand-offs outstanding per prefill instance.
    in_flight_limit: requests that one instance answers at the same time.
    timeout_s: how long an instance waits for its peer in one hand-off (it travels in the ticket).
    queue_timeout_s: how long a request may wait in the proxy; beyond it 429.
    threshold: prompts surely shorter than this many tokens are not handed off; 0 hands off all.
    open_control: instances may register from other hosts. Whoever can reach the port can then put an instance of their
        own in the path of every prompt, so it is for closed networks.
    tenant_key: path of the file with the secret that makes salts of API keys; empty: a random one per start.
    share_between_keys: API keys are no tenants, and share one KV cache; only a body's own `cache_salt` separates.
    cache_socket: of the host's cache server, for contexts; empty: there is none.
    contexts_file: where contexts are kept for a proxy that is started again; empty: nowhere.
    context_limit, context_bytes: contexts of all tenants, and their texts together.
    keys: path of the cluster's key file; instances must sign their heartbeats by it; empty: nobody signs.
    takeover_s: how long, after its prefill instance failed, a decode instance may take to say that it goes on alone.
    lost_after_s: without a heartbeat for this long, an instance gets no new requests.
    gone_after_s: without a heartbeat for this long, the requests it holds are given up and sent elsewhere.
    """

    queue_limit: int = 1024
    window: int = 8
    in_flight_limit: int = 1024
    timeout_s: float = 60.0
    queue_timeout_s: float = 120.0
    threshold: int = 0
    open_control: bool = False
    tenant_key: str = ""
    share_between_keys: bool = False
    cache_socket: str = ""
    contexts_file: str = ""
    context_limit: int = 4096
    context_bytes: int = 256 << 20
    keys: str = ""
    takeover_s: float = 3.0
    lost_after_s: float = 8.0
    gone_after_s: float = 30.0
    suspect_s: float = 2.0
    health_poll_s: float = 0.25
    report_wait_s: float = 1.0
