"""Who rates what, and in which order: a blind study's design, as numbers only."""

import random
from collections import Counter
from dataclasses import dataclass

DESIGNS = ("within", "between")
SCORES = (1, 2, 3)


@dataclass(frozen=True)
class Item:
    """
    What a rater judges at once: a conversation with one system's reply.

    `system` is None for an attention check, whose reply asks for the score `expected`.
    """

    conversation: int
    system: int | None
    expected: int | None = None


def plan(
    conversations: int, systems: int, raters: int, ratings: int, design: str, checks: int, seed: int
) -> list[list[Item]]:
    """
    The items of each rater, in the order in which they are shown.

    Each reply is rated by exactly `ratings` raters, and the raters' loads differ by one conversation at most.

    - `within`, as in the paper (Fig. 10): a rater judges the replies of all systems to a conversation, one after the
      other. Their order is a row of a Williams square: over the rows each system stands at each place, and follows each
      other system, equally often. The rows are dealt like cards, so that all are used equally often.
    - `between`: a rater sees a conversation once, with one system's reply, and each system equally often, up to one.

    Conversations come in a random order. An attention check stands beside a reply to the same conversation.

    Args:
        conversations, systems, raters, ratings: how many there are; `ratings` of each reply.
        checks: attention checks of each rater.
        seed: of all that is drawn.

    Raises:
        ValueError: for numbers that do not fit together.
    """
    if design not in DESIGNS:
        raise ValueError(f"There is no design {design!r}: take one of {', '.join(DESIGNS)}.")
    for name, value in (
        ("conversations", conversations),
        ("systems", systems),
        ("raters", raters),
        ("ratings", ratings),
    ):
        if value < 1:
            raise ValueError(f"{name} is {value} and must be 1 or more.")
    if checks < 0:
        raise ValueError(f"checks is {checks} and must be 0 or more.")
    seen_by = ratings if design == "within" else ratings * systems
    if seen_by > raters:
        raise ValueError(
            f"Each conversation must be seen by {seen_by} raters in the design {design} ({ratings} ratings of each "
            f"reply, {systems} systems), and there are only {raters}. Take more raters or fewer ratings."
        )
    least = conversations * seen_by // raters
    if least < 1:
        raise ValueError(
            f"{conversations} conversations with {seen_by} raters each do not give all {raters} raters something to "
            "judge. Take fewer raters, or more ratings or conversations."
        )
    if checks > least:
        raise ValueError(f"{checks} checks do not fit into the {least} conversations of a rater. Take fewer checks.")
    draw = random.Random(seed)
    assigned = _assign(conversations, raters, seen_by, draw)
    blocks = _within(assigned, systems, draw) if design == "within" else _between(assigned, systems, draw)
    return [_with_checks(rater, checks, draw) for rater in blocks]


def williams(systems: int) -> list[list[int]]:
    """
    Orders in which each item stands at each place, and directly before each other one, equally often.

    E. J. Williams, "Experimental designs balanced for the estimation of residual effects of treatments" (1949): as many
    rows as items for an even number of them, twice as many for an odd one.
    """
    first = [(place + 1) // 2 if place % 2 else (systems - place // 2) % systems for place in range(systems)]
    rows = [[(item + shift) % systems for item in first] for shift in range(systems)]
    return rows if systems % 2 == 0 or systems == 1 else rows + [row[::-1] for row in rows]


def _assign(conversations: int, raters: int, seen_by: int, draw: random.Random) -> list[list[int]]:
    """The conversations of each rater: each goes to those who have the fewest so far."""
    assigned = [[] for _ in range(raters)]
    for conversation in draw.sample(range(conversations), conversations):
        queue = draw.sample(assigned, raters)
        for rater in sorted(queue, key=len)[:seen_by]:
            rater.append(conversation)
    for rater in assigned:
        draw.shuffle(rater)
    return assigned


def _within(assigned: list[list[int]], systems: int, draw: random.Random) -> list[list[list[Item]]]:
    names = draw.sample(range(systems), systems)
    rows = [[names[item] for item in row] for row in williams(systems)]
    deck, used = [], Counter()  # (conversation, row): so often
    blocks = []
    for rater in assigned:
        blocks.append([])
        for conversation in rater:
            deck = deck or draw.sample(range(len(rows)), len(rows))
            row = min(deck, key=lambda row: used[conversation, row])
            deck.remove(row)
            used[conversation, row] += 1
            blocks[-1].append([Item(conversation, system) for system in rows[row]])
    return blocks


def _between(assigned: list[list[int]], systems: int, draw: random.Random) -> list[list[list[Item]]]:
    """
    Gives each (rater, conversation) a system, so that both see all systems equally often, up to one.

    That is an edge colouring: each rater and each conversation is split into nodes of at most `systems` edges, and a
    bipartite graph of that degree has a proper colouring with as many colours (König 1916). A clash of colours is
    solved by swapping two of them along the path on which they alternate.
    """
    edges = [(rater, conversation) for rater, theirs in enumerate(assigned) for conversation in theirs]
    draw.shuffle(edges)
    places, colours, degree = {}, {}, Counter()  # edge: its two nodes; node: {colour: edge}
    for edge in edges:
        ends = (("rater", edge[0]), ("conversation", edge[1]))
        places[edge] = tuple((*end, degree[end] // systems) for end in ends)
        degree.update(ends)
        for node in places[edge]:
            colours.setdefault(node, {})
        left, right = places[edge]
        free_left, free_right = (
            next(colour for colour in range(systems) if colour not in colours[node]) for node in (left, right)
        )
        path, node, colour = [], right, free_left
        while colour in colours[node]:
            step = colours[node][colour]
            path.append((step, colour))
            node = places[step][0] if places[step][1] == node else places[step][1]
            colour = free_right if colour == free_left else free_left
        for step, colour in path:
            for node in places[step]:
                del colours[node][colour]
        for step, colour in path:
            for node in places[step]:
                colours[node][free_right if colour == free_left else free_left] = step
        colours[left][free_left] = colours[right][free_left] = edge
    names = draw.sample(range(systems), systems)
    system = {edge: names[colour] for edge in edges for colour, at in colours[places[edge][0]].items() if at == edge}
    return [
        [[Item(conversation, system[rater, conversation])] for conversation in theirs]
        for rater, theirs in enumerate(assigned)
    ]


def _with_checks(blocks: list[list[Item]], checks: int, draw: random.Random) -> list[Item]:
    """The blocks in a row, with checks spread over them, at a random place of their block."""
    expected = []
    for place in range(checks):
        expected = expected or draw.sample(SCORES, len(SCORES))
        start, end = place * len(blocks) // checks, (place + 1) * len(blocks) // checks
        block = blocks[draw.randrange(start, end)]
        block.insert(draw.randrange(len(block) + 1), Item(block[0].conversation, None, expected.pop()))
    return [item for block in blocks for item in block]
