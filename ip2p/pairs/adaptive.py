"""How many candidates a caption pair gets: a fixed number, as the paper does it, or rounds until there are enough."""

from ip2p.recipe import Pairs


def next_round(settings: Pairs, drawn: int, accepted: int) -> int:
    """How many candidates to draw now of a caption pair of which `accepted` of `drawn` were accepted; 0: it is done.

    Without `pairs.adaptive` all are one round. With it, a round asks for no more than can be kept, and a caption pair
    is given up when fewer than `give_up_below` of its next candidates can be expected to be accepted.
    """
    left = settings.candidates - drawn
    if settings.adaptive is None or left == 0:
        return left
    wanted = settings.max_pairs - accepted
    if wanted <= 0 or expected_acceptance(drawn, accepted) < settings.adaptive.give_up_below:
        return 0
    return min(settings.adaptive.round, wanted, left)


# Beta(1, 1) prior, Bernoulli draws: the posterior mean is (k + 1) / (n + 2)   (Laplace's rule of succession)
def expected_acceptance(drawn: int, accepted: int) -> float:
    """Chance that the next candidate is accepted, when nothing is known but the last ones of its caption pair."""
    return (accepted + 1) / (drawn + 2)
