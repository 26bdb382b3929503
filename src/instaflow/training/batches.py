"""What several stages draw their batches from: cached token states, and pairs with their noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from instaflow.data.pairs import PairReader
from instaflow.models.sampling import noise
from instaflow.training.trainer import Batch, Draw


class TextCache:
    """Token states of the captions met last; captions recur, the text encoder is frozen."""

    def __init__(self, encode: Callable[[Sequence[str]], Tensor], limit: float = 4e9) -> None:
        """`encode` maps B prompts to states (B, L, D); at most `limit` bytes of them are kept."""
        self.encode, self.limit = encode, limit
        self.states: dict[str, Tensor] = {}

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """States (B, L, D) in fp32 on the CPU."""
        new = [p for p in dict.fromkeys(prompts) if p not in self.states]
        if new:
            # half once, for new and cached alike: a caption's states never depend on when it was met
            self.states.update(zip(new, self.encode(new).half().cpu(), strict=True))
        states = torch.stack([self.states[p] for p in prompts]).float()
        while len(self.states) * states[0].nbytes // 2 > self.limit:
            del self.states[next(iter(self.states))]  # the one met first
        return states


def pair_batch(pairs: PairReader, encode: TextCache, draw: Draw, batch_size: int, empty_prompts: float = 0.0) -> Batch:
    """This process's part of a batch of pairs: x1, the noise x0 back from its seed, and token states."""
    chosen = pairs.batch(draw.seed, draw.step, batch_size, draw.part)
    prompts = chosen.prompts
    if empty_prompts:
        dropped = draw.own([draw.python.random() < empty_prompts for _ in range(batch_size)])
        prompts = ["" if empty else p for p, empty in zip(prompts, dropped, strict=True)]
    x1 = chosen.x1.float()
    return {"x1": x1, "x0": noise(chosen.seeds, x1.shape[1:]), "states": encode(prompts)}
