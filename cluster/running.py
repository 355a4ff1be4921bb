"""What a cluster consists of while it runs, and its end."""

from __future__ import annotations

from cluster.cache import CacheMember
from cluster.members import InstanceMember, Member
from cluster.processes import stop_groups
from cluster.runfolder import RunFolder
from cluster.supervisor import Supervisor
from cluster.zygote import Zygote
from core.errors import BatonError


class Running:
    """The parts that were started, in the order of their start; prefill instances before decode instances."""

    def __init__(self) -> None:
        self.folder: RunFolder | None = None
        self.proxy: Member | None = None
        self.cache: CacheMember | None = None
        self.zygote: Zygote | None = None
        self.supervisor: Supervisor | None = None
        self.instances: list[InstanceMember] = []

    @property
    def members(self) -> list[Member]:
        """Everything that is supervised: the instances, the proxy and the cache server."""
        return [*self.instances, *([self.proxy] if self.proxy else []), *([self.cache] if self.cache else [])]

    @property
    def failed(self) -> str:
        """The names of what died too often and stays down; "" as long as all is well."""
        return ", ".join(sorted(self.supervisor.given_up)) if self.supervisor else ""

    def check_living(self) -> None:
        """Raises BatonError if something died that nobody starts again."""
        if self.supervisor and not self.failed:
            return
        for member in reversed(self.members):
            code = member.exit_code()
            if code is not None:
                raise BatonError(
                    f"{member.name} ended during start with exit code {code}\n{member.last_words()}".rstrip()
                )

    def last_words(self) -> str:
        """Of every instance."""
        return "\n".join(member.last_words() for member in self.instances)

    def stop(self) -> None:
        """Ends everything; returns when no process of it lives."""
        if self.supervisor:
            self.supervisor.stop()
        members = self.members
        for member in members:
            member.leave()
        stop_groups([member.child for member in members if member.child])
        if self.zygote:
            self.zygote.close()
        if self.supervisor:
            self.supervisor.release()
        if self.cache:
            self.cache.release()
        if self.folder:
            self.folder.remove()
