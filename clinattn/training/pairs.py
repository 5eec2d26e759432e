"""Pairs for next-sentence prediction: [CLS] facts A [SEP] B [SEP], B after A or from elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from clinattn.encoder.heads import IGNORE

from .examples import Examples
from .sequences import Tokens, joined

FOLLOWS, RANDOM = 0, 1  # as in BERT


class Pairs:
    """The sequences of a split, each cut in its middle, as first part A and second part B.

    Half of the time, B is as many events or words of a sequence of another subject. So B is no
    longer than the longest of those, whichever it is: its length tells nothing. A sequence of
    fewer than two is no pair, but A alone.
    Raises ValueError where there is no pair at all.
    """

    def __init__(self, source: str, examples: Examples, sep: int):
        self.examples, self.sep = examples, sep
        self.subjects = torch.from_numpy(examples.subjects())
        starts = torch.from_numpy(examples.starts())
        self.content = torch.from_numpy(examples.lengths()) - starts
        owner = self.subjects[self.content.argmax()]
        others = torch.where(self.subjects == owner, 0, self.content).max()
        longest = torch.where(self.subjects == owner, others, self.content.max())
        self.first = (self.content + 1) // 2
        self.second = torch.minimum(self.content // 2, longest)
        if not self.second.any():
            raise ValueError(
                f"{source}: no pairs for nsp in a split, expected sequences of two or more tokens "
                "besides [CLS] and static facts, and of two or more subjects"
            )
        self.lengths = (starts + self.first + self.second + 1 + (self.second > 0)).numpy()

    def draw(self, index: int, seed: int) -> tuple[Tokens, Tensor, int]:
        """The pair of a sequence, its token types (N,), 1 from B on, and FOLLOWS or RANDOM.

        -100 takes the place of the last where there is no B.
        """
        example = self.examples[index]
        middle = example.start + int(self.first[index])
        parts = [example.take(slice(middle))]
        parts.append(self._separator(parts[0]))
        types = torch.zeros(self.lengths[index], dtype=torch.int64)
        size = int(self.second[index])
        if size == 0:
            return joined(parts), types, IGNORE
        generator = torch.Generator().manual_seed(seed)
        label = int(torch.randint(2, (), generator=generator))
        second = example.take(slice(middle, middle + size))
        if label == RANDOM:
            second = self._elsewhere(index, second, generator)
        types[middle + 1 :] = 1
        return joined([*parts, second, self._separator(second)]), types, label

    def _elsewhere(self, index: int, true: Tokens, generator: torch.Generator) -> Tokens:
        """Returns as many tokens of another subject, moved in time to begin when `true` would."""
        size = len(true)
        fit = (self.content >= size) & (self.subjects != self.subjects[index])
        found = fit.nonzero().squeeze(1)
        donor = self.examples[found[torch.randint(len(found), (), generator=generator)]]
        last = len(donor) - donor.start - size
        begin = donor.start + int(torch.randint(last + 1, (), generator=generator))
        taken = donor.take(slice(begin, begin + size))
        if taken.days is None or true.days is None:
            return taken
        return Tokens(taken.ids, taken.days - taken.days[0] + true.days[0], taken.values)

    def _separator(self, before: Tokens) -> Tokens:
        return before.mark(self.sep, None if before.days is None else before.days[-1])
