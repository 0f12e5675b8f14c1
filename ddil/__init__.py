"""Diffusion distillation as imitation learning. The names that most programs need are here; each is loaded when it is used."""

from importlib import import_module

__version__ = "0.1.0"

FACE = {
    "diffusion.denoiser": "Denoiser",
    "diffusion.grids": "karras_grid trailing_grid uniform_grid",
    "diffusion.wrappers": "Guided Reflected Told",
    "solvers": "sample solver_by_name",
    "solvers.sampler": "Sampler",
    "rollins.states": "States",
    "rollins.data": "TensorData",
    "rollins.teacher": "Teacher",
    "rollins.forward": "Forward",
    "rollins.rollout": "Rollout",
    "rollins.replay": "Replay",
    "rollins.mixture": "Mixture",
    "rollins.walk": "Walk",
    "rollins.ddil": "DDIL",
    "methods.base": "Method bare jump",
    "measure.plots": "sample_rows",
    "models.unet": "ClassDenoiser TextDenoiser",
    "training.settings": "Settings",
    "training.trainer": "Trainer",
    "datasets.digits": "digits digits_classifier digits_teacher",
    "distil.menu": "MENU Entry Stage ddil_states enter",
    "distil.problem": "Problem atoms_problem digits_problem problem_kind",
    "distil.plan": "Plan preset read_plan",
    "distil.stages": "carry_out stage_of",
}
_PLACES = {name: module for module, names in FACE.items() for name in names.split()}
__all__ = [*_PLACES, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module 'ddil' has no attribute {name!r}")
    return getattr(import_module(f"ddil.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
