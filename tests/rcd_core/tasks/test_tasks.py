"""Tasks: pure generators with valid rows, and graders."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from contextlib import suppress
from itertools import permutations, product

import pytest

from rcd_core.errors import UserError
from rcd_core.tasks import MASK_TEXT, TASKS, Problem, check, get_task, grade
from rcd_core.tasks.answers import final_number, same_final_number
from rcd_core.tasks.boxed import INSTRUCTION
from rcd_core.tasks.sudoku import SUDOKU
from rcd_core.tasks.words import (
    ANIMALS,
    BUILDINGS,
    CITIES,
    FOODS,
    LANDSCAPES,
    PEOPLE,
    ROOMS,
    SINGLE_THINGS,
    VEHICLES,
)
from rcd_core.text.tokenizer import train_tokenizer

THEIRS, THERE = ("thing", "food", "animal", "vehicle"), ("room", "building", "landscape", "city")
POSSESSIONS, LOCATIONS = (SINGLE_THINGS, FOODS, ANIMALS, VEHICLES), (ROOMS, BUILDINGS, LANDSCAPES, CITIES)  # of a grid
GENERATORS = ("sudoku", "sudoku9", "arithmetic", "stories", "chain", "grid", "album")


def test_unknown_task_lists_the_names() -> None:
    with pytest.raises(UserError, match="sudoko.*sudoku, sudoku9, arithmetic"):
        get_task("sudoko")


@pytest.mark.parametrize("name", TASKS)
def test_docstring_example_is_a_row_that_solves_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RCD_RUN_CODE", "1")
    task = type(TASKS[name])
    docs = [str(doc) for doc in (*(base.__doc__ for base in task.__mro__), sys.modules[task.__module__].__doc__)]
    doc = next(doc for doc in docs if '{"' in doc)
    # sudoku.py shows a row of each size.
    start = [m.start() for m in re.finditer(r'\{"', doc)][1 if name == "sudoku9" else 0]
    row, _ = json.JSONDecoder(strict=False).raw_decode(doc, start)
    assert set(TASKS[name].fields) <= set(row)
    problem = TASKS[name].problem(row)
    assert grade(name, problem.response, problem.answer, prompt=problem.prompt)
    assert not grade(name, "no idea", problem.answer, prompt=problem.prompt)


@pytest.mark.parametrize("name", GENERATORS)
def test_synthetic_rows_are_a_function_of_index_split_and_seed(name: str) -> None:
    task = get_task(name)
    rows = [task.synthetic(i, "train", 0) for i in range(50)]
    assert rows == [task.synthetic(i, "train", 0) for i in range(50)]
    assert len({row["question"] for row in rows}) == 50
    problems = [task.problem(row) for row in rows]
    assert all(task.grade(problem.prompt, problem.response, problem.answer) for problem in problems)
    assert all(row != task.synthetic(i, "train", 1) for i, row in enumerate(rows))
    with pytest.raises(UserError, match="validation"):
        task.synthetic(0, "validation", 0)


@pytest.mark.parametrize("name", GENERATORS)
def test_train_and_test_never_share_a_solution(name: str) -> None:
    task = get_task(name)

    def solution(row: dict[str, str]) -> str:
        """Of a grid, with 576 solutions, the clues by kind."""
        return grid_clues(row["question"]) if name == "grid" else row["answer"]

    train, test = ({solution(task.synthetic(i, split, 3)) for i in range(3000)} for split in ("train", "test"))
    assert not train & test and len(train) > 1000


def grid_clues(question: str) -> str:
    names = set(PEOPLE)
    kinds = {word: str(number) for number, words in enumerate((*POSSESSIONS, *LOCATIONS)) for word in words}
    return " ".join("name" if word in names else kinds.get(word, word) for word in question.split())


# -- sudoku


def test_boards_are_valid_varied_and_have_8_to_16_givens() -> None:
    rows = [get_task("sudoku").synthetic(i, "train", 0) for i in range(1000)]
    assert all(SUDOKU.is_valid(row["answer"]) for row in rows)
    assert {36 - row["question"].count(".") for row in rows} == set(range(8, 17))
    assert len({row["answer"] for row in rows}) > 990
    for cell in (0, 17, 35):  # no digit is preferred: 1000 / 6 = 167 of each, SD 12
        counts = [sum(row["answer"][cell] == digit for row in rows) for digit in SUDOKU.digits]
        assert min(counts) > 115 and max(counts) < 220


def test_sudoku_accepts_any_valid_board_with_the_givens() -> None:
    task = get_task("sudoku")
    board = "123456456123231564564231312645645312"
    other = board.translate(str.maketrans("12", "21"))  # valid as well
    canvas = "#" + MASK_TEXT * 35 + board[35]
    assert task.grade(canvas, "#" + other, "") == (other[35] == board[35])
    assert task.grade("#" + MASK_TEXT * 36, "#" + other, "#" + board)
    assert not task.grade("#" + board[0] + MASK_TEXT * 35, "#" + other, "#" + board)  # a given was changed
    assert not task.grade("#" + MASK_TEXT * 36, "#" + board[:-1], "#" + board)
    assert not task.grade("#" + MASK_TEXT * 36, "#" + "1" * 36, "#" + board)
    assert not task.grade("#" + MASK_TEXT * 36, "#" + board[:-1] + MASK_TEXT, "#" + board)


def test_a_digit_twice_in_a_box_is_invalid() -> None:
    # A cyclic Latin square: valid rows and columns, invalid boxes.
    latin = "".join("123456"[(r + c) % 6] for r in range(6) for c in range(6))
    assert not SUDOKU.is_valid(latin)


@pytest.mark.parametrize(
    "row", [{"question": "." * 35, "answer": "1" * 36}, {"question": "2" + "." * 35, "answer": ""}]
)
def test_sudoku_rejects_invalid_rows(row: dict[str, str]) -> None:
    with pytest.raises(UserError, match="6x6"):
        get_task("sudoku").problem(row)


# -- numbers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", 18),
        ("so\n#### 70,000", 70000),
        ("#### $1,200.50.", 1200.5),
        ("#### -3", -3),
        ("#### -$4", -4),
        ("#### $-4", -4),
        ("####7", 7),
        ("#### 12.", 12),
        ("#### 5 apples", 5),
        ("#### .5", 0.5),
        (r"#### \$5", 5),
        ("#### 3/4", 0.75),
        ("#### 3/0", None),
        ("#### 60/week", 60),
        ("#### 1\n#### 2", 1),
        ("the answer is 18", None),
        ("#### none", None),
    ],
)
def test_final_number(text: str, number: float | None) -> None:
    value = final_number(text)
    assert value is None if number is None else float(value or 0) == number


def test_numbers_are_compared_as_numbers() -> None:
    assert same_final_number("#### 1,000.00", "#### 1000")
    assert not same_final_number("#### 1000.01", "#### 1000")
    assert not same_final_number("1000", "#### 1000")
    assert not same_final_number("#### x", "#### x")
    assert not same_final_number("#### 2/5", "#### 2") and same_final_number("#### 0.4", "#### 2/5")


def test_a_box_counts_if_there_is_no_number_after_a_marker() -> None:
    assert same_final_number(r"so \boxed{\$1,200 \text{ dollars}}", "#### 1200")
    assert same_final_number(r"\boxed{\frac{2}{5}}", "#### 2/5")
    assert not same_final_number(r"\boxed{3}", "#### 4")
    assert not same_final_number(r"#### 3, not \boxed{4}", "#### 4")


def test_gsm8k_drops_calculator_annotations_and_keeps_the_working() -> None:
    row = {"question": " Q? ", "answer": "He has 2*3=$<<2*3=6>>6.\n#### 1,006"}
    assert get_task("gsm8k").problem(row) == Problem("Q?", "He has 2*3=$6.\n#### 1,006", "#### 1006")
    with pytest.raises(UserError, match="####"):
        get_task("gsm8k").problem({"question": "Q", "answer": "6"})
    with pytest.raises(UserError, match="data.train.*gsm8k"):
        get_task("gsm8k").synthetic(0, "train", 0)


def test_wordings_of_stories_do_not_depend_on_the_question() -> None:
    task = get_task("stories")
    rows = [task.synthetic(i, "train", 0) for i in range(400)]
    for row in rows:
        numbers = [int(n) for n in re.findall(r"\d+", row["question"])]
        final = int(row["answer"].rsplit("#### ", 1)[1])
        gains = re.findall(r"brings (\d+)|finds (\d+)|buys (\d+)|sends (\d+)", row["question"])
        gained = sum(int(n) for match in gains for n in match if n)
        assert final == numbers[0] + gained - (sum(numbers[1:]) - gained)
    openings = {row["answer"].split()[0] for row in rows if row["question"].split()[2].isdigit()}
    assert {"So", "After", "With", "Adding", "Taking"} <= openings


def test_arithmetic_working_is_right_step_by_step() -> None:
    for i in range(300):
        *steps, last = get_task("arithmetic").synthetic(i, "train", 0)["answer"].split("\n")
        results = []
        for step in steps:
            left, right = step.split("=")
            assert eval(left) == int(right)  # digits and one operator, by the pattern below
            assert re.fullmatch(r"\d+[-+*]\d", left)
            assert not results or left.startswith(results[-1])
            results.append(right)
        assert 2 <= len(steps) <= 4 and last == f"#### {results[-1]}" and all(0 < int(r) <= 99 for r in results)


def test_a_grid_has_one_solution() -> None:
    """Judged from the prompt alone: of all 576 arrangements the answer's is the only right one."""
    assert all(len(set().union(*lists)) == sum(map(len, lists)) for lists in (POSSESSIONS, LOCATIONS)), (
        "kinds are clear"
    )
    task, seen = get_task("grid"), Counter[str]()
    for i in range(40):
        problem = task.problem(task.synthetic(i, "test", 0))
        people = re.findall(r"[A-Z][a-z]+(?= has)", problem.response)
        assert len(set(people)) == 4
        right = []
        for has, where in product(permutations(THEIRS), permutations(THERE)):
            pairs = zip(people, has, where, strict=True)
            text = "Pairs: " + " / ".join(f"{who} has the {what} in the {place}" for who, what, place in pairs)
            if check("grid", problem.prompt, text):
                right.append(text)
            assert grade("grid", text, problem.answer) == (text == problem.response)
        assert right == [problem.response]
        seen.update(re.findall(r" is | not |\? \?", problem.prompt))
    assert min(seen.values()) > 20 and len(seen) == 3
    for wrong in ("", problem.response[:-5], problem.response + " / x", problem.response.replace(people[0], "Nobody")):
        assert check("grid", problem.prompt, wrong) is False
    assert check("grid", "Who has what?", problem.response) is None


def test_an_album_has_one_token_for_each_picture_in_a_vocabulary_of_a_text() -> None:
    task = get_task("album")
    problems = [task.problem(task.synthetic(i, "train", 0)) for i in range(3000)]
    tokenizer = train_tokenizer((f"{p.prompt}\n{p.response}" for p in problems), 2048)
    assert len(tokenizer) > 1000
    for text in (text for p in problems[:300] for text in (p.prompt, p.response)):
        assert len(tokenizer(text)["input_ids"]) == 2 + 36 + 5


def test_an_album_accepts_every_answer_that_fits_the_pictures() -> None:
    task, digits = get_task("album"), "123456456123231564564231312645645312"

    def album(order: str, kinds: str = "person animal trade thing food place") -> str:
        found = [kinds.split()[order.index(d)] for d in digits]
        return "Kinds: " + " / ".join(" ".join(found[i : i + 6]) for i in range(0, 36, 6))

    question = "Album: ? otter" + " ?" * 4 + " / ? ? ? ? ? ?" * 5
    assert task.grade(question, album("123456"), "") and task.grade(question, album("321456"), "")
    assert not task.grade(question, album("213456"), ""), "the otter would be a person"
    assert not task.grade(question, album("123456").replace("trade thing", "thing trade", 1), ""), "no board"
    assert not task.grade(question, album("123456", "person animal trade tool food place"), ""), "no kind"
    assert not task.grade(question, album("123456") + " person", "") and not task.grade(question, "", "")
    assert check("album", question.replace("otter", "unicorn"), album("123456")) is None
    assert "\nthing  food   place  person animal trade\n" in task.layout(album("123456"))
    with pytest.raises(UserError, match="no album.*Kinds: animal"):
        task.problem({"question": question, "answer": album("213456")})


def test_a_chain_leads_from_room_to_room() -> None:
    task = get_task("chain")
    row = {"question": "Hunt from study: baker ? otter ? lemon ? Olga ? anvil ? harbour ?"}
    rooms = "lounge larder pantry study nursery larder".split()  # +3, -1, 5 - 4, +1, 2 <-> 3, 3 <-> 4 on the ring

    def filled(rooms: list[str]) -> str:
        return row["question"].replace("?", "{}").format(*rooms)

    problem = task.problem(row | {"answer": filled(rooms)})
    assert problem.prompt == row["question"].replace(" ?", MASK_TEXT)
    assert task.grade(problem.prompt, filled(rooms), "") and check("chain", problem.prompt, f" {filled(rooms)} ")
    wrong = [*rooms[:4], "lounge", rooms[5]]
    assert not task.grade(problem.prompt, filled(wrong), "") and not task.grade(problem.prompt, "", "")
    for other in (problem.prompt.replace("otter", "unicorn"), problem.prompt.replace("study", "harbour"), "Hunt"):
        assert check("chain", other, filled(rooms)) is None
    with pytest.raises(UserError, match="does not have the rooms"):
        task.problem(row | {"answer": filled(wrong)})


def test_a_chain_has_one_token_for_each_word_in_a_vocabulary_of_a_text() -> None:
    task = get_task("chain")
    problems = [task.problem(task.synthetic(i, "train", 0)) for i in range(3000)]
    tokenizer = train_tokenizer((f"{p.prompt}\n{p.response}" for p in problems), 2048)
    assert len(tokenizer) > 1000
    for text in (text for p in problems[:300] for text in (p.prompt, p.response)):
        assert len(tokenizer(text)["input_ids"]) == 4 + 2 * 24


# -- math


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        (r"first \boxed{3}, no: \boxed{ 2. }", "$2$", True),
        (r"\boxed{1,200}", "1200.0", True),
        (r"\boxed{(1,2)}", "(12)", False),
        (r"\boxed{}", "", False),
        (r"\boxed{2} and then \fbox{3}", "3", True),
    ],
)
def test_the_last_box_is_compared(completion: str, answer: str, right: bool) -> None:
    assert get_task("math").grade("", completion, answer) is right


def test_solutions_end_in_a_box_and_prompts_ask_for_one() -> None:
    task = get_task("math")
    row = {"question": "One and one?", "solution": "It is 2.", "answer": "2"}
    problem = task.problem(row)
    assert problem.prompt == "One and one?" + INSTRUCTION
    assert task.problem({**row, "question": problem.prompt}).prompt == problem.prompt, "only one instruction"
    assert problem.response.endswith(r"\boxed{2}") and task.grade("", problem.response, problem.answer)
    with pytest.raises(UserError, match="answer"):
        task.problem({**row, "answer": " "})
    with pytest.raises(UserError, match="data.test"):
        task.synthetic(0, "test", 0)


@pytest.mark.parametrize("answer", ["proof", "Proof", "proof.", r"\text{proof}", "notfound", "Not found"])
def test_the_word_proof_is_no_answer(answer: str) -> None:
    with pytest.raises(UserError, match="proof"):
        get_task("math").problem({"question": "Show it.", "solution": "Clear.", "answer": answer})
    row = {"question": "Which paper is 80 percent of proof?", "solution": "It.", "answer": "waterproof"}
    assert get_task("math").problem(row).answer == "waterproof"


LONG = "3" * 5000  # Python reads no more than 4,300 digits
RUNAWAY = [
    *(LONG, f"0.{LONG}", f"{LONG} / 7", f"{LONG}%", f"#### 1{LONG}", f"\\boxed{{{LONG}}}", f"\\boxed{{0.{LONG}}}"),
    *(f"\\boxed{{{LONG}th}}", f"\\boxed{{\\frac{{{LONG}}}{{7}}}}", f"\\boxed{{0.\\overline{{{LONG}}}}}"),
]


@pytest.mark.parametrize("task", sorted(TASKS))
def test_an_answer_that_repeats_a_digit_is_wrong_and_ends_nothing(task: str) -> None:
    for completion in RUNAWAY:
        with suppress(UserError):  # of tasks whose prompts are problems
            assert not grade(task, completion, "7", "a prompt")
        assert not check(task, f"Ben has {LONG} pears. He finds 3 more. How many pears does Ben have now?", completion)


def test_a_grid_that_is_none_is_not_judged() -> None:
    given = (
        "Grid: Mia fig van ? ? ? ? / Tom is lute is attic ? ? / Ida ? ? not Rome fig cliff / Leo ? ? is mill van Rome"
    )
    answer = (
        "Pairs: Mia has the food in the city / Tom has the thing in the room / Ida has the animal in the landscape / "
        "Leo has the vehicle in the building"
    )
    assert check("grid", given, answer) is True
    swapped = answer.replace("animal", "x").replace("food", "animal").replace("x", "food")
    assert check("grid", given, swapped) is False  # Mia has neither
    linked = answer.replace("animal", "x").replace("vehicle", "animal").replace("x", "vehicle")
    assert check("grid", given, linked) is False  # Leo has no vehicle, and is not in a city
    for none in (
        given.replace("attic", "lute"),
        given.replace("is attic", "is"),
        given.replace("fig cliff", "fig fig"),
    ):
        assert check("grid", none, answer) is None
    assert check("grid", "Grid: a ? ? / " * 20_000, answer) is None  # in milliseconds
