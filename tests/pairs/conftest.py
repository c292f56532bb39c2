import pytest

from ip2p.recipe import ClipRef, GrammarCaptions, ModelRef, Models, Pairs, Recipe, Sharing, Thresholds


@pytest.fixture(scope="session")
def smallest(tiny_sd, tiny_clip) -> Recipe:
    """The real path at its smallest: SD 1.5's layout, random weights, everything accepted that changes at all."""
    ref = ModelRef(path=str(tiny_sd))
    return Recipe(
        name="smallest",
        device="cpu",
        models=Models(text_to_image=ref, clip=ClipRef(name=f"local-dir:{tiny_clip}"), llm=ref, editor=ref),
        captions=GrammarCaptions(),
        pairs=Pairs(
            candidates=3,
            max_pairs=2,
            steps=2,
            height=64,
            width=64,
            batch_size=4,
            rows_per_block=2,
            sharing=Sharing(modes=["replace", "refine"]),
            thresholds=Thresholds(image=-1, direction=-1, agreement=-1),
        ),
    )
