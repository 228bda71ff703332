"""A misspelt word is told with what there is instead of it, nearest first."""

import pytest

from pi0exp import advice, compose
from pi0exp.errors import UserError


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["atention=sdpa"],
            "atention: there is no group or setting atention, attention perhaps; there are attention, ",
        ),
        (["stack=9"], "stack=9: there is no option 9, 9_blocks perhaps; there are 0_eager, "),
        (["attention=9"], "attention=9: there is no option 9; there are aiter, eager, sdpa, triton"),
        (
            ["fusion.rewrites.batch_camera=true"],
            "fusion.rewrites.batch_camera: there is no setting batch_camera, batch_cameras perhaps; there are batch_",
        ),
        (
            ["workload.horizen=3"],
            "workload.horizen: there is no setting horizen, horizon perhaps; there are batch_size",
        ),
        # Of the option that is chosen, not of the default's.
        (
            ["attention=sdpa", "attention.backed=math"],
            "attention.backed: there is no setting backed, backend perhaps; ",
        ),
        (
            ["attention.backend=math"],
            "attention.backend: attention=eager has no setting backend; it is one of attention=",
        ),
        (
            ["compile_mode.dependent_launches=true"],
            "compile_mode.dependent_launches: compile_mode=none has no setting dependent_launches; it is one of",
        ),
        (["search.n_trials=5"], "search.n_trials: only study=search has this setting"),
        (["study=search", "search.n_trial=5"], "search.n_trial: there is no setting n_trial, n_trials perhaps; there"),
        (["attention=sdap"], "In 'config': Could not find 'attention/sdap'; Available options in 'attention': aiter, "),
    ],
)
def test_what_is_there_instead(words: list[str], told: str):
    with pytest.raises(UserError) as error:
        compose.from_words(words)
    assert str(error.value).startswith(told)


def test_a_sweep_names_the_word_that_is_wrong():
    number = ValueError("Config group override must be a string or a list. Got int")
    assert advice.on(number, ["-m", "stack=9_blocks,8"]).startswith("stack=8: there is no option 8, 8_compiled perhaps")
    assert advice.on(number, ["-m", "stack=9_blocks"]) == "Config group override must be a string or a list. Got int"
