"""What is set in the studio's page travels in its address, and nonsense is one line."""

import re
from dataclasses import replace
from urllib.parse import parse_qsl

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safepatch.artifact.info import PatchInfo
from safepatch.errors import SafepatchError
from safepatch.hosting.recording import Drawn
from safepatch.runtime.parts import Look
from safepatch.studio.chosen import Slider, scale, sliders
from safepatch.studio.commands import attacking, commands, merging
from safepatch.studio.drawing import Picture
from safepatch.studio.judging import Verdict
from safepatch.studio.openings import colors, openings_svg
from safepatch.studio.settings import LIMITS, Settings

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).map(str.strip)
SET = st.builds(
    Settings,
    model=TEXTS,
    patches=st.lists(TEXTS.filter(bool), unique=True, max_size=3).map(tuple),
    method=st.sampled_from(["bundle", "linear"]),
    scales=st.dictionaries(TEXTS, st.floats(0, 9).map(lambda x: round(x, 3)).filter(lambda x: x != 1), max_size=2),
    gate=st.sampled_from(["", "soft", "off"]),
    prompt=TEXTS,
    seed=st.integers(0, 2**53),
    steps=st.integers(1, 100),
    guidance=st.none() | st.floats(0, 100).map(lambda x: round(x, 3)),
)


@given(SET)
def test_an_address_holds_all_that_is_set(settings):
    assert Settings.from_query(settings.to_query()) == settings


def test_what_is_usual_needs_no_address_and_what_differs_is_there_by_name():
    assert Settings().to_query() == ""
    changed = replace(Settings(), seed=7, patches=("a b.safetensors",), scales={"gore": 0.5, "weapons": 1.0})
    assert dict(parse_qsl(changed.to_query())) == {"seed": "7", "patch": "a b.safetensors", "scale.gore": "0.5"}


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("stepz=3", "did you mean 'steps'"),
        ("steps=many", "steps: a whole number, not 'many'"),
        ("steps=0", "steps: from 1 to 100, not 0"),
        ("seed=1e3", "whole number"),
        ("seed=-1", "seed: from 0"),
        ("images=100", "images: from 1 to 4"),
        ("guidance=nan", "guidance: a number, not 'nan'"),
        ("scale.gore=inf", "a number, not 'inf'"),
        ("scale.gore=-1", "strength of gore is -1"),
        ("gate=ajar", "no gate mode 'ajar'"),
        ("method=tise", "did you mean 'ties'"),
        ("prompt=" + "x" * 4001, "4001 characters; 4000 at most"),
        ("&".join(f"patch={i}" for i in range(13)), "13 patches"),
        ("prompt=%ff", "cannot be read"),
    ],
)
def test_nonsense_in_an_address_is_one_line(query, says):
    with pytest.raises(SafepatchError, match=re.escape(says)) as told:
        Settings.from_query(query)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", LIMITS)
def test_control_what_is_just_within_limits_is_taken(name):
    for edge in LIMITS[name]:
        assert getattr(replace(Settings(), **{name: int(edge)}), name) == edge


def info(*categories: str, kind: str = "lora", method: str | None = None) -> PatchInfo:
    instructions = {name: f"no {name}" for name in categories}
    recipe = {"method": method, "sources": []} if method else None
    return PatchInfo(kind, instructions, {"cross_attention_dim": 192}, {"family": "sd1"}, recipe=recipe)


def test_every_category_that_can_be_told_apart_has_a_strength_of_its_own():
    known = [info("weapons"), info("gore")]
    set_ = Settings(patches=("a", "b"), scales={"gore": 0.5})
    assert sliders(set_, known) == [Slider(("weapons",), 1.0), Slider(("gore",), 0.5)]
    assert scale(sliders(set_, known)) == {"weapons": 1.0, "gore": 0.5}
    assert scale(sliders(replace(set_, scales={}), known)) == 1.0
    assert [each.categories for each in sliders(replace(set_, method="linear"), known)] == [("gore", "weapons")]
    assert [each.categories for each in sliders(set_, [info("gore", "weapons", method="linear")])] == [
        ("gore", "weapons")
    ]
    lite = [info("weapons", kind="lite"), info("gore", kind="lite")]
    assert len(sliders(replace(set_, method="cat"), lite)) == 2


def test_command_lines_name_what_is_set_and_quote_what_a_shell_would_take_apart():
    set_ = Settings(patches=("a b.safetensors",), prompt="it's $HOME", seed=3, images=1, guidance=2.5, gate="soft")
    base, patched = commands(set_, [Slider(("gore",), 0.5)], ["--device", "cuda"])
    assert base.endswith("--seed 3 --steps 20 --guidance-scale 2.5 --device cuda -o base-3.png")
    assert "'a b.safetensors' --scale gore=0.5 --gate soft" in patched
    assert """'it'"'"'s $HOME'""" in patched
    several = replace(set_, patches=("a", "b"), method="ties", out="both.safetensors")
    assert merging(several) == "safepatch merge a b --method ties -o both.safetensors"
    assert commands(several, [])[0] == merging(several)
    assert "--patch both.safetensors" in attacking(several)


def test_gates_are_drawn_step_by_step_with_what_they_open_at_and_where_the_patch_acted():
    hostile = '"><script>x</script>'
    drawn = Drawn([999.0, 500.0, 1.0], [1, 2], {hostile: [0.1, 0.9, None], "gore": [None, 0.2, None]})
    svg = str(openings_svg(drawn, {hostile: 0.5}, colors([hostile, "gore"]), [hostile]))
    assert svg.count("<polyline") == 1
    assert svg.count("<circle") == 1  # one step alone is a point
    assert svg.count("<rect") == 2
    assert svg.count("stroke-dasharray") == 1
    assert "acted in 2 of 3 steps" in svg
    assert "0.90 at most, open" in svg
    assert "<script" not in svg
    assert "&lt;script" in svg


def test_a_gate_that_waits_for_both_keys_is_not_said_to_be_open_for_one():
    drawn = Drawn([999.0, 1.0], [], {"gore": [0.9, 0.9]}, {"gore": [None, 0.2]})
    shown = Picture(torch.zeros(3, 8, 8), Verdict(None), drawn, {"gore": 0.5}, {"gore": Look("both", 0.5)})
    assert not shown.opened
    assert "0.90 at most, shut" in str(openings_svg(drawn, shown.thresholds, colors(["gore"]), shown.opened))
    assert shown._replace(looks={}).opened == ("gore",)  # control: by the words alone it is
