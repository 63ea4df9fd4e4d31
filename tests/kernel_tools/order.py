"""Sets the order in which Triton's interpreter runs the programs of a launch, which is undefined on a GPU."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

ORDERS = ("forward", "reversed", "shuffled")


@dataclass
class Launches:
    """Grids of the launches within the block."""

    grids: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def several(self) -> int:
        """Number of launches with more than one program."""
        return sum(x * y * z > 1 for x, y, z in self.grids)


@contextmanager
def program_order(name: str, seed: int = 0) -> Iterator[Launches]:
    """In the block, programs run "forward", "reversed" or "shuffled"; needs TRITON_INTERPRET=1."""
    from triton.runtime.interpreter import interpreter_builder as builder

    if name not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {name!r}")
    launches, places = Launches(), {}
    set_dim, set_place = builder.set_grid_dim, builder.set_grid_idx

    def begin(nx: int, ny: int, nz: int) -> None:
        launches.grids.append((nx, ny, nz))
        programs = [(x, y, z) for x in range(nx) for y in range(ny) for z in range(nz)]
        order = list(programs)
        if name == "reversed":
            order.reverse()
        elif name == "shuffled":
            random.Random(seed + len(launches.grids)).shuffle(order)
        places.clear()
        places.update(zip(programs, order, strict=True))
        set_dim(nx, ny, nz)

    builder.set_grid_dim, builder.set_grid_idx = begin, lambda *turn: set_place(*places[turn])
    try:
        yield launches
    finally:
        del builder.set_grid_dim, builder.set_grid_idx
