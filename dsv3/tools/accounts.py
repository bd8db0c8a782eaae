"""Accounts of the server: add, list, remove; make and revoke API keys.

python -m dsv3 accounts add name=ada        asks for a password, or reads it from stdin
python -m dsv3 accounts list                accounts, their keys and tokens used
python -m dsv3 accounts password name=ada   a new password; ends all sessions
python -m dsv3 accounts remove name=ada     with its keys and conversations
python -m dsv3 accounts key name=ada        prints a new API key, once
python -m dsv3 accounts keys name=ada       its keys, by their ids
python -m dsv3 accounts revoke name=ada key=ID
"""

import getpass
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3.bounds import PositiveFloat
from dsv3.cli import REQUIRED, option

if TYPE_CHECKING:
    from dsv3.serving.accounts import Accounts

FIRST = "action"  # may be given without its name
ACTIONS = ("add", "list", "password", "remove", "key", "keys", "revoke")


@dataclass
class Options:
    action: str = option(REQUIRED, "what to do", choices=ACTIONS)
    name: str | None = option(None, "the account; needed for all but list")
    database: str = option("runs/accounts.sqlite", "file of accounts and conversations")
    key: str | None = option(None, "revoke: the key's id, as `accounts keys` lists it")
    label: str = option("", "key: what it is for")
    days: PositiveFloat | None = option(None, "key: days until it expires; null: never")


def run(options: Options) -> dict[str, Any]:
    """Do it, print it, and return it.

    Raises:
        ValueError: an option is missing, a name is taken or unknown, the passwords differ.
    """
    from dsv3.serving.accounts import Accounts
    from dsv3.serving.database import Database

    accounts = Accounts(Database(Path(options.database)))
    if options.action == "list":
        found = accounts.listed()
        for row in found:
            print(f"{row['name']}  keys: {row['keys']}  tokens: {row['tokens']}  since {day(row['created'])}")
        return {"accounts": found}
    if options.name is None:
        raise ValueError(f"name: {options.action} needs an account's name")
    return act(accounts, options, options.name)


def act(accounts: "Accounts", options: Options, name: str) -> dict[str, Any]:
    """One action on one account, noted in the audit log."""
    result: dict[str, Any] = {"name": name}
    if options.action == "add":
        if accounts.exists(name):
            raise ValueError(f"name={name}: there is such an account already")
        accounts.add(name, asked_password())
    elif options.action == "password":
        if not accounts.exists(name):
            raise ValueError(f"name={name}: there is no such account")
        accounts.set_password(name, asked_password())
    elif options.action == "remove":
        accounts.remove(name)
    elif options.action == "key":
        result["key"] = accounts.new_key(name, options.label, options.days)
        print(result["key"])
        print("Keep it: it is not shown again.", file=sys.stderr)
    elif options.action == "revoke":
        if options.key is None:
            raise ValueError("key: revoke needs a key's id, as `accounts keys` lists it")
        accounts.revoke(name, options.key)
    else:
        result["keys"] = accounts.keys(name)
        for row in result["keys"]:
            until = f"until {day(row['expires'])}" if row["expires"] else "no end"
            print(f"{row['id']}  {row['label'] or '-'}  since {day(row['created'])}  {until}")
        return result
    accounts.note(f"accounts {options.action}", account=name, detail=options.key or "")
    return result


def asked_password() -> str:
    """Asked for twice at a terminal; otherwise the first line of stdin.

    Raises ValueError where the two differ.
    """
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n")
    first = getpass.getpass("Password: ")
    if getpass.getpass("Again: ") != first:
        raise ValueError("password: the two differ")
    return first


def day(seconds: Any) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")
