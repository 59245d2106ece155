"""Counted randomness."""

import torch

from lgp.compute.randomness import Stream, counted_seed, generator, seeded


def test_same_place_gives_same_draws_and_other_places_others() -> None:
    def draw(*place: str | int) -> list[float]:
        return torch.rand(4, generator=generator(*place)).tolist()

    assert draw(0, "mim/mask", 3) == draw(0, "mim/mask", 3)
    others = [draw(0, "mim/mask", 4), draw(0, "cl/mask", 3), draw(1, "mim/mask", 3), draw(0, "mim/mask", 3, 0)]
    assert draw(0, "mim/mask", 3) not in others
    assert len({tuple(o) for o in others}) == len(others)


def test_seeds_do_not_collide_over_many_steps() -> None:
    seeds = {counted_seed(seed, "crops", step) for seed in range(4) for step in range(5000)}
    assert len(seeds) == 20_000
    assert all(0 <= s < 2**63 for s in seeds)


def test_seeded_block_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    with seeded(0, "init"):
        first = torch.rand(3)
    with seeded(0, "init"):
        second = torch.rand(3)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_stream_keeps_trainings_and_kinds_of_choices_apart() -> None:
    def draw(stream: Stream, kind: str, *place: int) -> list[float]:
        return torch.rand(4, generator=stream.generator(kind, *place)).tolist()

    stream = Stream(3, "mim")
    assert draw(stream, "mask", 5) == torch.rand(4, generator=generator(3, "mim/mask", 5)).tolist()
    others = [draw(Stream(4, "mim"), "mask", 5), draw(Stream(3, "cl"), "mask", 5)]
    others += [draw(stream, "crops", 5), draw(stream, "mask", 6), draw(stream, "mask", 5, 0)]
    assert draw(stream, "mask", 5) not in others
    assert len({tuple(o) for o in others}) == len(others)
    with stream.seeded("init", 1):
        inside = torch.rand(3)
    with seeded(3, "mim/init", 1):
        assert torch.equal(torch.rand(3), inside)
