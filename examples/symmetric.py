"""
Symmetric coroutines: a producer and a consumer, the fringes of two trees, and a
calculator whose tokenizer and parser feed each other.

    python examples/symmetric.py "2 * (3 + 4) - 5"
"""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Callable, Generator
from typing import Any

from twisted.internet.task import react

from twisted_rtsig.coro import Task, current_task, spawn, symmetric, transfer

# A producer and a consumer: neither calls the other


async def produce(items: list[str], consumer: Task[Any]) -> str:
    for item in items:
        await transfer(consumer, item)
    return "sold out"


async def consume(producer: Task[Any], item: str) -> None:
    while True:
        print("consumed", item)
        item = await transfer(producer)


async def market(items: list[str]) -> str:
    """The producer was started here, so its return value arrives here."""
    producer = symmetric(produce, items)
    consumer = symmetric(consume, producer)
    news: str = await transfer(producer, consumer)
    return news


# Compare the leaves of two trees, one by one

Tree = Any


def walk(tree: Tree, reader: Task[Any]) -> Generator[Any, Any, None]:
    """Transfer each leaf to the reader, and then return None."""
    if isinstance(tree, tuple):
        for branch in tree:
            yield from walk(branch, reader)
    else:
        yield transfer(reader, tree)


async def same_fringe(one: Tree, other: Tree) -> bool:
    reader = current_task()
    walks = [symmetric(walk, tree) for tree in (one, other)]
    while True:
        leaf, other_leaf = [await transfer(each, reader) for each in walks]
        if leaf != other_leaf:
            return False
        if leaf is None:
            return True


# A parser that asks for the next token when it needs one, and a tokenizer that
# transfers it in the middle of its loop

TOKEN = re.compile(r"\s*(?:([0-9]+)|(.))")
OPERATORS: dict[str, tuple[int, Callable[[int, int], int]]] = {
    "+": (1, operator.add),
    "-": (1, operator.sub),
    "*": (2, operator.mul),
    "/": (2, operator.floordiv),
}


async def tokenize(text: str, parser: Task[Any]) -> None:
    """Transfer each token; at the end, the task that started this receives None."""
    for match in TOKEN.finditer(text.strip()):
        number, sign = match.groups()
        await transfer(parser, sign if number is None else int(number))


class Parser:
    """
    Evaluates an expression.

    :ivar token: the next token; None at the end.
    """

    def __init__(self, text: str) -> None:
        self.tokenizer = symmetric(tokenize, text)
        self.token: int | str | None = None

    async def advance(self) -> int | str | None:
        """Return the next token, and read the one after it."""
        token = self.token
        if not self.tokenizer.done:
            self.token = await transfer(self.tokenizer, current_task())
        return token

    async def expression(self, strength: int = 1) -> int:
        value = await self.operand()
        while self.token in OPERATORS:
            its_strength, apply = OPERATORS[str(self.token)]
            if its_strength < strength:
                break
            await self.advance()
            value = apply(value, await self.expression(its_strength + 1))
        return value

    async def operand(self) -> int:
        token = await self.advance()
        if token == "(":
            value = await self.expression()
            if await self.advance() != ")":
                raise SyntaxError("expected )")
            return value
        if isinstance(token, int):
            return token
        raise SyntaxError(f"expected a number, not {token}")


async def calculate(text: str) -> int:
    parser = Parser(text)
    await parser.advance()
    value = await parser.expression()
    if parser.token is not None:
        raise SyntaxError(f"expected the end, not {parser.token}")
    return value


async def main(text: str) -> None:
    print(await market(["milk", "eggs"]))
    print(await same_fringe((1, (2, 3)), ((1, 2), 3)))
    try:
        print(text, "=", await calculate(text))
    except (SyntaxError, ArithmeticError, ValueError, RecursionError) as error:
        sys.exit(f"{text}: {error}")


if __name__ == "__main__":
    text = " ".join(sys.argv[1:]) or "2 * (3 + 4) - 5"
    react(lambda reactor: spawn(main, text, reactor=reactor).as_deferred())
