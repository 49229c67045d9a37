"""Other tasks in two of Atari's games, read off the console's memory: CPT's, appendix E.

    ghosts-easy   ms_pacman   200, 400, 800, 1600 for the ghosts that one energiser lets eat in succession; nothing else pays
    ghosts-hard               and every dot costs 10
    miners-easy   hero        1000 for a miner; nothing else pays
    miners-hard               and every wall that is blown up costs 300

A reward is that of one emulated frame: in the four of a step a dot and a ghost would mix. `points` is the frame's score change, `before`
and `after` the memory around it. What the bytes mean was found by playing, and by setting them: see the tests.
"""

from collections.abc import Callable, Sequence

Memory = Sequence[int]  # the 128 bytes


def ghosts(points: int, before: Memory, after: Memory, dot: int) -> int:
    """Ms. Pac-Man. The two upper bits of byte 116 count the ghosts eaten since the energiser, and return to 0 with the fourth or its end.

    The points alone do not tell: a strawberry is worth a ghost. Dots and energisers count in byte 119; all but dots are worth fifties.
    """
    eaten = before[116] >> 6
    ghost = 200 << eaten
    paid = ghost if after[116] >> 6 == (eaten + 1) % 4 and points >= ghost else 0
    return paid + (dot if after[119] == before[119] + 1 and points % 50 == 10 else 0)


def miners(points: int, before: Memory, after: Memory, wall: int) -> int:
    """Hero: 1000 points are a miner's, 75 a wall's, 125 a wall's and a creature's that dies with it. A counter that runs over pays 0."""
    return 1000 * (points >= 1000) + wall * (points in (75, 125))


REWARDS: dict[str, tuple[str, Callable[[int, Memory, Memory], int]]] = {  # the game, and what a frame pays
    "ghosts-easy": ("ms_pacman", lambda points, before, after: ghosts(points, before, after, 0)),
    "ghosts-hard": ("ms_pacman", lambda points, before, after: ghosts(points, before, after, -10)),
    "miners-easy": ("hero", lambda points, before, after: miners(points, before, after, 0)),
    "miners-hard": ("hero", lambda points, before, after: miners(points, before, after, -300)),
}
