"""The path that a warp takes through a kernel in the usual case: aligned tensors, no mask.

The code does not say which branches are taken. The hot path is the one with the most products, then with the
most copies (or the fewest, between copies), then without element-by-element accesses, unless these are usual,
then with the most stores (and loads, where what is stored depends on them), then the shortest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .sass import Instruction, Kernel

Score = tuple[int, ...]


def hides(block: list[Instruction]) -> bool:
    """Whether it sets scores to minus infinity."""
    return any(each.name == "FSEL" and "-INF" in each.text for each in block)


def _score(
    copying: bool, hiding: bool, elements: bool, loading: bool
) -> Callable[[list[Instruction]], Score]:
    def score(block: list[Instruction]) -> Score:
        kinds = [each.kind for each in block]
        copies = kinds.count("copy") * (1 if copying else -1)
        slow = sum(each.kind in ("load", "store") and ".128" not in each.opcode for each in block)
        slow += sum(each.name == "STS" for each in block)
        slow *= not elements
        products = kinds.count("hmma") + kinds.count("wgmma") + kinds.count("box")
        accesses = kinds.count("store") + loading * kinds.count("load")
        return products, hiding * hides(block), copies, -slow, accesses, -len(block)

    return score


def hottest(
    kernel: Kernel,
    start: int,
    ends: set[int],
    within: Iterable[int],
    copying: bool,
    hiding: bool = False,
    elements: bool = False,
    loading: bool = False,
) -> list[int]:
    """Blocks from start to the one before any of `ends`, or to the kernel's exit if `ends` is empty.

    `elements`: whether single elements are usually loaded and stored too. `loading`: whether what is stored
    depends on loads.
    """
    allowed, score = set(within), _score(copying, hiding, elements, loading)
    best: dict[int, tuple[Score, int | None] | None] = {}
    order: list[int] = []
    seen = {start}
    forward = {
        block: [
            each
            for each in kernel.successors[block]
            if each in ends or (each in allowed and each not in kernel.dominators.get(block, ()))
        ]
        for block in allowed
    }
    stack = [(start, iter(forward[start]))]
    while stack:
        block, following = stack[-1]
        each = next((each for each in following if each not in seen and each not in ends), None)
        if each is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(each)
            stack.append((each, iter(forward[each])))
    for block in order:
        own = score(kernel.blocks[block])
        ways: list[tuple[Score, int | None]] = []
        for each in forward[block]:
            if each in ends:
                ways.append((own, None))
            elif (rest := best.get(each)) is not None:
                ways.append((tuple(a + b for a, b in zip(own, rest[0], strict=True)), each))
        if not ends and kernel.blocks[block][-1].name in ("EXIT", "RET"):
            ways.append((own, None))
        best[block] = max(ways, key=lambda way: way[0], default=None)
    path, block = [], start
    if best[start] is None:
        raise ValueError("there is no way through this part of the kernel")
    while True:
        path.append(block)
        way = best[block]
        assert way is not None
        if way[1] is None:
            return path
        block = way[1]


def expand(
    kernel: Kernel, path: list[int], copy_trips: int = 1, products: int | None = None
) -> list[Instruction]:
    """The path's instructions with its loops repeated: copy loops copy_trips times, product loops until there
    are `products` of them.
    """
    on_path = set(path)
    heads = [h for h in path if h in kernel.loops and not on_path <= kernel.loops[h]]
    outermost = [h for h in heads if not any(h in kernel.loops[o] for o in heads if o != h)]
    result: list[Instruction] = []
    repeated: dict[int, tuple[list[int], int]] = {}  # keyed by the last block of a loop
    for head in outermost:
        body = [block for block in path if block in kernel.loops[head]]
        inside = kernel.count(body, "hmma")
        trips = copy_trips if kernel.count(body, "copy") else 1
        if inside and products is not None:
            trips = (products - kernel.count(path, "hmma")) // inside + 1
        repeated[body[-1]] = body, trips
    for block in path:
        result += kernel.blocks[block]
        body, trips = repeated.get(block, ([], 1))
        result += [each for _ in range(trips - 1) for part in body for each in kernel.blocks[part]]
    return result


def exit_of(kernel: Kernel, head: int) -> int:
    """The block that follows a loop."""
    return next(
        each
        for block in sorted(kernel.loops[head])
        for each in kernel.successors[block]
        if each not in kernel.loops[head]
    )


def product_loops(kernel: Kernel) -> list[int]:
    """The first blocks of the loops over tiles, in order: those with products that wait for their copies."""
    waiting = {
        head: body
        for head, body in kernel.loops.items()
        if kernel.count(body, "hmma") and kernel.count(body, "wait_groups")
    }
    return sorted(h for h in waiting if not any(o != h and o in waiting[h] for o in waiting))
