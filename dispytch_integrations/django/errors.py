"""Errors that are Django's as well as ours: caught by either name."""

from __future__ import annotations

from django.core.exceptions import ImproperlyConfigured
from django.db.transaction import TransactionManagementError

from dispytch_integrations import errors

__all__ = ["SettingsError", "TransactionError"]


class SettingsError(errors.SettingsError, ImproperlyConfigured):
    """Something in the setting DISPYTCH or in the project's event classes is wrong; all of it is told at once.

    `problems`: the same texts that `manage.py check` prints.
    """


class TransactionError(errors.TransactionError, TransactionManagementError):
    """`emit_on_commit` cannot tell which transaction is meant, or there is none where one is required."""
