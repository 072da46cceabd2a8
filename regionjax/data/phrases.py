"""How questions are put: several forms of each, shared by the sources whose tasks agree.

And how a short answer becomes a sentence: one form of each, so that exact match means something.

`{r}` stands for a region's mention, `{a}`, `{b}`, `{c}` for several; the other fields are words.
A checkpoint that learnt the forms here on scenes meets them again in `coco`.
"""

NAME = (
  "What is {r}?",
  "What is in {r}?",
  "Name the object in {r}.",
  "What kind of object is {r}?",
  "Tell me what {r} shows.",
  "What do you see in {r}?",
  "{r}: what is it?",
)
# Pointing without a word: a short caption is what a person who clicks wants to hear.
POINTED = ("{r}",)
CAPTION = (
  "Describe {r}.",
  "Give a short caption of {r}.",
  "Describe {r} in a few words.",
  "What does {r} look like?",
  "Write a short phrase about {r}.",
  "How would you describe {r}?",
)
ATTRIBUTE = {
  "colour": (
    "What colour is {r}?",
    "What is the colour of {r}?",
    "Which colour does {r} have?",
    "Name the colour of {r}.",
    "What color is {r}?",
    "Tell me the colour of {r}.",
  ),
  "texture": (
    "What texture does {r} have?",
    "Is {r} plain, striped, dotted or checkered?",
    "What is the texture of {r}?",
    "Name the pattern of {r}.",
    "Which pattern does {r} have?",
    "Tell me the texture of {r}.",
  ),
  "size": (
    "What size is {r}?",
    "Is {r} small, medium or large?",
    "What is the size of {r}?",
    "How large is {r}?",
    "How big is {r}?",
    "Tell me the size of {r}.",
  ),
}
READ = (
  "What is written in {r}?",
  "Read the text in {r}.",
  "What does {r} say?",
  "Which digit or word is in {r}?",
  "Read {r}.",
  "What text do you see in {r}?",
)
COMPARE = {
  "same colour": (
    "Do {a} and {b} have the same colour?",
    "Are {a} and {b} the same colour?",
    "Is the colour of {a} the same as that of {b}?",
    "Does {a} have the colour of {b}?",
    "Do {a} and {b} agree in colour?",
  ),
  "same kind": (
    "Are {a} and {b} the same kind of object?",
    "Do {a} and {b} show the same kind of object?",
    "Is {a} the same kind of object as {b}?",
    "Is the object in {a} of the same kind as {b}?",
    "Do {a} and {b} agree in kind?",
  ),
  "larger": (
    "Is {a} larger than {b}?",
    "Is {a} bigger than {b}?",
    "Comparing {a} and {b}, is the first one larger?",
    "Does {a} exceed {b} in size?",
    "Is the size of {a} greater than that of {b}?",
  ),
  "which is larger": (
    "Which is larger, {a} or {b}?",
    "Which one is bigger, {a} or {b}?",
    "Of {a} and {b}, which is the larger?",
    "Is the first or the second larger, {a} or {b}?",
    "Name the larger of {a} and {b}.",
  ),
  "left": (
    "Is {a} left of {b}?",
    "Is {a} to the left of {b}?",
    "Does {a} lie left of {b}?",
    "Is {a} further left than {b}?",
    "Is {a} on the left of {b}?",
  ),
  "above": (
    "Is {a} above {b}?",
    "Is {a} higher than {b}?",
    "Does {a} lie above {b}?",
    "Is {a} further up than {b}?",
    "Is {a} higher in the image than {b}?",
  ),
}
PICK = (
  "Which of {a}, {b} and {c} is {d}?",
  "One of {a}, {b} and {c} is {d}. Which one?",
  "Find {d} among {a}, {b} and {c}.",
  "Which is {d}: {a}, {b} or {c}?",
  "Of {a}, {b} and {c}, which is {d}?",
)
COUNT = (
  "How many {d} are in the image?",
  "How many {d} are there?",
  "Count the {d}.",
  "How many {d} do you see?",
  "What is the number of {d} in the image?",
)
YESNO = (
  "Is {r} {p}?",
  "Is it true that {r} is {p}?",
  "Would you say that {r} is {p}?",
  "Yes or no: {r} is {p}.",
  "Can you confirm that {r} is {p}?",
  "Do you agree that {r} is {p}?",
)
CHOICE = {
  "category": ("What is {r}?", "What kind of object is {r}?", "Which of these is {r}?",
               "Choose the name of {r}.", "Pick the object in {r}."),
  "colour": ("What colour is {r}?", "Which colour does {r} have?", "Choose the colour of {r}.",
             "Which of these colours is {r}?", "Pick the colour of {r}."),
  "texture": ("What texture does {r} have?", "Which pattern does {r} have?",
              "Choose the texture of {r}.", "Which of these textures has {r}?",
              "Pick the pattern of {r}."),
  "text": ("What is written in {r}?", "What does {r} say?", "Choose the text in {r}.",
           "Which of these is written in {r}?", "Pick the text in {r}."),
}  # fmt: skip
OPTIONS = "(A) {0} (B) {1} (C) {2} (D) {3}"
RATIONALE = (
  "Is {r} {p}? Answer: {y}. Why?",
  "Is {r} {p}? The answer is {y}. Choose the reason.",
  "Question: is {r} {p}? Answer: {y}. Which reason is right?",
  "Is {r} {p}? It is right to say {y}, because",
  "Why is {y} the answer to the question: is {r} {p}?",
)
LOCATE = (
  "Where is {d}?",
  "Find {d}.",
  "Locate {d} in the image.",
  "Give the box of {d}.",
  "Which box holds {d}?",
  "Show me {d}.",
)
SCENE = (
  "Describe the image.",
  "What is in the image, from left to right?",
  "List the objects from left to right.",
  "What do you see in this image?",
  "Give a caption of the whole image.",
  "What does the image show?",
)
# Follow-ups in a dialogue; 'it' is the region last spoken of.
FOLLOW = {
  "category": ("What is it?", "And what is it?", "What kind of object is it?", "Name it.",
               "What does it show?"),
  "colour": ("What colour is it?", "And its colour?", "Which colour does it have?",
             "And what colour is it?", "Name its colour."),
  "texture": ("What texture does it have?", "And its texture?", "And its pattern?",
              "Is it plain, striped, dotted or checkered?", "Name its texture."),
  "size": ("What size is it?", "And its size?", "How large is it?",
           "Is it small, medium or large?", "And how big is it?"),
  "text": ("What does it say?", "Read it.", "What is written in it?", "And what does it say?",
           "Which digit or word is it?"),
}  # fmt: skip
SAME_OF = ("And {r}?", "What about {r}?", "And what about {r}?", "Now {r}.", "The same for {r}?")
# What is asked about an object, and the sentence that answers it.
SENTENCES = {
  "category": "It is {p}.",
  "colour": "It is {a}.",
  "texture": "It is {a}.",
  "size": "It is {a}.",
  "text": "It says {a}.",
  "caption": "It is {a}.",
  "which": "It is the {a} one.",
  "which is larger": "The {a} one is larger.",
  "box": "It is at {a}.",
  "objects": "The image shows {a}.",
}
# Relations of two regions: yes, no.
RELATED = {
  "same colour": ("Yes, they have the same colour.", "No, their colours differ."),
  "same kind": ("Yes, they are of the same kind.", "No, their kinds differ."),
  "larger": ("Yes, it is larger.", "No, it is smaller."),
  "left": ("Yes, it is further left.", "No, it is further right."),
  "above": ("Yes, it is higher.", "No, it is lower."),
}
AGREED = ("Yes, it is.", "No, it is not.")


def with_article(noun: str) -> str:
  """`a star`, `an orange moon`."""
  return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def sentence(about: str, answer: str) -> str:
  """A short answer as a sentence; a letter, which only points at an option, stays as it is.

  Args:
    about: what is asked, as a source notes it: an aspect, a relation, 'number', 'box' and so on.
    answer: the short answer.
  """
  if answer.startswith("("):
    return answer
  if answer in ("yes", "no"):
    return RELATED.get(about, AGREED)[answer == "no"]
  if about == "number":
    return f"There {'is' if answer == '1' else 'are'} {answer}."
  return SENTENCES[about].format(a=answer, p=with_article(answer))
