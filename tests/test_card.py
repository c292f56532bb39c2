"""Published recipes name no places, and recipes may not hold secrets."""

import pytest
import yaml

from ip2p.card import public_name, published_recipe
from ip2p.pairs.export import SPLITS, dataset_card
from ip2p.recipe import Recipe
from ip2p.train.export import card
from tests.test_recipe import MINIMAL

PRIVATE = "private-canary"


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.model_validate(
        MINIMAL
        | {
            "captions": {"kind": "files", "path": f"s3://{PRIVATE}/captions/web.parquet", "column": "TEXT"},
            "models": {
                "text_to_image": {"path": f"/home/{PRIVATE}/sd15"},
                "clip": {"name": f"local-dir:/data/{PRIVATE}/clip"},
                "llm": {"path": "owner/public-llm"},
                "editor": {"path": f"/home/{PRIVATE}/editor"},
            },
            "instructions": {"engine": {"download_dir": f"/scratch/{PRIVATE}"}},
            "train": {
                "dataset": f"gs://{PRIVATE}/pairs",
                "base": {"path": f"/home/{PRIVATE}/base"},
                "mlflow": {"tracking_uri": f"https://mlflow.{PRIVATE}.example"},
            },
            "tune": {"triplets": f"/home/{PRIVATE}/triplets.jsonl"},
            "evaluate": {"models": {"other": {"workspace": f"s3://{PRIVATE}/ten"}}},
        }
    )


def test_cards_name_no_machine_bucket_or_account(recipe):
    for text in (
        dataset_card(recipe, {"train": 3, "validation": 1, "test": 0}),
        card(recipe, {"pairs": 3}, "make it night"),
    ):
        assert PRIVATE not in text
    assert "edited by `owner/public-llm`, images drawn by `sd15`" in dataset_card(recipe, dict.fromkeys(SPLITS, 1))


def test_a_card_has_what_decides_what_is_made(recipe):
    found = yaml.safe_load(published_recipe(recipe, "captions", "pairs", "train"))
    assert (found["seed"], found["captions"]["path"], found["captions"]["column"]) == (0, "web.parquet", "TEXT")
    assert found["pairs"]["guidance_scale"] == list(recipe.pairs.guidance_scale)
    assert found["train"]["base"]["path"] == "base"
    assert "batch_size" not in found["pairs"] and "mlflow" not in found["train"] and "serve" not in found


@pytest.mark.parametrize(
    ("place", "public"),
    [
        ("owner/name", "owner/name"),
        ("/home/me/models/sd15/", "sd15"),
        ("s3://bucket/a/b.parquet?region=x", "b.parquet"),
        ("local-dir:weights/clip", "clip"),
        ("C:\\models\\sd", "sd"),
        ("ViT-B-32", "ViT-B-32"),
    ],
)
def test_public_name(place, public):
    assert public_name(place) == public


@pytest.mark.parametrize(
    "address", ["http://user:secret@host", "https://token@host/x", "postgresql://u:p@db/mlflow", "http://@host"]
)
def test_credentials_in_an_address_are_refused(address):
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD"):
        Recipe.model_validate(MINIMAL | {"train": {"mlflow": {"tracking_uri": address}}})


@pytest.mark.parametrize("name", ["hf_token", "api_key", "HF_TOKEN", "s3_secret", "password", "aws_credentials"])
@pytest.mark.parametrize("section", ["instructions", "evaluate"])
def test_secrets_in_engine_arguments_are_refused(section, name):
    engine = {"engine": {name: "x"}}
    keys = engine if section == "instructions" else {"judge": {"model": {"path": "a/b"}} | engine}
    with pytest.raises(ValueError, match=rf"{name}: recipes are printed and kept"):
        Recipe.model_validate(MINIMAL | {section: keys})


def test_arguments_that_count_tokens_are_no_secrets():
    engine = {"max_num_batched_tokens": 8192, "tokenizer_mode": "slow", "skip_tokenizer_init": True}
    Recipe.model_validate(MINIMAL | {"instructions": {"engine": engine}})
