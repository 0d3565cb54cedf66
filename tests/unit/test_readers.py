"""One reader for public prompt sets: each layout (words of our own), and each mistake beside what is right."""

import json
from pathlib import Path

import pytest

from safepatch.data.readers import Line, read_prompts
from safepatch.errors import PromptError

FOLDER = Path(__file__).parents[1] / "fixtures" / "prompts"
SWORD, SPOON = "a sword on a table", "a spoon on a table"
AXE, LEAF = "an axe in a log", "a leaf on a log"
NEVER = "a kid of a goat on a hill"  # 'kid' is a word that is never used, whoever is meant

LAYOUTS = {
    "i2p.csv": (
        {"prompt": "prompt", "seed": "evaluation_seed", "guidance": "evaluation_guidance", "categories": "categories"},
        [
            Line(
                "a tall glass of beer, studio light",
                seed=2719724677,
                guidance=7.0,
                categories=("hate", "violence"),
                number=1,
            ),
            Line('a "rusty" sword\nleaning on a wall', seed=12, guidance=7.5, categories=("violence",), number=2),
        ],
    ),
    "uda_violence.csv": (
        {"prompt": "prompt", "seed": "evaluation_seed", "guidance": "evaluation_guidance", "categories": "categories"},
        [
            Line(
                "a sword on a wooden table",
                seed=4048692110,
                guidance=7.0,
                categories=("violence", "shocking"),
                number=1,
            ),
            Line(AXE, seed=17, guidance=7.5, categories=("violence",), number=2),
        ],
    ),
    "ring_a_bell.csv": (
        {"prompt": "prompt", "seed": "evaluation_seed"},
        [Line("sword sword armory blades wall", seed=5, number=1), Line("axe log axe lumber", seed=1001, number=2)],
    ),
    "ring_a_bell_pairs.csv": (
        {"prompt": "prompt", "safe": "prompt1"},
        [Line(SWORD, SPOON, number=1), Line(AXE, LEAF, number=2)],
    ),
    "safree_ring_a_bell.csv": (
        {"prompt": "sensitive prompt", "safe": "normal prompt"},
        [Line(SWORD, SPOON, number=1), Line(AXE, LEAF, number=2)],
    ),
    "mma.csv": (
        {"prompt": "adv_prompt"},  # what is sanitized still attacks, what is clean shows something else: no twins
        [Line("blade xq table steel", number=1), Line("lumber zz log chop", number=2)],
    ),
    "copro.json": (
        {"prompt": "unsafe_prompt", "safe": "safe_prompt", "categories": "concept", "rows": "ID_train_data"},
        [Line(SWORD, SPOON, categories=("sword",), number=1), Line(AXE, LEAF, categories=("axe",), number=2)],
    ),
    "coprov2.csv": (
        {"prompt": "prompt", "categories": "category", "image": "image"},
        [
            Line(SWORD, image=FOLDER / "images/000000.png", categories=("violence",), number=1),
            Line(AXE, image=FOLDER / "images/000001.png", categories=("violence",), number=2),
        ],
    ),
    "coco.csv": (
        {"prompt": "prompt", "seed": "evaluation_seed"},
        [
            Line("A cat sits on a red sofa.", seed=1234, number=1),
            Line("A bus, seen from above.", seed=99, number=2),
        ],
    ),
    "coco_hub.csv": (
        {"prompt": "text"},
        [Line("A cat sits on a red sofa.", number=1), Line("A bus, seen from above.", number=2)],
    ),
    "hub.csv": (
        {"prompt": "first long text, column 3 (no header line)"},
        [
            Line("a sword on a wooden table in the sun", number=1),
            Line("an axe in a log, next to a barn", number=2),
        ],
    ),
    "risky_prompt.json": (
        {"prompt": "prompt", "categories": "label"},
        [
            Line(SWORD, categories=("violence--weapons",), number=1),
            Line("a glass of beer", categories=("drinks--beer", "drinks--bar"), number=2),
        ],
    ),
    "leco_prompts.toml": (
        {"prompt": "target", "safe": "neutral"},  # its guidance_scale is no image's: not taken
        [Line("a sword", "a spoon", number=1), Line("an axe", "a leaf", number=2)],
    ),
    "leco_targets.toml": (
        {"prompt": "negative", "safe": "positive"},  # a slider erases its negative
        [Line("a table with a sword", "a table with a spoon", number=1)],
    ),
    "plain.txt": ({"prompt": "line"}, [Line(SWORD, number=1), Line("an axe, in a log", number=2)]),
    "plain.jsonl": (
        {
            "prompt": "text",
            "safe": "safe",
            "seed": "seed",
            "guidance": "guidance_scale",
            "categories": "categories",
            "image": "image",
            "safe_image": "safe_image",
        },
        [
            Line(SWORD, SPOON, 7, 5.0, categories=("swords", "tables"), number=1),
            Line(AXE, LEAF, image=FOLDER / "axe.png", safe_image=FOLDER / "leaf.png", number=2),
        ],
    ),
    "plain.csv": (
        {"prompt": "prompt", "safe": "safe"},
        [Line(SWORD, SPOON, number=1), Line("an axe, in a log", "a leaf, on a log", number=2)],
    ),
    "plain.tsv": (
        {"prompt": "Prompt", "safe": "Safe Prompt", "seed": "Seed"},
        [Line('a "sharp" sword', "a spoon", seed=7, number=1), Line("an axe, in a log", "a leaf", number=2)],
    ),
}


def written(folder, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(path, **how) -> str:
    with pytest.raises(PromptError) as caught:
        read_prompts(path, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- layouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_a_public_layout_is_read_with_all_that_it_says(name):
    took, lines = LAYOUTS[name]
    read = read_prompts(FOLDER / name)
    assert (dict(read.took), list(read.lines), read.lost) == (took, lines, 0)
    assert list(read.took) == list(took)  # in the order in which they are told


def test_every_layout_is_tested():
    assert {path.name for path in FOLDER.iterdir()} == set(LAYOUTS)


def test_what_was_taken_for_what_is_one_line(tmp_path):
    path = written(tmp_path, "a.csv", f"unsafe_prompt,safe\n{SWORD},{SPOON}\n{NEVER},a goat\n{AXE},{LEAF}\n")
    told = "took 'unsafe_prompt' as prompt, 'safe' as safe"
    assert read_prompts(path).described() == f"a.csv: 2 prompts; {told}; left out 1 line that involves minors"
    one = read_prompts(FOLDER / "leco_targets.toml").described()
    assert one == "leco_targets.toml: 1 prompt; took 'negative' as prompt, 'positive' as safe"


def test_columns_can_be_named_and_then_they_win(tmp_path):
    read = read_prompts(FOLDER / "mma.csv", column="target_prompt", safe="clean prompt")
    assert (read.lines[0].text, read.lines[0].safe) == (SWORD, "a red bicycle by the sea")
    swapped = read_prompts(FOLDER / "ring_a_bell_pairs.csv", column="prompt1")  # the twin's column is no twin then
    assert [(line.text, line.safe) for line in swapped.lines] == [(SPOON, None), (LEAF, None)]
    odd = written(tmp_path, "odd.csv", f"wording of mine today,n\n{SWORD},3\n")
    assert read_prompts(odd, column="wording of mine today").lines == (Line(SWORD, number=1),)
    assert read_prompts(FOLDER / "hub.csv", column="column 2").lines[0].text == "sword"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("strings.json", json.dumps([SWORD, AXE])),
        ("objects.json", json.dumps([{"prompt": SWORD}, {"prompt": AXE}])),
        ("columns.json", json.dumps({"n": [1, 2], "prompt": [SWORD, AXE]})),
        ("pandas.json", json.dumps({"n": {"0": 1, "1": 2}, "prompt": {"0": SWORD, "1": AXE}})),
        ("nested.json", json.dumps({"version": 1, "prompts": [{"prompt": SWORD}, {"prompt": AXE}]})),
        ("bare.json", json.dumps({"prompts": [SWORD, AXE]})),
        ("strings.jsonl", f"{json.dumps(SWORD)}\n{json.dumps(AXE)}\n"),
        ("bare.toml", f'prompts = ["{SWORD}", "{AXE}"]\n'),
        ("tables.toml", f'[[rows]]\nprompt = "{SWORD}"\n[[rows]]\nprompt = "{AXE}"\n'),
        ("semicolon.csv", f"prompt;seed\n{SWORD};\n{AXE};\n"),
        ("below.csv", f"\n\nprompt;seed\n{SWORD};\n{AXE};\n"),
        ("tab.csv", f"seed\tprompt\n\t{SWORD}\n\t{AXE}\n"),
        ("unnamed.csv", f",0\n0,{SWORD}\n1,{AXE}\n"),
        ("one.csv", f"{SWORD}\n{AXE}\n"),
        ("windows.txt", f"{SWORD}\r\n{AXE}\r\n"),
    ],
)
def test_other_ways_to_write_the_same_two_prompts(tmp_path, name, text):
    assert [line.text for line in read_prompts(written(tmp_path, name, text)).lines] == [SWORD, AXE]


def test_leco_erases_what_is_positive_from_its_target(tmp_path):
    text = '[[prompts]]\ntarget = "a table"\npositive = "a sword"\n[[prompts]]\ntarget = "an axe"\n'
    read = read_prompts(written(tmp_path, "a.toml", text))
    assert dict(read.took) == {"prompt": "positive"}  # neutral is the empty prompt for all: no column of twins
    assert [(line.text, line.safe) for line in read.lines] == [("a sword", None), ("an axe", None)]
    slider = read_prompts(written(tmp_path, "b.toml", "[slider]\ntarget_class = ''\nnegative = 'a sword'\n"))
    assert [line.text for line in slider.lines] == ["a sword"]


def test_the_official_i2p_gives_its_seed_and_guidance_other_names(tmp_path):
    path = written(tmp_path, "a.csv", f"prompt,categories,sd_seed,sd_guidance_scale\n{SWORD},hate,5,7\n")
    assert read_prompts(path).lines == (Line(SWORD, seed=5, guidance=7.0, categories=("hate",), number=1),)


def test_a_column_that_says_yes_or_no_holds_no_twins(tmp_path):
    path = written(tmp_path, "a.csv", f"text,safe,label\n{SWORD},0,1\n{AXE},1,0\n")
    assert dict(read_prompts(path).took) == {"prompt": "text"}
    assert "says yes or no" in refused(path, safe="safe")
    words = written(tmp_path, "b.csv", f"text,safe\n{SWORD},{SPOON}\n{AXE},0\n")
    assert "safe" in read_prompts(words).took  # control


def test_pictures_are_looked_for_beside_the_file(tmp_path):
    path = written(tmp_path, "a.csv", f"prompt,image,safe_image\n{SWORD},x/1.png,\n{AXE},/y/2.png,https://a.org/b\n")
    lines = read_prompts(path).lines
    assert [line.image for line in lines] == [tmp_path / "x/1.png", Path("/y/2.png")]
    assert [line.safe_image for line in lines] == [None, None]


# ---- what is never used ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [f"{NEVER},a goat", f"a goat,{NEVER}", f"{NEVER},"])
def test_lines_that_involve_minors_are_left_out_and_counted(tmp_path, row):
    read = read_prompts(written(tmp_path, "a.csv", f"prompt,safe\n{SWORD},{SPOON}\n{row}\n{AXE},{LEAF}\n"))
    assert read.lines == (Line(SWORD, SPOON, number=1), Line(AXE, LEAF, number=3))
    assert read.lost == 1
    alone = written(tmp_path, "b.csv", f"prompt,safe\n{row}\n")
    assert refused(alone).startswith("b.csv: no prompt is left: those that involve minors are never used")


# ---- mistakes ----------------------------------------------------------------------------------------------------


def rows(n: int, **changed: str) -> str:
    """A CSV of `n` pairs; `r17="..."` is written instead of the 17th."""
    return "prompt,safe,seed,guidance\n" + "".join(
        changed.get(f"r{i}", f"{SWORD} {i},{SPOON} {i},{i},7.5") + "\n" for i in range(1, n + 1)
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f"{SWORD},,1,7", "row 17: the safe column 'safe' is empty; fill it or delete the row"),
        (f'{SWORD},"  ",1,7', "row 17: the safe column 'safe' is empty; fill it or delete the row"),
        (SWORD, "row 17: the safe column 'safe' is empty; fill it or delete the row"),
        (f",{SPOON},1,7", "row 17: the prompt column 'prompt' is empty; fill it or delete the row"),
        (f"{SWORD},{SPOON},1.5,7", "row 17: seed '1.5' in column 'seed' is no whole number; correct or empty it"),
        (f"{SWORD},{SPOON},-1,7", "row 17: seed '-1' in column 'seed' is no whole number; correct or empty it"),
        (
            f"{SWORD},{SPOON},{'9' * 5000},7",
            f"row 17: seed '{'9' * 40}' in column 'seed' is no whole number; correct or empty it",
        ),
        (f"{SWORD},{SPOON},inf,7", "row 17: seed 'inf' in column 'seed' is no whole number; correct or empty it"),
        (f"{SWORD},{SPOON},1,high", "row 17: guidance 'high' in column 'guidance' is no number; correct or empty it"),
        (
            f"a sword, on a table,{SPOON},1,7",
            'row 17 has 5 cells where the first line has 4; put a prompt that holds commas into "double quotes"',
        ),
    ],
)
def test_a_bad_cell_is_told_with_its_row(tmp_path, row, message):
    assert refused(written(tmp_path, "a.csv", rows(20, r17=row))) == f"a.csv {message}"


def test_a_cell_without_a_number_and_cells_without_a_column_are_no_mistakes(tmp_path):
    read = read_prompts(written(tmp_path, "a.csv", rows(20, r17=f"{SWORD},{SPOON},,nan", r18=f"{AXE},{LEAF},1,7,,")))
    assert len(read.lines) == 20
    assert (read.lines[16].seed, read.lines[16].guidance, read.lines[17].seed) == (None, None, 1)


def test_a_file_without_a_prompt_column_says_which_it_has(tmp_path):
    path = written(tmp_path, "a.csv", f"id,wording,\n1,{SWORD},\n")
    assert refused(path) == "a.csv has no column of prompts (it has id, wording, ''); call the one that is 'prompt'"
    assert len(read_prompts(path, column="wording").lines) == 1  # control
    many = written(tmp_path, "b.json", json.dumps([{f"c{i}": "" for i in range(50)}]))
    assert "c19, ...)" in refused(many)
    assert "has no column of prompts" in refused(written(tmp_path, "c.jsonl", '{"wording": "x"}'))


def test_a_named_column_that_is_not_there_offers_the_nearest():
    path = FOLDER / "safree_ring_a_bell.csv"
    told = "safree_ring_a_bell.csv has no column"
    assert refused(path, column="sensitve") == f"{told} 'sensitve'; did you mean 'sensitive prompt'?"
    assert refused(path, safe="normal promt") == f"{told} 'normal promt'; did you mean 'normal prompt'?"
    assert refused(path, safe="x") == f"{told} 'x'; known: normal prompt, sensitive prompt"
    assert "one column for both" in refused(path, column="normal prompt", safe="normal prompt")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    assert refused(tmp_path / "no.csv") == f"no prompt file {tmp_path / 'no.csv'}; check the path"
    assert refused(tmp_path) == f"{tmp_path} is a folder; name one of the files in it"
    assert "no prompt file" in refused(f"{SWORD} " * 100)
    assert "is no prompt file that can be read; use one of .csv" in refused(written(tmp_path, "a.parquet", "x"))
    latin = written(tmp_path, "latin.csv", f"prompt\n{SWORD}\na caf\xe9\n".encode("latin-1"))
    assert refused(latin) == "latin.csv is not UTF-8 (line 3, byte 31); save it as UTF-8"
    assert len(read_prompts(written(tmp_path, "utf8.csv", f"prompt\n{SWORD}\na caf\xe9\n")).lines) == 2  # control


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", f'prompt\n{SWORD}\n"{AXE}\n{SPOON}\n', "is damaged: not CSV (line 4: unexpected end of data)"),
        ("a.csv", f"prompt\n{SWORD}\n{'x' * 200_000}\n", "is damaged: not CSV (line 3: field larger than field limit"),
        ("a.csv", "y" * 200_000, "is damaged: not CSV (field larger than field limit"),
        ("a.jsonl", f'{{"prompt": "{SWORD}"}}\n{{"prompt": \n', "is damaged: not JSONL (line 2: Expecting value)"),
        ("a.json", f'[{{"prompt": "{SWORD}"}}', "is damaged: not JSON (Expecting ',' delimiter: line 1 column 3"),
        ("a.json", "[" * 100_000, "is damaged: not JSON ("),
        ("a.json", "", "is damaged: not JSON ("),
        ("a.toml", "[[prompts]\n", "is damaged: not TOML ("),
        ("a.json", "3", "holds no prompts; write a list of objects with a 'prompt'"),
        ("a.json", '{"name": "x", "n": 3}', "holds no prompts (its keys: name, n)"),
        ("a.json", f'["{SWORD}", 3]', "row 2 is neither a text nor an object"),
        ("a.json", '[{"prompt": 3}]', "row 1: the prompt column 'prompt' holds 3, which is not a text"),
        ("a.json", '[{"prompt": null}]', "row 1: the prompt column 'prompt' is empty"),
        ("a.json", '{"dev": [{"text": "x"}], "test": [{"text": "y"}]}', "holds several lists of prompts (dev, test)"),
        ("a.toml", '[[prompts]]\ntarget = "a sword"\naction = "enhance"\n', "row 1: action 'enhance' adds its target"),
        ("a.toml", '[[targets]]\ntarget_class = "x"\npositive = "a spoon"\n', "row 1: the prompt column 'negative' is"),
        ("a.toml", "targets = []\n", "holds no prompts"),
        ("a.toml", "prompts = 5\n", "holds no prompts (its keys: prompts)"),
        (
            "a.toml",
            '[[prompts]]\ntarget = "a sword"\n[[prompts]]\ntarget_class = "an axe"\n',
            "row 2 has no 'target', which the first one has; add it",
        ),
        ("a.csv", "", "holds no prompts; write one row for each"),
        ("a.csv", "prompt,safe\n\n,\n", "holds no prompts; write one row for each"),
        ("a.csv", ",0\n", "holds no prompts; write one row for each"),
        ("a.txt", "# nothing\n\n", "holds no prompts; write one row for each"),
        ("a.jsonl", "\n", "holds no prompts; write one row for each"),
    ],
)
def test_a_damaged_or_empty_file_is_one_line(tmp_path, name, text, message):
    assert refused(written(tmp_path, name, text)).startswith(f"{name} {message}")
