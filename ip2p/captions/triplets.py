"""Triplets (caption, instruction, edited caption) written by us: the exemplars of the few-shot prompt."""

from typing import NamedTuple


class Triplet(NamedTuple):
    caption: str
    instruction: str
    edited_caption: str


EXEMPLARS = (
    Triplet(
        "a wooden rowing boat on a calm lake at sunrise",
        "make the lake frozen",
        "a wooden rowing boat on a frozen lake at sunrise",
    ),
    Triplet(
        "Portrait of an old fisherman with a gray beard, oil on canvas",
        "give him a red woollen hat",
        "Portrait of an old fisherman with a gray beard and a red woollen hat, oil on canvas",
    ),
    Triplet(
        "a brown dog asleep on a sofa",
        "replace the dog with a cat",
        "a brown cat asleep on a sofa",
    ),
    Triplet(
        "Narrow street in Lisbon with yellow trams",
        "have it rain",
        "Narrow street in Lisbon with yellow trams in the rain",
    ),
    Triplet(
        "three sheep grazing on a green hill under a cloudy sky",
        "leave only one sheep",
        "one sheep grazing on a green hill under a cloudy sky",
    ),
    Triplet(
        "A glass vase with white tulips on a kitchen table",
        "make the vase out of clay",
        "A clay vase with white tulips on a kitchen table",
    ),
    Triplet(
        "mountain hut in summer, photograph by a hiker",
        "turn it into winter",
        "snow-covered mountain hut in winter, photograph by a hiker",
    ),
    Triplet(
        "a lighthouse on a cliff, watercolor painting",
        "make it a photograph",
        "a lighthouse on a cliff, photograph",
    ),
    Triplet(
        "two children building a sandcastle on the beach",
        "remove the sandcastle",
        "two children on the beach",
    ),
    Triplet(
        "An astronaut in a white suit riding a horse",
        "colour the suit orange",
        "An astronaut in an orange suit riding a horse",
    ),
    Triplet(
        "a red apple to the left of a green pear",
        "swap the apple and the pear",
        "a green pear to the left of a red apple",
    ),
    Triplet(
        "city skyline seen from the river, midday",
        "set it at night",
        "city skyline seen from the river, night with lit windows",
    ),
)
