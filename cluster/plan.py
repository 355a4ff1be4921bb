"""From a topology to the instances that make it: names, ports, cores. Refuses before anything is started."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from cluster import cores, gpus
from cluster.cache import socket_path
from cluster.options import ClusterOptions, Start
from cluster.ports import LOOPBACK, WILDCARDS, Address, check_free, free_ports, is_loopback
from core.errors import ConfigError
from core.handoff import Role
from core.topology import Topology
from engine.build import Build, Device
from engine.instance import ENV_VLLM_CORES, InstanceSpec, num_ranks
from engine.preflight import (
    check_arguments,
    check_memory,
    check_model,
    check_pinned,
    check_ranks,
    check_transport,
)
from kvcache.spec import CacheSpec
from transport.keys import read_keys
from transport.schemes import wanted_schemes


def instances(topology: Topology, options: ClusterOptions, proxy_url: str, build: Build) -> list[InstanceSpec]:
    """Decode instances last. Raises ConfigError for anything that would only fail after a long start."""
    roles = [Role.PREFILL] * topology.num_prefill + [Role.DECODE] * topology.num_decode
    host = options.host if options.open_control else LOOPBACK
    ports = free_ports(len(roles), host)
    ranks = [num_ranks(options.arguments(role)) for role in roles]
    shares, on = _cores(ranks, build), _gpus(ranks, build)
    specs = [
        InstanceSpec(
            name=f"{role.value}-{index if role is Role.PREFILL else index - topology.num_prefill}",
            role=role,
            model=options.model,
            host=host,
            port=ports[index],
            join=proxy_url,
            plain=topology.num_prefill == 0 and options.cache is None,
            transport=options.transport,
            cores=shares[index],
            gpus=on[index].visible,
            gpu_memory=on[index].memory_share,
            arguments=options.arguments(role),
            connector=options.connector_of(role),
            environment=options.environment,
        )
        for index, role in enumerate(roles)
    ]
    check(specs, build, options.cache.num_bytes if options.cache else 0)
    return specs


def with_cache(spec: InstanceSpec, socket: str) -> InstanceSpec:
    """The same instance with the host's KV cache behind it."""
    return msgspec.structs.replace(spec, connector={"cache": socket} | spec.connector)


def with_keys(options: ClusterOptions) -> ClusterOptions:
    """The same options, with the key file's whole path. Raises ConfigError if it cannot be used, or if something would
    leave this host unencrypted all the same."""
    if not options.keys:
        return options
    path = os.path.abspath(options.keys)
    read_keys(path)
    wanted_schemes(options.transport, has_keys=True)
    if options.cache is not None and options.cache.is_on_the_network:
        raise ConfigError(
            "--keys: caches of other hosts (listen=, peer=) send their blocks unencrypted: leave these words out of "
            "--cache, or leave out --keys on a closed network"
        )
    return msgspec.structs.replace(options, keys=path)


def contexts_arguments(cache: CacheSpec | None, folder: Path) -> list[str]:
    """For the proxy: the cache server's socket, and the file that remembers contexts. Nothing without a cache."""
    if cache is None:
        return []
    return ["--cache-socket", str(socket_path(cache, folder)), "--contexts-file", str(folder / "contexts.jsonl")]


def check(specs: list[InstanceSpec], build: Build, cache_bytes: int = 0) -> None:
    """Everything that can be known before a start."""
    for spec in specs:
        spec.serve_arguments(build.device)
        check_transport(spec, build.device)
        check_arguments(spec.arguments, build.device, plain=spec.plain)
        check_model(spec.model.path, plain=spec.plain)
        check_ranks(spec.model.path, num_ranks(spec.arguments))
    if build.device is Device.CPU:
        check_memory(specs, cache_bytes)
    else:
        check_pinned(cache_bytes)


def proxy_address(options: ClusterOptions) -> Address:
    """Where the proxy will listen. Raises ConfigError if somebody does already, or nobody could join there."""
    wildcard = options.host in WILDCARDS
    if options.open_control and wildcard:
        raise ConfigError(
            f"--open-control needs this machine's address as --host, as other hosts reach it, not {options.host}"
        )
    if not (options.open_control or wildcard or is_loopback(options.host)):
        raise ConfigError(
            f"--host {options.host} is neither this machine alone nor every interface: give --host 0.0.0.0 to serve "
            "other hosts' clients, or add --open-control to let their instances join too (closed networks only)"
        )
    if options.port:
        check_free(options.port, options.host)
        return Address(options.host, options.port)
    return Address(options.host, free_ports(1, options.host)[0])


def start_of(options: ClusterOptions, build: Build) -> Start:
    """How to start. Raises ConfigError if that is impossible on this device."""
    if options.start is Start.FORK and build.device is not Device.CPU:
        raise ConfigError("instances on a GPU cannot be forked: use --start plain")
    return options.start or (Start.FORK if build.device is Device.CPU else Start.PLAIN)


def _gpus(ranks: list[int], build: Build) -> list[gpus.Gpus]:
    return gpus.shares_of_instances(gpus.present() if build.device is Device.GPU else [], ranks)


def _cores(ranks: list[int], build: Build) -> list[tuple[int, ...]]:
    if build.device is not Device.CPU:
        return [()] * len(ranks)
    given = os.environ.get(ENV_VLLM_CORES, "")
    if given not in cores.AUTOMATIC:
        try:
            return [cores.parse(given)] * len(ranks)
        except ValueError as error:
            raise ConfigError(f"{ENV_VLLM_CORES}={given!r} is not a list of cores such as 0,2-4") from error
    return cores.shares_of_instances(sorted(os.sched_getaffinity(0)), ranks)
