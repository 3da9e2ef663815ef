"""How the sequences of a step share its tokens. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def share(wanted: Sequence[int], budget: int) -> list[int]:
    """Tokens for each sequence, by arrival, of the one or more that it could take; `budget` is at least their number.

    Who wants one token (a sequence that decodes) gets it. Of what is left, the oldest prefill has half for sure, so it
    is done after at most twice its own time, whatever comes after it. The other half goes to prefills that are shorter
    than what the oldest still wants, the shortest first, so a short prompt does not wait for a long one. What they
    leave goes by arrival: of prompts of one length the first is served first. When the oldest is done within its half,
    the next one takes its place.
    """
    counts = [int(want == 1) for want in wanted]
    prefills = [index for index, want in enumerate(wanted) if want > 1]
    left = budget - sum(counts)

    def give(index: int, most: int) -> None:
        nonlocal left
        given = min(wanted[index] - counts[index], most)
        counts[index] += given
        left -= given

    for number, oldest in enumerate(prefills):
        give(oldest, left - left // 2)
        if counts[oldest] < wanted[oldest]:
            later = prefills[number + 1 :]
            shorter = sorted((index for index in later if wanted[index] < wanted[oldest]), key=wanted.__getitem__)
            for index in (*shorter, oldest, *later):
                give(index, left)
            break
    return counts
