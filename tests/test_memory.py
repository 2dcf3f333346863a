import pytest
import torch

from fastmat.errors import UserError
from fastmat.memory import Chunks, out_of_memory


def real_error() -> RuntimeError:
    """What the CPU allocator of this PyTorch raises."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    return caught.value


class Room:
    """Work that fits as long as the items of a chunk cost no more than `most` together."""

    def __init__(self, most: int, costs: list[int], error: Exception) -> None:
        self.most, self.costs, self.error = most, costs, error
        self.tried: list[tuple[int, int]] = []

    def __call__(self, start: int, stop: int) -> list[int]:
        self.tried.append((start, stop))
        if sum(self.costs[start:stop]) > self.most:
            raise self.error
        return list(range(start, stop))


def chunks(size: int | None = None) -> Chunks:
    return Chunks(size, item="image", advice="do something else")


@pytest.mark.parametrize("error", [real_error(), torch.OutOfMemoryError("no room"), MemoryError()], ids=type)
def test_out_of_memory_halves_and_goes_on_with_the_same_items(error, caplog) -> None:
    tool, room = chunks(), Room(3, [1] * 10, error)
    assert [i for part in tool.run(10, room) for i in part] == list(range(10))
    assert room.tried == [(0, 10), (0, 5), (0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    assert [r.message.split(" at once")[0] for r in caplog.records] == [
        "out of memory at 10 x image",
        "out of memory at 5 x image",
    ]
    # What was learnt is remembered, and smaller work is still done at once.
    room.tried.clear()
    tool.run(3, room)
    tool.run(1, room)
    assert room.tried == [(0, 2), (2, 3), (0, 1)] and len(caplog.records) == 2


def test_one_item_that_does_not_fit_is_a_users_error() -> None:
    costs = [1, 1, 9, 1]
    with pytest.raises(UserError, match="work on one image: do something else"):
        chunks().run(4, Room(3, costs, torch.OutOfMemoryError("no room")))


def test_other_errors_pass() -> None:
    room = Room(0, [1] * 4, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        chunks().run(4, room)
    assert room.tried == [(0, 4)]
    assert not out_of_memory(KeyError("DefaultCPUAllocator: "))


def test_items_may_cost_more_than_one() -> None:
    costs = [4, 2, 1, 7, 1, 1, 1]
    room = Room(100, costs, MemoryError())
    tool = chunks(6)
    tool.run(7, room, cost=lambda start, stop: sum(costs[start:stop]))
    assert room.tried == [(0, 2), (2, 3), (3, 4), (4, 7)]  # the item of 7 is tried alone, though over the size
    room.tried.clear()
    tool.run(7, room, cost=lambda start, stop: (stop - start) * max(costs[start:stop]))  # padded to the longest
    assert room.tried == [(0, 1), (1, 3), (3, 4), (4, 7)]
    room.tried.clear()
    tool.run(3, room, at_most=2)
    assert room.tried == [(0, 2), (2, 3)]
    assert tool.run(0, room) == []


def test_nothing_of_the_failed_chunk_is_held_when_the_next_is_tried() -> None:
    alive: list[bool] = []

    class Big:
        count = 0

        def __init__(self) -> None:
            Big.count += 1

        def __del__(self) -> None:
            Big.count -= 1

    def work(start: int, stop: int) -> None:
        alive.append(Big.count > 0)
        big = Big()
        if stop - start > 2:
            raise torch.OutOfMemoryError(f"no room for {big}")

    chunks().run(8, work)
    assert not any(alive) and len(alive) == 6
