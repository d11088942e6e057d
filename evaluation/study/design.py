"""The design of a blind study, as indices: which rater rates which replies, and in which order."""

import random
from collections import Counter
from dataclasses import dataclass

DESIGNS = ("within", "between")
SCORES = (1, 2, 3)


@dataclass(frozen=True)
class Item:
    """
    An item that a rater judges: a conversation with the reply of one system.

    For an attention check `system` is None, and the reply asks for the score `expected`.
    """

    conversation: int
    system: int | None
    expected: int | None = None


def plan(
    conversations: int, systems: int, raters: int, ratings: int, design: str, checks: int, seed: int
) -> list[list[Item]]:
    """
    Return the items of each rater, in the order in which they are shown.

    Each reply is rated by exactly `ratings` raters, and the number of conversations per rater differs by at most one.

    - `within`, as in the paper (Fig. 10): a rater judges the replies of all systems to a conversation, one after the
      other. Their order is a row of a Williams square: over all rows, each system is equally often in each position,
      and equally often directly after each other system. The rows are dealt like cards, to use all equally often.
    - `between`: a rater sees a conversation once, with one system's reply. The counts of the systems differ by at most
      one.

    The order of conversations is random. An attention check is next to a reply to the same conversation.

    Args:
        conversations, systems, raters: numbers of each.
        ratings: number of ratings per reply.
        checks: number of attention checks per rater.
        seed: seed of all random choices.

    Raises:
        ValueError: if the numbers are out of range or inconsistent.
    """
    if design not in DESIGNS:
        raise ValueError(f"Unknown design {design!r}; choose one of {', '.join(DESIGNS)}.")
    for name, value in (
        ("conversations", conversations),
        ("systems", systems),
        ("raters", raters),
        ("ratings", ratings),
    ):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more.")
    if checks < 0:
        raise ValueError(f"checks is {checks}; it must be 0 or more.")
    seen_by = ratings if design == "within" else ratings * systems
    if seen_by > raters:
        raise ValueError(
            f"Each conversation must be seen by {seen_by} raters in the design {design} ({ratings} ratings of each "
            f"reply, {systems} systems), but there are only {raters}. Use more raters or fewer ratings."
        )
    least = conversations * seen_by // raters
    if least < 1:
        raise ValueError(
            f"{conversations} conversations with {seen_by} raters each are too few for {raters} raters. Use fewer "
            "raters, or more ratings or conversations."
        )
    if checks > least:
        raise ValueError(f"{checks} checks do not fit into the {least} conversations of a rater. Use fewer checks.")
    draw = random.Random(seed)
    assigned = _assign(conversations, raters, seen_by, draw)
    blocks = _within(assigned, systems, draw) if design == "within" else _between(assigned, systems, draw)
    return [_with_checks(rater, checks, draw) for rater in blocks]


def williams(systems: int) -> list[list[int]]:
    """
    Return orders in which each item is equally often in each position, and equally often before each other item.

    E. J. Williams, "Experimental designs balanced for the estimation of residual effects of treatments" (1949): n rows
    for an even number n of items, 2 n rows for an odd number.
    """
    first = [(place + 1) // 2 if place % 2 else (systems - place // 2) % systems for place in range(systems)]
    rows = [[(item + shift) % systems for item in first] for shift in range(systems)]
    return rows if systems % 2 == 0 or systems == 1 else rows + [row[::-1] for row in rows]


def _assign(conversations: int, raters: int, seen_by: int, draw: random.Random) -> list[list[int]]:
    """Assign conversations to raters: each goes to the raters who have the fewest so far."""
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
    deck, used = [], Counter()  # (conversation, row): number of uses
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
    Assign a system to each (rater, conversation), so that for each rater and for each conversation the counts of the
    systems differ by at most one.

    This is an edge coloring: each rater and each conversation is split into nodes with at most `systems` edges, and a
    bipartite graph of that degree has a proper coloring with `systems` colors (König 1916). A conflict is resolved by
    swapping two colors along the path on which they alternate.
    """
    edges = [(rater, conversation) for rater, theirs in enumerate(assigned) for conversation in theirs]
    draw.shuffle(edges)
    places, colors, degree = {}, {}, Counter()  # edge: its two nodes; node: {color: edge}
    for edge in edges:
        ends = (("rater", edge[0]), ("conversation", edge[1]))
        places[edge] = tuple((*end, degree[end] // systems) for end in ends)
        degree.update(ends)
        for node in places[edge]:
            colors.setdefault(node, {})
        left, right = places[edge]
        free_left, free_right = (
            next(color for color in range(systems) if color not in colors[node]) for node in (left, right)
        )
        path, node, color = [], right, free_left
        while color in colors[node]:
            step = colors[node][color]
            path.append((step, color))
            node = places[step][0] if places[step][1] == node else places[step][1]
            color = free_right if color == free_left else free_left
        for step, color in path:
            for node in places[step]:
                del colors[node][color]
        for step, color in path:
            for node in places[step]:
                colors[node][free_right if color == free_left else free_left] = step
        colors[left][free_left] = colors[right][free_left] = edge
    names = draw.sample(range(systems), systems)
    system = {edge: names[color] for edge in edges for color, at in colors[places[edge][0]].items() if at == edge}
    return [
        [[Item(conversation, system[rater, conversation])] for conversation in theirs]
        for rater, theirs in enumerate(assigned)
    ]


def _with_checks(blocks: list[list[Item]], checks: int, draw: random.Random) -> list[Item]:
    """Concatenate the blocks, with checks spread over them at random positions within their blocks."""
    expected = []
    for place in range(checks):
        expected = expected or draw.sample(SCORES, len(SCORES))
        start, end = place * len(blocks) // checks, (place + 1) * len(blocks) // checks
        block = blocks[draw.randrange(start, end)]
        block.insert(draw.randrange(len(block) + 1), Item(block[0].conversation, None, expected.pop()))
    return [item for block in blocks for item in block]
