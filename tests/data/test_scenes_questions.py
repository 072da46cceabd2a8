"""Questions about scenes: right answers, many forms, and nothing to be had without the region."""

from __future__ import annotations

import collections
import re

import numpy as np
import pytest

from regionjax.data import phrases
from regionjax.data import scenes_world as world
from regionjax.data.scenes import make_scene
from regionjax.data.scenes_dialogue import TASKS, WEIGHTS
from regionjax.data.sources.scenes import ScenesSource

N = 240
SINGLE = ("name", "attribute", "caption", "read", "yesno", "choice", "rationale")


@pytest.fixture(scope="module")
def asked():
  """task -> examples with one question each, by mask, so that the object is known for certain."""
  sources = {t: ScenesSource("test", tasks=[t], references=("mask",), turns=1) for t in TASKS}
  examples = [{task: source[i] for task, source in sources.items()} for i in range(N)]
  return {task: [one[task] for one in examples] for task in TASKS}


def _scene(example):
  split, seed, index = example.images[0].key.split("/")
  return make_scene(split, int(seed), int(index))


def _objects(example):
  """The object behind each region."""
  scene = _scene(example)
  found = []
  for region in example.regions:
    mask = region.rasterize(scene.side, scene.side)
    k = int(np.bincount(scene.owner[mask] + 1).argmax()) - 1
    assert (scene.visible(k) == mask).all()
    found.append(scene.things[k])
  return found


def _caption(t):
  return " ".join(["a", t.size, t.colour] + [t.texture] * (t.texture != "plain") + [t.category])


def _fits(thing, words):
  """Whether a description such as `a large red star`, `red object`, `plain` fits an object."""
  words = set(words.split()) - {"a", "an", "the", "object", "it", "is"}
  return words <= {thing.size, thing.colour, thing.texture, thing.category}


def _options(question):
  return re.search(r"\(A\) (.+) \(B\) (.+) \(C\) (.+) \(D\) (.+?)$", question).groups()


def test_every_task_is_there(asked):
  assert set(TASKS) == set(WEIGHTS)
  for task, examples in asked.items():
    for example in examples:
      assert example.meta["task"] == task
      assert all(turn.task == task for turn in example.turns if turn.role == "assistant")


@pytest.mark.parametrize("task", list(TASKS))
def test_questions_have_many_forms(task, asked):
  """At least five ways of asking each thing; all of them are met."""
  words = "|".join(sorted({*world.CATEGORIES, *world.COLOURS, *world.SIZES, *world.TEXTURES}))
  forms = collections.defaultdict(set)
  for example in asked[task]:
    question = re.sub(r"\(A\).*", "", example.turns[0].text)
    about = example.meta["turns"][0]["about"]
    if task in ("choice", "attribute", "compare"):
      question = f"{about}: {question}"
    forms[task].add(re.sub(rf"\b(an?|the|{words}|objects?|yes|no)s?\b ?", "", question))
  assert len(forms[task]) >= 5
  tables = [phrases.ATTRIBUTE, phrases.COMPARE, phrases.CHOICE, phrases.FOLLOW]
  assert all(len(set(forms)) >= 5 for table in tables for forms in table.values())


@pytest.mark.parametrize("task", SINGLE)
def test_answers_about_one_region_are_right(task, asked):
  for example in asked[task]:
    (thing,) = _objects(example)
    question, answer = (turn.text for turn in example.turns)
    about = example.meta["turns"][0]["about"]
    if task in ("name", "attribute", "read"):
      assert answer == getattr(thing, about)
    elif task == "caption":
      assert answer == _caption(thing)
    elif task == "yesno":
      claim = re.search(r"\{region:0\} is (.+?)[.?]|Is \{region:0\} (.+?)\?", question)
      assert answer == ("yes" if _fits(thing, claim[1] or claim[2]) else "no")
    else:
      options = _options(question)
      right = options["ABCD".index(answer[1])]
      assert example.choices == options and example.answer == "ABCD".index(answer[1])
      expected = getattr(thing, about) if task == "choice" else f"it is {_caption(thing)}"
      assert right == expected and len(set(options)) == 4


def test_reasons_all_agree_with_the_answer_given(asked):
  """Else the wrong reasons could be told from the text alone."""
  for example in asked["rationale"]:
    question = example.turns[0].text
    claim = re.search(r"[Ii]s \{region:0\} (.+?)\?", question)[1]
    given = re.search(r"\b(yes|no)\b", question)[1]
    wanted = set(claim.split()) - {"a", "an"}
    for option in _options(question):
      plain = not set(option.split()) & set(world.TEXTURES)
      words = set(option.split()) | ({"plain"} if plain else set())
      assert (wanted <= words) == (given == "yes")


def test_comparisons_are_right(asked):
  for example in asked["compare"]:
    one, two = _objects(example)
    mentioned = re.findall(r"\{region:(\d)\}", example.turns[0].text)
    assert mentioned == ["0", "1"]
    scene, about, answer = _scene(example), example.meta["turns"][0]["about"], example.turns[1].text
    i, j = (next(k for k, t in enumerate(scene.things) if t is o) for o in (one, two))
    rank = world.SIZE_RANK
    truth = {
      "same colour": one.colour == two.colour,
      "same kind": one.category == two.category,
      "larger": rank[one.size] > rank[two.size],
      "which is larger": rank[one.size] > rank[two.size],
      "left": scene.centre(i)[0] < scene.centre(j)[0],
      "above": scene.centre(i)[1] < scene.centre(j)[1],
    }[about]
    yes, no = ("first", "second") if about == "which is larger" else ("yes", "no")
    assert answer == (yes if truth else no)


def test_picked_regions_are_the_only_fit(asked):
  for example in asked["pick"]:
    question, answer = (turn.text for turn in example.turns)
    text = re.sub(r"\{region:\d\}", "", question)
    described = re.search(rf".*\bthe ((?:\w+ )*?(?:{'|'.join(world.CATEGORIES)}|object))\b", text)[
      1
    ]
    order = [int(k) for k in re.findall(r"\{region:(\d)\}", question)]
    things = _objects(example)
    fits = [_fits(things[k], described) for k in order]
    assert fits.count(True) == 1
    assert answer == ("first", "second", "third")[fits.index(True)]


def test_counts_are_right(asked):
  singular = {plural: one for one, plural in world.PLURALS.items()}
  for example in asked["count"]:
    question, answer = (turn.text for turn in example.turns)
    noun = rf"((?:\w+ )?(?:{'|'.join(singular)}|objects))\b"
    text = re.sub(r"^(How many|Count the|What is the number of) ", "", question)
    phrase = re.match(noun, text)[1]
    words = " ".join(singular.get(w, w) for w in phrase.split() if w != "objects")
    assert answer == str(sum(_fits(t, words) for t in _scene(example).things))


def test_located_boxes_hold_the_only_fit(asked):
  for example in asked["locate"]:
    question, answer = (turn.text for turn in example.turns)
    assert answer == "{region:0}" and "region" not in question
    described = re.search(
      rf".*\bthe ((?:\w+ )*?(?:{'|'.join(world.CATEGORIES)}|object))\b", question
    )[1]
    scene = _scene(example)
    fits = [k for k, t in enumerate(scene.things) if _fits(t, described)]
    assert len(fits) == 1 and example.regions[0].kind == "box"
    assert example.regions[0].box_xyxy == scene.box(fits[0])


def test_scene_captions_list_everything_from_left_to_right(asked):
  for example in asked["scene"]:
    listed = re.split(", | and ", example.turns[1].text)
    scene = _scene(example)
    assert len(listed) == len(scene.things)
    left = sorted(range(len(listed)), key=scene.centre)
    assert [text.split()[1:] for text in listed] == [
      [scene.things[k].colour, scene.things[k].category] for k in left
    ]


def test_dialogues_build_on_what_was_said(asked):
  openers = collections.Counter()
  for example in asked["dialogue"]:
    answers = example.turns[1::2]
    notes = example.meta["turns"]
    assert 1 <= len(answers) <= 4
    assert [n["region_dependent"] for n in notes] == [True] + [False] * (len(notes) - 1)
    objects = _objects(example)
    it = None
    for turn, reply, note in zip(example.turns[::2], answers, notes):
      mentioned = re.findall(r"\{region:(\d+)\}", turn.text)
      if note["about"] in ("category", "colour", "texture", "size", "text"):
        it = objects[int(mentioned[0])] if mentioned else it
        assert reply.text == getattr(it, note["about"])
    openers[len(answers)] += 1
  assert sum(n for length, n in openers.items() if length > 1) > 0.8 * N


@pytest.mark.parametrize("task", [*SINGLE, "compare", "pick"])  # those that depend on the region
def test_nothing_beats_a_random_object_without_the_region(task, asked):
  """Who knows the scene and the question but not the region: guesses the commonest answer.

  Its expected score must not exceed that of answering for a random object by more than chance.
  """
  best, random = [], []
  for example in asked[task]:
    note = example.meta["turns"][0]
    assert note["region_dependent"]
    answer = example.turns[1].text
    candidates = collections.Counter([answer, *note["scene_answers"]])
    assert note["chance"] == pytest.approx(candidates[answer] / candidates.total())
    top = max(candidates.values())
    modes = [a for a, n in candidates.items() if n == top]
    best.append((answer in modes) / len(modes))
    random.append(note["chance"])
  # Standard error of the first mean is 0.03 with 240 questions.
  assert np.mean(best) <= 1.1 * np.mean(random) + 0.06


@pytest.mark.parametrize("task", ["yesno", "choice", "rationale", "pick", "compare"])
def test_closed_answers_are_balanced(task, asked):
  counts = collections.Counter(example.turns[1].text for example in asked[task])
  if task == "compare":
    counts.pop("first"), counts.pop("second")
  expected = counts.total() / len(counts)
  assert max(abs(n - expected) for n in counts.values()) < 4 * np.sqrt(expected)


def test_whole_image_questions_claim_no_region(asked):
  for task in ("count", "scene", "locate"):
    for example in asked[task]:
      note = example.meta["turns"][0]
      assert note["region_dependent"] is False and note["chance"] is None and note["ref"] == "none"


def test_held_out_questions_are_about_held_out_pairs():
  source = ScenesSource("heldout_pairs", tasks=["name", "attribute", "caption"],
                        references=("mask",), turns=1)  # fmt: skip
  for i in range(60):
    (thing,) = _objects(source[i])
    assert (thing.category, thing.colour) in world.HELD_OUT


def test_answers_use_a_small_vocabulary(asked):
  words = collections.Counter(
    word.strip(",") for task, examples in asked.items() if task != "read"
    for example in examples for turn in example.turns[1::2] for word in turn.text.split()
  )  # fmt: skip
  looks = {*world.CATEGORIES, *world.COLOURS, *world.SIZES, *world.TEXTURES}
  closed = {"yes", "no", "first", "second", "third", "(A)", "(B)", "(C)", "(D)", *"0123456789"}
  known = looks | closed | set(world.WORDS) | {"a", "an", "and", "{region:0}"}
  assert set(words) <= known
