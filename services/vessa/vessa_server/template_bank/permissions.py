"""What a caller may see and do in the template banks.

A bank belongs to the key that made it, by the key's name. Others do not learn that it is there, unless it is
shared: then all may use it, and curators change its templates. Admins see and change all banks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vessa.errors import Forbidden, UnknownBank
from vessa.schemas import BankInfo
from vessa_server.auth.keys import Caller, Role
from vessa_server.template_bank.bank import Bank, TemplateBanks, TemplateInfos
from vessa_server.template_bank.template import Template


@dataclass(frozen=True)
class CallersBanks:
    """The banks as one caller sees them; another's are UnknownBank. It has the methods of TemplateBanks."""

    banks: TemplateBanks
    caller: Caller

    def get(self, name: str) -> Bank:
        """Return a bank; UnknownBank, StoreUnavailable."""
        bank = self.banks.get(name)
        if not self._sees(bank.owner, bank.shared):
            raise UnknownBank(f"there is no template bank {name!r}")
        return bank

    def list(self) -> list[BankInfo]:
        """Return the caller's banks and the shared ones, by name."""
        return [info for info in self.banks.list() if self._sees(info.owner, info.shared)]

    def add(self, name: str, templates: Sequence[Template]) -> TemplateInfos:
        """Add templates; a bank that this makes is the caller's."""
        return self.banks.add(name, templates, owner=self.caller.name, may=self._sees)

    def remove(self, name: str, identity: str) -> None:
        """Remove one template."""
        self.get(name)
        self.banks.remove(name, identity)

    def delete(self, name: str) -> None:
        """Delete a bank; Forbidden for a shared one of another key."""
        self._require_own(name)
        self.banks.delete(name)

    def share(self, name: str, shared: bool) -> BankInfo:
        """Let all keys use the bank, or its owner alone; Forbidden for a shared one of another key."""
        self._require_own(name)
        self.banks.share(name, shared)
        return self.get(name).info()

    def _sees(self, owner: str | None, shared: bool) -> bool:
        return shared or self.caller.role is Role.admin or owner == self.caller.name

    def _require_own(self, name: str) -> None:
        bank = self.get(name)
        if self.caller.role is not Role.admin and bank.owner != self.caller.name:
            raise Forbidden(f"bank {name!r} is shared by another key; only its owner or an admin may do this")
