"""Decide what a caller may see and do in the template banks.

A bank belongs to the key that made it, by the key's name. Other keys do not learn that it exists, unless it
is shared: then all keys may use it, and curators change its templates. Admins see and change all banks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vessa.errors import DamagedBank, Forbidden, UnknownBank
from vessa.schemas import BankInfo
from vessa_server.auth.keys import Caller, Role
from vessa_server.observability.request_context import current_request
from vessa_server.template_bank.bank import Quota, TemplateBanks, TemplateInfos
from vessa_server.template_bank.retrieval import Bank, check_name
from vessa_server.template_bank.template import Template


@dataclass(frozen=True)
class CallersBanks:
    """Show the banks as one caller sees them; banks of others raise UnknownBank.

    It has the methods of TemplateBanks. quota: of a key that is no admin
    """

    banks: TemplateBanks
    caller: Caller
    quota: Quota | None = None

    def get(self, name: str) -> Bank:
        """Return a bank. Raises UnknownBank, DamagedBank, StoreUnavailable."""
        current_request().bank = check_name(name)
        bank = self.banks.get(name)
        if not self._sees(bank.owner, bank.shared):
            raise UnknownBank(f"There is no template bank {name!r}. GET /banks lists them.")
        return bank

    def list(self) -> list[BankInfo]:
        """Return the caller's banks and the shared ones, by name."""
        return [info for info in self.banks.list() if self._sees(info.owner, info.shared)]

    def add(self, name: str, templates: Sequence[Template]) -> TemplateInfos:
        """Add templates; a bank that this makes is the caller's. Raises TooLarge for a full quota."""
        current_request().bank = check_name(name)
        quota = None if self._admin else self.quota
        return self.banks.add(name, templates, owner=self.caller.name, access=self._sees, quota=quota)

    def remove(self, name: str, identity: str) -> None:
        """Remove one template."""
        self.get(name)
        self.banks.remove(name, identity)

    def delete(self, name: str) -> None:
        """Delete a bank. Raises Forbidden for a shared one of another key; admins delete damaged ones too."""
        try:
            self._require_own(name)
        except DamagedBank:
            if not self._admin:
                raise
        self.banks.delete(name)

    def share(self, name: str, shared: bool) -> BankInfo:
        """Let all keys use the bank, or its owner alone. Raises Forbidden for a shared one of another key."""
        self._require_own(name)
        self.banks.share(name, shared)
        return self.get(name).info()

    @property
    def _admin(self) -> bool:
        return self.caller.role is Role.admin

    def _sees(self, owner: str | None, shared: bool) -> bool:
        return shared or self._admin or owner == self.caller.name

    def _require_own(self, name: str) -> None:
        bank = self.get(name)
        if not self._admin and bank.owner != self.caller.name:
            raise Forbidden(f"Bank {name!r} belongs to another key. Only its owner or an admin may do this.")
