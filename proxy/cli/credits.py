"""`tollgate credits`: what users have, what they spent, and what an operator books by hand."""

from typing import TYPE_CHECKING, Any

import click

from proxy.cli.books import Books, with_books
from proxy.cli.options import AMOUNT, DAY, Command, day_options, email_option, examples, json_option, page_options
from proxy.cli.output import Column, block, numbers, page_text, plain, show, table, words
from proxy.ledger.decide import CreditType

if TYPE_CHECKING:
    from proxy.administration.credits import Order

_SUMS = numbers(
    "calls", "input_tokens", "cached_input_tokens", "output_tokens", "charged", "refunded", "average_charged"
)


@click.group("credits")
def group() -> None:
    """Balances, what changed them, and credits booked by hand."""


# ---- booking


def _booking_options(command: Command) -> Command:
    return click.option("--idempotency-key", help="Sent again with the same key, it is booked once.")(command)


@group.command(
    "grant",
    epilog=examples(
        "tollgate credits grant --email ann@example.com --amount 25",
        "tollgate credits grant --email ann@example.com --amount 25 --description 'invoice 7' --idempotency-key i-7",
    ),
)
@email_option
@click.option("--amount", type=AMOUNT, required=True, help="Credits to add, such as 2.5.")
@click.option("--description", default="granted by the operator", show_default=True)
@_booking_options
@json_option
def credits_grant(email: str, amount: int, description: str, idempotency_key: str | None, *, as_json: bool) -> None:
    """Top up a user's wallet."""
    if amount <= 0:
        raise click.BadParameter("must be above zero", param_hint="--amount")
    _book(email, "topup", amount, description, idempotency_key, as_json=as_json)


@group.command(
    "adjust",
    epilog=examples("tollgate credits adjust --email ann@example.com --amount -1.5 --description 'granted twice'"),
)
@email_option
@click.option("--amount", type=AMOUNT, required=True, help="Credits to add, or below zero to take.")
@click.option("--description", required=True, help="Why.")
@_booking_options
@json_option
def credits_adjust(email: str, amount: int, description: str, idempotency_key: str | None, *, as_json: bool) -> None:
    """Correct a balance, either way.

    What open calls hold cannot be taken.
    """
    if not amount:
        raise click.BadParameter("must not be zero", param_hint="--amount")
    _book(email, "adjustment", amount, description, idempotency_key, as_json=as_json)


@group.command(
    "refund",
    epilog=examples(
        "tollgate credits refund req_…", "tollgate credits refund req_… --amount 0.5 --description 'half of an answer'"
    ),
)
@click.argument("request_id")
@click.option("--amount", type=AMOUNT, help="Credits to give back; all that is left of the charge if left out.")
@click.option("--description", default="refunded by the operator", show_default=True)
@_booking_options
@json_option
def credits_refund(
    request_id: str, amount: int | None, description: str, idempotency_key: str | None, *, as_json: bool
) -> None:
    """Give the charge of a call back, wholly or partly.

    Whoever paid it gets it. REQUEST_ID is the `x-request-id` of the call's answer. Never more is given back than was
    charged.
    """
    if amount is not None and amount <= 0:
        raise click.BadParameter("must be above zero", param_hint="--amount")
    _book(None, "refund", amount, description, idempotency_key, request_id=request_id, as_json=as_json)


def _book(  # noqa: PLR0913 - what is booked, and how it is shown
    email: str | None,
    type_: str,
    amount: int | None,
    description: str,
    idempotency_key: str | None,
    *,
    request_id: str | None = None,
    as_json: bool,
) -> None:
    """Book into the wallet of a user, or for a refund into that of the call."""
    from proxy.administration.credits import Order
    from proxy.journal import read_call

    order = Order(
        type=CreditType(type_),
        amount=amount,
        description=description,
        request_id=request_id,
        idempotency_key=idempotency_key,
    )

    async def work(books: Books) -> None:
        payer: str = email or (await read_call(books.engine, str(request_id))).user_id
        shown, is_replay = await _booked(books, payer, order)
        said = " (booked before)." if is_replay else "."
        show(shown, f"{shown['email']} has {shown['balance']} credits{said}", as_json=as_json)

    with_books(work)


async def _booked(books: Books, email: str, order: "Order") -> tuple[dict[str, Any], bool]:
    from proxy.administration import COMMAND_LINE
    from proxy.administration.credits import book
    from proxy.shown.credits import transaction_item

    user = await books.user(email)
    async with books.ledger() as ledger:
        booked = await book(books.engine, ledger, COMMAND_LINE, user.id, order)
    transaction = plain(transaction_item(booked.entry))
    shown = {
        "email": user.email,
        "amount": transaction["amount"],
        "balance": transaction["balance_after"],
        "replayed": booked.is_replay,
        "transaction": transaction,
    }
    return shown, booked.is_replay


# ---- reading


@group.command("balance", epilog=examples("tollgate credits balance --email ann@example.com"))
@email_option
@json_option
def credits_balance(email: str, *, as_json: bool) -> None:
    """Show what a user has.

    Reserved is what open calls hold of it, available what is left for new ones.
    """
    from proxy.identity.users import find_user
    from proxy.shown.credits import read_balance
    from proxy.storage.database import reading

    async def work(books: Books) -> None:
        async with reading(books.engine) as connection:
            user = await find_user(connection, email)
            found = await read_balance(connection, user.wallet_id)
        said = f"balance {found.balance}, reserved {found.reserved}, available {found.available}"
        show({"email": user.email, **plain(found)}, said, as_json=as_json)

    with_books(work)


@group.command(
    "transactions",
    epilog=examples(
        "tollgate credits transactions --email ann@example.com --type topup",
        "tollgate credits transactions --email ann@example.com --from 2026-11-01 --to 2026-11-30 --csv > november.csv",
    ),
)
@email_option
@click.option(
    "type_",
    "--type",
    type=click.Choice(["topup", "refund", "adjustment", "deduction"]),
    help="Only those of a kind; calls are deductions.",
)
@click.option("first", "--from", type=DAY, help="The first UTC day, such as 2026-11-01.")
@click.option("last", "--to", type=DAY, help="The last UTC day, itself included.")
@click.option("--key", help="Only those of the calls of a key, by its id.")
@click.option("--model", help="Only those of the calls of a model.")
@click.option("as_csv", "--csv", is_flag=True, help="All of them in CSV, however many there are.")
@page_options
@json_option
def credits_transactions(  # noqa: PLR0913 - one parameter an option
    *,
    email: str,
    type_: str | None,
    first: str | None,
    last: str | None,
    key: str | None,
    model: str | None,
    limit: int,
    cursor: str | None,
    as_csv: bool,
    as_json: bool,
) -> None:
    """Show everything that changed a balance, newest first."""
    from proxy.shown.credits import filter_of, transaction_page, transactions_csv

    if as_csv and as_json:
        raise click.UsageError("--csv and --json do not go together")
    wanted = filter_of(None if type_ is None else CreditType(type_), first, last, key, model)

    async def work(books: Books) -> None:
        wallet_id = (await books.user(email)).wallet_id
        if as_csv:
            async for lines in await transactions_csv(books.engine, wallet_id, wanted, cursor):
                click.echo(lines, nl=False)
            return
        shown = plain(await transaction_page(books.engine, wallet_id, wanted, limit, cursor))
        columns = [
            *words("id", "created_at", "type"),
            *numbers("amount", "balance_after"),
            *words("model", "request_id", "description"),
        ]
        show(shown, page_text(shown, columns, nothing="No transactions."), as_json=as_json)

    with_books(work)


@group.command("stats", epilog=examples("tollgate credits stats --email ann@example.com --from 2026-11-01"))
@email_option
@day_options
@json_option
def credits_stats(email: str, first: str | None, last: str | None, *, as_json: bool) -> None:
    """Show what a user spent, by day, model and key.

    In the last 30 days, unless others are named.
    """
    from proxy.shown.usage import wallet_stats

    async def work(books: Books) -> None:
        user = await books.user(email)
        shown = plain(await wallet_stats(books.engine, user.wallet_id, first, last))
        tables = [f"{user.shown_name} from {shown['from']} to {shown['to']} ({shown['time_zone']})"]
        for heads, rows in (
            ([], [shown["total"]]),
            (words("day"), shown["by_day"]),
            (words("model"), shown["by_model"]),
            (words("key_id", "name"), shown["by_key"]),
        ):
            columns: list[Column] = [*heads, *_SUMS]
            tables += [table(rows, columns, nothing="")] if rows else []
        show(shown, "\n\n".join(tables), as_json=as_json)

    with_books(work)


@group.command("charge", epilog=examples("tollgate credits charge req_…"))
@click.argument("request_id")
@json_option
def credits_charge(request_id: str, *, as_json: bool) -> None:
    """Show the receipt of a call: what it cost and why.

    REQUEST_ID is the `x-request-id` of the call's answer.
    """
    from proxy.journal import read_call
    from proxy.shown.charges import charge_of

    async def work(books: Books) -> None:
        shown = plain(charge_of(await read_call(books.engine, request_id)))
        show(shown, block(shown), as_json=as_json)

    with_books(work)


@group.command("charges", epilog=examples("tollgate credits charges --email ann@example.com"))
@email_option
@page_options
@json_option
def credits_charges(email: str, limit: int, cursor: str | None, *, as_json: bool) -> None:
    """Show the calls of a user, newest first.

    Those too that are open or cost nothing; `credits charge` shows all of one.
    """
    from proxy.shown.charges import charge_page

    async def work(books: Books) -> None:
        user = await books.user(email)
        shown = plain(await charge_page(books.engine, user.wallet_id, limit, cursor))
        columns = [
            *words("request_id", "created_at", "state", "outcome", "provider", "model"),
            *numbers("reserved", "charged", "refunded"),
        ]
        show(shown, page_text(shown, columns, nothing="No calls."), as_json=as_json)

    with_books(work)
