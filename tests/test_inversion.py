"""Prompt inversion: the right words are found where they are known, control tokens never, and the experiment runs,
goes on, and refuses what it cannot use.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from forked import ROOT, alone, run_experiment
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from ddil.diffusion.denoiser import coefficients, from_x
from ddil.measure.inversion import OPTIMIZERS, Descent, PromptSearch, find_prompt, prompt_conditions, vocabulary
from ddil.lab.results import read_results
from ddil.datasets.scenes import SceneReader, write_tokenizer
from ddil.datasets.scenes import tiny_pipeline
from ddil.models.family import Prompts
from ddil.models.pipeline import TextToImage

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


class Lookup(nn.Module):
    """A text encoder that gives each token's own random row of 16 numbers."""

    device = torch.device("cpu")

    def __init__(self, count: int):
        super().__init__()
        self.rows = nn.Embedding.from_pretrained(torch.randn(count, 16, generator=torch.Generator().manual_seed(11)))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.rows

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        return (self.rows(ids),)


class Columns(nn.Module):
    """A network whose clean estimate holds the embedding at position i + 1 in column i, told as noise or as v."""

    def __init__(self, prediction: str):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.prediction, self.config, self.device = (
            prediction,
            FrozenDict(in_channels=2, block_out_channels=(1,)),
            torch.device("cpu"),
        )

    def picture(self, embeddings: Tensor) -> Tensor:
        return embeddings[:, 1:9].transpose(1, 2).unflatten(1, (2, 8))

    def forward(self, z: Tensor, index: Tensor, encoder_hidden_states: Tensor, **_) -> tuple[Tensor]:
        alpha_sigma = coefficients(self.schedule, (index.double() + 1) / 1000, z)
        return (from_x(self.prediction, self.picture(encoder_hidden_states), z, *alpha_sigma),)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def exact(tokenizer: CLIPTokenizer, prediction: str = "epsilon") -> TextToImage:
    """A model whose pictures spell their prompts."""
    network = Columns({"epsilon": "eps", "v_prediction": "v"}[prediction])
    model = TextToImage(
        network, {**SCHEDULER, "prediction_type": prediction}, Prompts([tokenizer], [Lookup(len(tokenizer))])
    )
    network.schedule = model.schedule
    return model


RATES = {
    "gradient": {"learning_rate": 10.0, "updates": 60},
    "adam": {"learning_rate": 0.1, "updates": 60},
    "lbfgs": {"updates": 12},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_known_words_are_found(tokenizer: CLIPTokenizer, optimizer: str, prediction: str) -> None:
    """By each optimiser, whatever the network predicts; the best of several starts, and better than no prompt."""
    model, text = exact(tokenizer, prediction), "four pink squares below a blue circle"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    found = find_prompt(
        model,
        model.network.picture(prompt_conditions(model, [ids])),
        tokens=len(ids),
        optimizer=optimizer,
        batch=1,
        restarts=2,
        **RATES[optimizer],
    )
    assert (found.ids, found.text, found.reads_back) == (ids, text, True)
    assert found.held_out == min(found.restarts) < 1e-8 and found.empty > 0.05


def test_control_tokens_are_never_chosen(tokenizer: CLIPTokenizer) -> None:
    """Not even for a picture of them; nor anything else that is not allowed."""
    model, control = exact(tokenizer), tokenizer.all_special_ids
    picture = model.network.picture(prompt_conditions(model, [[control[0]] * 4]))
    found = find_prompt(model, picture, tokens=4, updates=40, learning_rate=20.0, batch=2)
    chosen = {i for ids in found.trace for i in ids}
    assert not chosen & set(control) and len(chosen) > 4
    few = vocabulary(tokenizer, words=True)[::7]
    assert {
        i
        for ids in find_prompt(model, picture, tokens=4, updates=40, learning_rate=20.0, batch=2, allowed=few).trace
        for i in ids
    } <= set(few.tolist())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")


def test_an_update_is_the_gradient_at_the_words(tiny: Path) -> None:
    """Embeddings that are not words move by the gradient that autograd finds, through encoder and U-Net, for the
    nearest words' own rows.
    """
    model = TextToImage.load(tiny)
    tokenizer, rate = model.tokenizers[0], 0.5
    search = PromptSearch(model, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), (0.5, 0.9))
    ids, draw = tokenizer("two green triangles", add_special_tokens=False).input_ids, search.draw(3, "test")
    descent = Descent(search, torch.tensor(ids), vocabulary(tokenizer), "gradient", rate, 1)
    with torch.no_grad():
        descent.free += 1e-3 * torch.randn(descent.free.shape, generator=torch.Generator().manual_seed(1))
    before = descent.free.detach().clone()
    loss = descent.update(draw)

    table = model.text_encoders[0].get_input_embeddings().weight.requires_grad_()
    framed = tokenizer(["two green triangles"], padding="max_length", max_length=16, return_tensors="pt").input_ids
    cond = model.text_encoders[0](framed)[0].expand(3, -1, -1)
    output = model.network(draw.z, draw.t.float() * 1000 - 1, cond).sample  # this network predicts the noise
    expected = (output - draw.eps).square().mean()
    (gradient,) = torch.autograd.grad(expected, table)
    torch.testing.assert_close(loss, expected.item())
    assert gradient[ids].abs().min() > 0
    torch.testing.assert_close(before - descent.free.detach(), rate * gradient[ids], rtol=1e-3, atol=1e-6)


def test_the_result_depends_on_the_seed_alone(tiny: Path) -> None:
    """Not on the state of torch's own generator; and weights stay as they are."""
    model, runs = TextToImage.load(tiny), []
    picture = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    before = [value.clone() for part in (model.network, model.text_encoders[0]) for value in part.state_dict().values()]
    for state, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(state)
        runs.append(find_prompt(model, picture, tokens=3, updates=4, optimizer="adam", batch=2, seed=seed))
    assert runs[0] == runs[1] and runs[0].loss != runs[2].loss
    assert all(
        torch.equal(one, other)
        for one, other in zip(
            before, (value for part in (model.network, model.text_encoders[0]) for value in part.state_dict().values())
        )
    )


def judges(folder: Path, tokenizer: CLIPTokenizer) -> dict[str, str]:
    """A scene reader and a CLIP model of random weights."""
    torch.manual_seed(0)
    SceneReader(4).save_pretrained(folder / "reader", safe_serialization=True)
    tower = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=8)
    text = dict(
        tower,
        vocab_size=len(tokenizer),
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    CLIPModel(
        CLIPConfig(text_config=text, vision_config=dict(tower, image_size=32, patch_size=8), projection_dim=8)
    ).save_pretrained(folder / "clip", safe_serialization=True)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder / "clip"
    )
    write_tokenizer(folder / "clip")
    return {name: str(folder / name) for name in ("reader", "clip")}


def test_the_experiment(tiny: Path, tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    """It refuses a student that is not there before anything is searched; interrupted after the inversion it goes
    on with the prompts on disk, to the table.
    """
    notebook, output = ROOT / "experiments/prompt_inversion.ipynb", tmp_path / "out"
    parameters = {
        "model": str(tiny),
        **judges(tmp_path, tokenizer),
        "count": 2,
        "tokens": 3,
        "updates": 2,
        "restarts": 1,
        "batch": 2,
        "per_prompt": 2,
        "teacher_steps": 2,
        "few_steps": 1,
        "output": str(output),
    }
    refused = alone(run_experiment, notebook, {**parameters, "students": {"PD": str(tmp_path / "nowhere")}})
    assert "FileNotFoundError" in refused and "nowhere" in refused and not output.exists()

    (output / "inverted.png").mkdir(parents=True)  # in the way of the first figure
    assert "inverted.png" in alone(run_experiment, notebook, parameters)
    prompts = sorted((output / "prompts").iterdir())
    kept = [path.stat().st_mtime_ns for path in prompts]
    assert len(prompts) == 2 and all(len(json.loads(path.read_text())["ids"]) == 3 for path in prompts)

    (output / "inverted.png").rmdir()
    assert not alone(run_experiment, notebook, parameters)
    assert [path.stat().st_mtime_ns for path in sorted((output / "prompts").iterdir())] == kept
    found = read_results(output / "results.json")
    assert {(row["arm"], row["n"]) for row in found["rows"] if row["metric"] == "diversity"} == {
        ("teacher, 2 steps", 2),
        ("teacher, 1 steps", 2),
        ("teacher, 2 steps, own captions", 2),
    }
    assert {"CLIP similarity", "all right"} <= {row["metric"] for row in found["rows"]}
