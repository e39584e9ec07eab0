"""resources.custom: the custom resources that each stage's processes ask for."""

from __future__ import annotations

import pytest

from pipelines.recipe.load import load_recipe
from pipelines.run.stages import stages_of
from pipelines.serving.description import describe
from pipelines.serving.graph import ON_HEAD, application
from pipelines.serving.http.guard import ApiLimits
from rcd_core.errors import UserError

WITH_REFERENCE = ("deploy.start=reference", "deploy.baseline=false")
PLACED = ('resources.custom={"target*": {big: 0.001}, signals: {small: 1}, target-paper_alpha: {other: 2}}',)


def test_patterns_place_stages() -> None:
    stages = stages_of(load_recipe("sudoku-reference", PLACED))
    one = {"CPU": 1.0}
    assert stages["signals"].bundles == ({**one, "small": 1.0},)
    assert stages["target"].bundles == ({**one, "big": 0.001},) * 2
    assert stages["target-paper_alpha"].bundles == ({**one, "big": 0.001, "other": 2.0},) * 2
    assert stages["baseline"].bundles == stages["base"].bundles == (one,) * 2
    assert stages["prepare"].bundles == (one,)


def test_results_do_not_depend_on_it() -> None:
    """The section is in no stage's key, so a run can resume on other nodes."""
    for stage in stages_of(load_recipe("sudoku-reference", PLACED)).values():
        assert not any(section.startswith("resources") for section in stage.sections)


@pytest.mark.parametrize(
    ("custom", "says"),
    [
        ("{signal: {small: 1}}", "resources.custom.signal "),
        ("{prepare: {small: 1}}", "resources.custom.prepare "),
        ("{'target-x*': {small: 1}}", "resources.custom.target-x* "),
        ("{signals: {GPU: 1}}", "resources.custom.signals.GPU "),
        ("{signals: {small: 0}}", "resources.custom.signals.small is 0"),
        ("{signals: small}", "resources.custom.signals is 'small'"),
    ],
)
def test_mistakes_are_named(custom: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("sudoku-reference", [f"resources.custom={custom}"])
    assert says in str(caught.value)


def test_served_models_share_gpus_only_where_they_are_together() -> None:
    gpus = ("resources.gpus_per_worker=1", "resources.num_workers=1", *WITH_REFERENCE)
    together = describe(load_recipe("sudoku-reference", gpus), "/{}".format)
    assert [one.num_gpus for one in together.replicas] == [0.5, 0.5]
    apart = "resources.custom={deploy: {big: 0.001}, deploy-reference: {small: 0.001}}"
    target, reference = describe(load_recipe("sudoku-reference", [*gpus, apart]), "/{}".format).replicas
    assert (target.num_gpus, target.resources) == (1.0, {"big": 0.001})
    assert (reference.num_gpus, reference.resources) == (1.0, {"small": 0.001})


def test_replicas_ask_for_it() -> None:
    apart = "resources.custom={deploy: {big: 0.001}, deploy-reference: {small: 0.001}}"
    made = application(describe(load_recipe("sudoku-reference", [apart, *WITH_REFERENCE]), "/{}".format), ApiLimits())
    found = {}
    todo = [made._bound_deployment]
    while todo:
        one = todo.pop()
        found[one.name] = one.ray_actor_options.get("resources")
        for value in one.init_args:
            inner = value.values() if isinstance(value, dict) else [value]
            todo += [each._bound_deployment for each in inner if hasattr(each, "_bound_deployment")]
    assert found["Target"] == {"big": 0.001} and found["Reference"] == {"small": 0.001} and found["Ingress"] == ON_HEAD
