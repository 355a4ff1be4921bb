"""`baton doctor`: what this host offers, measured between two of its processes, and what stands in the way.

Exit code 0: every transport that `--transport auto` takes here works, and nothing is marked FIX. 1: something is.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Mapping

import msgspec

from cluster import limits, modules
from core.errors import TransferError
from core.finding import Finding, Verdict
from engine.instance import source_path
from transport.choose import fastest
from transport.probe import Measurement
from transport.probe_pair import process_pairs
from transport.schemes import choices, is_measured, unavailable, why_not_auto


class Checkup(msgspec.Struct, frozen=True):
    """One transport here.

    why_unavailable, why_not_auto: empty if it is, and if `auto` takes it. failure: of the probe; empty if it worked or
    was not tried.
    """

    transport: str
    why_unavailable: str = ""
    why_not_auto: str = ""
    failure: str = ""
    measurement: Measurement | None = None

    @property
    def verdict(self) -> Verdict:
        if self.failure and not self.why_not_auto:
            return Verdict.FIX
        return Verdict.NOTE if self.failure or self.why_unavailable else Verdict.OK


class Report(msgspec.Struct, frozen=True):
    """Everything. chosen: what `auto` takes between two instances of this host; empty if nothing works."""

    host: str
    transports: list[Checkup]
    chosen: str
    limits: list[Finding]
    modules: list[Finding]

    @property
    def is_well(self) -> bool:
        verdicts = [each.verdict for each in self.transports]
        verdicts += [each.verdict for each in (*self.limits, *self.modules)]
        return bool(self.chosen) and Verdict.FIX not in verdicts


def run(options: argparse.Namespace) -> int:
    """Prints the report; see the top for the exit code."""
    report = examine()
    print(_as_json(report) if options.json else _as_text(report))
    return 0 if report.is_well else 1


def examine() -> Report:
    """Takes a few seconds, most of which other processes take to start."""
    environment = {"PYTHONPATH": source_path()}
    transports = _check_up(environment)
    works = {each.transport: each.measurement for each in transports if each.measurement and not each.why_not_auto}
    chosen = fastest(list(works), works) if works else ""
    host = f"{platform.system()} on {platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    return Report(host, transports, chosen, limits.findings(), modules.findings())


def _check_up(environment: Mapping[str, str]) -> list[Checkup]:
    named = [Checkup(scheme, unavailable(scheme), why_not_auto(scheme)) for scheme in choices()[1:]]
    tried = [each.transport for each in named if not each.why_unavailable and is_measured(each.transport)]
    done = []
    with process_pairs(tried, environment) as pairs:
        for each in named:
            if each.transport in pairs:
                try:
                    each = msgspec.structs.replace(each, measurement=pairs[each.transport].measure())
                except TransferError as error:
                    each = msgspec.structs.replace(each, failure=str(error))
            done.append(each)
    return done


def _as_json(report: Report) -> str:
    return msgspec.json.format(
        msgspec.json.encode(
            {
                "host": report.host,
                "is_well": report.is_well,
                "chosen": report.chosen,
                "transports": [_transport_as_json(each) for each in report.transports],
                "limits": report.limits,
                "modules": report.modules,
            }
        ),
        indent=2,
    ).decode()


def _transport_as_json(each: Checkup) -> dict[str, object]:
    speed = each.measurement
    return {
        "transport": each.transport,
        "verdict": each.verdict.value,
        "available": not each.why_unavailable,
        "why_unavailable": each.why_unavailable,
        "auto": not each.why_not_auto,
        "why_not_auto": each.why_not_auto,
        "failure": each.failure,
        "write_gb_per_s": round(speed.write_gb_per_s, 3) if speed else None,
        "read_gb_per_s": round(speed.read_gb_per_s, 3) if speed else None,
        "latency_us": round(speed.latency_s * 1e6, 1) if speed else None,
    }


def _as_text(report: Report) -> str:
    rows = [f"{report.host}", "", "transports, measured between two processes of this host"]
    rows += [f"        {'':<10}{'there':>12}{'back':>12}{'a block':>10}"]
    rows += [_row(each, each.transport == report.chosen) for each in report.transports]
    for title, found in (("limits", report.limits), ("modules", report.modules)):
        rows += ["", title, *[line for each in found for line in _lines(each)]]
    rows += ["", _conclusion(report)]
    return "\n".join(rows)


def _row(each: Checkup, is_chosen: bool) -> str:
    speed, figures = each.measurement, ""
    if speed is not None:
        figures = f"{speed.write_gb_per_s:>7.2f} GB/s{speed.read_gb_per_s:>7.2f} GB/s{speed.latency_s * 1e6:>7.0f} us"
    remark = each.failure or each.why_unavailable or each.why_not_auto or ("auto takes this one" if is_chosen else "")
    return f"  {each.verdict.value:<4}  {each.transport:<10}{figures:<34}  {remark}".rstrip()


def _lines(found: Finding) -> list[str]:
    first = f"  {found.verdict.value:<4}  {found.name:<14}{found.value}"
    return [first, f"{'':<22}{found.advice}"] if found.advice else [first]


def _conclusion(report: Report) -> str:
    if report.is_well:
        return f"Well: between instances of this host, KV goes by {report.chosen}."
    return (
        "Not well: see what is marked FIX." if report.chosen else "Not well: no transport works between two processes."
    )
