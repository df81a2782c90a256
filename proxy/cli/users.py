"""`tollgate users`: accounts, their limits, and what they have."""

import sys
from typing import TYPE_CHECKING, Any

import click

from proxy.cli.books import Books, with_books
from proxy.cli.options import email_option, examples, given, json_option, models_option, page_options, rate_options
from proxy.cli.output import block, numbers, page_text, plain, show, words

if TYPE_CHECKING:
    from proxy.identity.users import Standing


@click.group("users")
def group() -> None:
    """Accounts: who may call, and how much at a time."""


@group.command("list", epilog=examples("tollgate users list", "tollgate users list --search ann --limit 10"))
@click.option("--email", help="A whole e-mail address, or the beginning of one.")
@click.option("--search", metavar="TEXT", help="Part of an e-mail address or of a name, or an id.")
@page_options
@json_option
def users_list(email: str | None, search: str | None, limit: int, cursor: str | None, *, as_json: bool) -> None:
    """Show users with their wallets, newest first."""
    from proxy.shown.users import user_page

    async def work(books: Books) -> None:
        shown = plain(await user_page(books.engine, limit, cursor, email=email, text=search))
        columns = [
            *words("id", "email", "name=full_name", "active=is_active", "admin=is_admin"),
            *numbers("wallet.balance", "wallet.reserved", "wallet.available"),
        ]
        show(shown, page_text(shown, columns, nothing="No users."), as_json=as_json)

    with_books(work)


@group.command("show", epilog=examples("tollgate users show --email ann@example.com"))
@email_option
@json_option
def users_show(email: str, *, as_json: bool) -> None:
    """Show a user with its wallet and its limits."""
    from proxy.identity.users import read_standing
    from proxy.storage.database import reading

    async def work(books: Books) -> None:
        user = await books.user(email)
        async with reading(books.engine) as connection:
            shown = _shown(await read_standing(connection, user.id))
        show(shown, block(shown), as_json=as_json)

    with_books(work)


@group.command(
    "create",
    epilog=examples(
        "tollgate users create --email ann@example.com",
        "tollgate users create --email ann@example.com --requests-per-minute 60 --allowed-models 'gpt-4o*'",
        "tollgate users create --email ann@example.com --issuer https://login.example.com/ --subject 1234",
    ),
)
@click.option("--email", required=True, help="The user's e-mail address.")
@click.option("--password", help="Needed only to log in; API keys work without.")
@click.option("--full-name", help="What the person is called.")
@click.option("is_admin", "--admin", is_flag=True, help="May use the admin endpoints.")
@click.option("--issuer", help="An issuer of `[[auth.issuers]]` whose tokens are the user's; needs --subject.")
@click.option("--subject", help="The `sub` by which that issuer knows the user.")
@rate_options
@models_option
@json_option
def users_create(
    *, password: str | None, issuer: str | None, subject: str | None, as_json: bool, **wanted: Any
) -> None:
    """Add a user with an empty wallet."""
    from proxy.administration import COMMAND_LINE
    from proxy.administration.users import create
    from proxy.identity.passwords import Passwords

    if (issuer is None) != (subject is None):
        raise click.UsageError("--issuer and --subject go together")
    identity = (issuer, subject) if issuer is not None and subject is not None else None

    async def work(books: Books) -> None:
        made = await create(
            books.engine, Passwords(), COMMAND_LINE, given(wanted), password=password, identity=identity
        )
        show(_shown(made), f"Created {made.user.email} ({made.user.id}).", as_json=as_json)

    with_books(work)


@group.command(
    "edit",
    epilog=examples(
        "tollgate users edit --email ann@example.com --tokens-per-minute 100000 --concurrent-calls-max none",
        "tollgate users edit --email ann@example.com --new-email ann@example.org --verified",
    ),
)
@email_option
@click.option("--new-email", help="Another e-mail address; it is not verified any more unless that is said too.")
@click.option("--full-name", help="What the person is called; empty for no name.")
@click.option("--verified/--unverified", "email_verified", default=None, help="Whether the address is the user's.")
@rate_options
@models_option
@json_option
def users_edit(*, email: str, new_email: str | None, as_json: bool, **changes: Any) -> None:
    """Change a user's address, name and limits.

    They hold from its very next call on; what is left out stays.
    """
    wanted = given({"email": new_email, **changes})
    if not wanted:
        raise click.UsageError("say what is to be another way")
    _change(email, wanted, "{} is changed.", as_json=as_json)


@group.command("deactivate", epilog=examples("tollgate users deactivate --email ann@example.com"))
@email_option
@json_option
def users_deactivate(email: str, *, as_json: bool) -> None:
    """Refuse everything to a user from its very next call on.

    Its keys, wallet and charges stay in the books. The last active admin cannot be deactivated.
    """
    _change(email, {"is_active": False}, "{} may do nothing any more.", as_json=as_json)


@group.command("activate", epilog=examples("tollgate users activate --email ann@example.com"))
@email_option
@json_option
def users_activate(email: str, *, as_json: bool) -> None:
    """Let a user in again who was deactivated.

    Its keys work as before; who logs in has to do so anew.
    """
    _change(email, {"is_active": True}, "{} may call again.", as_json=as_json)


@group.command(
    "admin",
    epilog=examples(
        "tollgate users admin --email ann@example.com on", "tollgate users admin --email ann@example.com off"
    ),
)
@click.argument("rank", type=click.Choice(["on", "off"]))
@email_option
@json_option
def users_admin(rank: str, email: str, *, as_json: bool) -> None:
    """Make a user an admin, or none any more.

    The last active admin stays one. Admins use the admin endpoints with a key of the scope admin, or logged in.
    """
    said = "{} is an admin." if rank == "on" else "{} is no admin."
    _change(email, {"is_admin": rank == "on"}, said, as_json=as_json)


@group.command("password", epilog=examples("tollgate users password --email ann@example.com"))
@email_option
@click.option("--password", help="The new one; without it, it is asked for, or read from standard input.")
@json_option
def users_password(email: str, password: str | None, *, as_json: bool) -> None:
    """Set a user's password.

    Whoever is logged in as this user has to do so again.
    """
    from proxy.administration import COMMAND_LINE
    from proxy.administration.users import set_password
    from proxy.identity.passwords import Passwords

    if password is None:
        password = _asked()

    async def work(books: Books) -> None:
        user = await books.user(email)
        await set_password(books.engine, Passwords(), COMMAND_LINE, user, password)
        shown = {"id": user.id, "email": user.email}
        show(shown, f"{user.shown_name} has another password.", as_json=as_json)

    with_books(work)


def _asked() -> str:
    """A password that nobody sees in a list of processes."""
    if sys.stdin.isatty():
        asked: str = click.prompt("New password", hide_input=True, confirmation_prompt=True, err=True)
        return asked
    return sys.stdin.readline().rstrip("\r\n")


def _change(email: str, changes: dict[str, Any], said: str, *, as_json: bool) -> None:
    from proxy.administration import COMMAND_LINE
    from proxy.administration.users import change

    async def work(books: Books) -> None:
        user = await books.user(email)
        after = await change(books.engine, COMMAND_LINE, user.id, changes)
        show(_shown(after), said.format(after.user.shown_name), as_json=as_json)

    with_books(work)


def _shown(standing: "Standing") -> dict[str, Any]:
    from proxy.shown.users import user_item

    shown: dict[str, Any] = plain(user_item(standing))
    return shown
